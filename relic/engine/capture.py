"""Render a scene along camera poses with panda3d: through EGL where a GPU is found, else in software."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from types import TracebackType
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from relic.engine.scenes import Scene
from relic.engine.staging import PANDA_AXES, build, core
from relic.engine.visibility import Visibility

__all__ = [
    "FIELD_OF_VIEW_DEG",
    "Backend",
    "Camera",
    "choose_backend",
    "intrinsics_of",
    "opencv_to_panda",
    "shoot",
]

Backend = Literal["auto", "egl", "software"]

FIELD_OF_VIEW_DEG: Final = 75.0  # horizontal
NEAR, FAR = 0.08, 200.0  # m
TURN: Final = np.block([[PANDA_AXES, np.zeros((3, 1))], [np.zeros((1, 3)), np.ones((1, 1))]])
SUPERSAMPLING: Final = 2  # each side
WITHOUT_GPU: Final = ("llvmpipe", "softpipe", "swrast", "software")


def intrinsics_of(size: tuple[int, int], *, field_of_view_deg: float = FIELD_OF_VIEW_DEG) -> Tensor:
    """Return `fx fy cx cy` (4,) float64 of a picture (height, width), in pixels centres at integers."""
    height, width = size
    focal = width / 2 / math.tan(math.radians(field_of_view_deg) / 2)
    return torch.tensor([focal, focal, width / 2 - 0.5, height / 2 - 0.5], dtype=torch.float64)


def opencv_to_panda(c2w: np.ndarray) -> np.ndarray:
    """Convert poses (..., 4, 4) to the matrices panda3d takes.

    Panda's axes are x right, y forward, z up, for the world and for the camera; its matrices act on row
    vectors, so the result is transposed: position in the last row.
    """
    return np.swapaxes(TURN @ c2w @ TURN.T, -1, -2)


def choose_backend(backend: Backend = "auto") -> Literal["egl", "software"]:
    """Return the backend that is fastest on this machine, or the one asked for; tried once per process.

    A driver that computes pictures without a GPU works as egl, and is slower than panda3d's own software.

    Raises:
        ValueError: If the one asked for does not work here.
    """
    driver = None if backend == "software" else _egl_driver()
    if driver is not None and (backend == "egl" or not driver.lower().startswith(WITHOUT_GPU)):
        return "egl"
    if backend == "egl":
        raise ValueError(
            "backend=egl: panda3d found no headless driver; install one (Debian: apt-get install libegl1 "
            "libgl1-mesa-dri), or take backend=software, which needs none."
        )
    return "software"


def shoot(
    scene: Scene,
    c2w: Tensor,
    *,
    size: tuple[int, int],
    field_of_view_deg: float = FIELD_OF_VIEW_DEG,
    backend: Backend = "auto",
) -> Iterator[np.ndarray]:
    """Yield the pictures of a scene from poses (f, 4, 4), each (h, w, 3) uint8 RGB. size: (height, width)."""
    with Camera(scene, size=size, field_of_view_deg=field_of_view_deg, backend=backend) as camera:
        for pose in c2w.double().numpy():
            yield camera.picture(pose)


class Camera:
    """A scene before a lens. Use it as a context: leaving it frees the frame buffer.

    Args:
        scene: What to film.
        size: (height, width) of the pictures in pixels.
        field_of_view_deg: Horizontal.
        backend: "egl", "software", or "auto" for the first that works.
    """

    def __init__(
        self,
        scene: Scene,
        *,
        size: tuple[int, int],
        field_of_view_deg: float = FIELD_OF_VIEW_DEG,
        backend: Backend = "auto",
    ) -> None:
        p3d = core()
        self.size = size
        self.backend = choose_backend(backend)
        height, width = (side * SUPERSAMPLING for side in size)
        self._engine = p3d.GraphicsEngine.get_global_ptr()
        self._buffer = _make_buffer(_pipe(self.backend), height, width)
        if self._buffer is None:
            raise RuntimeError(f"panda3d could not make a {height}x{width} frame buffer ({self.backend}).")
        self._texture = p3d.Texture("frame")
        self._texture.set_auto_texture_scale(p3d.ATS_none)  # any size, not only powers of two
        self._buffer.add_render_texture(self._texture, p3d.GraphicsOutput.RTM_copy_ram)
        lens = p3d.PerspectiveLens()
        lens.set_film_size(width, height)
        lens.set_focal_length(float(intrinsics_of((height, width), field_of_view_deg=field_of_view_deg)[0]))
        lens.set_near_far(NEAR, FAR)
        focal, _, cx, cy = intrinsics_of(size, field_of_view_deg=field_of_view_deg).tolist()
        self._visible = Visibility(scene, reach=((cx + 0.5) / focal, (cy + 0.5) / focal))
        self._stage = build(scene)
        self._eye = self._stage.root.attach_new_node(p3d.Camera("eye", lens))
        self._buffer.make_display_region().set_camera(self._eye)
        self._engine.open_windows()

    def __enter__(self) -> Camera:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the frame buffer and the scene's nodes."""
        if self._buffer is not None:
            self._engine.remove_window(self._buffer)
            self._stage.root.remove_node()
            self._buffer = None

    def picture(self, c2w: np.ndarray) -> np.ndarray:
        """Return the picture (h, w, 3) uint8 RGB from a pose (4, 4) float64."""
        pose = opencv_to_panda(c2w)
        self._eye.set_mat(core().LMatrix4f(*pose.ravel().tolist()))
        self._stage.sky.set_pos(*pose[3, :3].tolist())
        self._stage.show(self._visible(c2w))
        self._engine.render_frame()
        height, width = self._texture.get_y_size(), self._texture.get_x_size()
        raw = np.frombuffer(self._texture.get_ram_image(), np.uint8).reshape(height, width, -1)[::-1]
        return np.ascontiguousarray(halve(raw)[..., 2::-1])  # panda: bottom row first, BGR


