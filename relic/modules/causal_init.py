"""Causal initialisation: a teacher becomes a few-step causal student, by regression (paper §4.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from einops import repeat
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from relic.modules.base import adamw
from relic.modules.student import StudentModule
from relic.nn.checkpoints import WeightsSource
from relic.nn.denoiser import Denoiser
from relic.nn.dit import DiTConfig
from relic.nn.forcing import forced_velocity
from relic.nn.student import FewSteps
from relic.nn.text import WordTableConfig
from relic.ops.actions import controls_of
from relic.ops.flow import add_noise, x0_of
from relic.ops.losses import ode_regression_loss
from relic.ops.masks import FORCINGS, Forcing
from relic.ops.randomness import derive_seed
from relic.ops.retention import AnyPolicy, Compressed, block_range, block_that_ends
from relic.ops.video import psnr, to_uint8
from relic.parallel import Compute
from relic.rollout import KeyedNoise
from relic.types import TIME_STRIDE, Batch, ClipSpec, Controls, latents_of

__all__ = ["CausalInit", "SaysLevels"]

BASE_LATENTS = 21  # that positions of the base model were trained on


@runtime_checkable
class SaysLevels(Protocol):
    """A data module that knows at which noise levels the states of its trajectories lie."""

    @property
    def levels(self) -> tuple[float, ...] | None: ...


class Given(NamedTuple):
    """What is presented of a batch: tensors alone, so that a step computed from it can be recorded.

    noisy, sigma: states (b, t, c, h, w) and their levels (b, t); scored: (b, t), 0 where a solution was given
    its latent; clean, clean_sigma: (b, t', c, h, w) and (b, t'), what generation would have cached; end: (b,
    t, c, h, w), what the noisy ones lead to; text, controls: of the clip.
    """

    noisy: Tensor
    sigma: Tensor
    scored: Tensor
    clean: Tensor
    clean_sigma: Tensor
    end: Tensor
    text: Tensor
    controls: Controls


class CausalInit(StudentModule):
    """Fit a causal student to predict clean latents, at the noise levels at which it denoises.

    Batches hold trajectories, as `relic ode-pairs` writes them: states of a teacher's ODE solutions at the
    student's noise levels and their clean end, which it learns from any of them (ODE regression, as in the
    paper). Or they hold true clips (`data.content: latents`), whose states are noised: the student is then a
    causal diffusion model of the data, for `SelfForcing` to distil, and what it is to remember is true. Of
    each batch the first B blocks are used, with `teacher` all that the clip has, else B
    uniform over them. `hybrid` presents the last `noisy_blocks` of them as states, each block at a level of
    its own, and those before as the memory would hold them: the clean end, at the noise level that generation
    caches. Gradients pass through the keys and values of these clean blocks, so that writing the memory is
    learned with reading it. `diffusion` has only noisy blocks after the image; `teacher` has every block
    noisy, each with its past clean. Latents that a solution was given, and not only the image, are context
    and out of the loss.

    Args:
        net: Sizes of the DiT, the teacher's, with the YaRN factor of its longest horizon: the student keeps
            it at every length.
        clip: Shape of the clips; linked from `data.clip` on the command line.
        words: Trained word table for small worlds; null if batches carry prompt embeddings.
        vae: Weights of the autoencoder (safetensors); needed to fit on video, and to sample.
        init: The teacher's file, or that of a student that goes on, with another memory, say; null starts
            fresh.
        policy: What the memory keeps.
        sampler: Denoising steps, whose levels the trajectories must have, and what is committed.
        forcing: What the blocks before a noisy one are: `hybrid`, `teacher` or `diffusion`.
        noisy_blocks: Noisy blocks at the end of the clip, with `hybrid` forcing.
        rollout_blocks: Validation also generates so many blocks and measures their PSNR against the
            clean ends, both decoded; 0 for none.
        compute: Activation checkpointing and compilation of the blocks.
        cuda_graphs: Record forward and backward pass as a CUDA graph, one for each number of blocks, and
            replay it: for small networks, whose passes take longer to launch than to run. For one GPU.
        optimizer: The optimiser.
        warmup_steps: Steps over which the learning rate rises from zero.
        ema_decay: Decay of the moving average of the weights; null for none.
        seed: Seed of block counts, levels and noise.

    Raises:
        ValueError: If a setting is out of range, or sizes don't fit each other.
    """

    stage: ClassVar[str] = "causal_init"
    starts_from: ClassVar[Sequence[str]] = ("teacher", "student")

    def __init__(
        self,
        *,
        net: DiTConfig,
        clip: ClipSpec,
        words: WordTableConfig | None = None,
        vae: str | None = None,
        init: WeightsSource | None = None,
        policy: AnyPolicy = Compressed(),  # noqa: B008 - frozen
        sampler: FewSteps = FewSteps(),  # noqa: B008 - frozen
        forcing: Literal["teacher", "diffusion", "hybrid"] = "hybrid",
        noisy_blocks: int = 2,
        rollout_blocks: int = 0,
        compute: Compute = Compute(),  # noqa: B008 - frozen
        cuda_graphs: bool = False,
        optimizer: OptimizerCallable = adamw,
        warmup_steps: int = 0,
        ema_decay: float | None = 0.99,
        seed: int = 0,
    ) -> None:
        super().__init__(
            net=net, clip=clip, words=words, vae=vae, policy=policy, sampler=sampler, compute=compute,
            cuda_graphs=cuda_graphs, init=init, optimizer=optimizer, warmup_steps=warmup_steps,
            ema_decay=ema_decay, seed=seed,
        )  # fmt: skip
        if forcing not in FORCINGS:
            raise ValueError(f"forcing={forcing!r} must be one of {', '.join(FORCINGS)}.")
        if noisy_blocks < 1:
            raise ValueError(
                f"noisy_blocks={noisy_blocks} must be at least 1; what is clean teaches nothing."
            )
        longest = latents_of(clip.max_frames)
        blocks = block_that_ends(longest, block_latents=clip.block_latents)
        if not 0 <= rollout_blocks <= blocks:
            raise ValueError(f"rollout_blocks={rollout_blocks} must be between 0 and the clip's {blocks}.")
        if net.rope_factor * BASE_LATENTS < longest - 1e-6:
            raise ValueError(
                f"net.rope_factor={net.rope_factor} is that of {net.rope_factor * BASE_LATENTS:g} latents, "
                f"but the longest horizon has {longest}: start from the teacher of that horizon, with the "
                f"factor {longest / BASE_LATENTS}, or shorten clip.horizons."
            )
        self.forcing: Forcing = forcing
        self.noisy_blocks, self.rollout_blocks = noisy_blocks, rollout_blocks

    def setup(self, stage: str) -> None:
        super().setup(stage)
        source = getattr(self.trainer, "datamodule", None)
        if isinstance(source, SaysLevels) and source.levels is not None:  # a foreign one need not
            self.check_levels(source.levels)

    def check_levels(self, levels: tuple[float, ...]) -> None:
        """Compare the noise levels of trajectories with the student's.

        Raises:
            ValueError: If they differ.
        """
        own = self.student.sampler.levels
        if len(levels) != len(own) or any(abs(a - b) > 1e-6 for a, b in zip(levels, own, strict=True)):
            found, needed = (", ".join(f"{level:.4f}" for level in each) for each in (levels, own))
            raise ValueError(
                f"The trajectories have states at the levels {found}; the student denoises at {needed} "
                f"(steps={self.student.sampler.steps}, shift={self.student.sampler.shift:g}). Set "
                "model.init_args.sampler to theirs, or make them again (relic ode-pairs --student_steps, "
                "--shift)."
            )

    # -- loss ------------------------------------------------------------------------------------------------

    def blocks_of(self, batch: Batch) -> int:
        """Return how many blocks there are after the image in the clips of a batch."""
        return block_that_ends(latents_of(batch.actions.shape[1]), block_latents=self.clip.block_latents)

    def drawn_blocks(self, batch: Batch) -> int:
        """Return how many blocks of this training batch are used: uniform over what there is, and a function
        of seed and batch index alone, so that all ranks agree. `teacher` holds every shorter clip already.
        """
        if self.forcing == "teacher":
            return self.blocks_of(batch)
        return 1 + derive_seed(self.seed, self.stage, "blocks", self.batch_index) % self.blocks_of(batch)

    def drawn_levels(self, batch: Batch) -> Tensor:
        """Return the number of the level of each block (b, blocks), a function of the sample alone."""
        draws = self.uniform(batch.key, "levels", size=(self.blocks_of(batch),))
        return (draws * self.student.sampler.steps).long().clamp(max=self.student.sampler.steps - 1)

    def given(self, batch: Batch, *, blocks: int, steps: Tensor) -> Given:
        """Return what is presented of a batch.

        blocks: how many of the clip are used. steps: (b, blocks or more), the number of the level of each
        block; those of clean blocks are not used.

        Raises:
            ValueError: If the trajectories of the batch have another number of states than the student has
                levels.
        """
        size = self.clip.block_latents
        total = block_range(blocks, block_latents=size).stop
        clean = self._clean_blocks(blocks)
        start = 1 if self.forcing == "teacher" else block_range(clean, block_latents=size).stop
        whole = self._ends(batch)
        of_latents = repeat(steps[:, :blocks], "b n -> b (n t)", t=size)[:, start - 1 :]
        sigma = torch.tensor(self.student.sampler.levels, device=whole.device)[of_latents]
        if batch.trajectory is None:  # noise of the whole clip: a sample's does not depend on what is used
            noise = self.normal(batch.key, "states", like=whole)
            noisy = add_noise(whole[:, start:total], noise[:, start:total], sigma=sigma)
        else:
            rows = torch.arange(len(steps), device=whole.device)[:, None]
            noisy = batch.trajectory[
                rows, of_latents, torch.arange(start, total, device=whole.device)
            ].float()
        end = whole[:, :total]
        held, held_sigma = self._context(end, batch.key)
        scored = self._scored(batch)[:, start:total]
        kept = block_range(clean, block_latents=size).stop
        return Given(
            noisy=torch.where(scored[..., None, None, None], noisy, held[:, start:]),
            sigma=torch.where(scored, sigma, held_sigma[:, start:]), scored=scored.float(),
            clean=held[:, :kept], clean_sigma=held_sigma[:, :kept], end=end[:, start:], text=batch.text,
            controls=controls_of(batch.actions[:, : 1 + TIME_STRIDE * (total - 1)]),
        )  # fmt: skip

    def regression_loss(self, net: Denoiser, given: Given) -> Tensor:
        """Return the mean squared error of x0 over the noisy latents that are scored, per sample (b,)."""
        velocity = forced_velocity(
            net, given.noisy, clean=given.clean, sigma=given.sigma, clean_sigma=given.clean_sigma,
            text=given.text, controls=given.controls, plan=self.plan, forcing=self.forcing,
        )  # fmt: skip
        x0 = x0_of(given.noisy, velocity, sigma=given.sigma)
        return ode_regression_loss(x0, given.end, weight=given.scored)

    def _ends(self, batch: Batch) -> Tensor:
        """Return the clean latents (b, t, c, h, w) that are to be predicted."""
        needed = self.student.sampler.steps + 1
        if batch.trajectory is not None and batch.trajectory.shape[1] != needed:
            raise ValueError(
                f"The student's {needed - 1} steps need trajectories of {needed} states, the last one clean; "
                f"the batch has {batch.trajectory.shape[1]}. Make them with relic ode-pairs."
            )
        return self.clean_latents(batch)

    def _scored(self, batch: Batch) -> Tensor:
        """Return which latents (b, t) of a batch are to be predicted: all but the image, or what a solution
        was given.
        """
        if batch.trajectory is not None:
            return solved(batch.trajectory)
        times = torch.arange(latents_of(batch.actions.shape[1]), device=batch.actions.device)
        return (times > 0).expand(len(batch.key), -1)

    def _clean_blocks(self, blocks: int) -> int:
        """Return how many blocks after the image are presented clean."""
        return {"teacher": blocks - 1, "diffusion": 0, "hybrid": max(0, blocks - self.noisy_blocks)}[
            self.forcing
        ]

    def _context(self, end: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return latents as generation caches them, and their noise levels (b, t)."""
        sigma = torch.full(end.shape[:2], self.student.sampler.context_level, device=end.device)
        sigma[:, 0] = 0.0  # the image always is clean
        if self.student.sampler.context_level:
            # drawn for the whole clip: what a sample gets does not depend on how much of it is used
            end = add_noise(end, self.normal(key, "context", like=end), sigma=sigma)
        return end, sigma

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if not isinstance(batch, Batch):
            raise ValueError("Causal init takes no plain video, which has no actions: unset data.plain.")
        given = self.given(batch, blocks=self.drawn_blocks(batch), steps=self.drawn_levels(batch))
        if self.recorder is None:
            loss = _mean(self.regression_loss(self.trained, given), given)
        else:  # with its backward pass, so that the one to come finds nothing behind the loss
            loss = self.recorder.of(self.learn)(given, parts=self.trainer.accumulate_grad_batches)
            loss = loss.clone().requires_grad_()
        self.log("train/loss_ode", loss.detach(), prog_bar=True, batch_size=len(batch.key))
        return loss

    def learn(self, given: Given, *, parts: int) -> Tensor:
        """Leave the gradients of a batch, one of `parts` that make a step; return its loss."""
        loss = _mean(self.regression_loss(self.trained, given), given)
        (loss / parts).backward()
        return loss.detach()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.recorder is not None:  # recordings add to gradients where they are
            torch._foreach_zero_([p.grad for p in self.trained.parameters() if p.grad is not None])

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        if self.recorder is None:  # else this comes between the gradients and their step
            super().optimizer_zero_grad(*args, **kwargs)

    # -- validation ------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses = self.level_losses(batch)
        count = len(batch.key)
        for level, loss in losses.items():
            self.log(f"val/loss_ode_sigma_{level}", loss, sync_dist=True, batch_size=count)
        mean = torch.stack(list(losses.values())).mean()
        self.log("val/loss_ode", mean, prog_bar=True, sync_dist=True, batch_size=count)
        if self.rollout_blocks:
            self.log("val/psnr_rollout", self.rollout_psnr(batch), sync_dist=True, batch_size=count)

    test_step = validation_step

    @torch.no_grad()
    def level_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the averaged network's loss over whole clips with all noisy blocks at one level, keyed
        "0.938" and so on.
        """
        blocks, losses = self.blocks_of(batch), {}
        for number, level in enumerate(self.student.sampler.levels):
            steps = torch.full((len(batch.key), blocks), number, device=batch.actions.device)
            given = self.given(batch, blocks=blocks, steps=steps)
            losses[f"{level:.3f}"] = _mean(self.regression_loss(self.averaged, given), given)
        return losses

    @torch.no_grad()
    def rollout_psnr(self, batch: Batch) -> Tensor:
        """Return the PSNR (dB) of the first `rollout_blocks` blocks generated after what a solution was given
        (fewer where the clip ends) against the clean end, both decoded.
        """
        size = self.clip.block_latents
        known = (~self._scored(batch)).sum(1).clamp(min=1)
        known = 1 + (known - 1) // size * size  # the image and whole blocks
        scores = []
        for count in known.unique().tolist():
            rows = (known == count).nonzero()[:, 0]
            part = Batch(*(None if x is None else x[rows.to(x.device)] for x in batch))  # type: ignore[arg-type]
            scores.append(self._rollout_psnr(part, known=count))
        return torch.cat(scores).mean()

    def _rollout_psnr(self, batch: Batch, *, known: int) -> Tensor:
        latents = min(
            known + self.rollout_blocks * self.clip.block_latents, latents_of(batch.actions.shape[1])
        )
        truth = self.clean_latents(batch)[:, :latents]
        actions = batch.actions[:, : 1 + TIME_STRIDE * (latents - 1)]
        noise = KeyedNoise(tuple(batch.key.tolist()), ("validation",))
        made = self.extend(truth[:, :known], actions=actions, text=batch.text, noise=noise)
        frames = 1 + TIME_STRIDE * (known - 1)
        videos: list[Any] = [to_uint8(self.frozen_vae.decode(x))[:, frames:] for x in (made, truth)]
        return torch.stack([psnr(*pair).mean() for pair in zip(*videos, strict=True)])


def solved(states: Tensor) -> Tensor:
    """Return which latents (b, t) of trajectories (b, s, t, c, h, w) were solved for, and not given: theirs
    change with the noise level.
    """
    return (states[:, 0] != states[:, -1]).flatten(2).any(-1)


def _mean(losses: Tensor, given: Given) -> Tensor:
    """Return the mean over the samples (b,) of which something is scored."""
    return losses.sum() / given.scored.any(1).sum().clamp(min=1)
