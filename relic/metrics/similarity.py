"""How alike two videos are, frame by frame: PSNR, SSIM, LPIPS and sharpness, and their mean over clips.

Videos are uint8 (f, h, w, 3). The functions give one number a frame; `FrameMean` is their accumulating half.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchmetrics import Metric

from relic.ops.video import from_uint8, psnr

__all__ = [
    "LPIPS",
    "FrameMean",
    "LPIPSUnavailable",
    "by_chunks",
    "check_same",
    "check_video",
    "load_lpips",
    "luma",
    "psnr",
    "sharpness",
    "sharpness_ratio",
    "ssim",
]

CHUNK_PIXELS: Final = 2**18  # scored at a time: a few MB of float32, whatever the length of a clip

WINDOW, SIGMA = 11, 1.5  # of SSIM, pixels
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

ALEXNET_FILE: Final = "alexnet-owt-7be5be79.pth"  # torchvision's name for it in torch's cache
ALEXNET_URL: Final = f"https://download.pytorch.org/models/{ALEXNET_FILE}"
CONVOLUTIONS: Final = {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}  # layer: stride, padding
POOLED_BEFORE: Final = (3, 6)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1]
LEAST_SIDE: Final = 31  # pixels; less leaves nothing after AlexNet's second pooling


class LPIPSUnavailable(FileNotFoundError):
    """LPIPS cannot be measured here: its backbone or its heads are not on this machine.

    Catch it to go on without LPIPS, and write its text into the report.
    """


def check_video(video: Tensor, *, name: str = "video") -> None:
    """Raise ValueError unless `video` is uint8 (f, h, w, 3) with at least one frame."""
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != torch.uint8 or not len(video):
        raise ValueError(
            f"{name} is {video.dtype} {tuple(video.shape)}; it must be uint8 (f, h, w, 3) with at least one "
            "frame (relic.ops.video.to_uint8 makes it from network output)."
        )


def check_same(video: Tensor, truth: Tensor, *, name: str = "video", other: str = "truth") -> None:
    """Raise ValueError unless both are videos of the same length and size."""
    check_video(video, name=name)
    check_video(truth, name=other)
    if video.shape != truth.shape:
        raise ValueError(
            f"{name} has (f, h, w) = {tuple(video.shape[:3])}, {other} has {tuple(truth.shape[:3])}; they "
            "must be equal: cut both to the frames that belong together, bring both to one size."
        )


# -- scores of a frame -------------------------------------------------------------------------------------


def ssim(video: Tensor, truth: Tensor) -> Tensor:
    """Return the structural similarity of each frame, in [-1, 1], 1 if equal (Wang et al. 2004).

    Gaussian window of 11 pixels and sigma 1.5, K = (0.01, 0.03), population covariance, mean over colours and
    all pixels, borders reflected: what torchmetrics 1.9 computes. scikit-image leaves out the 5 pixels along
    the border, which moves the mean of small pictures.
    video, truth: uint8 (f, h, w, 3) -> (f,) float32.

    Raises:
        ValueError: If shapes differ or a side is shorter than the window.
    """
    check_same(video, truth)
    if min(video.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs sides of at least {WINDOW} pixels, got {tuple(video.shape[1:3])}.")
    return by_chunks(_ssim, video, truth)


def sharpness(video: Tensor) -> Tensor:
    """Return how sharp each frame is: the deviation of the Laplacian of its luma, in grey levels.

    The square root of the variance of the Laplacian (Pech-Pacheco et al. 2000), so that half the contrast is
    half as sharp: 4-neighbour Laplacian of BT.601 luma over the pixels that have all neighbours. 0 for a flat
    picture. Mean gradients would not do: a blur makes an edge wide and leaves its height. Noise counts as
    detail, so a score above 1 against truth means noise or invented texture.
    video: uint8 (f, h, w, 3) -> (f,) float32.
    """
    check_video(video)
    if min(video.shape[1:3]) < 3:
        raise ValueError(f"Sharpness needs sides of at least 3 pixels, got {tuple(video.shape[1:3])}.")
    return by_chunks(_sharpness, video)


def sharpness_ratio(video: Tensor, truth: Tensor) -> Tensor:
    """Return `sharpness(video) / sharpness(truth)`: 1 is as sharp as truth, 0 a flat picture.

    Where truth itself is flat it is 1 if the video is flat, too, and infinite if it is not.
    video, truth: uint8 (f, h, w, 3) -> (f,) float32.
    """
    check_same(video, truth)
    ours, theirs = sharpness(video), sharpness(truth)
    return torch.where((ours == 0) & (theirs == 0), 1.0, ours / theirs)


def luma(video: Tensor) -> Tensor:
    """Return BT.601 luma in [0, 255]. video: (..., 3) uint8 or float RGB -> (...) float32."""
    return video.float() @ torch.tensor([0.299, 0.587, 0.114], device=video.device)


class LPIPS(nn.Module):
    """Measure the perceptual distance of frames (Zhang et al. 2018), AlexNet, version 0.1; 0 if equal.

    Equals `lpips.LPIPS(net="alex")` of the same weights; it needs no torchvision. Frames are scored in
    chunks, on the device where the module is.

    Args:
        backbone: `features.{n}.weight` and `.bias` of AlexNet's convolutions, n in 0, 3, 6, 8, 10.
        heads: `lin{i}.model.1.weight` of the five linear heads.
    """

    def __init__(self, backbone: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
        super().__init__()
        for index, layer in enumerate(CONVOLUTIONS):
            for name, tensor in (
                (f"weight_{index}", backbone[f"features.{layer}.weight"]),
                (f"bias_{index}", backbone[f"features.{layer}.bias"]),
                (f"head_{index}", heads[f"lin{index}.model.1.weight"]),
            ):
                self.register_buffer(name, tensor.detach().float(), persistent=False)
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, rearrange(torch.tensor(values), "c -> c 1 1"), persistent=False)

    @torch.no_grad()
    def forward(self, video: Tensor, truth: Tensor) -> Tensor:
        """Return the distance of each frame. video, truth: uint8 (f, h, w, 3) -> (f,) float32."""
        check_same(video, truth)
        if min(video.shape[1:3]) < LEAST_SIDE:
            raise ValueError(f"LPIPS needs sides of {LEAST_SIDE} pixels, got {tuple(video.shape[1:3])}.")
        return by_chunks(self._distance, video, truth)

    def _distance(self, video: Tensor, truth: Tensor) -> Tensor:
        total = torch.zeros(len(video), device=self.get_buffer("scale").device)
        pairs = zip(self._features(video), self._features(truth), strict=True)
        for index, (ours, theirs) in enumerate(pairs):
            total += F.conv2d((ours - theirs).square(), self.get_buffer(f"head_{index}")).mean((1, 2, 3))
        return total

    def _features(self, video: Tensor) -> list[Tensor]:
        """Return what each of the five layers sees, of unit length at every place."""
        shift, scale = self.get_buffer("shift"), self.get_buffer("scale")
        x = (from_uint8(rearrange(video.to(scale.device), "f h w c -> f c h w")) - shift) / scale
        seen = []
        for index, (layer, (stride, padding)) in enumerate(CONVOLUTIONS.items()):
            if layer in POOLED_BEFORE:
                x = F.max_pool2d(x, 3, stride=2)
            weight, bias = self.get_buffer(f"weight_{index}"), self.get_buffer(f"bias_{index}")
            x = F.conv2d(x, weight, bias, stride=stride, padding=padding).relu()
            seen.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return seen


def load_lpips(backbone: str | Path | None = None, *, device: torch.device | str = "cpu") -> LPIPS:
    """Load LPIPS with AlexNet, without a download. The `lpips` package ships the heads, not the backbone.

    Args:
        backbone: A file with torchvision's AlexNet, `.pth` or `.safetensors`, any float type, with or without
            the classifier; None for torch's cache (`torch.hub.get_dir()/checkpoints`).
        device: Where it is measured.

    Raises:
        LPIPSUnavailable: If the backbone or the package with the heads is not here.
        ValueError: If the file holds something else.
    """
    spec = importlib.util.find_spec("lpips")  # importing it would load torchvision
    if spec is None or not spec.submodule_search_locations:
        raise LPIPSUnavailable("LPIPS: not measured, no package with its heads; pip install lpips.")
    cached = Path(torch.hub.get_dir(), "checkpoints", ALEXNET_FILE)
    path = cached if backbone is None else Path(backbone)
    if not path.is_file():
        raise LPIPSUnavailable(
            f"LPIPS: not measured, backbone not found at {path}; put {ALEXNET_URL} at {cached}, or name a "
            "file with torchvision's AlexNet (.pth or .safetensors)."
        )
    weights = _read_alexnet(path)
    heads = Path(spec.submodule_search_locations[0], "weights", "v0.1", "alex.pth")
    return LPIPS(weights, torch.load(heads, map_location="cpu", weights_only=True)).to(device)


def _read_alexnet(path: Path) -> dict[str, Tensor]:
    """Return AlexNet's convolutions from a file, or say what it lacks."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        found: Any = load_file(path)
    else:
        found = torch.load(path, map_location="cpu", weights_only=True)
    names = {f"features.{layer}.{part}" for layer in CONVOLUTIONS for part in ("weight", "bias")}
    held = set(found) if isinstance(found, Mapping) else set()
    odd = {name for name in held - names if not name.startswith("classifier.")}
    if not names <= held or odd:
        raise ValueError(
            f"{path} is not torchvision's AlexNet: it lacks {sorted(names - held) or 'nothing'} and also "
            f"holds {sorted(odd)[:5] or 'nothing'}; get {ALEXNET_URL}."
        )
    return {name: found[name] for name in names}


