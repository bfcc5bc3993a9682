"""`relic export`: a fitted student and its autoencoder -> the bundle that `relic.World.load` reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Literal

import torch

from relic.data.index import Index
from relic.data.picture import fitted, open_image
from relic.nn.checkpoints import read_header
from relic.nn.student import StudentConfig
from relic.ops.retention import Compressed, parse_policy
from relic.world import Scene, write_bundle

__all__ = ["export", "median_d_bar"]


def export(
    student: str,
    *,
    vae: str,
    out: str,
    data: str | None = None,
    d_bar: float | None = None,
    policy: str = "own",
    max_latents: int | None = None,
    steps: int | None = None,
    context: Literal["own", "clean", "last_step"] = "own",
    image: str | None = None,
    prompt: str = "",
    dtype: Literal["keep", "bfloat16", "int8"] = "keep",
) -> None:
    """Write a world bundle from a fitted student and its autoencoder.

    Args:
        student: The student that causal_init or self_forcing exported (safetensors).
        vae: Weights of the autoencoder that its training set was encoded with (safetensors).
        out: The bundle, a new folder.
        data: Training set, by whose index the unit of scripted motion (the median d_bar) is measured.
        d_bar: That unit itself, scene units a frame, instead of data.
        policy: Memory to play with, by default that of the training: own, full, window:8, sink_window:1:8,
            compressed:8, compressed:8:1,4,2 (its schedule). With another, measure what it remembers.
        max_latents: Bound a compressed memory to so many latents, which makes streams endless.
        steps: Denoising steps a block to play with, by default those of the training.
        context: What is committed to memory: own as in training, clean by a pass over the finished block,
            last_step by the last denoising step, which saves that pass.
        image: Picture where the world is entered unless a player brings another; cropped and scaled.
        prompt: What is there.
        dtype: Dtype of the weights in the files; keep leaves them as they are, bfloat16 rounds them to half
            the bytes, int8 the student's matrices to a quarter (the autoencoder to bfloat16).
    """
    header = read_header(student, kind="student")["config"]
    config = StudentConfig.from_header(header)
    if (data is None) == (d_bar is None):
        raise ValueError(
            "give either --data, the training set, or --d_bar, the unit of motion in scene units."
        )
    config = replace(config, policy=parse_policy(policy, own=config.policy))
    if max_latents is not None:
        if not isinstance(config.policy, Compressed):
            raise ValueError(
                f"max_latents={max_latents} bounds a compressed memory; this one is {config.policy}: give "
                "--policy compressed:LATENTS too, or leave max_latents out."
            )
        config = replace(config, policy=replace(config.policy, max_latents=max_latents))
    sampler = config.sampler if steps is None else replace(config.sampler, steps=steps)
    if context != "own":
        sampler = replace(sampler, context=context)
    config = replace(config, sampler=sampler)
    if prompt and image is None:
        raise ValueError(f"prompt={prompt!r} says what is in a picture: give --image too.")
    clip = config.clip
    scene = None
    if image is not None:
        picture = fitted(open_image(Path(image)), height=clip.height, width=clip.width)
        scene = Scene(image=torch.from_numpy(picture), prompt=prompt)
    unit = median_d_bar(data, fps=clip.fps) if data is not None else d_bar
    assert unit is not None
    write_bundle(
        out, student=student, vae=vae, d_bar=unit, config=config, scene=scene,
        dtype={"keep": None, "bfloat16": torch.bfloat16, "int8": torch.int8}[dtype],
    )  # fmt: skip
    size = sum(file.stat().st_size for file in Path(out).iterdir()) / 2**20
    endless = config.policy.repositions
    print(f"student    {student}")
    print(f"clip       {clip.height}x{clip.width}, {clip.fps} fps, blocks of {clip.block_latents} latents")
    print(f"horizon    {'none: streams are endless' if endless else f'{clip.max_frames} frames'}")
    print(f"memory     {config.policy}")
    print(f"sampler    {config.sampler}")
    print(f"d_bar      {unit:.6g} scene units a frame{f', the median of {data}' if data else ''}")
    print(f"wrote      {out}, {size:.1f} MiB")


def median_d_bar(data: str, *, fps: float) -> float:
    """Return the median over the recordings of a data set of their mean moving step, scene units a frame at
    `fps`.

    Raises:
        ValueError: If no recording translates.
    """
    # windows of a recording share its d_bar and count as one
    steps = {
        row.source or row.key: row.d_bar * row.fps / fps
        for row in Index.read(data).rows
        if row.valid and row.translates
    }
    if not steps:
        raise ValueError(f"{data} has no valid recording that translates, so no d_bar; give --d_bar instead.")
    return median(steps.values())
