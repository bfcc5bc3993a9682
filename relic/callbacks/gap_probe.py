"""Measure the gap between plain video and actions: how much of the prior is kept, how actions are obeyed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from relic.callbacks.undisturbed import undisturbed
from relic.data.datamodule import WorldDataModule
from relic.ops.actions import exchange_actions
from relic.types import Batch, ClipSpec

__all__ = ["GapProbe", "HeldOut", "Probed"]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Where clips that no one trains on are read.

    Args:
        root: Folder or fsspec URL of a dataset of latents; its validation scenes are read.
        validation_scenes: Scenes held out for validation, as in the run that trains on this dataset.
        evaluation_scenes: Scenes held out for evaluation, likewise.
    """

    root: str
    validation_scenes: int = 2
    evaluation_scenes: int = 2

    def __post_init__(self) -> None:
        if self.validation_scenes < 1:
            raise ValueError(
                f"validation_scenes={self.validation_scenes} of {self.root} must be at least 1: "
                "the probe reads scenes that no one trains on."
            )


@runtime_checkable
class Probed(Protocol):
    """What a module offers to be probed; `TeacherExtension` does."""

    clip: ClipSpec
    vae_path: str | None

    def bucket_losses(
        self,
        batch: Batch,
        *,
        control: Literal["actions", "none"],
        first_latent: Literal["clean", "noised", "unscored"],
        rope: Literal["own", "plain"],
    ) -> dict[str, Tensor]:
        """Return the averaged network's mean loss over a batch by range of sigma, from noise that depends on
        the samples' keys alone.
        """


