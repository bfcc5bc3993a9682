"""The autoencoder of a small world: fitted on frames, it makes the latents that all later stages use."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from relic.modules.base import Frozen, RelicModule, adamw
from relic.nn.checkpoints import WeightsSource
from relic.nn.tiny_vae import TinyVAE, TinyVAEConfig
from relic.ops.randomness import keyed_uniform
from relic.ops.video import from_uint8, psnr, to_uint8
from relic.types import Batch, Clip, ClipSpec, latents_of

__all__ = ["Autoencoder"]

DETAIL_CELL = 8  # pixels a side
LEAST_POWER = 1e-4  # of flat cells, whose root would have no gradient
MOMENT_MEMORY = 200  # training batches that the running mean and std of the latents look back on


class Autoencoder(RelicModule):
    """Fit a `TinyVAE` to reconstruct video.

    No layer takes statistics over a batch, and noise belongs to samples, so that ranks only share the work.

    Args:
        net: Sizes of the autoencoder.
        clip: Shape of the clips; linked from `data.clip` on the command line.
        window_frames: Frames of the short window, at a random place in each clip, that a step is trained on
            (4k+1); null for whole clips.
        edge_weight: Weight of the error of differences between neighbouring pixels, beside the squared error.
        detail_weight: Weight of the error of how much detail there is, wherever it is: the root mean square
            of the Laplacian in cells of 8x8 pixels. The other terms have an uncertain edge blurred.
        lpips_weight: Weight of the perceptual distance (LPIPS, AlexNet); needs the backbone in torch's cache.
        kl_weight: Weight of the KL divergence to a standard normal, a number of the latents.
        latent_noise: Noise added to latents in training, in units of their std, so that the decoder bears
            what a denoiser leaves.
        init: Weights of an earlier run to start from; null starts fresh.
        optimizer: The optimiser.
        warmup_steps: Steps over which the learning rate rises from zero.
        ema_decay: Decay of the moving average of the weights; null for none.
        seed: Seed of initial weights and of all noise.

    Raises:
        ValueError: If a setting is out of range.
        FileNotFoundError: If LPIPS is asked for and its backbone is not in the cache.
    """

    stage: ClassVar[str] = "autoencoder"
    kind: ClassVar[str] = "tiny_vae"

    def __init__(
        self,
        *,
        net: TinyVAEConfig,
        clip: ClipSpec,
        window_frames: int | None = None,
        edge_weight: float = 0.1,
        detail_weight: float = 0.0,
        lpips_weight: float = 0.0,
        kl_weight: float = 1e-6,
        latent_noise: float = 0.05,
        init: WeightsSource | None = None,
        optimizer: OptimizerCallable = adamw,
        warmup_steps: int = 0,
        ema_decay: float | None = 0.999,
        seed: int = 0,
    ) -> None:
        super().__init__(
            init=init, optimizer=optimizer, warmup_steps=warmup_steps, ema_decay=ema_decay, seed=seed
        )
        weights = {
            "edge_weight": edge_weight,
            "detail_weight": detail_weight,
            "lpips_weight": lpips_weight,
            "kl_weight": kl_weight,
            "latent_noise": latent_noise,
        }
        for name, value in weights.items():
            if value < 0:
                raise ValueError(f"{name}={value} must not be negative; 0 leaves the term out.")
        if window_frames is not None:
            latents_of(window_frames)
            if window_frames > min(clip.horizons):
                raise ValueError(
                    f"window_frames={window_frames} is longer than a clip of clip.horizons={clip.horizons}; "
                    "shorten the window, or lengthen the clips."
                )
        self.net_config, self.clip, self.window_frames = net, clip, window_frames
        self.edge_weight, self.detail_weight = edge_weight, detail_weight
        self.lpips_weight, self.kl_weight, self.latent_noise = lpips_weight, kl_weight, latent_noise
        self.perceptual: Any = Frozen(alexnet_distance()) if lpips_weight > 0 else None
        self.moment_updates = 0

    def build(self) -> TinyVAE:
        return TinyVAE(self.net_config)

    def export_config(self) -> Mapping[str, Any]:
        return dataclasses.asdict(self.net_config)

    # -- loss ------------------------------------------------------------------------------------------------

    def window(self, batch: Batch) -> Tensor:
        """Return the frames (b, f, 3, h, w) in [-1, 1] that a step is trained on, keyed by the samples."""
        video = frames_of(batch)
        if self.window_frames is not None and self.window_frames < video.shape[1]:
            room = video.shape[1] - self.window_frames + 1
            drawn = keyed_uniform(batch.key, self.seed, self.stage, "window")  # on the host, which cuts
            starts = (drawn * room).long().tolist()
            video = torch.stack(
                [clip[s : s + self.window_frames] for clip, s in zip(video, starts, strict=True)]
            )
        return from_uint8(video)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        video = self.window(batch)
        vae = self.trained
        mu, logvar = vae.moments(video)
        self.track_moments(mu.detach())
        # sampling the posterior and noise for robustness are one normal draw of their joint variance
        spread = (logvar.exp() + (self.latent_noise * vae.std[:, None, None]).square()).sqrt()
        reconstruction = vae.render(mu + spread * self.normal(batch.key, "posterior", like=mu)).float()
        losses = self.losses(reconstruction, video) | {"kl": self.kl_weight * kl_divergence(mu, logvar)}
        for name, value in losses.items():
            if name != "rec":
                self.log(f"train/loss_{name}", value, batch_size=len(video))
        self.log("train/loss_rec", losses["rec"], prog_bar=True, batch_size=len(video))
        return torch.stack(list(losses.values())).sum()

    def losses(self, reconstruction: Tensor, video: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of the loss of a reconstruction (b, f, 3, h, w), not clipped."""
        terms = {"rec": F.mse_loss(reconstruction, video)}
        if self.edge_weight:
            terms["edge"] = self.edge_weight * edge_loss(reconstruction, video)
        if self.detail_weight:
            terms["detail"] = self.detail_weight * detail_loss(reconstruction, video)
        if self.perceptual is not None:
            distance = self.perceptual.net(reconstruction.flatten(0, 1), video.flatten(0, 1))
            terms["lpips"] = self.lpips_weight * distance.mean()
        return terms

    @torch.no_grad()
    def track_moments(self, mu: Tensor) -> None:
        """Move the mean of each channel, and the one scale of all of them, towards those of `mu`
        (b, t, c, h, w), of all ranks together.

        One scale, so that latents have variance 1 on the whole and coarse channels stay larger than fine
        ones: scaled one by one, channels that hardly show would be most of what a denoiser is fitted to.
        """
        vae = self.trained
        axes = (0, 1, 3, 4)
        seen = torch.stack([mu.mean(axes), mu.square().mean(axes)])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(seen)
            seen /= dist.get_world_size()
        self.moment_updates += 1
        rate = 1.0 / min(self.moment_updates, MOMENT_MEMORY)
        mean, square = torch.stack([vae.mean, vae.std.square() + vae.mean.square()]).lerp(seen, rate)
        vae.mean.copy_(mean)
        vae.std.copy_((square - mean.square()).mean().clamp(min=1e-6).sqrt().expand_as(mean))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["moment_updates"] = self.moment_updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.moment_updates = checkpoint["moment_updates"]

    # -- measuring -------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        truth = frames_of(batch)
        latents = self.averaged.encode(from_uint8(truth))
        video = to_uint8(self.averaged.decode(latents))
        truth = rearrange(truth, "b f c h w -> b f h w c")
        size = len(truth)
        self.log("val/psnr_rec", psnr(video, truth).mean(), prog_bar=True, sync_dist=True, batch_size=size)
        self.log("val/latent_std", latents.std(), sync_dist=True, batch_size=size)

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Reconstruct a batch's video: uint8 (b, f, h, w, 3) on the CPU."""
        return to_uint8(self.averaged(from_uint8(frames_of(batch)))).cpu()

    @torch.no_grad()
    def reconstruct(self, clips: Sequence[Clip]) -> list[Tensor]:
        """Encode and decode each clip: uint8 (f, h, w, 3) each, on the CPU."""
        videos = [rearrange(clip.video, "f h w c -> 1 f c h w").to(self.device) for clip in clips]
        return [to_uint8(self.averaged(from_uint8(video)))[0].cpu() for video in videos]


