"""Captions say what is there, in few words, every five seconds, and never how the camera moves."""

from __future__ import annotations

import torch

from relic.engine.building import make_scene
from relic.engine.captions import describe
from relic.engine.capture import intrinsics_of
from relic.engine.materials import COLOURS
from relic.engine.trajectories import make_trajectory
from relic.ops.camera import rigid, rotation_from_angles
from tests.engine.places import ORIGIN, studio

INTRINSICS = intrinsics_of((128, 256))
WORDS = {
    *COLOURS, "a", "an", "and", "with", "room", "court", "walls", "floor", "wooden", "tiled", "carpet",
    "grass", "stone", "door", "doorway", "picture", "rug", "sofa", "bed", "desk", "cabinet", "bookshelf",
    "lamp", "plant", "chair", "table", "column", "statue", "crates", "tree", "bench", "fountain",
}  # fmt: skip


def test_there_is_one_caption_every_five_seconds_of_known_words() -> None:
    for seed in range(6):
        scene = make_scene(seed)
        c2w = make_trajectory(scene, seed=seed, frames=200, fps=8)
        captions = describe(scene, c2w, fps=8, intrinsics_px=INTRINSICS)
        assert len(captions) == 5
        for caption in captions:
            assert set(caption.replace(",", "").split()) <= WORDS, caption
            assert caption.startswith(("a room with", "a court with"))
            assert any(f"{room.walls} walls" in caption for room in scene.rooms)


def test_a_caption_names_what_is_in_view_and_not_what_is_behind() -> None:
    scene = studio({"red": (0.3, -1.5, 3.0), "blue": (0.0, -1.5, -3.0)})
    ahead = ORIGIN.expand(16, 4, 4)
    turn = rotation_from_angles(torch.tensor([180.0, 0.0, 0.0], dtype=torch.float64))
    behind = rigid(turn, ORIGIN[:3, 3]).expand(16, 4, 4)
    captions = [describe(scene, c2w, fps=16, intrinsics_px=INTRINSICS)[0] for c2w in (ahead, behind)]
    assert captions == [
        "a room with a white wooden floor, white walls and a red lamp",
        "a room with a white wooden floor, white walls and a blue lamp",
    ]


def test_an_empty_room_is_named_by_its_walls() -> None:
    captions = describe(studio({}), ORIGIN.expand(16, 4, 4), fps=16, intrinsics_px=INTRINSICS)
    assert captions == ("a room with a white wooden floor and white walls",)
