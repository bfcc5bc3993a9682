"""`relic ode-pairs`: a teacher and latents -> shards of ODE solutions, from which a student starts."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from relic.data.trajectories import PairsSettings, write_pairs
from relic.modules import TeacherExtension
from relic.nn.checkpoints import file_sha256
from relic.nn.student import FewSteps
from relic.ops.actions import controls_of
from relic.ops.flow import steps_to

__all__ = ["ode_pairs"]


def ode_pairs(
    teacher: str,
    *,
    latents: str,
    out: str,
    horizon: tuple[int, ...] = (81,),
    windows: int | None = None,
    prefix_share: float = 0.0,
    student_steps: int = 4,
    steps: int | None = None,
    shift: float | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch: int = 1,
    per_shard: int = 16,
    part: tuple[int, int] = (0, 1),
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Solve a teacher's flow ODE for windows of latents. Stopped, it goes on when started again.

    Args:
        teacher: Weights of the teacher (safetensors); of the longest horizon that is solved.
        latents: Folder or fsspec URL of the latents, with their index: first latents, actions and captions.
        out: Folder of the shards of solutions.
        horizon: Frames of the solutions, 4k+1; several are allowed.
        windows: Solutions of each horizon, spread over scenes; by default every window.
        prefix_share: Share of the shards whose solutions go on from more than the image: from blocks of the
            window, as many in the whole shard; for a teacher that was fitted with prefix_share.
        student_steps: Denoising steps of the student; states are kept at its noise levels.
        steps: Euler steps, a multiple of student_steps; by default the teacher's.
        shift: Warp of the noise levels of teacher and student towards noise; by default the teacher's.
        guidance: Classifier-free guidance on the text; by default the teacher's.
        seed: Of the noise, and of which windows are taken.
        batch: Windows solved at a time.
        per_shard: Solutions in a shard: what a stopped run may have to do again.
        part: Number, from 0, and count of processes that share the work, each given its own number.
        device: Where to solve; auto takes a GPU if there is one, and bf16 there.
    """
    place = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu")
    if device != "auto":
        place = torch.device(device)
    module = TeacherExtension.from_file(teacher)
    if module.net_config.control is None:
        raise ValueError(
            f"{teacher} has no control, so its student could not be steered; fit a teacher with net.control."
        )
    if prefix_share and not module.prefix_share:
        raise ValueError(
            f"prefix_share={prefix_share}, but {teacher} continues one image only; fit a teacher with "
            "prefix_share, or leave it 0."
        )
    wanted = {"steps": steps, "shift": shift, "guidance": guidance}
    chosen = {name: value for name, value in wanted.items() if value is not None}
    sampler = dataclasses.replace(module.sampler, **chosen)  # type: ignore[arg-type]
    levels = FewSteps(steps=student_steps, shift=sampler.shift).levels
    steps_to(levels, steps=sampler.steps, shift=sampler.shift)  # fails before time is spent
    net = module.trained.to(place)

    @torch.inference_mode()
    def solve(noise: Tensor, *, given: Tensor, actions: Tensor, text: Tensor) -> Tensor:
        with torch.autocast(place.type, torch.bfloat16, enabled=place.type == "cuda"):
            return sampler.trajectory(
                net,
                noise.to(place),
                levels=levels,
                given=given.to(place),
                text=text.to(place),
                controls=controls_of(actions.to(place)),
            )

    settings = PairsSettings(
        horizons=tuple(horizon),
        windows=windows,
        prefix_share=prefix_share,
        per_shard=per_shard,
        seed=seed,
        levels=levels,
        sampler=dataclasses.asdict(sampler),
        teacher_sha256=file_sha256(teacher),
    )
    with tqdm(unit=" windows", desc="ode-pairs") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        index = write_pairs(
            latents,
            out,
            solve=solve,
            settings=settings,
            clip=module.clip,
            words=module.net_config.text_length,
            batch=batch,
            part=part,
            progress=show,
        )
    print(f"Wrote {index}" if index else f"Wrote part {part[0]} of {part[1]} to {out}; others are to come.")