def frames_of(batch: Batch) -> Tensor:
    """Return the batch's video (b, f, 3, h, w) uint8.

    Raises:
        ValueError: If the batch holds something else.
    """
    if batch.video is None:
        raise ValueError("The autoencoder is fitted on frames: set data.content to video.")
    return batch.video


def edge_loss(video: Tensor, truth: Tensor) -> Tensor:
    """Return the mean absolute error of differences between neighbouring pixels, of (..., h, w)."""
    error = video - truth
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def detail_loss(video: Tensor, truth: Tensor) -> Tensor:
    """Return the mean absolute error of the detail in cells of (..., 3, h, w)."""
    return (detail(video) - detail(truth)).abs().mean()


def detail(video: Tensor) -> Tensor:
    """Return the root mean square of the Laplacian (4 neighbours) of (..., 3, h, w) in each cell of 8x8
    pixels, over channels too: (n, 1, h', w'), n pictures.
    """
    frames = video.reshape(-1, *video.shape[-3:])
    x = F.pad(frames, (1, 1, 1, 1), mode="replicate")
    beside = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
    power = (4 * frames - beside).square().mean(1, keepdim=True)
    cells = F.avg_pool2d(power, DETAIL_CELL, ceil_mode=True)
    return (cells + LEAST_POWER).sqrt()


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """Return the KL divergence of N(mu, exp(logvar)) to a standard normal, a number of the latents."""
    return 0.5 * (mu.square() + logvar.exp() - 1.0 - logvar).mean()


def alexnet_distance() -> nn.Module:
    """Return LPIPS with AlexNet, if that can be had without a download.

    Raises:
        FileNotFoundError: If the backbone is not in torch's cache.
    """
    from torchvision.models import AlexNet_Weights

    url = AlexNet_Weights.IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if not path.is_file():
        raise FileNotFoundError(
            f"lpips_weight > 0 needs AlexNet at {path}; put {url} there, or set lpips_weight to 0."
        )
    import lpips

    return lpips.LPIPS(net="alex", verbose=False)
