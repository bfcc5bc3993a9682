"""Self-forcing: the student learns from clips it generated itself, as a teacher sees them (paper §4.4).

Longer than most files: two optimisers' turns, the rollout and its replay are one idea.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from relic.modules.base import Frozen
from relic.modules.scores import Given, build_score, check_teacher, score_velocity
from relic.modules.student import StudentModule
from relic.nn.checkpoints import WeightsSource, file_sha256, read_header
from relic.nn.denoiser import Denoiser
from relic.nn.dit import DiTConfig
from relic.nn.forcing import replayed_velocity
from relic.nn.student import FewSteps, StudentConfig
from relic.nn.text import WordTableConfig
from relic.ops.dmd import ScoreLevels, channel_drift, dmd_gradient, mean_error, with_gradient
from relic.ops.flow import guide, velocity_of, x0_of
from relic.ops.losses import flow_matching_loss
from relic.ops.randomness import derive_seed
from relic.ops.retention import AnyPolicy, Compressed, block_that_ends
from relic.parallel import Compute, primed
from relic.rollout import DrawnNoise, KeyedNoise, Rollout, Trace, Walk, walk
from relic.types import TIME_STRIDE, Batch, ClipSpec, latents_of

__all__ = ["SelfForcing", "Turns"]


def student_adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW as Self-Forcing has it for the student."""
    return torch.optim.AdamW(parameters, lr=2e-6, betas=(0.0, 0.999), weight_decay=0.01)


def critic_adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW as Self-Forcing has it for the critic."""
    return torch.optim.AdamW(parameters, lr=4e-7, betas=(0.0, 0.999), weight_decay=0.01)


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Whose optimiser takes which step: the critic's for a while, then `ratio` of the critic's to each of the
    student's, which comes last, when the critic has caught up.
    """

    ratio: int
    critic_first: int

    def student_steps(self, steps: int) -> int:
        """Return how many of the first `steps` steps are the student's."""
        return max(0, steps - self.critic_first) // (self.ratio + 1)

    def of(self, step: int) -> Literal["student", "critic"]:
        """Return whose step number `step` is, from 0."""
        return "student" if self.student_steps(step + 1) > self.student_steps(step) else "critic"


