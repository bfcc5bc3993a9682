"""Memory retrieval: how well a generated video shows again what had left the view.

Two modes that are never mixed. `truth`: the generated frame `now` against the true one, after a true prefix
(the headline). `self`: the generated frame `now` against the generated frame `seen`, for near-identical poses
and cameras that are estimated to have left and returned. Floors and ceilings stand beside every score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Final, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from relic.metrics.revisit import RevisitPairs, RevisitRule, find_revisits, near_identical, verified
from relic.metrics.similarity import by_chunks, check_same, psnr, sharpness, ssim
from relic.types import Clip

__all__ = ["PairScores", "RevisitScore", "SelfRevisitScore", "score_frames", "self_revisit", "truth_revisit"]

FrameScore = Callable[[Tensor, Tensor], Tensor]

GAP_BINS_S: Final = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # the last one is open
ROUNDING_DB: Final = 60.0  # a frame counts no more: 59 dB is what rounding to 8 bits leaves
ROWS: Final = ("psnr", "ssim", "lpips", "sharpness", "sharpness_truth")


class PairScores(NamedTuple):
    """Scores of frames against those they should equal, a number a pair (n,); lpips None if not measured."""

    psnr: Tensor
    ssim: Tensor
    lpips: Tensor | None
    sharpness: Tensor
    sharpness_truth: Tensor

    def keep(self, mask: Tensor) -> PairScores:
        """Return the pairs where `mask` (n,) is true."""
        lpips = None if self.lpips is None else self.lpips[mask]
        return PairScores(
            self.psnr[mask], self.ssim[mask], lpips, self.sharpness[mask], self.sharpness_truth[mask]
        )


def score_frames(frames: Tensor, wanted: Tensor, *, lpips: FrameScore | None = None) -> PairScores:
    """Score frames against the wanted ones. Both uint8 (n, h, w, 3), n may be 0 -> (n,) each, on the CPU.

    PSNR counts at most 60 dB, where rounding to 8 bits ends it, so that a few equal frames (floors show true
    ones) do not make a mean.
    lpips: from `relic.metrics.load_lpips`, or None to leave it out.
    """
    if not len(frames) and not len(wanted):
        none = torch.zeros(0)
        return PairScores(none, none, None if lpips is None else none, none, none)
    check_same(frames, wanted, name="frames", other="wanted")
    return PairScores(
        by_chunks(psnr, frames, wanted).clamp(max=ROUNDING_DB).cpu(),
        ssim(frames, wanted).cpu(),
        None if lpips is None else lpips(frames, wanted).cpu(),
        sharpness(frames).cpu(),
        sharpness(wanted).cpu(),
    )


def truth_revisit(
    pairs: RevisitPairs,
    generated: Tensor,
    truth: Tensor,
    *,
    reconstruction: Tensor | None = None,
    lpips: FrameScore | None = None,
) -> dict[str, PairScores]:
    """Score revisits against the true frames, with what stands beside them.

    `generated`; the floors `copy_first` (the first true frame) and `nearest_seen` (the true frame `seen`,
    shown at `now`: a perfect lookup, which exact returns make the truth); the ceiling `autoencoder` if a
    reconstruction is given. Videos: uint8 (f, h, w, 3).

    Raises:
        ValueError: If lengths or sizes differ.
    """
    check_same(generated, truth, name="generated")
    now, seen = pairs.now.to(truth.device), pairs.seen.to(truth.device)
    wanted = truth[now]
    shown = {
        "generated": generated[pairs.now.to(generated.device)].to(truth.device),
        "copy_first": truth[:1].expand(len(now), -1, -1, -1),
        "nearest_seen": truth[seen],
    }
    if reconstruction is not None:
        check_same(reconstruction, truth, name="reconstruction")
        shown["autoencoder"] = reconstruction[pairs.now.to(reconstruction.device)].to(truth.device)
    return {name: score_frames(frames, wanted, lpips=lpips) for name, frames in shown.items()}


def self_revisit(
    pairs: RevisitPairs,
    generated: Tensor,
    truth: Tensor,
    *,
    reconstruction: Tensor | None = None,
    lpips: FrameScore | None = None,
) -> dict[str, PairScores]:
    """Score revisits against what the same video showed before.

    Give it near-identical (`near_identical`) and verified (`verified`) pairs only: a frozen video is alike at
    any pair. `generated`; the floor `away` (the generated frame that sees least of the view, shown at `now`:
    a camera that does not return); the ceiling `truth` (true frames `now` against `seen`), and `autoencoder`
    (the same of a reconstruction) if one is given. Videos: uint8 (f, h, w, 3).

    Raises:
        ValueError: If lengths or sizes differ.
    """
    check_same(generated, truth, name="generated")
    shown = {
        "generated": (generated, pairs.now), "away": (generated, pairs.away), "truth": (truth, pairs.now),
    }  # fmt: skip
    if reconstruction is not None:
        check_same(reconstruction, truth, name="reconstruction")
        shown["autoencoder"] = (reconstruction, pairs.now)
    return {
        name: score_frames(video[at.to(video.device)], video[pairs.seen.to(video.device)], lpips=lpips)
        for name, (video, at) in shown.items()
    }


class _PairMeans(Metric):
    """Sums of pair scores by column (what is shown) and by gap, over clips and processes."""

    is_differentiable = False
    full_state_update = False
    columns: ClassVar[tuple[str, ...]]  # what is shown, the score itself first
    totals: Tensor
    counts: Tensor
    gap_totals: Tensor
    gap_counts: Tensor
    pairs: Tensor
    clips: Tensor
    no_pair: Tensor
    did_not_move: Tensor
    unverified: Tensor

    def __init__(
        self,
        *,
        rule: RevisitRule | None = None,
        lpips: FrameScore | None = None,
        gap_bins_s: Sequence[float] = GAP_BINS_S,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        edges = list(gap_bins_s)
        if not edges or edges[0] < 0 or any(a >= b for a, b in pairwise(edges)):
            raise ValueError(f"gap_bins_s={tuple(edges)} must rise from 0 or more; use {GAP_BINS_S}.")
        self.rule, self.lpips = rule or RevisitRule(), lpips
        self.gap_bins_s = tuple(edges)
        shapes = {
            "totals": (len(ROWS), len(self.columns)), "counts": (len(self.columns),),
            "gap_totals": (len(self.columns), len(edges)), "gap_counts": (len(self.columns), len(edges)),
        }  # fmt: skip
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("pairs", "clips", "no_pair", "did_not_move", "unverified"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _add(self, scored: Mapping[str, PairScores], gap: Tensor) -> None:
        edges = torch.tensor(self.gap_bins_s, dtype=torch.float64)
        bins = torch.bucketize(gap.cpu(), edges, right=True) - 1
        inside = bins >= 0
        for name, scores in scored.items():
            column = self.columns.index(name)
            for row, values in enumerate(scores):
                if values is not None:
                    self.totals[row, column] += values.double().sum().to(self.totals.device)
            self.counts[column] += len(gap)
            for target, values in ((self.gap_totals, scores.psnr.double()), (self.gap_counts, gap * 0 + 1)):
                target[column].index_add_(0, bins[inside].to(target.device), values[inside].to(target.device))

    def _counted(self, *names: str) -> dict[str, Tensor]:
        return {f"memory/{name}": getattr(self, name) for name in names}

    def _means(self, suffix: str) -> dict[str, Tensor]:
        """Return `memory/<score>_<suffix>[_<column>]` and the curve; the first column is the score itself."""
        found: dict[str, Tensor] = {}
        means = self.totals / self.counts
        ratio = means[ROWS.index("sharpness")] / means[ROWS.index("sharpness_truth")]
        named = {f"{row}_{suffix}": means[ROWS.index(row)] for row in ("psnr", "ssim", "lpips")}
        if self.lpips is None:
            del named[f"lpips_{suffix}"]
        named["sharpness_ratio" if suffix == "revisit" else f"sharpness_ratio_{suffix}"] = ratio
        for column, beside in enumerate(self.columns):
            if column and not self.counts[column]:
                continue  # not given
            tail = f"_{beside}" if column else ""
            found |= {f"memory/{name}{tail}": values[column] for name, values in named.items()}
            for index, low in enumerate(self.gap_bins_s):
                if self.gap_counts[column, index]:
                    high = self.gap_bins_s[index + 1] if index + 1 < len(self.gap_bins_s) else None
                    span = f"{low:g}s_up" if high is None else f"{low:g}_{high:g}s"
                    mean = self.gap_totals[column, index] / self.gap_counts[column, index]
                    found[f"memory/psnr_{suffix}{tail}_after_{span}"] = mean
        return found


class RevisitScore(_PairMeans):
    """Accumulate the headline: revisits of a generated video against the truth, after a true prefix.

    `compute` returns means over all pairs of all clips, each pair counted once:

    | name | what it is |
    |---|---|
    | `memory/psnr_revisit`, `memory/ssim_revisit`, `memory/lpips_revisit` | at all revisits; LPIPS if given |
    | `memory/sharpness_ratio` | mean sharpness there over that of the truth |
    | `…_moved` | the same over pairs whose estimated camera left and returned, where estimates are given |
    | `…_copy_first`, `…_nearest_seen` | floors: the first true frame or the true frame `seen` instead |
    | `…_autoencoder` | ceiling: the reconstructed truth, where it is given |
    | `memory/psnr_revisit…_after_2_4s` | by seconds out of sight, bins that hold pairs only |
    | `memory/pairs`, `memory/clips` | pairs scored, clips given |
    | `memory/no_pair` | clips whose path has no revisit: not scored |
    | `memory/did_not_move` | clips with revisits, none of them verified on the estimated camera |
    | `memory/unverified` | clips with revisits for which no estimate was given |

    A clip that did not move keeps its (bad) score in the headline: the truth says what should be there.
    Without any pair the scores are NaN.

    Args:
        rule: What counts as a revisit.
        lpips: From `load_lpips`; None leaves LPIPS out.
        gap_bins_s: Lower edges of the bins of seconds out of sight; the last bin is open.
    """

    columns = ("generated", "moved", "copy_first", "nearest_seen", "autoencoder")

    def update(
        self,
        generated: Tensor,
        truth: Clip,
        *,
        prefix_frames: int,
        estimated_c2w: Tensor | None = None,
        reconstruction: Tensor | None = None,
    ) -> None:
        """Add a clip.

        Args:
            generated: uint8 (f, h, w, 3), its first `prefix_frames` frames true.
            truth: The clip it should equal, with its own `d_bar`.
            prefix_frames: True frames; only what they saw can be remembered.
            estimated_c2w: (f, 4, 4) the camera of the generated video, aligned to the truth, NaN where not
                registered; None if it was not estimated.
            reconstruction: uint8 (f, h, w, 3), the truth through the autoencoder.

        Raises:
            ValueError: If lengths or sizes differ.
        """
        check_same(generated, truth.video, name="generated")
        pairs = _find(truth, self.rule, prefix_frames=prefix_frames)
        self.clips += 1
        if not len(pairs.now):
            self.no_pair += 1
            return
        self.pairs += len(pairs.now)
        scored = truth_revisit(pairs, generated, truth.video, reconstruction=reconstruction, lpips=self.lpips)
        self._add(scored, pairs.gap)
        if estimated_c2w is None:
            self.unverified += 1
            return
        kept = _verify(pairs, estimated_c2w, truth, self.rule)
        self.did_not_move += int(not len(kept.now))
        mask = torch.isin(pairs.now, kept.now)
        self._add({"moved": scored["generated"].keep(mask)}, kept.gap)

    def compute(self) -> dict[str, Tensor]:
        """Return the means so far, by name."""
        return self._means("revisit") | self._counted(
            "pairs", "clips", "no_pair", "did_not_move", "unverified"
        )


class SelfRevisitScore(_PairMeans):
    """Accumulate how well generated videos equal what they showed before, at near-identical poses.

    Only pairs whose estimated camera left and returned are scored. `compute` returns, over all of them:

    | name | what it is |
    |---|---|
    | `memory/psnr_self`, `memory/ssim_self`, `memory/lpips_self` | at all verified pairs; LPIPS if given |
    | `memory/sharpness_ratio_self` | mean sharpness of `now` over that of `seen` |
    | `…_away` | floor: the generated frame that sees least of the view, shown at `now` |
    | `…_truth`, `…_autoencoder` | ceilings: true frames, and reconstructed ones where they are given |
    | `memory/psnr_self…_after_2_4s` | by seconds out of sight |
    | `memory/pairs_self`, `memory/clips_self`, `memory/no_pair_self` | pairs scored, clips, those without |
    | `memory/did_not_move_self` | clips with pairs, none of them verified: counted, not scored |

    Args:
        rule: What counts as a revisit, and as near-identical.
        lpips: From `load_lpips`; None leaves LPIPS out.
        gap_bins_s: Lower edges of the bins of seconds out of sight; the last bin is open.
    """

    columns = ("generated", "away", "truth", "autoencoder")

    def update(
        self,
        generated: Tensor,
        truth: Clip,
        *,
        estimated_c2w: Tensor,
        prefix_frames: int = 1,
        reconstruction: Tensor | None = None,
    ) -> None:
        """Add a clip; the arguments are those of `RevisitScore.update`, the estimate is needed.

        Raises:
            ValueError: If lengths or sizes differ.
        """
        check_same(generated, truth.video, name="generated")
        pairs = _find(truth, self.rule, prefix_frames=None)
        pairs = near_identical(pairs, truth.c2w, rule=self.rule, d_bar=truth.d_bar)
        pairs = pairs.keep(pairs.now >= prefix_frames)
        self.clips += 1
        if not len(pairs.now):
            self.no_pair += 1
            return
        kept = _verify(pairs, estimated_c2w, truth, self.rule)
        self.did_not_move += int(not len(kept.now))
        self.pairs += len(kept.now)
        scored = self_revisit(kept, generated, truth.video, reconstruction=reconstruction, lpips=self.lpips)
        self._add(scored, kept.gap)

    def compute(self) -> dict[str, Tensor]:
        """Return the means so far, by name."""
        counts = self._counted("pairs", "clips", "no_pair", "did_not_move")
        return self._means("self") | {f"{name}_self": count for name, count in counts.items()}


def _size(clip: Clip) -> tuple[int, int]:
    return clip.video.shape[1], clip.video.shape[2]


def _find(clip: Clip, rule: RevisitRule, *, prefix_frames: int | None) -> RevisitPairs:
    if len(clip.c2w) != len(clip.video):
        raise ValueError(
            f"truth has {len(clip.video)} frames and {len(clip.c2w)} poses; a clip has a pose a frame."
        )
    return find_revisits(
        clip.c2w, clip.intrinsics_px, fps=clip.fps, size=_size(clip), rule=rule, d_bar=clip.d_bar,
        prefix_frames=prefix_frames,
    )  # fmt: skip


def _verify(pairs: RevisitPairs, estimated_c2w: Tensor, clip: Clip, rule: RevisitRule) -> RevisitPairs:
    if estimated_c2w.shape != clip.c2w.shape:
        raise ValueError(
            f"estimated_c2w is {tuple(estimated_c2w.shape)}, the clip's poses are {tuple(clip.c2w.shape)}; "
            "give a row for every frame, NaN where it is not registered."
        )
    return verified(
        pairs, estimated_c2w, intrinsics_px=clip.intrinsics_px, size=_size(clip), d_bar=clip.d_bar, rule=rule
    )
