"""Scenes are pure functions of their seed, whole, and free where a camera should be."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relic.engine.building import make_scene
from relic.engine.furniture import CENTRE, COURT, WALL
from relic.engine.geometry import mesh_of, outdoor_light
from relic.engine.materials import PATTERNS, TEXTURE_SIDE, Material, paint, plain
from relic.engine.scenes import OUTDOORS, Room, Scene, Solid
from relic.engine.space import FreeSpace


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    assert make_scene(4, 2) == make_scene(4, 2)
    assert make_scene(4, 2) != make_scene(4, 3)
    assert make_scene(4, 2) != make_scene(5, 2)
    assert make_scene(4, 2).name == "seed4-scene-00002"


def reached(scene: Scene) -> set[int]:
    """Rooms that can be reached from the first through doorways."""
    found = {0}
    for _ in scene.rooms:
        for opening in scene.openings:
            if OUTDOORS not in opening.rooms and found & set(opening.rooms):
                found |= set(opening.rooms)
    return found


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_every_room_is_reached_and_one_is_a_court(seed: int) -> None:
    scene = make_scene(seed)
    assert [room.kind for room in scene.rooms].count("court") == 1
    assert len(scene.rooms) >= 3
    assert reached(scene) == set(range(len(scene.rooms)))
    walls = [room.walls for room in scene.rooms]
    assert len(set(walls)) == len(walls), "rooms are told apart by their walls"


def place_in(volume: Room | Scene, space: FreeSpace, rng: np.random.Generator) -> np.ndarray:
    """Draw a free point at eye height."""
    low, high = (np.array(end) * (1, 0, 1) for end in (volume.low, volume.high))
    return space.place(rng, low=low - (0, 1.6, 0), high=high - (0, 1.4, 0))


def test_a_camera_can_walk_between_rooms() -> None:
    for seed in range(4):
        scene = make_scene(seed)
        space, rng = FreeSpace(scene), np.random.default_rng(seed)
        places = [place_in(room, space, rng) for room in scene.rooms]
        ways = [space.way(a, b, height=1.5) for a in places for b in places]
        assert sum(way is not None for way in ways) >= 0.9 * len(ways)


def test_ways_keep_clear_of_everything() -> None:
    scene = make_scene(1)
    space, rng = FreeSpace(scene), np.random.default_rng(0)
    for _ in range(8):
        start, goal = (place_in(scene, space, rng) for _ in range(2))
        way = space.way(start, goal, height=1.5)
        for a, b in zip([start, *way], way, strict=False):
            points = a[:, None] + (b - a)[:, None] * np.linspace(0, 1, 50)
            assert space.gaps(points).min() > space.clearance - 0.03  # between the places that were looked at


def test_the_gap_is_the_distance_to_the_nearest_box() -> None:
    scene = make_scene(2)
    space = FreeSpace(scene)
    lows, highs = scene.obstacles
    rng = np.random.default_rng(0)
    for point in rng.uniform(scene.low, scene.high, (20, 3)):
        nearest = np.linalg.norm(np.clip(point, lows, highs) - point, axis=1).min()
        edge = min((point - scene.low).min(), (np.array(scene.high) - point).min())
        assert space.gap(point) == pytest.approx(min(nearest, edge), abs=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_carry_no_detail_finer_than_a_small_picture(pattern: str) -> None:
    texture = paint(Material("blue", pattern, "white")).astype(float)  # type: ignore[arg-type]
    assert texture.shape == (TEXTURE_SIDE, TEXTURE_SIDE, 3)
    small = texture.reshape(16, 8, 16, 8, 3).mean((1, 3)).repeat(8, 0).repeat(8, 1)
    assert ((texture - small) ** 2).mean() <= 0.15 * max(texture.var(axis=(0, 1)).mean(), 1e-9)


@pytest.mark.parametrize("shape", ["box", "cylinder", "cone", "sphere"])
def test_faces_look_outwards(shape: str) -> None:
    solid = Solid((-1.0, -3.0, -1.5), (1.0, -1.0, 1.5), plain("red"), shape)  # type: ignore[arg-type]
    mesh = mesh_of(solid, outdoor_light)
    p, q, r = (mesh.points[mesh.triangles[:, k]] for k in range(3))
    normals, outwards = np.cross(q - p, r - p), (p + q + r) / 3 - (0, -2, 0)
    sizes = np.linalg.norm(normals, axis=1)
    facing = (normals * outwards).sum(1)[sizes > 1e-9]
    assert (facing > 0).all()


def test_all_furniture_stands_on_the_floor_inside_its_footprint() -> None:
    for piece in (*WALL, *CENTRE, *COURT):
        for turn in range(4):
            thing = piece.place((0.0, 0.0, turn), "red", np.random.default_rng(0))
            lows, highs = (np.array([getattr(s, end) for s in thing.solids]) for end in ("low", "high"))
            assert (lows < highs).all()
            assert highs[:, 1].max() == 0
            low, high = lows.min(0)[[0, 2]], highs.max(0)[[0, 2]]
            longest = max(piece.width, piece.depth)
            assert (high - low <= longest + 0.1).all()
            front = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)][turn])
            assert ((low + high) / 2 @ front) > 0, "it stands in front of its wall"


def test_importing_the_engine_loads_no_renderer() -> None:
    code = "import sys, relic.engine; assert not {'panda3d', 'torch', 'av'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_panda3d_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['panda3d'] = None\n"
        "from relic.engine.staging import core\n"
        "try: core()\n"
        "except ImportError as error: assert \"pip install 'relic-world[engine]'\" in str(error), error\n"
        "else: raise SystemExit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