def halve(picture: np.ndarray) -> np.ndarray:
    """Halve a picture, each pixel the mean over a tent of 4x4 samples, 1 3 3 1 on each side, so that edges
    spread over two pixels and neither crawl nor shimmer. (2h, 2w, 4) uint8 -> (h, w, 4) uint8.
    """
    words = np.pad(picture.view(np.uint32)[..., 0], 1, mode="edge")
    for up in (False, True):  # rows, then columns
        words = np.ascontiguousarray(_halve_rows(words, up=up).T)
    return words[..., None].view(np.uint8)


def _halve_rows(words: np.ndarray, *, up: bool) -> np.ndarray:
    """Average rows of uint32 words, (2h + 2, w), by 1 3 3 1 -> (h, w): three means of pairs, the first and
    last rounded up, or down.
    """
    once = _mean_bytes(words[:-1], words[1:], up=up)
    twice = _mean_bytes(once[:-1], once[1:], up=not up)
    return _mean_bytes(twice[0::2], twice[1::2], up=up)


def _mean_bytes(a: np.ndarray, b: np.ndarray, *, up: bool) -> np.ndarray:
    """Average the four bytes of uint32 words at once, rounding up or down; none carries into the next."""
    half = ((a ^ b) & np.uint32(0xFEFEFEFE)) >> np.uint32(1)
    return (a | b) - half if up else (a & b) + half


@lru_cache(maxsize=1)
def _egl_driver() -> str | None:
    """Return the name of what draws through EGL, None if nothing does."""
    if (pipe := _pipe("egl")) is None:
        return None
    buffer = _make_buffer(pipe, 16, 16)
    name = str(buffer.get_gsg().get_driver_renderer())
    core().GraphicsEngine.get_global_ptr().remove_window(buffer)
    return name


@lru_cache(maxsize=2)
def _pipe(backend: Literal["egl", "software"]) -> Any:
    """Return panda's pipe to a renderer, None if it does not work here."""
    p3d = core()
    selection = p3d.GraphicsPipeSelection.get_global_ptr()
    if backend == "software":
        pipe = selection.make_pipe("TinyOffscreenGraphicsPipe", "p3tinydisplay")
    else:
        pipe = selection.make_module_pipe("p3headlessgl")
    if pipe is None or not pipe.is_valid():
        return None
    buffer = _make_buffer(pipe, 16, 16)
    if buffer is None:
        return None
    p3d.GraphicsEngine.get_global_ptr().remove_window(buffer)
    return pipe


def _make_buffer(pipe: Any, height: int, width: int) -> Any:
    p3d = core()
    pixels = p3d.FrameBufferProperties()
    pixels.set_rgba_bits(8, 8, 8, 8)  # four bytes a pixel, which `halve` averages as one word
    pixels.set_depth_bits(24)
    engine = p3d.GraphicsEngine.get_global_ptr()
    shape = p3d.WindowProperties.size(width, height)
    buffer = engine.make_output(pipe, "camera", 0, pixels, shape, p3d.GraphicsPipe.BF_refuse_window)
    if buffer is None:
        return None
    engine.open_windows()
    return buffer if buffer.is_valid() else None
