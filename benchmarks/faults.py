"""Do the scores react to planted faults? Engine clips of out-and-back paths, broken on purpose.

Each fault is what a broken model would give after the same true prefix. Truth mode compares with the true
frame; self mode with what was shown before; action errors compare the camera after the prefix with the
commanded one. It is found by visual odometry, as in an evaluation, or with `--cameras planted` known.

    python benchmarks/faults.py --clips 6 --lpips alexnet.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from machine import describe_machine
from torch import Tensor

from relic.engine import film, make_scene, make_trajectory
from relic.metrics import (
    ActionError,
    LPIPSUnavailable,
    RevisitRule,
    RevisitScore,
    SelfRevisitScore,
    VisualOdometry,
    anchor_to,
    load_lpips,
)
from relic.ops.actions import integrate, mirror_actions, parse_script
from relic.ops.video import to_uint8
from relic.types import Clip

D_BAR = 0.05  # m
SCRIPTS = (  # out and back, past the first view; the prefix ends where the camera turns back
    ("pan_left*16 pan_right*48", "pan_left*48"),
    ("pan_right*12 tilt_up*8 pan_left*40 static*4", "pan_right*40 tilt_down*8"),
    ("pan_left*16 roll_cw*8 pan_right*40", "pan_left*40 roll_ccw*8"),
)


class Case(NamedTuple):
    """A clip, its path through another scene, other paths after the prefix, and how many frames that has."""

    clip: Clip
    elsewhere: Clip
    mirrored: Clip
    half_turned: Clip
    prefix_frames: int


class Outcome(NamedTuple):
    """What a broken model shows, uint8 (f, h, w, 3), and its camera, (f, 4, 4), NaN where none is found."""

    video: Tensor
    c2w: Tensor


def truth(case: Case) -> Outcome:
    return Outcome(case.clip.video, case.clip.c2w)


def noisy_truth(case: Case) -> Outcome:
    """Return the truth with noise of 8 grey levels: a good model."""
    noise = torch.randn(case.clip.video.shape, generator=torch.Generator().manual_seed(0))
    noisy = (case.clip.video + 8 * noise).round().clamp(0, 255).to(torch.uint8)
    return _after_prefix(case, noisy, case.clip.c2w)


def frozen_camera(case: Case) -> Outcome:
    """Return the last true frame, for ever."""
    last = torch.full((len(case.clip.video),), case.prefix_frames - 1)
    return _after_prefix(case, case.clip.video[last], case.clip.c2w[last])


def frozen_first_frame(case: Case) -> Outcome:
    """Return the first frame from the start, prefix or not: a camera at the identity."""
    first = torch.zeros(len(case.clip.video), dtype=torch.int64)
    return Outcome(case.clip.video[first], torch.eye(4, dtype=torch.float64).expand(len(first), -1, -1))


def grey_blur(case: Case) -> Outcome:
    """Return a grey picture with a trace of the truth, in which no camera is found."""
    grey = rearrange(case.clip.video, "f h w c -> f c h w").float().mean(1, keepdim=True) / 127.5 - 1
    size = grey.shape[-2:]
    small = F.adaptive_avg_pool2d(grey, (2, 3)) * 0.25
    smooth = F.interpolate(small, size=size, mode="bilinear").expand(-1, 3, -1, -1)
    return _after_prefix(case, to_uint8(smooth), torch.full_like(case.clip.c2w, torch.nan))


def another_scene(case: Case) -> Outcome:
    """Return the right motion through the wrong place."""
    return _after_prefix(case, case.elsewhere.video, case.clip.c2w)


def shuffled_return(case: Case) -> Outcome:
    """Return the true frames behind the prefix in any order."""
    behind = len(case.clip.video) - case.prefix_frames
    order = torch.randperm(behind, generator=torch.Generator().manual_seed(0)) + case.prefix_frames
    order = torch.cat([torch.arange(case.prefix_frames), order])
    return Outcome(case.clip.video[order], case.clip.c2w[order])


def dropped_frames(case: Case) -> Outcome:
    """Return every second frame behind the prefix, and hold the last one: twice too fast."""
    frames = torch.arange(len(case.clip.video))
    behind = case.prefix_frames - 1 + 2 * (frames - case.prefix_frames + 1)
    order = torch.where(frames < case.prefix_frames, frames, behind).clamp(max=len(frames) - 1)
    return Outcome(case.clip.video[order], case.clip.c2w[order])


def mirrored_actions(case: Case) -> Outcome:
    """Return the right place, turned the other way."""
    return _after_prefix(case, case.mirrored.video, case.mirrored.c2w)


def half_the_turn(case: Case) -> Outcome:
    """Return the right place, turned half as far."""
    return _after_prefix(case, case.half_turned.video, case.half_turned.c2w)


FAULTS: Mapping[str, Callable[[Case], Outcome]] = {
    "truth": truth,
    "truth with noise": noisy_truth,
    "return path shuffled": shuffled_return,
    "actions mirrored": mirrored_actions,
    "turned half as far": half_the_turn,
    "frames dropped": dropped_frames,
    "truth from another scene": another_scene,
    "frozen camera": frozen_camera,
    "frozen first frame": frozen_first_frame,
    "grey blur": grey_blur,
}


def make_cases(clips: int, *, size: tuple[int, int], seed: int = 7) -> list[Case]:
    """Film out-and-back paths that turn on the spot, each in a scene of its own and in the next one."""
    cases = []
    for number in range(clips):
        out, back = SCRIPTS[number % len(SCRIPTS)]
        actions = parse_script(f"{out} {back}")
        prefix = len(parse_script(out))
        mirrored, half = actions.clone(), actions.clone()
        mirrored[prefix:] = mirror_actions(actions[prefix:])
        half[prefix:, 6:12] /= 2
        paths = [(number, actions), (number + clips, actions), (number, mirrored), (number, half)]
        filmed = []
        for index, steer in paths:
            scene = make_scene(seed, index)
            start = make_trajectory(scene, seed=0, frames=1)
            path = start @ integrate(steer, d_bar=D_BAR)
            filmed.append(film(scene, path, size=size)._replace(d_bar=D_BAR))
        cases.append(Case(*filmed, prefix_frames=prefix))
    return cases


def score(
    cases: Sequence[Case],
    fault: Callable[[Case], Outcome],
    *,
    rule: RevisitRule,
    lpips: Callable | None,
    estimated: bool = False,
) -> dict[str, float]:
    """Return the scores of both modes and of action following, by name, over all cases."""
    by_truth, by_self = RevisitScore(rule=rule, lpips=lpips), SelfRevisitScore(rule=rule, lpips=lpips)
    by_action = ActionError()
    for case in cases:
        shown, clip = fault(case), case.clip
        c2w = shown.c2w
        if estimated:
            found = VisualOdometry().estimate(shown.video, intrinsics_px=clip.intrinsics_px)
            c2w = anchor_to(found.c2w, clip.c2w)
        settings = {"estimated_c2w": c2w, "prefix_frames": case.prefix_frames}
        by_truth.update(shown.video, clip, **settings)
        by_self.update(shown.video, clip, **settings)
        behind = slice(case.prefix_frames - 1, None)
        by_action.update(c2w[behind], clip.c2w[behind], d_bar=D_BAR)
    scores = by_truth.compute() | by_self.compute() | by_action.compute()
    return {name: float(value) for name, value in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--size", type=int, nargs=2, default=[128, 256])
    parser.add_argument("--cameras", choices=["estimated", "planted"], default="estimated")
    parser.add_argument("--lpips", help="file with torchvision's AlexNet; by default torch's cache")
    args = parser.parse_args()
    rule = RevisitRule()
    print(describe_machine())
    print(f"{args.clips} clips at {args.size[0]}x{args.size[1]}, cameras {args.cameras}; revisits: {rule}")
    lpips = None
    try:
        lpips = load_lpips(args.lpips)
    except LPIPSUnavailable as error:
        print(error)
    cases = make_cases(args.clips, size=tuple(args.size))
    estimated = args.cameras == "estimated"
    table = {
        name: score(cases, fault, rule=rule, lpips=lpips, estimated=estimated)
        for name, fault in FAULTS.items()
    }
    shown = [
        "memory/psnr_revisit", "memory/ssim_revisit", "memory/lpips_revisit", "memory/sharpness_ratio",
        "memory/did_not_move", "memory/psnr_self", "memory/did_not_move_self", "memory/pairs_self",
        "action/rpe_rot_deg", "action/rpe_rot_deg_8", "action/coverage",
    ]  # fmt: skip
    print(f"\n| fault | {' | '.join(shown)} |\n|{'---|' * (len(shown) + 1)}")
    for name, scores in table.items():
        print(f"| {name} | {' | '.join(_cell(scores.get(column)) for column in shown)} |")
    print("\nfloors and ceilings (of the truth):")
    for name, value in table["truth"].items():
        if name.endswith(("_copy_first", "_nearest_seen", "_self_away", "_self_truth")):
            print(f"  {name:<44} {_cell(value)}")


def _after_prefix(case: Case, video: Tensor, c2w: Tensor) -> Outcome:
    """Put the true prefix before what is shown."""
    n = case.prefix_frames
    return Outcome(torch.cat([case.clip.video[:n], video[n:]]), torch.cat([case.clip.c2w[:n], c2w[n:]]))


def _cell(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.3f}".rstrip("0").rstrip(".")


if __name__ == "__main__":
    main()
