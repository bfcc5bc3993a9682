"""How well are camera poses found in true video? Coverage, floor by action and seconds a clip.

Clips are the engine's own paths, a scene each. Translations are in mean steps (d̄), rotations in degrees; `_8`
is over 8 frames, so that 0.8 there is a tenth of the way. With `--through` the clips pass through the
autoencoder of a world first, as all that it generates does.

    python benchmarks/estimator.py                       # all three sets, about five minutes
    python benchmarks/estimator.py --sets 128x256:81:24  # height x width : frames : clips
    python benchmarks/estimator.py --sets 128x256:81:24 --through tiny
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np
import torch
from machine import describe_machine

from relic.engine import Camera, choose_backend, intrinsics_of, make_scene, make_trajectory
from relic.metrics.pose import PoseEstimator, VisualOdometry
from relic.metrics.trajectory_error import ActionError, TooFewSteps, relative_pose_error
from relic.ops.actions import mean_step
from relic.suite.play import reconstruct
from relic.types import TIME_STRIDE, Clip
from relic.world import World

SCORES = ("rpe_trans", "rpe_rot_deg", "rpe_trans_8", "rpe_rot_deg_8")
SEED = 2077  # not the scenes that the thresholds of visual odometry were chosen on


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", default=["128x256:81:24", "480x832:81:8", "128x256:321:4"])
    parser.add_argument("--through", help="a world, whose autoencoder the clips pass through")
    parser.add_argument("--clips", action="store_true", help="a line for each clip, too")
    args = parser.parse_args()
    world = World.load(args.through) if args.through else None
    print(describe_machine())
    print(f"engine: {choose_backend()}{f', through {args.through}' if world else ''}")
    for number, words in enumerate(args.sets):
        size, frames, count = words.split(":")
        height, width = map(int, size.split("x"))
        clips = film((height, width), frames=int(frames), count=int(count), first=100 * number)
        if world is not None:
            clips = decoded(clips, world)
        measure(words, clips, VisualOdometry(), each=args.clips)


def film(size: tuple[int, int], *, frames: int, count: int, first: int) -> Iterator[Clip]:
    """Yield clips of the engine's own paths, a scene each."""
    for number in range(count):
        scene = make_scene(SEED, first + number)
        c2w = make_trajectory(scene, seed=number, frames=frames)
        with Camera(scene, size=size) as camera:
            video = torch.from_numpy(np.stack([camera.picture(pose) for pose in c2w.numpy()]))
        yield Clip(video, c2w, intrinsics_of(size), fps=16.0, d_bar=mean_step(c2w)[0])


def decoded(clips: Iterator[Clip], world: World) -> Iterator[Clip]:
    """Yield clips as the autoencoder of a world shows them, in the stretches that it would generate."""
    stretch = TIME_STRIDE * world.config.clip.block_latents
    for clip in clips:
        yield clip._replace(video=reconstruct(world.vae, clip.video, block_frames=stretch))


def measure(name: str, clips: Iterator[Clip], estimator: PoseEstimator, *, each: bool) -> None:
    """Print the table of one set."""
    metric, seconds, medians = ActionError(), [], {"trans": [], "rot": []}
    for number, clip in enumerate(clips):
        start = time.process_time()
        found = estimator.estimate(clip.video, intrinsics_px=clip.intrinsics_px)
        seconds.append(time.process_time() - start)
        metric.update(found.c2w, clip.c2w, d_bar=clip.d_bar)
        try:
            errors = relative_pose_error(found.c2w, clip.c2w, delta=8, d_bar=clip.d_bar)
        except TooFewSteps:
            errors = None
        if errors is not None:
            medians["trans"].append(float(errors.trans[errors.valid].mean()))
            medians["rot"].append(float(errors.rot_deg[errors.valid].mean()))
        if each:
            score = "" if errors is None else f"{medians['trans'][-1]:8.3f} {medians['rot'][-1]:8.3f}"
            print(f"  {number:3} {int(found.registered.sum()):4} {score} {seconds[-1]:6.1f} s", flush=True)
    scores = {key.removeprefix("action/"): float(value) for key, value in metric.compute().items()}
    print(f"\n{name}: coverage {scores['coverage']:.3f}, {scores['unscored']:.0f} unscored, ", end="")
    print(f"ATE {scores['ate']:.2f} d̄, {np.mean(seconds):.1f} s a clip, at most {max(seconds):.1f}")
    print(
        f"median clip over 8 frames: {np.nanmedian(medians['trans']):.3f} d̄, {np.median(medians['rot']):.3f}°"
    )
    print(f"{'':<16}" + "".join(f"{score:>16}" for score in SCORES))
    buckets = [""] + [f"/{key.split('/')[1]}" for key in scores if key.startswith("rpe_rot_deg/")]
    for bucket in buckets:
        cells = "".join(f"{scores.get(score + bucket, np.nan):16.3f}" for score in SCORES)
        print(f"{bucket.removeprefix('/') or 'all':<16}{cells}", flush=True)


if __name__ == "__main__":
    main()
