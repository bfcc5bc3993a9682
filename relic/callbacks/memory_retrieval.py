"""Does the model remember? Revisits of generated clips, scored while it trains."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from relic.callbacks.panel import add_picture
from relic.callbacks.recordings import Recordings
from relic.callbacks.scoring import Generated, Scoring
from relic.metrics.pose.estimator import PoseEstimator, anchor_to
from relic.metrics.retrieval import RevisitScore, SelfRevisitScore
from relic.metrics.revisit import RevisitRule, find_revisits
from relic.metrics.similarity import LPIPS, LPIPSUnavailable, load_lpips
from relic.types import TIME_STRIDE, Clip

__all__ = ["MemoryRetrieval"]


class _TakesImageOnly(Exception):
    """The module has refused a longer prefix."""


class MemoryRetrieval(Scoring):
    """Score what a module shows where the camera comes back, after a true prefix (`RevisitScore`).

    Logs `memory/psnr_revisit`, `memory/ssim_revisit`, `memory/lpips_revisit`, `memory/sharpness_ratio` and
    what stands beside them. A module that takes the image only (its `generate` raises NotImplementedError for
    a longer prefix, as a bidirectional teacher does) is scored against what it showed itself instead
    (`SelfRevisitScore`): `memory/psnr_self` and so on. Choose paths that leave and come back.

    Args:
        clips: A data set of recordings, or clips. With several ranks, of one length.
        prefix_frames: True frames that each clip starts from; None for half of it, in whole blocks.
        rule: What counts as a revisit; None for the defaults of `RevisitRule`.
        lpips: File with torchvision's AlexNet; None for torch's cache. If there is none LPIPS is left out,
            and said so.
        every_n_validations: Score after the first validation and every n-th from there.
        max_seconds: No further clips are generated after so long.
        shown: Clips whose videos go to TensorBoard.
        estimator: Finds cameras, to say whether they left and returned; None for `VisualOdometry`.
        seed: Seed of the noise.
    """

    name = "memory"

    def __init__(
        self,
        clips: Recordings | Sequence[Clip],
        *,
        prefix_frames: int | None = None,
        rule: RevisitRule | None = None,
        lpips: str | None = None,
        every_n_validations: int = 1,
        max_seconds: float | None = None,
        shown: int = 2,
        estimator: PoseEstimator | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            clips, every_n_validations=every_n_validations, max_seconds=max_seconds, shown=shown,
            estimator=estimator, seed=seed,
        )  # fmt: skip
        if prefix_frames is not None and prefix_frames % TIME_STRIDE != 1:
            raise ValueError(f"prefix_frames={prefix_frames} must be 4k+1: one image, then groups of four.")
        self.prefix, self.rule, self.backbone = prefix_frames, rule or RevisitRule(), lpips
        self.lpips: LPIPS | None = None
        self.image_only = False  # whether the module takes no longer prefix
        self._reconstructions: dict[int, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.clips or stage == "predict":
            return
        super().setup(trainer, pl_module, stage)
        shortest = min(self.clips, key=lambda clip: len(clip.video))
        frames = len(shortest.video)
        if self.prefix is not None and self.prefix >= frames:
            raise ValueError(
                f"prefix_frames={self.prefix} leaves nothing to generate of clips of {frames} frames."
            )
        if self.prefix is None and self.prefix_frames(shortest, pl_module) == 1:
            raise ValueError(
                f"half a clip of {frames} frames is less than a block, which leaves no prefix but the image; "
                "take longer clips, or ask for that with prefix_frames=1."
            )
        if not any(self._comes_back(clip) for clip in self.clips):
            raise ValueError(
                f"none of the {len(self.clips)} clips comes back to what it saw ({self.rule}); take longer "
                "clips, of paths that leave and return, or another rule."
            )
        try:
            self.lpips = load_lpips(self.backbone)
        except LPIPSUnavailable as missing:
            rank_zero_warn(str(missing))
        if not trainer.strategy.reduce_boolean_decision(self.lpips is not None):
            self.lpips = None  # all ranks must log the same names

    def _comes_back(self, clip: Clip) -> bool:
        height, width = clip.video.shape[1:3]
        pairs = find_revisits(
            clip.c2w, clip.intrinsics_px, fps=clip.fps, size=(height, width), rule=self.rule, d_bar=clip.d_bar
        )
        return len(pairs.now) > 0

    def prefix_frames(self, clip: Clip, pl_module: LightningModule) -> int:
        if self.image_only:
            return 1
        if self.prefix is not None:
            return self.prefix
        block = TIME_STRIDE * int(getattr(getattr(pl_module, "clip", None), "block_latents", 1))
        return 1 + len(clip.video) // 2 // block * block

    def metric(self, pl_module: LightningModule) -> Metric:
        kind = SelfRevisitScore if self.image_only else RevisitScore
        return kind(rule=self.rule, lpips=self.lpips)

    def score(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        try:
            scores = super().score(trainer, pl_module)
        except _TakesImageOnly as refusal:
            self.image_only = True
            name = type(pl_module).__name__
            rank_zero_info(
                f"MemoryRetrieval: {name} is scored against itself, it refused a prefix: {refusal}"
            )
            scores = super().score(trainer, pl_module)
        kind = "_self" if self.image_only else ""
        if scores[f"memory/no_pair{kind}"] == scores["memory/clips"]:
            where = "to an earlier pose" if kind else "to what its prefix saw"
            rank_zero_warn(
                f"MemoryRetrieval: no clip comes back {where}, so there is no score ({self.rule}); take "
                "other paths, another prefix or another rule."
            )
        return scores

    def add(self, metric: Any, made: Generated) -> None:
        cameras = anchor_to(self.cameras(made), made.clip.c2w)
        metric.update(
            made.video.to(metric.device), made.clip._replace(video=made.clip.video.to(metric.device)),
            prefix_frames=made.prefix_frames, estimated_c2w=cameras,
            reconstruction=self._reconstructions.get(made.number),
        )  # fmt: skip

    def generate(self, trainer: Trainer, pl_module: LightningModule, number: int) -> Generated:
        try:
            made = super().generate(trainer, pl_module, number)
        except NotImplementedError as refusal:
            if self.prefix_frames(self.clips[number], pl_module) == 1:
                raise
            raise _TakesImageOnly(str(refusal)) from refusal
        reconstruct: Any = getattr(pl_module, "reconstruct", None)
        if number not in self._reconstructions and callable(reconstruct):
            with trainer.precision_plugin.forward_context():
                self._reconstructions[number] = reconstruct([made.clip])[0].cpu()
        return made

    def show_scores(self, writer: Any, *, step: int) -> None:
        if picture := curve(self.latest):
            add_picture(writer, "memory/psnr_since_last_seen", picture, step=step)


def curve(scores: Mapping[str, float]) -> bytes | None:
    """Draw PSNR against seconds out of sight, as PNG; None if nothing was scored."""
    lines: dict[str, dict[float, tuple[str, float]]] = {}
    for name, value in scores.items():
        line, _, span = name.removeprefix("memory/").partition("_after_")
        if span:
            low, _, high = span.removesuffix("s").partition("_")
            label = f"{low.removesuffix('s')} up" if high == "up" else f"{low}-{high}"
            lines.setdefault(line, {})[float(low.removesuffix("s"))] = label, value
    if not lines:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    spans = {low: label for points in lines.values() for low, (label, _) in points.items()}
    places = {low: place for place, low in enumerate(sorted(spans))}
    for line, points in lines.items():
        style = "-" if line.count("_") == 1 else ":"  # the score itself, or what stands beside it
        rising = sorted(points.items())
        values = [value for _, (_, value) in rising]
        ax.plot([places[low] for low, _ in rising], values, marker="o", label=line, linestyle=style)
    ax.set_xticks(list(places.values()), [spans[low] for low in places])
    ax.set_xlabel("seconds out of sight")
    ax.set_ylabel("PSNR, dB")
    ax.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
