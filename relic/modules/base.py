"""What every stage shares: a trained network, its moving average, keyed noise, and an export at the end."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from relic.nn.checkpoints import WeightsSource, check_source, load_weights, save_weights
from relic.ops.randomness import keyed_generator, keyed_normal, keyed_uniform
from relic.ops.video import from_uint8, to_uint8
from relic.parallel import Compute, average_gradients, clip_gradients, gathered, shard_network
from relic.types import Clip

__all__ = ["Frozen", "RelicModule", "adamw", "reconstructed"]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW as most stages use it; every value can be overridden from a config."""
    return torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01)


class Frozen(nn.Module):
    """Hold a network that moves between devices with its owner but is never trained, saved or restored."""

    net: Any

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        object.__setattr__(
            self, "net", net.eval().requires_grad_(False)
        )  # not a child: invisible to checkpoints

    def _apply(self, fn: Callable, recurse: bool = True) -> Frozen:
        self.net._apply(fn, recurse)
        return self


@torch.no_grad()
def reconstructed(vae: Any, clips: Sequence[Clip], *, device: torch.device) -> list[Tensor]:
    """Encode and decode each clip: the best that any sample could be. uint8 (f, h, w, 3) each, on the CPU."""
    videos = [rearrange(clip.video, "f h w c -> 1 f c h w").to(device) for clip in clips]
    return [to_uint8(vae.decode(vae.encode(from_uint8(video))))[0].cpu() for video in videos]


