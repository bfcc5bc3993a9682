"""How fast a run is: samples, frames and tokens a second, and the share of time that it waits for data."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from relic.types import PATCH, Batch, Mixed

__all__ = ["Throughput"]


class Throughput(Callback):
    """Log speeds over the last `every_n_batches` training batches, over all ranks.

    | name | what it is |
    |---|---|
    | `speed/samples_per_s`, `speed/frames_per_s` | training samples, and pixel frames they stand for |
    | `speed/tokens_per_s` | tokens of 2x2 latent cells, where batches hold latents or trajectories |
    | `speed/batches_per_s` | on each rank |
    | `speed/waiting` | share of the time between the end of a batch and the start of the next, in [0, 1] |
    | `speed/mfu` | model FLOPs utilisation, if `flops_per_sample` is given |

    Validations do not count as time. Waiting is for data, and for what other callbacks do between batches,
    such as saving; it is that of the first rank. The device is waited for once every `every_n_batches` and
    around validations, never between. Sizes are read from `relic.types.Batch`; of other batches only samples
    are known, by the length of their first tensor.

    Args:
        every_n_batches: Batches that a figure is over.
        flops_per_sample: Model FLOPs of forward and backward pass of a sample.
        peak_flops: Of one device, for MFU: 989e12 is dense bf16 of an H100 SXM by its data sheet.
    """

    def __init__(
        self, *, every_n_batches: int = 50, flops_per_sample: float | None = None, peak_flops: float = 989e12
    ) -> None:
        if every_n_batches < 1:
            raise ValueError(f"every_n_batches={every_n_batches} must be at least 1.")
        for name, value in (("flops_per_sample", flops_per_sample), ("peak_flops", peak_flops)):
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive.")
        self.every_n_batches = every_n_batches
        self.flops_per_sample, self.peak_flops = flops_per_sample, peak_flops
        self._paused = 0.0
        self._begin(0.0)

    def _begin(self, now: float) -> None:
        self._start, self._ended = now, now
        self._batches = self._samples = self._frames = self._tokens = 0
        self._waited = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(time.perf_counter())

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _finish(pl_module)
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _finish(pl_module)
        pause = time.perf_counter() - self._paused  # not training's time
        self._start += pause
        self._ended += pause

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += time.perf_counter() - self._ended

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        samples, frames, tokens = sizes_of(batch)
        self._batches += 1
        self._samples += samples
        self._frames += frames
        self._tokens += tokens
        if self._batches == self.every_n_batches:
            _finish(pl_module)
            now = time.perf_counter()
            self._log(pl_module, now - self._start, ranks=trainer.world_size)
            self._begin(now)
            return
        self._ended = time.perf_counter()

    def _log(self, pl_module: LightningModule, seconds: float, *, ranks: int) -> None:
        speeds = {
            "speed/batches_per_s": self._batches / seconds,
            "speed/samples_per_s": ranks * self._samples / seconds,
            "speed/waiting": self._waited / seconds,
        }
        if self._frames:
            speeds["speed/frames_per_s"] = ranks * self._frames / seconds
        if self._tokens:
            speeds["speed/tokens_per_s"] = ranks * self._tokens / seconds
        if self.flops_per_sample is not None:
            speeds["speed/mfu"] = self._samples * self.flops_per_sample / seconds / self.peak_flops
        pl_module.log_dict(speeds)


def _finish(pl_module: LightningModule) -> None:
    """Wait until the device has done what it was asked to."""
    if pl_module.device.type == "cuda":
        torch.cuda.synchronize(pl_module.device)


def sizes_of(batch: Any) -> tuple[int, int, int]:
    """Return samples, pixel frames and tokens of a batch; 0 for what is not known."""
    if isinstance(batch, Mixed):
        parts = [sizes_of(part) for part in batch]
        samples, frames, tokens = (sum(column) for column in zip(*parts, strict=True))
        return samples, frames, tokens
    if isinstance(batch, Batch):
        samples, frames = batch.actions.shape[:2]
        latents = batch.latents if batch.latents is not None else batch.trajectory
        tokens = 0
        if latents is not None:
            t, _, h, w = latents.shape[-4:]
            tokens = t * h * w // PATCH**2
        return samples, samples * frames, samples * tokens
    tensors = [batch] if isinstance(batch, torch.Tensor) else list(_tensors(batch))
    return (len(tensors[0]) if tensors and tensors[0].ndim else 0), 0, 0


def _tensors(batch: Any) -> list[torch.Tensor]:
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else ()
    return [part for part in parts if isinstance(part, torch.Tensor)]
