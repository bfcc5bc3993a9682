"""What stages of the student share: what they build, how it is sampled, and a count of batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method

from relic.modules.base import Frozen, RelicModule, reconstructed
from relic.nn.checkpoints import WeightsSource
from relic.nn.denoiser import Denoiser
from relic.nn.dit import DiTConfig
from relic.nn.memory import Memory
from relic.nn.student import FewSteps, StudentConfig
from relic.nn.text import WordTableConfig
from relic.nn.tiny_vae import TinyVAE
from relic.ops.actions import encode_actions
from relic.ops.randomness import clip_key
from relic.ops.retention import AnyPolicy, block_that_ends
from relic.ops.video import from_uint8, to_uint8
from relic.ops.words import word_ids
from relic.parallel import Compute, Recorder, apply_compute, shard_network
from relic.rollout import KeyedNoise, Noise, Rollout
from relic.types import TIME_STRIDE, Batch, Clip, ClipSpec, latents_of

__all__ = ["StudentModule"]


class StudentModule(RelicModule):
    """Base of the stages that fit a causal few-step student; they write files of kind `student`.

    A stage says what a batch costs. `generate` and `predict_step` sample the averaged network through the
    rollout that is also played, with noise that is the same for every stage, so that stages compare.

    Args:
        net: Sizes of the DiT.
        clip: Shape of the clips; memory is planned for the longest horizon.
        words: Trained word table, or None if batches carry prompt embeddings.
        vae: Weights of the autoencoder (safetensors); needed to sample videos.
        policy: What the memory keeps.
        sampler: Denoising steps, and what is committed.
        compute: Activation checkpointing and compilation of the blocks.
        cuda_graphs: Whether what a step computes is recorded as a CUDA graph and replayed.
        init, optimizer, warmup_steps, ema_decay, seed: As in `RelicModule`.

    Raises:
        ValueError: If sizes don't fit each other, e.g. a window that is no whole number of blocks.
    """

    kind: ClassVar[str] = "student"

    def __init__(
        self,
        *,
        net: DiTConfig,
        clip: ClipSpec,
        words: WordTableConfig | None,
        vae: str | None,
        policy: AnyPolicy,
        sampler: FewSteps,
        compute: Compute,
        cuda_graphs: bool,
        init: WeightsSource | None,
        optimizer: OptimizerCallable,
        warmup_steps: int,
        ema_decay: float | None,
        seed: int,
    ) -> None:
        super().__init__(
            init=init, optimizer=optimizer, warmup_steps=warmup_steps, ema_decay=ema_decay, seed=seed
        )
        if words is not None and words.width != net.text_width:
            raise ValueError(f"words.width={words.width} must equal net.text_width={net.text_width}.")
        self.student = StudentConfig(net=net, words=words, clip=clip, policy=policy, sampler=sampler)
        self.plan = self.student.plan()  # refuses what does not fit, before time is spent
        if cuda_graphs and policy.repositions:
            raise ValueError(
                "cuda_graphs=true cannot record a memory that chooses by pose, on the host, what it keeps; "
                "set policy.max_latents to null, or cuda_graphs to false."
            )
        self.compute = compute
        self.cuda_graphs = cuda_graphs
        self.recorder: Recorder | None = None
        self.vae_path = vae
        self.vae: Frozen | None = None

    @property
    def clip(self) -> ClipSpec:
        return self.student.clip

    @property
    def net_config(self) -> DiTConfig:
        return self.student.net

    # -- building --------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.cuda_graphs:
            kind, count = self.trainer.strategy.root_device.type, self.trainer.world_size
            if kind != "cuda" or count != 1:
                raise ValueError(
                    f"cuda_graphs=true records the work of one CUDA device; this run has {count} of type "
                    f"{kind}. Set cuda_graphs to false."
                )
            if self.trainer.scaler is not None:
                raise ValueError(
                    f"cuda_graphs=true cannot record gradients that precision={self.trainer.precision!r} "
                    "scales; use bf16-mixed or 32-true, or set cuda_graphs to false."
                )
            self.recorder = Recorder(self.parameters)

    def on_validation_model_zero_grad(self) -> None:
        self.zero_grad(set_to_none=self.recorder is None)  # recordings add to gradients where they are

    def build(self) -> Denoiser:
        return self.student.build()

    def configure_model(self) -> None:
        if self.vae is None and self.vae_path is not None:
            self.vae = Frozen(TinyVAE.from_file(self.vae_path))
        super().configure_model()

    def prepare_for_training(self, net: Any) -> None:
        apply_compute(net.dit, self.compute)

    def shard(self, net: Any, mesh: DeviceMesh) -> None:
        shard_network(net, net.dit.blocks, mesh=mesh, plan=self.compute)
        for part in (net, *net.dit.blocks):  # a rollout reads its prompt outside `forward`
            register_fsdp_forward_method(part, "read")

    def export_config(self) -> Mapping[str, Any]:
        return self.student.to_header()

    @property
    def frozen_vae(self) -> Any:
        if self.vae is None:
            raise ValueError("This needs an autoencoder: set `vae` to its safetensors file.")
        return self.vae.net

    def clean_latents(self, batch: Batch) -> Tensor:
        """Return the clean latents (b, t, c, h, w) of a batch: its latents, the end of its ODE solutions, or
        its video, encoded.
        """
        if batch.latents is not None:
            return batch.latents.float()
        if batch.trajectory is not None:
            return batch.trajectory[:, -1].float()
        if batch.video is not None:
            with torch.no_grad():
                return self.frozen_vae.encode(from_uint8(batch.video))
        raise ValueError("The batch holds neither latents, nor trajectories, nor video; give one of them.")

    # -- how far training is ---------------------------------------------------------------------------------

    @property
    def batch_index(self) -> int:
        """Training batches consumed before the one at work: the same on all ranks, and as if the run had
        never been stopped. What a whole batch shares is drawn by it.
        """
        if self._trainer is None:
            return 0
        # `total` runs on over epochs and is restored from checkpoints; `current` is neither
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return progress.processed

    # -- sampling --------------------------------------------------------------------------------------------

    def rollout(self, net: Denoiser, *, noise: Noise, like: Tensor, exit_step: int | None = None) -> Rollout:
        """Return a rollout of `net` with an empty memory for streams like `like` (b, t, c, h, w)."""
        device = like.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else like.dtype  # else attention casts it all
        memory = Memory(self.plan, batch=len(like), dtype=dtype, device=like.device)
        return Rollout(net, memory, noise=noise, sampler=self.student.sampler, exit_step=exit_step)

    @torch.no_grad()
    def extend(self, prefix: Tensor, *, actions: Tensor, text: Tensor, noise: Noise) -> Tensor:
        """Return latents (b, t, c, h, w): `prefix` (b, t', c, h, w), and what the averaged network makes of
        the rest of the actions (b, f, 13).

        Raises:
            ValueError: If prefix or actions are not the image and whole blocks, or exceed the longest
                horizon.
        """
        size, total = self.clip.block_latents, latents_of(actions.shape[1])
        for count in (prefix.shape[1], total):
            block_that_ends(count, block_latents=size)
        longest = latents_of(self.clip.max_frames)
        if total > longest:
            raise ValueError(
                f"{actions.shape[1]} frames are {total} latents, more than the {longest} of the longest "
                "horizon; cut the clip, or add its length to clip.horizons."
            )
        rollout = self.rollout(self.averaged, noise=noise, like=prefix)
        known = 1 + TIME_STRIDE * (prefix.shape[1] - 1)
        rollout.prefill(prefix, actions[:, :known], text=text)
        rest = actions[:, known:]
        stretches = rest.split(TIME_STRIDE * size, dim=1) if rest.shape[1] else ()
        return torch.cat([prefix, *(block.latents for block in rollout(stretches, text=text))], dim=1)

    @torch.no_grad()
    def generate(self, clips: Sequence[Clip], *, prefix_frames: int = 1, seed: int) -> list[Tensor]:
        """Generate each clip again after its first `prefix_frames` frames: uint8 (f, h, w, 3) each.

        The prefix, the image and whole blocks, is encoded and committed to the memory; it comes back as the
        autoencoder has it. A clip's noise depends on `seed` and its image.

        Raises:
            ValueError: If prefix or clip are not the image and whole blocks, the prefix is longer than the
                clip, or the clip than the longest horizon.
        """
        return [self._generate(clip, prefix_frames, key=clip_key(clip, seed=seed)) for clip in clips]

    def _generate(self, clip: Clip, prefix_frames: int, *, key: int) -> Tensor:
        latents_of(prefix_frames)
        if prefix_frames > len(clip.video):
            raise ValueError(f"prefix_frames={prefix_frames} exceeds the clip's {len(clip.video)} frames.")
        video = rearrange(clip.video[:prefix_frames], "f h w c -> 1 f c h w").to(self.device)
        actions = encode_actions(clip.c2w, d_bar=clip.d_bar)[None].float().to(self.device)
        caption = clip.captions[0] if clip.captions else ""
        text = word_ids(caption, length=self.net_config.text_length)[None].to(self.device)
        prefix = self.frozen_vae.encode(from_uint8(video))
        noise = KeyedNoise((key,), ("generate",))
        latents = self.extend(prefix, actions=actions, text=text, noise=noise)
        return to_uint8(self.frozen_vae.decode(latents)).cpu()[0]

    def reconstruct(self, clips: Sequence[Clip]) -> list[Tensor]:
        """Encode and decode each clip: the best that any sample could be. uint8 (f, h, w, 3) each."""
        return reconstructed(self.frozen_vae, clips, device=self.device)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sample videos for a batch from its first latent, actions and prompts: uint8 (b, f, h, w, 3)."""
        image = self.clean_latents(batch)[:, :1]
        noise = KeyedNoise(tuple(batch.key.tolist()), ("generate",))
        latents = self.extend(image, actions=batch.actions, text=batch.text, noise=noise)
        return to_uint8(self.frozen_vae.decode(latents)).cpu()
