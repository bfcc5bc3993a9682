"""The scores of self-forcing: a teacher, and the critic that starts from it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from relic.nn.checkpoints import WeightsSource, load_weights, read_header
from relic.nn.denoiser import Denoiser
from relic.nn.dit import DiTConfig
from relic.nn.student import StudentConfig
from relic.ops.flow import add_noise
from relic.parallel import Compute, apply_compute, shard_network
from relic.rollout import Walk

__all__ = ["Given", "build_score", "check_teacher", "score_velocity"]


class Given(NamedTuple):
    """What a turn computes with: tensors that were drawn and walked before, so that it never asks the host.

    prefix: (b, t', c, h, w) true first latents, the image or more; text: prompts; walk: of all frames; noise:
    (blocks, steps, b, t, c, h, w) of the rollout; score_noise, score_sigma: (b, t, c, h, w) and (b, t), of
    scoring.
    """

    prefix: Tensor
    text: Tensor
    walk: Walk
    noise: Tensor
    score_noise: Tensor
    score_sigma: Tensor

    @property
    def known(self) -> int:
        """How many latents are given."""
        return self.prefix.shape[1]


def check_teacher(path: str, student: StudentConfig, *, rope_factor: float) -> None:
    """Compare a teacher's header with a student and its horizon, before time is spent.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else, or a teacher of other sizes or another horizon.
    """
    header = read_header(path, kind="teacher")["config"]
    sizes = dataclasses.asdict(student.net) | {"rope_factor": rope_factor}
    found = dataclasses.asdict(DiTConfig.from_dict(header["dit"]))
    pairs = {f"net.{name}": (found[name], value) for name, value in sizes.items()}
    pairs["words"] = header["words"], dataclasses.asdict(student.words) if student.words else None
    wrong = [
        f"{name} is {there} there, {here} here" for name, (there, here) in pairs.items() if there != here
    ]
    if wrong:
        raise ValueError(
            f"The teacher {path} has other sizes than the student: {'; '.join(wrong)}. Give the teacher that "
            "the student comes from, and its YaRN factor as teacher_rope_factor."
        )
    clip = student.clip
    there = header["clip"]["height"], header["clip"]["width"], max(header["clip"]["horizons"])
    here = clip.height, clip.width, clip.max_frames
    if there != here:
        sizes_of = "{}x{}, {} frames".format
        raise ValueError(
            f"The teacher {path} was fitted on clips of {sizes_of(*there)}, this stage rolls out "
            f"{sizes_of(*here)}: it would score what it never saw. Give the teacher of this horizon, or set "
            "data.clip to its clips."
        )


def build_score(
    source: WeightsSource,
    student: StudentConfig,
    *,
    rope_factor: float,
    plan: Compute,
    mesh: DeviceMesh | None,
    device: torch.device,
) -> Denoiser:
    """Return the teacher of a student, executed as `plan` says and sharded over `mesh`.

    On the meta device nothing is loaded.
    """
    with torch.device("meta"):  # loaded in a moment, each rank its part
        net = Denoiser(dataclasses.replace(student.net, rope_factor=rope_factor), student.words)
    apply_compute(net.dit, plan)
    if mesh is not None:
        shard_network(net, net.dit.blocks, mesh=mesh, plan=plan)
    if device.type != "meta":
        load_weights(net, source, kind="teacher", device=device)
    return net


def score_velocity(
    net: Any, x0: Tensor, given: Given, *, prompt: Literal["own", "none"]
) -> tuple[Tensor, Tensor]:
    """Return what a score is given, clips x0 (b, t, c, h, w) with noise, and its velocity there.

    prompt: the clips' own, or `none` for guidance.
    """
    xt = add_noise(x0, given.score_noise, sigma=given.score_sigma)
    drop = None if prompt == "own" else torch.ones(len(x0), dtype=torch.bool, device=x0.device)
    velocity = net(xt, sigma=given.score_sigma, text=given.text, controls=given.walk.controls, drop_text=drop)
    return xt, velocity
