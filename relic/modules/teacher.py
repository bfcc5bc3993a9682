"""The teacher: an action-conditioned bidirectional denoiser, stretched from 5 to 20 s (paper §4.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from relic.modules.base import Frozen, RelicModule, adamw, reconstructed
from relic.nn.checkpoints import WeightsSource, read_header
from relic.nn.denoiser import Denoiser, EulerSampler
from relic.nn.dit import DiTConfig
from relic.nn.text import WordTableConfig
from relic.nn.tiny_vae import TinyVAE
from relic.nn.tuning import ControlFirst, FullTuning, LowRank
from relic.ops.actions import controls_of, encode_actions
from relic.ops.flow import add_noise, velocity_of
from relic.ops.losses import Sampling, Weighting, draw_sigma, flow_matching_loss, level_weight
from relic.ops.randomness import clip_key
from relic.ops.video import from_uint8, to_uint8
from relic.ops.words import word_ids
from relic.parallel import Compute, apply_compute, shard_network
from relic.types import Batch, Clip, ClipSpec, Controls, Mixed, latents_of

__all__ = ["TeacherExtension"]

FirstLatent = Literal["clean", "noised", "unscored"]
# share of the noise level that the first latent gets, and its weight in the loss
FIRST_LATENT: dict[FirstLatent, tuple[float, float]] = {
    "clean": (0.0, 0.0),
    "noised": (1.0, 1.0),
    "unscored": (1.0, 0.0),
}


class TeacherExtension(RelicModule):
    """Fit a bidirectional denoiser to follow the camera, by flow matching on velocity.

    The first latent is the clean image latent at noise level 0, in the input and out of the loss. A network
    without control (`net.control: null`) is fitted on plain video; `init.missing` starts one with control
    from it. Of a `Mixed` batch the plain part is denoised without controls.

    Args:
        net: Sizes of the DiT.
        clip: Shape of the clips; linked from `data.clip` on the command line.
        words: Trained word table for small worlds; null if batches carry prompt embeddings.
        vae: Weights of the autoencoder (safetensors); needed to fit on video, and to sample.
        init: Weights of an earlier stage to start from; null starts fresh.
        tuning: Which weights learn: all (`{}`), the control layers first (`{control_steps: 500}`), or control
            layers and an update of low rank (`{rank: 16}`).
        first_latent: `clean`, or `noised` like the others and in the loss, as in text-to-video pre-training;
            such a network is a start, and not for sampling from an image.
        prefix_share: Share of training samples that go on from more than the image: so many latents at their
            start are clean, any number but all. It teaches to read what was seen before, as a student will.
        level_sampling: How noise levels are drawn: `uniform` or `logit_normal`, then shifted.
        level_shift: Shift of the noise levels towards noise; 1 for none.
        level_weighting: Weight of the loss by noise level: `none` or the `bell` of public Wan fine-tunes.
        prompt_dropout: Share of samples whose prompt is emptied, for classifier-free guidance.
        validation_buckets: Validation measures the loss once in each of so many equal ranges of sigma.
        sampler: How videos are sampled.
        compute: Activation checkpointing and compilation of the blocks.
        optimizer: The optimiser.
        warmup_steps: Steps over which the learning rate rises from zero.
        ema_decay: Decay of the moving average of the weights; null for none.
        seed: Seed of initial weights and of all noise.
    """

    stage: ClassVar[str] = "teacher"
    kind: ClassVar[str] = "teacher"

    def __init__(
        self,
        *,
        net: DiTConfig,
        clip: ClipSpec,
        words: WordTableConfig | None = None,
        vae: str | None = None,
        init: WeightsSource | None = None,
        tuning: FullTuning | ControlFirst | LowRank = FullTuning(),  # noqa: B008 - frozen
        first_latent: Literal["clean", "noised"] = "clean",
        prefix_share: float = 0.0,
        level_sampling: Sampling = "uniform",
        level_shift: float = 1.0,
        level_weighting: Weighting = "none",
        prompt_dropout: float = 0.1,
        validation_buckets: int = 4,
        sampler: EulerSampler = EulerSampler(),  # noqa: B008 - frozen
        compute: Compute = Compute(),  # noqa: B008 - frozen
        optimizer: OptimizerCallable = adamw,
        warmup_steps: int = 0,
        ema_decay: float | None = 0.999,
        seed: int = 0,
    ) -> None:
        super().__init__(
            init=init, optimizer=optimizer, warmup_steps=warmup_steps, ema_decay=ema_decay, seed=seed
        )
        if words is not None and words.width != net.text_width:
            raise ValueError(f"words.width={words.width} must equal net.text_width={net.text_width}.")
        if not 0.0 <= prefix_share <= 1.0 or (prefix_share and first_latent == "noised"):
            raise ValueError(
                f"prefix_share={prefix_share} must be in [0, 1], a share of the samples, and 0 with "
                "first_latent: noised."
            )
        if not 0.0 <= prompt_dropout <= 1.0:
            raise ValueError(f"prompt_dropout={prompt_dropout} must be in [0, 1], a share of the samples.")
        if validation_buckets < 1:
            raise ValueError(f"validation_buckets={validation_buckets} must be at least 1.")
        self.net_config, self.clip, self.words = net, clip, words
        self.tuning: FullTuning | ControlFirst | LowRank = tuning
        self.first_latent: FirstLatent = first_latent
        self.prefix_share = prefix_share
        self.level_sampling, self.level_shift, self.level_weighting = (
            level_sampling,
            level_shift,
            level_weighting,
        )
        self.prompt_dropout = prompt_dropout
        self.validation_buckets = validation_buckets
        self.sampler, self.compute = sampler, compute
        self.vae_path = vae
        self.vae: Frozen | None = None

    def build(self) -> Denoiser:
        return Denoiser(self.net_config, self.words)

    def configure_model(self) -> None:
        if self.vae is None and self.vae_path is not None:
            self.vae = Frozen(TinyVAE.from_file(self.vae_path))
        super().configure_model()

    def prepare_for_training(self, net: Any) -> None:
        apply_compute(net.dit, self.compute)

    def shard(self, net: Any, mesh: DeviceMesh) -> None:
        if type(self.tuning) is not FullTuning:
            raise ValueError(
                f"tuning={self.tuning} cannot be sharded: its checkpoints need the optimiser state of every "
                "weight; tune all weights, or use strategy ddp."
            )
        shard_network(net, net.dit.blocks, mesh=mesh, plan=self.compute)

    def begin_tuning(self, net: Any) -> None:
        self.tuning.prepare(net, seed=self.seed)

    def plain_weights(self, net: Any) -> Mapping[str, Tensor]:
        return self.tuning.plain_weights(net)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # not by requires_grad: under DDP a parameter must not stop or start to take part
        for name, parameter in self.trained.named_parameters():
            if not self.tuning.trains(name, step=self.trainer.global_step):
                parameter.grad = None

    def export_config(self) -> Mapping[str, Any]:
        return {
            "dit": dataclasses.asdict(self.net_config),
            "words": dataclasses.asdict(self.words) if self.words else None,
            "clip": dataclasses.asdict(self.clip),
            "sampler": dataclasses.asdict(self.sampler),
            "prefix_share": self.prefix_share,
        }

    # -- loss ------------------------------------------------------------------------------------------------

    def clean_latents(self, batch: Batch) -> Tensor:
        """Return the batch's latents (b, t, c, h, w), encoding video if that is what it holds."""
        if batch.latents is not None:
            return batch.latents.float()
        if batch.video is not None:
            with torch.no_grad():
                return self.frozen_vae.encode(from_uint8(batch.video))
        raise ValueError("The teacher is fitted on latents or video; this batch holds ODE trajectories.")

    @property
    def frozen_vae(self) -> Any:
        if self.vae is None:
            raise ValueError("This needs an autoencoder: set `vae` to its safetensors file.")
        return self.vae.net

    def controls(self, batch: Batch) -> Controls | None:
        """Return what steers the camera in this batch: nothing, if the network has no control."""
        return controls_of(batch.actions) if self.net_config.control is not None else None

    def denoising_loss(
        self,
        net: Denoiser,
        batch: Batch,
        *,
        sigma: Tensor,
        purpose: str,
        drop_text: Tensor | None = None,
        control: Literal["actions", "none"] = "actions",
        first_latent: FirstLatent | None = None,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Return the flow-matching loss per sample (b,) at noise levels sigma (b,).

        control: `none` denoises plain video, whatever the batch's actions are. first_latent: as in the class,
        or `unscored`: noised, and out of the loss; None for that of the class. prefix: (b,) latents at the
        start that are clean and out of the loss, besides the first; None for no others.
        """
        x0 = self.clean_latents(batch)
        noise = self.normal(batch.key, purpose, like=x0)
        moving, scored = torch.ones(2, *x0.shape[:2], device=x0.device)
        moving[:, 0], scored[:, 0] = FIRST_LATENT[first_latent or self.first_latent]
        if prefix is not None:
            later = torch.arange(x0.shape[1], device=x0.device) >= prefix[:, None]
            moving, scored = moving * later, scored * later
        per_latent = sigma[:, None] * moving
        velocity = net(
            add_noise(x0, noise, sigma=per_latent),
            sigma=per_latent,
            text=batch.text,
            controls=self.controls(batch) if control == "actions" else None,
            drop_text=drop_text,
        )
        return flow_matching_loss(velocity, velocity_of(x0, noise), weight=scored)

    def training_step(self, batch: Batch | Mixed, batch_idx: int) -> Tensor:
        if isinstance(batch, Batch):
            return self._training_loss(batch, log="train/loss_flow")
        # not one pass: without controls a network computes what it was pretrained to, not a null action
        steered = self._training_loss(batch.steered, log="train/loss_flow")
        plain = self._training_loss(batch.plain, log="train/loss_flow_plain", control="none")
        share = len(batch.plain.key) / (len(batch.steered.key) + len(batch.plain.key))
        return steered.lerp(plain, share)

    def _training_loss(self, batch: Batch, *, log: str, **conditions: Any) -> Tensor:
        u = self.uniform(batch.key, "sigma")
        sigma = draw_sigma(u, sampling=self.level_sampling, shift=self.level_shift)
        drop = self.uniform(batch.key, "prompt") < self.prompt_dropout
        losses = self.denoising_loss(
            self.trained, batch, sigma=sigma, purpose="noise", drop_text=drop, prefix=self.draw_prefix(batch),
            **conditions,
        )  # fmt: skip
        loss = (level_weight(sigma, weighting=self.level_weighting) * losses).mean()
        self.log(log, loss, prog_bar=True, batch_size=len(batch.key))
        return loss

    def draw_prefix(self, batch: Batch) -> Tensor | None:
        """Draw how many latents at the start of each training sample are clean, (b,)."""
        if not self.prefix_share:
            return None
        longest = latents_of(batch.actions.shape[1]) - 1
        length = (1 + self.uniform(batch.key, "prefix length") * longest).long().clamp(max=longest)
        return torch.where(self.uniform(batch.key, "prefix") < self.prefix_share, length, 1)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses = self.bucket_losses(batch)
        for bucket, loss in losses.items():
            self.log(f"val/loss_flow_sigma_{bucket}", loss, sync_dist=True, batch_size=len(batch.key))
        mean = torch.stack(list(losses.values())).mean()
        self.log("val/loss_flow", mean, prog_bar=True, sync_dist=True, batch_size=len(batch.key))

    test_step = validation_step

    @torch.no_grad()
    def bucket_losses(
        self,
        batch: Batch,
        *,
        control: Literal["actions", "none"] = "actions",
        first_latent: FirstLatent | None = None,
        rope: Literal["own", "plain"] = "own",
    ) -> dict[str, Tensor]:
        """Return the averaged network's loss in equal ranges of sigma, keyed "0.00-0.25" and so on;
        unweighted.

        control, first_latent: see `denoising_loss`. rope: `plain` measures without YaRN, at factor 1.
        """
        net = self.averaged
        conditions: dict[str, Any] = {"control": control, "first_latent": first_latent}
        count, losses = self.validation_buckets, {}
        with net.at_rope_factor(1.0) if rope == "plain" else nullcontext():
            for bucket in range(count):
                sigma = (bucket + self.uniform(batch.key, f"bucket {bucket}")) / count
                purpose = f"validation {bucket}"
                loss = self.denoising_loss(net, batch, sigma=sigma, purpose=purpose, **conditions)
                losses[f"{bucket / count:.2f}-{(bucket + 1) / count:.2f}"] = loss.mean()
        return losses

    @classmethod
    def from_file(cls, path: str, *, vae: str | None = None, **settings: Any) -> TeacherExtension:
        """Rebuild an exported teacher; `settings` are further arguments, e.g. `sampler=`."""
        config = read_header(path, kind=cls.kind)["config"]
        module = cls(
            net=DiTConfig.from_dict(config["dit"]),
            clip=ClipSpec(**{**config["clip"], "horizons": tuple(config["clip"]["horizons"])}),
            words=WordTableConfig(**config["words"]) if config["words"] else None,
            vae=vae,
            init=WeightsSource(path=path),
            ema_decay=None,
            **{
                "sampler": EulerSampler(**config["sampler"]),
                "prefix_share": config.get("prefix_share", 0.0),
                **settings,
            },
        )
        module.configure_model()
        return module.eval()

    # -- sampling --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, clips: Sequence[Clip], *, prefix_frames: int = 1, seed: int) -> list[Tensor]:
        """Generate each clip again from its first frames, prompt and camera path: uint8 (f, h, w, 3) each.

        What is given comes back as the autoencoder has it.

        Raises:
            NotImplementedError: If more than one true frame is asked for, of a network that was fitted with
                prefix_share=0: it continues one image only.
            ValueError: If clip or prefix are not 4k+1 frames, or the prefix is longer than the clip.
        """
        if prefix_frames != 1 and not self.prefix_share:
            raise NotImplementedError(
                f"prefix_frames={prefix_frames}: this teacher continues one image only; fit it with "
                "prefix_share for longer ones."
            )
        return [self._generate(clip, prefix_frames, key=clip_key(clip, seed=seed)) for clip in clips]

    def _generate(self, clip: Clip, prefix_frames: int, *, key: int) -> Tensor:
        latents_of(len(clip.video))
        latents_of(prefix_frames)
        if prefix_frames > len(clip.video):
            raise ValueError(f"prefix_frames={prefix_frames} exceeds the clip's {len(clip.video)} frames.")
        video = from_uint8(rearrange(clip.video[:prefix_frames], "f h w c -> 1 f c h w").to(self.device))
        actions = encode_actions(clip.c2w, d_bar=clip.d_bar)[None].float().to(self.device)
        text = word_ids(clip.captions[0] if clip.captions else "", length=self.net_config.text_length)
        return self.sample(
            self.frozen_vae.encode(video),
            actions=actions,
            text=text[None].to(self.device),
            key=torch.tensor([key]),
        )[0]

    @torch.no_grad()
    def sample(self, given: Tensor, *, actions: Tensor, text: Tensor, key: Tensor) -> Tensor:
        """Generate from the clean first latents (b, n, c, h, w), the image's at least, actions (b, f, 13),
        text and keys (b,).

        Returns uint8 video (b, f, h, w, 3) on the CPU.
        """
        like = given.new_empty(len(given), latents_of(actions.shape[1]), *given.shape[2:])
        x0 = self.sampler(
            self.averaged,
            self.normal(key, "sample", like=like),
            given=given,
            text=text,
            controls=controls_of(actions),
        )
        return to_uint8(self.frozen_vae.decode(x0)).cpu()

    def reconstruct(self, clips: Sequence[Clip]) -> list[Tensor]:
        """Encode and decode each clip: the best that any sample could be. uint8 (f, h, w, 3) each."""
        return reconstructed(self.frozen_vae, clips, device=self.device)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sample videos for a batch from its first latent, actions and prompts: uint8 (b, f, h, w, 3)."""
        image = self.clean_latents(batch)[:, :1]
        return self.sample(image, actions=batch.actions, text=batch.text, key=batch.key)
