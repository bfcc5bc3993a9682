"""The engine's pictures against the library's camera: same places, same senses, same bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from relic.engine import capture
from relic.engine.building import make_scene
from relic.engine.capture import Camera, choose_backend, halve, intrinsics_of, opencv_to_panda, shoot
from relic.engine.scenes import OUTDOORS
from relic.engine.staging import core
from relic.engine.trajectories import make_trajectory
from relic.engine.visibility import Visibility
from relic.ops.actions import CHANNELS, from_keys, integrate
from relic.ops.camera import invert_rigid, project, rigid, rotation_from_angles
from tests.engine.places import ORIGIN, centres, find, studio

SIZE = (128, 256)
MARKERS = {"red": (-0.6, -1.7, 3.0), "blue": (0.8, -1.4, 3.4), "green": (0.1, -1.2, 2.6)}


def backends() -> list[str]:
    try:
        return ["software", choose_backend("egl")]
    except ValueError:
        return ["software"]


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(
    "angles", [(0.0, 0.0, 0.0), (12.0, -6.0, 0.0), (-9.0, 4.0, 25.0), (5.0, 8.0, -140.0)]
)
def test_a_ball_shows_at_the_pixel_where_it_projects(backend: str, angles: tuple[float, ...]) -> None:
    c2w = rigid(rotation_from_angles(torch.tensor(angles, dtype=torch.float64)), ORIGIN[:3, 3])
    picture = next(shoot(studio(MARKERS), c2w[None], size=SIZE, backend=backend))
    pixels, depth = project(centres(MARKERS), invert_rigid(c2w), intrinsics_px=intrinsics_of(SIZE))
    assert (depth > 0).all()
    for colour, expected in zip(MARKERS, pixels.tolist(), strict=True):
        found = find(picture, colour)
        assert found is not None
        assert np.hypot(found[0] - expected[0], found[1] - expected[1]) < 0.5, (colour, found, expected)


def measure(channel: str, backend: str = "software") -> tuple[np.ndarray, np.ndarray]:
    """Hold a key for 4 frames -> pixels (2 markers, xy) before and after, measured in the pictures."""
    markers = {"red": MARKERS["red"], "blue": MARKERS["blue"]}
    action = torch.stack([from_keys(["static"]), *[from_keys([channel])] * 4])
    c2w = ORIGIN @ integrate(action, d_bar=0.06)
    pictures = list(shoot(studio(markers), c2w[[0, -1]], size=SIZE, backend=backend))
    return tuple(np.array([find(picture, colour) for colour in markers]) for picture in pictures)


SENSES = {
    "truck_left": "right", "truck_right": "left", "pedestal_up": "down", "pedestal_down": "up",
    "tilt_up": "down", "tilt_down": "up", "pan_left": "right", "pan_right": "left",
    "dolly_in": "grows", "dolly_out": "shrinks", "roll_cw": "turns_ccw", "roll_ccw": "turns_cw",
}  # fmt: skip


@pytest.mark.parametrize("channel", CHANNELS[:12])
def test_the_picture_moves_against_the_camera(channel: str) -> None:
    before, after = measure(channel)
    shift = (after - before).mean(0)
    spans = [pixels[1] - pixels[0] for pixels in (before, after)]
    growth = np.linalg.norm(spans[1]) / np.linalg.norm(spans[0])
    # on a screen y runs down, so a counter-clockwise turn lowers atan2(y, x)
    turns = np.degrees(np.arctan2(spans[1][1], spans[1][0]) - np.arctan2(spans[0][1], spans[0][0]))
    measured = {
        "right": shift[0], "left": -shift[0], "down": shift[1], "up": -shift[1],
        "grows": 200 * (growth - 1), "shrinks": 200 * (1 - growth), "turns_cw": turns, "turns_ccw": -turns,
    }  # fmt: skip
    assert measured[SENSES[channel]] > 4, measured


def test_every_sense_is_tested() -> None:
    assert set(SENSES) == set(CHANNELS[:12])


@pytest.mark.parametrize(
    ("hpr", "angles"),
    [
        ((-30, 0, 0), (30, 0, 0)),
        ((0, 20, 0), (0, 20, 0)),
        ((0, 0, 15), (0, 0, 15)),
        ((-40, 10, -5), (40, 10, -5)),
    ],
)
def test_panda_heading_pitch_roll_is_minus_pan_tilt_roll(hpr: tuple, angles: tuple) -> None:
    c2w = rigid(
        rotation_from_angles(torch.tensor(angles, dtype=torch.float64)),
        torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64),
    )
    node = core().NodePath("camera")
    node.set_pos(1.0, 3.0, 2.0)  # panda: right, forward, up
    node.set_hpr(*hpr)
    expected = np.array([[node.get_mat().get_cell(i, j) for j in range(4)] for i in range(4)])
    assert np.abs(opencv_to_panda(c2w.numpy()) - expected).max() < 1e-5  # panda computes in float32


def test_intrinsics_centre_a_picture_between_its_middle_pixels() -> None:
    fx, fy, cx, cy = intrinsics_of((64, 96)).tolist()
    assert (cx, cy) == (47.5, 31.5)
    assert fx == fy == pytest.approx(48 / np.tan(np.radians(37.5)))


@pytest.mark.parametrize("backend", backends())
def test_the_same_seed_gives_the_same_bytes_and_another_differs(backend: str) -> None:
    def pictures(index: int) -> bytes:
        scene = make_scene(0, index)
        c2w = make_trajectory(scene, seed=0, frames=20, fps=8)[::10]
        return np.stack(list(shoot(scene, c2w, size=(48, 64), backend=backend))).tobytes()

    assert pictures(0) == pictures(0)
    assert pictures(0) != pictures(1)


@pytest.mark.parametrize("size", [(64, 96), (80, 144), (128, 256)])
def test_any_size_fills_the_picture(size: tuple[int, int]) -> None:
    scene = make_scene(3)
    picture = next(shoot(scene, make_trajectory(scene, seed=0, frames=1), size=size))
    assert picture.shape == (*size, 3)
    assert picture.dtype == np.uint8
    quarters = [picture[:: size[0] - 1], picture[:, :: size[1] - 1]]
    assert all(edge.std() > 0 for edge in quarters), "an edge is blank"


def test_leaving_out_hidden_rooms_changes_no_pixel() -> None:
    differing = 0
    for index in range(3):
        scene = make_scene(5, index)
        c2w = make_trajectory(scene, seed=1, frames=320, fps=4)[::16].numpy()
        with Camera(scene, size=(48, 64), backend="software") as camera:
            culled = np.stack([camera.picture(pose) for pose in c2w])
            everything = [*range(len(scene.rooms)), OUTDOORS]
            camera._visible = lambda pose, seen=everything: seen  # type: ignore[assignment]
            whole = np.stack([camera.picture(pose) for pose in c2w])
        # a room's edge may differ where two surfaces meet in one pixel
        differing += int((np.abs(culled.astype(int) - whole).max(-1) > 24).sum())
    assert differing < 12


def test_a_room_behind_the_camera_is_left_out() -> None:
    scene = make_scene(0)
    seen = Visibility(scene, reach=(0.77, 0.4))
    room = scene.rooms[0]
    heading = torch.tensor([-135.0, 0.0, 0.0], dtype=torch.float64)  # into the corner of the house
    centre = torch.tensor([(room.low[0] + 1), -1.5, (room.low[2] + 1)], dtype=torch.float64)
    assert len(seen(rigid(rotation_from_angles(heading), centre).numpy())) < len(scene.rooms)


def test_halving_averages_samples_over_a_tent() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 24, 4), dtype=np.uint8)
    padded = np.pad(picture.astype(float), ((1, 1), (1, 1), (0, 0)), mode="edge")
    weights = np.array([1, 3, 3, 1]) / 8
    mean = sum(
        weights[i] * weights[j] * padded[i : i + 16 : 2, j : j + 24 : 2] for i in range(4) for j in range(4)
    )
    assert np.abs(halve(picture) - mean).max() <= 1.5  # six roundings, as often down as up
    assert abs((halve(picture) - mean).mean()) < 0.1


def test_an_unknown_renderer_is_an_error() -> None:
    if "egl" in backends():
        gpu = not capture._egl_driver().lower().startswith(capture.WITHOUT_GPU)
        assert choose_backend("auto") == ("egl" if gpu else "software")
    else:
        with pytest.raises(ValueError, match="software"):
            choose_backend("egl")
