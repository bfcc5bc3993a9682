import numpy as np
import pytest
import torch
from PIL import Image

from relic.ops.actions import encode_actions
from relic.ops.camera import check_rigid
from relic.suite.case import NoTruth
from relic.suite.memobench import csv_poses, find_memobench, phase_scores, write_memobench_frames
from tests.suite.recordings import SHAPE, write_memobench, write_track


def case_in(root, **options):
    folder, c2w = write_memobench(root, **options)
    (case,) = find_memobench(root, shape=SHAPE)
    assert case.folder == folder
    return case, c2w


def test_a_clip_is_resampled_evenly_to_what_the_world_plays(tmp_path):
    case, c2w = case_in(tmp_path)
    clip = case.truth()
    taken = case.taken()
    assert (case.num_frames, taken[0], taken[-1], case.outward) == (41, 0, 59, 0)
    assert set(np.diff(taken)) <= {1, 2}
    assert torch.equal(clip.c2w, c2w[taken]) and clip.captions == ("a fox in a yard",)
    steps = encode_actions(clip.c2w, d_bar=clip.d_bar)[1:, :6].norm(dim=1)
    assert steps.mean() == pytest.approx(1.0, abs=0.02), "its own mean step is the unit"


def test_pictures_and_intrinsics_are_cropped_alike(tmp_path):
    case, _ = case_in(tmp_path)
    clip = case.truth()
    with Image.open(case.pictures()[0]) as picture:
        scaled = picture.resize((57, 32), Image.Resampling.BOX).crop((4, 0, 52, 32))
    assert np.array_equal(clip.video[0].numpy(), np.array(scaled))
    fx, _, cx, cy = clip.intrinsics_px.tolist()
    assert fx == pytest.approx(50 * 32 / 36) and cy == pytest.approx(15.5)
    assert cx == pytest.approx(32 * 32 / 36 - 0.5 - 4)


def test_phases_are_scaled_to_the_played_frames(tmp_path):
    case, _ = case_in(tmp_path)
    assert case.leaves == (20, 40)
    visible, gone, back = case.phases()
    assert (visible, gone, back) == (range(14), range(14, 27), range(27, 41))
    video = case.truth().video
    worse = video.clone()
    worse[27:] = 0
    scores = phase_scores(worse, video, case)
    assert scores["phase/psnr_visible"] > 59 > scores["phase/psnr_back"] and "phase/lpips_gone" not in scores


def test_frames_are_written_where_memobenchs_tools_look(tmp_path):
    case, _ = case_in(tmp_path)
    video = case.truth().video
    folder = write_memobench_frames(video, case, root=tmp_path / "model")
    assert folder == tmp_path / "model" / "Synthetic" / "Barnyard" / "Barnyard_005" / "frames"
    names = sorted(path.name for path in folder.iterdir())
    assert names[0] == "00000.png" and len(names) == 41
    with Image.open(folder / names[-1]) as picture:
        assert np.array_equal(np.array(picture), video[-1].numpy())


def test_a_raw_track_stands_in_for_poses(tmp_path):
    case, _ = case_in(tmp_path, track=True)
    turn = {"rot_x": 0.3, "rot_y": -0.2}
    write_track(
        case.folder,
        [
            {
                "loc_x": i,
                "loc_y": 0,
                "loc_z": 1,
                **turn,
                "rot_z": 0.01 * i,
                "fx": 50,
                "fy": 50,
                "cx": 31.5,
                "cy": 17.5,
            }
            for i in range(60)
        ],
    )
    clip = case.truth()
    check_rigid(clip.c2w)
    # a turn about z of a left-handed world, seen from a camera whose y and z point the other way
    angles = {
        name: torch.tensor([value], dtype=torch.float64)
        for name, value in {
            "rot_x": 0.0,
            "rot_y": 0.0,
            "rot_z": 0.5,
            "loc_x": 1.0,
            "loc_y": 2.0,
            "loc_z": 3.0,
        }.items()
    }

    pose = csv_poses(angles)[0].numpy()
    sin, cos = np.sin(0.5), np.cos(0.5)
    assert np.allclose(pose, [[cos, -sin, 0, 1], [-sin, -cos, 0, 2], [0, 0, -1, 3], [0, 0, 0, 1]])


def test_what_is_missing_or_odd_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no MemoBench clips"):
        find_memobench(tmp_path, shape=SHAPE)
    case, c2w = case_in(tmp_path)
    np.save(case.folder / "5" / "poses.npy", c2w[:50].numpy())
    with pytest.raises(NoTruth, match=r"Barnyard_005: 50 poses and 60 frames"):
        case.truth()
    np.save(case.folder / "5" / "poses.npy", c2w.numpy() * 2)
    with pytest.raises(NoTruth, match="not rigid"):
        case.truth()
    (tmp_path / "Synthetic_processed" / "Synthetic_ExitReenter.csv").unlink()
    (case,) = find_memobench(tmp_path, shape=SHAPE)
    with pytest.raises(ValueError, match=r"no phases; save Synthetic_ExitReenter\.xlsx as"):
        phase_scores(torch.zeros(1), torch.zeros(1), case)