# -- the mean of a score -----------------------------------------------------------------------------------


class FrameMean(Metric):
    """Accumulate the mean of a frame score over clips and processes, each frame counted once.

        metric = FrameMean(ssim)  # or psnr, sharpness_ratio, load_lpips()
        metric.update(video, truth)

    Args:
        score: Takes two uint8 videos (f, h, w, 3) and returns (f,).
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    frames: Tensor

    def __init__(self, score: Callable[[Tensor, Tensor], Tensor], **settings: Any) -> None:
        super().__init__(**settings)
        self.score = score
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("frames", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, video: Tensor, truth: Tensor) -> None:
        """Add the frames of a clip. video, truth: uint8 (f, h, w, 3)."""
        check_same(video, truth)
        self.total += by_chunks(self.score, video, truth).double().sum().to(self.total)
        self.frames += len(video)

    def compute(self) -> Tensor:
        """Return the mean over all frames so far; NaN if there was none."""
        return self.total / self.frames


# -- in pieces ---------------------------------------------------------------------------------------------


def by_chunks(score: Callable[..., Tensor], *videos: Tensor) -> Tensor:
    """Score a few frames at a time, so that a long clip takes no more memory than a short one."""
    height, width = videos[0].shape[1:3]
    frames = max(1, CHUNK_PIXELS // (height * width))
    return torch.cat(
        [score(*parts) for parts in zip(*(video.split(frames) for video in videos), strict=True)]
    )


def _ssim(video: Tensor, truth: Tensor) -> Tensor:
    half = WINDOW // 2
    x, y = (
        F.pad(rearrange(v, "f h w c -> f c h w").float(), (half, half, half, half), mode="reflect")
        for v in (video, truth)
    )
    mean_x, mean_y = _blur(x), _blur(y)
    squares = mean_x.square() + mean_y.square()
    product = mean_x * mean_y
    variances = (_blur(x.square() + y.square()) - squares).clamp(min=0)
    covariance = _blur(x * y) - product
    alike = (2 * product + C1) * (2 * covariance + C2)
    return (alike / ((squares + C1) * (variances + C2))).mean((1, 2, 3))


def _blur(picture: Tensor) -> Tensor:
    """Weigh (..., h, w) with a Gaussian window, where it fits whole -> (..., h − 10, w − 10).

    Shifted sums, since a convolution of single channels takes ten times as long on a CPU.
    """
    half = WINDOW // 2
    weights = torch.exp(-0.5 * ((torch.arange(WINDOW, dtype=torch.float64) - half) / SIGMA).square())
    taps = (weights / weights.sum()).tolist()
    for axis in (-2, -1):
        size = picture.shape[axis] - 2 * half
        blurred = taps[half] * picture.narrow(axis, half, size)
        for i in range(half):
            pair = picture.narrow(axis, i, size) + picture.narrow(axis, WINDOW - 1 - i, size)
            blurred.add_(pair, alpha=taps[i])
        picture = blurred
    return picture


def _sharpness(video: Tensor) -> Tensor:
    grey = luma(video)
    across = grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    down = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1]
    return (across + down - 4 * grey[:, 1:-1, 1:-1]).std((1, 2), correction=0)