class SelfForcing(StudentModule):
    """Fit a student on its own rollouts: distribution matching (DMD), with replayed back-propagation.

    Every optimiser step has clips of its own, rolled out by the student without gradients from the first
    latents, actions and prompts of a batch. The critic learns to denoise them. The student follows, in every
    latent, the difference between what the critic and the frozen teacher would denoise them to; block by
    block is computed again for that with gradients, so that memory is needed for one block at a time (by
    default: `replay_by`). The first latent is the clean image at noise level 0, for all three networks, and
    out of every loss; so are those of a longer start, where a rollout goes on from one.

    `trainer.max_steps` counts the steps of both optimisers: critic_only_steps + N·(critic_ratio + 1) are N
    steps of the student.

    Args:
        net: Sizes of the DiT; its `rope_factor` stays that of the student's longest horizon.
        clip: Shape of the clips; linked from `data.clip` on the command line. Its longest horizon is the one
            that is rolled out and scored, and has to be the teacher's.
        teacher: File of the teacher of this horizon: the frozen score, and the critic's start.
        teacher_rope_factor: Its YaRN factor, which may differ from the student's.
        words: Trained word table for small worlds; null if batches carry prompt embeddings.
        vae: Weights of the autoencoder (safetensors); needed to fit on video, and to sample.
        policy: What the student's memory keeps.
        sampler: The student's steps, and what is committed.
        exit_step: Step, from 0, whose prediction is scored and replayed in every block: null for the last, or
            `random` for one drawn for each batch. All steps run whatever it is.
        prefix_share: Share of the batches that go on from the true first half of their clips, in whole
            blocks, instead of the image alone (past the paper). What was really there is then in the memory,
            and the teacher, fitted with a `prefix_share` of its own, says how it looks when it is seen again.
        replay_by: What is computed again at a time, and held for its backward pass: a `block`, as in the
            paper, or the `clip`, all blocks in two passes, for small networks. The gradient is the same. Half
            precision on a GPU then takes compiled attention, as `CausalInit` does.
        guidance: Weight of the teacher's classifier-free guidance; 1 means none.
        levels: Noise levels at which clips are scored and the critic is fitted.
        critic_ratio: Steps of the critic for each of the student.
        critic_only_steps: Steps of the critic before that.
        accumulate: Batches whose gradients make one step.
        clip_norm: Largest norm of the gradients, of each network; null does not clip.
        compute: How the student's blocks are executed.
        score_compute: How the blocks of teacher and critic are executed.
        cuda_graphs: Record what a turn computes as a CUDA graph, one for each start, and replay it: for small
            networks, whose passes take longer to launch than to run. For one GPU, and a policy that does not
            choose by pose.
        init: The student to start from: of causal init, or of the horizon before.
        optimizer: The student's optimiser.
        critic_optimizer: The critic's.
        ema_decay: Decay of the moving average of the student's weights; null for none.
        seed: Seed of initial weights and of all noise.

    Raises:
        ValueError: If a setting is out of range.
    """

    stage: ClassVar[str] = "self_forcing"

    def __init__(
        self,
        *,
        net: DiTConfig,
        clip: ClipSpec,
        teacher: WeightsSource,
        teacher_rope_factor: float = 1.0,
        words: WordTableConfig | None = None,
        vae: str | None = None,
        policy: AnyPolicy = Compressed(),  # noqa: B008 - frozen
        sampler: FewSteps = FewSteps(),  # noqa: B008 - frozen
        exit_step: int | Literal["random"] | None = None,
        prefix_share: float = 0.0,
        replay_by: Literal["block", "clip"] = "block",
        guidance: float = 4.0,
        levels: ScoreLevels = ScoreLevels(),  # noqa: B008 - frozen
        critic_ratio: int = 5,
        critic_only_steps: int = 100,
        accumulate: int = 1,
        clip_norm: float | None = 10.0,
        compute: Compute = Compute(),  # noqa: B008 - frozen
        score_compute: Compute = Compute(),  # noqa: B008 - frozen
        cuda_graphs: bool = False,
        init: WeightsSource | None = None,
        optimizer: OptimizerCallable = student_adamw,
        critic_optimizer: OptimizerCallable = critic_adamw,
        ema_decay: float | None = 0.99,
        seed: int = 0,
    ) -> None:
        super().__init__(
            net=net, clip=clip, words=words, vae=vae, policy=policy, sampler=sampler, compute=compute,
            cuda_graphs=cuda_graphs, init=init, optimizer=optimizer, warmup_steps=0, ema_decay=ema_decay,
            seed=seed,
        )  # fmt: skip
        if exit_step not in (None, "random", *range(sampler.steps)):
            raise ValueError(
                f"exit_step={exit_step} must be one of the {sampler.steps} steps, 0 to {sampler.steps - 1}, "
                "null for the last one, or random."
            )
        if not 0.0 <= prefix_share <= 1.0:
            raise ValueError(f"prefix_share={prefix_share} must be in [0, 1], a share of the batches.")
        if prefix_share and self._half_of(clip.max_frames) == 1:
            raise ValueError(
                f"prefix_share={prefix_share}: a clip of {clip.max_frames} frames has one block after the "
                "image, and so no first half to go on from; use longer clips, or 0."
            )
        if replay_by not in ("block", "clip"):
            raise ValueError(f"replay_by={replay_by!r} must be block or clip.")
        if replay_by == "clip" and (policy.repositions or sampler.context != "clean"):
            raise ValueError(
                "replay_by=clip computes all blocks again at once, from what is clean and planned ahead: "
                "set replay_by to block, or set sampler.context to clean and policy.max_latents to null."
            )
        for name, value, least in (
            ("critic_ratio", critic_ratio, 1),
            ("critic_only_steps", critic_only_steps, 0),
            ("accumulate", accumulate, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        if clip_norm is not None and clip_norm <= 0:
            raise ValueError(f"clip_norm={clip_norm} must be positive; null does not clip.")
        self.automatic_optimization = False  # two optimisers, and many backward passes in a step
        self.teacher, self.teacher_rope_factor = teacher, teacher_rope_factor
        self.exit_step, self.guidance, self.levels = exit_step, guidance, levels
        self.prefix_share, self.replay_by = prefix_share, replay_by
        self.turns = Turns(ratio=critic_ratio, critic_first=critic_only_steps)
        self.accumulate, self.clip_norm = accumulate, clip_norm
        self.score_compute = score_compute
        self.critic_optimizer_callable = critic_optimizer
        self.critic: nn.Module | None = None
        self.real: Frozen | None = None
        self.teacher_sha256: str | None = None
        self._waiting = 0  # batches whose gradients wait for a step

    # -- building --------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            if self.init is not None:
                self._check_student(self.init.path)
            check_teacher(self.teacher.path, self.student, rope_factor=self.teacher_rope_factor)
            if self.prefix_share and not read_header(self.teacher.path)["config"].get("prefix_share"):
                raise ValueError(
                    f"prefix_share={self.prefix_share}, but the teacher {self.teacher.path} continues one "
                    "image only; fit it with a prefix_share, or leave it 0."
                )
            own = file_sha256(self.teacher.path) if self.global_rank == 0 else None
            self.teacher_sha256 = self.trainer.strategy.broadcast(own)

    def _check_student(self, path: str) -> None:
        """Compare how the student in `init` generates with how this one will, which no weights tell."""
        there, here = StudentConfig.from_header(read_header(path, kind=self.kind)["config"]), self.student
        pairs = {
            "policy": (there.policy, here.policy),
            "sampler": (there.sampler, here.sampler),
            "clip.block_latents": (there.clip.block_latents, here.clip.block_latents),
        }
        wrong = [f"{name} is {a} there, {b} here" for name, (a, b) in pairs.items() if a != b]
        if wrong:
            raise ValueError(
                f"The student {path} learned to generate in another way: {'; '.join(wrong)}. Set these as "
                "they are there, or repeat causal init with those here."
            )

    def on_fit_start(self) -> None:
        # what it warns of, and takes for a fault, is what a checkpoint is: the state after a step
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")

    def configure_model(self) -> None:
        super().configure_model()
        if self.critic is None:
            # the frozen one has no backward pass to keep anything for
            self.real = Frozen(self._score(dataclasses.replace(self.score_compute, keep="all")))
            self.critic = self._score(self.score_compute)

    def _score(self, plan: Compute) -> Denoiser:
        return build_score(
            self.teacher,
            self.student,
            rope_factor=self.teacher_rope_factor,
            plan=plan,
            mesh=None if self.device_mesh is None else self.device_mesh["data_parallel"],
            device=torch.get_default_device(),
        )

    def configure_optimizers(self) -> Any:
        student = self.optimizer_callable([p for p in self.trained.parameters() if p.requires_grad])
        critic = self.critic_optimizer_callable(list(self.fake.parameters()))
        # saving a sharded run (torch's DCP) advances an optimiser that has no state yet, by one step
        return [student, critic] if self.device_mesh is None else [primed(student), primed(critic)]

    @property
    def fake(self) -> Any:
        """The critic: the score of the student's clips."""
        if self.critic is None:
            self.configure_model()
        return self.critic

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["teacher_sha256"] = self.teacher_sha256

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        before = checkpoint["teacher_sha256"]
        if self.teacher_sha256 is not None and before != self.teacher_sha256:
            raise ValueError(
                f"This run was started with another teacher (SHA-256 {before}) than {self.teacher.path} "
                f"({self.teacher_sha256}); put that file back, or begin a new run with init."
            )

    # -- what a turn is given --------------------------------------------------------------------------------

    def given(self, batch: Batch) -> Given:
        """Return what a turn computes with: how clips start, actions and prompts of a batch, and all of its
        noise. What the batch holds after the start is not used.
        """
        if not isinstance(batch, Batch):
            raise ValueError("Self-forcing takes no plain video, which has no actions: unset data.plain.")
        if batch.actions.shape[1] != self.clip.max_frames:
            raise ValueError(
                f"The batch has actions of {batch.actions.shape[1]} frames; this stage rolls out "
                f"{self.clip.max_frames}, its teacher's horizon."
            )
        known = self.drawn_prefix(batch)
        prefix = self.clean_latents(batch)[:, :known]
        walked, _ = walk(batch.actions, device=prefix.device)
        if self.recorder is not None:
            walked = walked._replace(c2w=walked.c2w.to(prefix.device))
        clip = prefix[:, :1].expand(-1, walked.c2w.shape[1], -1, -1, -1)
        sigma = self.levels(self.uniform(batch.key, "level"))[:, None].repeat(1, clip.shape[1])
        sigma[:, :known] = 0.0  # one level a clip, and 0 for what is given
        return Given(
            prefix=prefix, text=batch.text, walk=walked, noise=self._rollout_noise(batch.key, clip),
            score_noise=self.normal(batch.key, "score", like=clip), score_sigma=sigma,
        )  # fmt: skip

    def drawn_prefix(self, batch: Batch) -> int:
        """Return how many latents this batch goes on from, the same on all ranks."""
        draw = derive_seed(self.seed, self.stage, self.batch_index, "prefix") / 2**63
        return self._half_of(batch.actions.shape[1]) if draw < self.prefix_share else 1

    def _half_of(self, frames: int) -> int:
        """Return the latents of the first half of a clip: the image and whole blocks."""
        size = self.clip.block_latents
        return 1 + block_that_ends(latents_of(frames), block_latents=size) // 2 * size

    def _rollout_noise(self, key: Tensor, clip: Tensor) -> Tensor:
        noise = KeyedNoise(tuple(key.tolist()), (self.seed, self.stage, "rollout"))
        size, steps = self.clip.block_latents, range(self.student.sampler.steps)
        blocks = range(1, 1 + block_that_ends(clip.shape[1], block_latents=size))
        drawn = [noise(block=block, step=step, like=clip[:, :size]) for block in blocks for step in steps]
        return torch.stack(drawn).unflatten(0, (len(blocks), len(steps)))

    def scored_step(self) -> int:
        """Return the step whose prediction is scored in this batch, the same on all ranks."""
        steps = self.student.sampler.steps
        if self.exit_step == "random":
            return derive_seed(self.seed, self.stage, self.batch_index, "exit_step") % steps
        return steps - 1 if self.exit_step is None else self.exit_step

    # -- rollout ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def roll_out(self, given: Given, *, exit_step: int) -> tuple[Tensor, tuple[Trace, ...]]:
        """Return the clips that are scored (b, t, c, h, w), and what is needed to compute them again."""
        rollout, rest = self._begin(given, exit_step=exit_step)
        while rest.frames:
            stretch, rest = rest.cut(
                frames=TIME_STRIDE * self.clip.block_latents, latents=self.clip.block_latents
            )
            rollout.step(stretch, text=given.text)
        return torch.cat([given.prefix, *(trace.x0 for trace in rollout.traces)], dim=1), rollout.traces

    def replay(self, given: Given, traces: Sequence[Trace]) -> Iterator[tuple[slice, Tensor]]:
        """Yield, for each block, its place in the clip and its latents computed again, with gradients.

        Run the backward pass of a block before asking for the next: then only what the memory's policy keeps
        is held beside one block's graph. By the clip, all blocks are yielded as one.
        """
        if self.replay_by == "clip":
            yield slice(given.known, None), self._replayed_clip(given, traces)
            return
        rollout, _ = self._begin(given)
        for trace, x0 in rollout.replay(traces):
            latents = self.plan.block(trace.block)
            yield slice(latents.start, latents.stop), x0

    def _replayed_clip(self, given: Given, traces: Sequence[Trace]) -> Tensor:
        """Return the latents of all generated blocks computed again, (b, t, c, h, w), with gradients."""
        noisy = torch.cat([trace.xt for trace in traces], dim=1)
        clean = torch.cat([given.prefix, *(trace.context for trace in traces[:-1])], dim=1)
        sigma = torch.full(noisy.shape[:2], traces[0].sigma, dtype=torch.float64, device=noisy.device)
        with torch.enable_grad():
            velocity = replayed_velocity(
                self.trained, noisy, clean=clean, sigma=sigma, clean_sigma=sigma.new_zeros(clean.shape[:2]),
                text=given.text, controls=given.walk.controls, plan=self.plan,
            )  # fmt: skip
            return x0_of(noisy, velocity, sigma=sigma)

    def _begin(self, given: Given, *, exit_step: int | None = None) -> tuple[Rollout, Walk]:
        """Return a rollout that has seen what is given, and the walk after it."""
        noise = DrawnNoise(given.noise)
        rollout = self.rollout(self.trained, noise=noise, like=given.prefix, exit_step=exit_step)
        first, rest = given.walk.cut(frames=1 + TIME_STRIDE * (given.known - 1), latents=given.known)
        rollout.prefill(given.prefix, first, text=given.text)
        return rollout, rest

    # -- scores ----------------------------------------------------------------------------------------------

    def critic_loss(self, x0: Tensor, given: Given) -> Tensor:
        """Return the flow-matching loss of the critic on generated clips (b, t, c, h, w)."""
        _, velocity = score_velocity(self.fake, x0, given, prompt="own")
        return self._denoising_loss(x0, velocity, given)

    def _denoising_loss(self, x0: Tensor, velocity: Tensor, given: Given) -> Tensor:
        weight = (given.score_sigma > 0).float()
        return flow_matching_loss(velocity, velocity_of(x0, given.score_noise), weight=weight).mean()

    @torch.no_grad()
    def gradient(self, x0: Tensor, given: Given) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the gradient that the student follows in generated clips (b, t, c, h, w), and what to log of
        it.
        """
        assert self.real is not None
        sigma = given.score_sigma
        xt, velocity = score_velocity(self.fake, x0, given, prompt="own")
        fake = x0_of(xt, velocity, sigma=sigma)
        critic = self._denoising_loss(x0, velocity, given)
        _, velocity = score_velocity(self.real.net, x0, given, prompt="own")
        if self.guidance != 1.0:
            _, plain = score_velocity(self.real.net, x0, given, prompt="none")
            velocity = guide(velocity, plain, scale=self.guidance)
        real = x0_of(xt, velocity, sigma=sigma)
        known = given.known
        gradient = dmd_gradient(x0, fake=fake, real=real, known=known)
        loss = 0.5 * gradient[:, known:].square().mean()  # of the squared form, as is common
        return gradient, {
            "train/loss_student": loss,
            "train/loss_ratio": critic / loss,
            "train/error_ratio": torch.div(*(mean_error(x0, x, known=known) for x in (fake, real))).mean(),
        }

    # -- optimisation ----------------------------------------------------------------------------------------

    @property
    def accumulates(self) -> bool:
        return self._waiting > 0

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        turn = self.turns.of(self.trainer.global_step)
        run: Any = self.student_turn if turn == "student" else self.critic_turn
        run = run if self.recorder is None else self.recorder.of(run)
        self._log(batch, run(self.given(batch), exit_step=self.scored_step()))
        self._waiting += 1
        if self._waiting == self.accumulate:
            self._waiting = 0
            self._finish(turn, batch)

    def student_turn(self, given: Given, *, exit_step: int) -> dict[str, Tensor]:
        """Roll out, score, and leave the student's gradients; return what to log."""
        x0, traces = self.roll_out(given, exit_step=exit_step)
        pull, told = self.gradient(x0, given)
        pull = pull / (self.accumulate * x0[:, given.known :].numel())
        for at, again in self.replay(given, traces):
            self._backward(with_gradient(again, pull[:, at]))
        return told | {"train/colour_drift": self.colour_drift(x0[:, given.known - 1 :])}

    def critic_turn(self, given: Given, *, exit_step: int) -> dict[str, Tensor]:
        """Roll out, and leave the critic's gradients; return what to log."""
        x0, _ = self.roll_out(given, exit_step=exit_step)
        loss = self.critic_loss(x0, given)
        self._backward(loss / self.accumulate)
        return {
            "train/loss_critic": loss.detach(),
            "train/colour_drift": self.colour_drift(x0[:, given.known - 1 :]),
        }

    def _finish(self, turn: Literal["student", "critic"], batch: Batch) -> None:
        """Take the step that the waiting gradients are for."""
        optimizers: Any = self.optimizers()
        settings: dict[str, Any] = {"clip_norm": self.clip_norm, "in_place": self.recorder is not None}
        if turn == "student":
            norm = self._step(optimizers[0], self.trained.parameters(), **settings)
            self.update_ema()
        else:
            norm = self._step(optimizers[1], self.fake.parameters(), **settings)
        steps = self.trainer.global_step
        self._log(
            batch,
            {
                f"train/grad_norm_{turn}": norm,
                "step/student": float(self.turns.student_steps(steps)),
                "step/critic": float(steps - self.turns.student_steps(steps)),
            },
        )

    def colour_drift(self, latents: Tensor) -> Tensor:
        """Return how far the colours of generated clips (b, t, c, h, w) drift from first to last block."""
        return channel_drift(latents, block_latents=self.clip.block_latents).mean()

    def _log(self, batch: Batch, values: Mapping[str, Tensor | float]) -> None:
        self.log_dict(dict(values), batch_size=len(batch.key))

    # -- measuring -------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Roll the averaged student out along true actions; compare with the true latents."""
        truth = self.clean_latents(batch)
        noise = KeyedNoise(tuple(batch.key.tolist()), (self.seed, self.stage, "validation"))
        latents = self.extend(truth[:, :1], actions=batch.actions, text=batch.text, noise=noise)
        values = {
            "val/error_latents": mean_error(truth, latents).mean(),
            "val/colour_drift": self.colour_drift(latents),
        }
        self.log_dict(values, prog_bar=True, sync_dist=True, batch_size=len(batch.key))

    test_step = validation_step