class RelicModule(LightningModule):
    """Base of all stages.

    A stage says how its network is built (`build`), what it is called (`kind`), and what one batch costs
    (`training_step`). Noise comes from `self.normal` and `self.uniform`: a function of the sample's key
    alone, so that neither the number of ranks nor a restart changes it.
    """

    stage: ClassVar[str]
    kind: ClassVar[str]  # of the file it writes
    starts_from: ClassVar[Sequence[str]] = ()  # kinds of the file in `init`, if others than its own

    def __init__(
        self,
        *,
        init: WeightsSource | None,
        optimizer: OptimizerCallable,
        warmup_steps: int,
        ema_decay: float | None,
        seed: int,
    ) -> None:
        super().__init__()
        if ema_decay is not None and not 0.0 < ema_decay < 1.0:
            raise ValueError(
                f"ema_decay={ema_decay} must lie between 0 and 1, or be null for no moving average."
            )
        self.init = init
        self.optimizer_callable = optimizer
        self.warmup_steps = warmup_steps
        self.ema_decay = ema_decay
        self.seed = seed
        self.net: nn.Module | None = None
        self.ema: nn.Module | None = None
        self.ema_updates = 0  # on the host: asking a device for a count would stall it at every step

    @abstractmethod
    def build(self) -> nn.Module:
        """Return the network to train, with fresh weights."""

    @abstractmethod
    def export_config(self) -> Mapping[str, Any]:
        """Return plain values that rebuild the network; they go into the header of the exported file."""

    def prepare_for_training(self, net: nn.Module) -> None:
        """Change how `net` is executed (checkpointing, compilation); parameter names must stay."""

    def begin_tuning(self, net: nn.Module) -> None:
        """Choose what of `net`, loaded, learns. If that changes names, `plain_weights` must undo it."""

    def plain_weights(self, net: nn.Module) -> Mapping[str, Tensor]:
        """Return the weights of the trained or averaged network under the names that `build` gives them."""
        return net.state_dict()

    def shard(self, net: nn.Module, mesh: DeviceMesh) -> None:
        """Shard `net`, trained or averaged, over the ranks of a mesh; a stage with blocks names them."""
        shard_network(net, (), mesh=mesh, plan=Compute())

    # -- building --------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.init is not None:
            check_source(self.init, kind=self.starts_from or self.kind)  # fails before time is spent

    def configure_model(self) -> None:
        if self.net is not None:
            return
        device = torch.get_default_device()
        with self._seeded():
            if self.init is None:
                net = self.build()
            else:
                with torch.device("meta"):  # no draw, and no memory, that loading would replace at once
                    net = self.build()
        ema = None if self.ema_decay is None else copy.deepcopy(net).requires_grad_(False)
        self.prepare_for_training(net)
        for part in (net, ema):
            if part is None:
                continue
            if self.device_mesh is not None:  # sharded before it takes memory, if it is loaded from a file
                self.shard(part, self.device_mesh["data_parallel"])
            if self.init is not None and device.type != "meta":
                with self._seeded():  # what the file lacks is drawn
                    load_weights(part, self.init, kind=self.starts_from or self.kind, device=device)
        self.begin_tuning(net)
        self.net, self.ema = net, ema

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(keyed_generator(self.seed, self.stage, "weights").initial_seed())
            yield

    @property
    def trained(self) -> Any:
        """The network that learns."""
        if self.net is None:
            self.configure_model()
        return self.net

    @property
    def averaged(self) -> Any:
        """The network that is validated, sampled and exported: the moving average if there is one."""
        net = self.trained
        return net if self.ema is None else self.ema

    # -- optimisation ----------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_callable([p for p in self.trained.parameters() if p.requires_grad])
        if self.warmup_steps == 0:
            return optimizer
        ramp = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / self.warmup_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": ramp, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.update_ema()

    @property
    def accumulates(self) -> bool:
        """Whether gradients of earlier batches wait for a step; no checkpoint holds them."""
        return bool(self.trainer.fit_loop._should_accumulate())

    def _backward(self, loss: Tensor) -> None:
        """Run a backward pass where a step has several (manual optimisation). `_step` has to follow: replicas
        exchange gradients there, once, and not in every pass.
        """
        model = self.trainer.model
        with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
            self.manual_backward(loss)

    def _step(
        self,
        optimizer: Any,
        parameters: Iterable[nn.Parameter],
        *,
        clip_norm: float | None,
        in_place: bool = False,
    ) -> Tensor:
        """Take a step with the gradients that the backward passes before it left, and clear them: to zero if
        `in_place`, else their memory is freed.

        Return the norm of the gradients, averaged over ranks, before they were clipped to `clip_norm`.
        """
        parameters = list(parameters)
        if self.trainer.scaler is not None:
            raise ValueError(
                f"precision={self.trainer.precision!r} scales gradients, so that their norm means nothing; "
                "use bf16-mixed or 32-true."
            )
        average_gradients(parameters)
        norm = clip_gradients(parameters, limit=clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not in_place)
        return norm

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move the average towards the trained weights; faster while it is young, so as not to lag."""
        if self.ema is None or self.ema_decay is None:
            return
        self.ema_updates += 1
        decay = min(self.ema_decay, (1 + self.ema_updates) / (10 + self.ema_updates))
        weights = self.plain_weights(self.trained)
        names, means = zip(*self.ema.named_parameters(), strict=True)
        torch._foreach_lerp_(list(means), [weights[name] for name in names], 1.0 - decay)
        for mean, buffer in zip(self.ema.buffers(), self.trained.buffers(), strict=True):
            mean.copy_(buffer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ema_updates"] = self.ema_updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.ema_updates = checkpoint["ema_updates"]

    # -- keyed randomness ------------------------------------------------------------------------------------

    def normal(self, key: Tensor, purpose: str, *, like: Tensor) -> Tensor:
        """Normal noise in the shape of `like` (b, ...), a function of (key, seed, stage, purpose)."""
        return keyed_normal(key, self.seed, self.stage, purpose, like=like)

    def uniform(self, key: Tensor, purpose: str, *, size: tuple[int, ...] = ()) -> Tensor:
        """Uniform draws (b, *size) in [0, 1), a function of (key, seed, stage, purpose), on this module's
        device.
        """
        return keyed_uniform(key, self.seed, self.stage, purpose, size=size).to(self.device, torch.float32)

    # -- export ----------------------------------------------------------------------------------------------

    @property
    def export_path(self) -> Path:
        """Where the finished weights go: `<default_root_dir>/<kind>.safetensors`, the next stage's
        `init.path`.
        """
        return Path(self.trainer.default_root_dir) / f"{self.kind}.safetensors"

    def on_fit_end(self) -> None:
        self.export(self.export_path)

    def export(self, path: Path) -> None:
        """Write the (averaged) weights with a header that rebuilds the network. Every rank has to call it."""
        weights = gathered(self.plain_weights(self.averaged))
        if self.global_rank == 0:
            save_weights(path, weights, kind=self.kind, config=self.export_config())
            rank_zero_info(f"Wrote {path} ({self.trainer.global_step:,} steps)")