class GapProbe(Callback):
    """Log at step 0 and on validation what tuning on actions gives and what it costs.

    All of it is flow-matching loss of the averaged weights on held-out latents, over equal ranges of sigma,
    from the same noise at every step and on any number of ranks. Each of the three losses is also logged by
    range, e.g. `gap/prior_loss_sigma_0.50-0.75`.

    | name | what it is |
    |---|---|
    | `gap/prior_loss` | on plain video, without controls |
    | `gap/prior_loss_start` | the same at step 0, of the weights training started from |
    | `gap/prior_kept` | prior_loss_start / prior_loss: 1 at step 0, less if the prior is forgotten |
    | `gap/control_true` | on action clips, with their own actions |
    | `gap/control_shuffled` | on the same clips, with the actions of another one of similar mean speed |
    | `gap/control_gain` | 1 − control_true / control_shuffled: 0 if actions are ignored |

    At step 0 only, on plain video without controls, over all latents but the first (it is part of the gap
    what a network is asked to bear before it learns anything):

    | name | what it is |
    |---|---|
    | `gap/step0_base` | first latent noised like the others, no YaRN (factor 1) |
    | `gap/step0_clean_first` | what is added by a clean first latent at sigma 0, alone |
    | `gap/step0_yarn` | what is added by this network's YaRN factor, alone |

    `history` holds every measurement with its step.

    Args:
        plain: Plain video, as the prior was trained on.
        actions: Clips with actions.
        num_clips: Clips read of each; even, and a multiple of the number of ranks.
        batch: Clips measured at a time on each rank.
        first_latent: How the prior was trained: `noised` for text-to-video (public models), `clean` for a
            network that continues an image.
        every_n_validations: Measure after every n-th validation only; the others log the last values again.
        words: Length of the text in word ids, as in the data module.
        seed: Seed of the windows and of the noise.

    Raises:
        ValueError: If a setting is out of range.
        TypeError: In `setup`, if the module cannot be probed.
        RuntimeError: If a run is resumed from a checkpoint that was written without this probe.
    """

    def __init__(
        self,
        plain: HeldOut,
        actions: HeldOut,
        *,
        num_clips: int = 32,
        batch: int = 8,
        first_latent: Literal["clean", "noised"] = "noised",
        every_n_validations: int = 1,
        words: int = 32,
        seed: int = 0,
    ) -> None:
        for name, count in (("batch", batch), ("every_n_validations", every_n_validations)):
            if count < 1:
                raise ValueError(f"{name}={count} must be at least 1.")
        if num_clips < 2 or num_clips % 2:
            raise ValueError(
                f"num_clips={num_clips} must be even and at least 2: clips exchange actions in pairs; "
                f"use {max(2, num_clips + 1)}."
            )
        self.plain, self.actions = plain, actions
        self.num_clips, self.batch, self.words, self.seed = num_clips, batch, words, seed
        self.first_latent: Literal["clean", "noised"] = first_latent
        self.every_n_validations = every_n_validations
        self.validations = 0
        self.history: list[dict[str, float]] = []
        self._clips: dict[str, Batch] = {}

    # -- reading ---------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, Probed):
            raise TypeError(
                "GapProbe needs a module with clip, vae_path and bucket_losses(batch, control=, "
                f"first_latent=, rope=), such as TeacherExtension; {type(pl_module).__name__} lacks some."
            )
        if self.num_clips % trainer.world_size:
            raise ValueError(
                f"num_clips={self.num_clips} cannot be shared by {trainer.world_size} ranks; take a multiple."
            )
        if not self._clips:
            steered = self._read(self.actions, pl_module)
            shuffled = steered._replace(actions=exchange_actions(steered.actions))
            alike = int((shuffled.actions == steered.actions).flatten(1).all(1).sum())
            if alike:
                raise ValueError(
                    f"{alike} of the {self.num_clips} action clips would get their own actions back: "
                    f"{self.actions.root} holds too few different windows in its validation scenes; lower "
                    "num_clips, or hold more scenes out."
                )
            self._clips = {
                "plain": self._read(self.plain, pl_module), "true": steered, "shuffled": shuffled
            }  # fmt: skip

    def _read(self, held: HeldOut, module: Probed) -> Batch:
        """Return fixed windows of the held-out scenes as one batch, on the CPU."""
        data = WorldDataModule(
            root=held.root, clip=module.clip, content="latents", global_batch=self.batch, workers=0,
            seed=self.seed, validation_scenes=held.validation_scenes, vae=module.vae_path, words=self.words,
            evaluation_scenes=held.evaluation_scenes, validation_windows=self.num_clips,
        )  # fmt: skip
        data.setup("validate")
        columns = zip(*data.val_dataloader(), strict=True)
        joined: list[Any] = [None if column[0] is None else torch.cat(column) for column in columns]
        return Batch(*joined)

    # -- when ------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step:
            if not self.history:
                raise RuntimeError(
                    f"GapProbe measures the start, but this run goes on at step {trainer.global_step} from a "
                    "checkpoint without its measurements: resume without the probe, or begin anew with it."
                )
            return
        self.validations, self.history = 0, []
        with undisturbed(pl_module), trainer.precision_plugin.forward_context():
            values = self.measure(trainer, pl_module) | self.measure_start(trainer, pl_module)
        self._record(values, step=0)
        for logger in trainer.loggers:
            logger.log_metrics(self.history[0], step=0)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self.validations += 1
        if self.validations % self.every_n_validations == 0:
            with undisturbed(pl_module), trainer.precision_plugin.forward_context():
                self._record(self.measure(trainer, pl_module), step=trainer.global_step)
        for name, value in self.history[-1].items():
            if name.startswith("gap/") and not name.startswith("gap/step0"):
                pl_module.log(name, value, sync_dist=True)  # equal on all ranks already

    def _record(self, values: Mapping[str, float], *, step: int) -> None:
        start = self.history[0]["gap/prior_loss_start"] if self.history else values["gap/prior_loss"]
        kept = start / values["gap/prior_loss"]
        prior = {"gap/prior_loss_start": start, "gap/prior_kept": kept}
        self.history.append({"step": step, **values, **prior})

    # -- what ------------------------------------------------------------------------------------------------

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Return the losses and the gain, as they are now."""
        found = {
            "gap/prior_loss": self._losses(trainer, pl_module, "plain", first_latent=self.first_latent),
            "gap/control_true": self._losses(trainer, pl_module, "true", control="actions"),
            "gap/control_shuffled": self._losses(trainer, pl_module, "shuffled", control="actions"),
        }
        values = {name: _mean(losses) for name, losses in found.items()}
        for name, losses in found.items():
            values |= {f"{name}_sigma_{bucket}": loss for bucket, loss in losses.items()}
        values["gap/control_gain"] = 1 - values["gap/control_true"] / values["gap/control_shuffled"]
        return values

    def measure_start(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Return what the clean first latent and YaRN cost, each alone."""
        base = _mean(self._losses(trainer, pl_module, "plain", first_latent="unscored", rope="plain"))
        clean = _mean(self._losses(trainer, pl_module, "plain", first_latent="clean", rope="plain"))
        yarn = _mean(self._losses(trainer, pl_module, "plain", first_latent="unscored", rope="own"))
        return {
            "gap/step0_base": base, "gap/step0_clean_first": clean - base, "gap/step0_yarn": yarn - base
        }  # fmt: skip

    def _losses(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        clips: Literal["plain", "true", "shuffled"],
        *,
        control: Literal["actions", "none"] = "none",
        first_latent: Literal["clean", "noised", "unscored"] = "clean",
        rope: Literal["own", "plain"] = "own",
    ) -> dict[str, float]:
        """Return the mean loss over all clips by range of sigma; ranks share the work."""
        assert isinstance(pl_module, Probed)
        mine = list(range(trainer.global_rank, self.num_clips, trainer.world_size))
        totals: dict[str, Tensor] = {}
        for first in range(0, len(mine), self.batch):
            rows = mine[first : first + self.batch]
            part: list[Any] = [
                None if column is None else column[rows].to(pl_module.device) for column in self._clips[clips]
            ]
            losses = pl_module.bucket_losses(
                Batch(*part), control=control, first_latent=first_latent, rope=rope
            )
            for bucket, loss in losses.items():
                total = totals.get(bucket, torch.zeros((), device=loss.device))
                totals[bucket] = total + loss.float() * len(rows)
        summed = trainer.strategy.reduce(torch.stack(list(totals.values())), reduce_op="sum")
        return dict(zip(totals, (summed / self.num_clips).tolist(), strict=True))

    # -- resuming --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations, "history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations, self.history = state_dict["validations"], list(state_dict["history"])


def _mean(losses: Mapping[str, float]) -> float:
    return sum(losses.values()) / len(losses)
