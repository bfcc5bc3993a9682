import json

import pytest
import torch

from relic.data.video import count_frames
from relic.metrics.pose.estimator import PoseEstimate
from relic.metrics.revisit import RevisitRule
from relic.ops.actions import encode_actions, integrate, parse_script
from relic.ops.video import psnr
from relic.suite.case import NoTruth
from relic.suite.judges import Judges
from relic.suite.mind import find_mind, held_keys, lcm_result, mind_result, read_poses, write_mind_video
from tests.suite.recordings import SHAPE, write_mind


def test_a_clip_has_its_context_as_a_true_prefix(tmp_path):
    write_mind(tmp_path)
    (case,) = find_mind(tmp_path, shape=SHAPE)
    assert (case.name, case.group, case.measures) == (
        "1st_data-mem_test-data-26",
        "1st_data mem_test",
        "memory",
    )
    clip = case.truth()
    # mark_time is 20: the image and 16 frames of context fit before it; half of the horizon is generated
    assert (case.start, case.outward, case.mark, case.num_frames) == (3, 16, 20, 33)
    assert clip.video.shape == (33, 32, 48, 3) and clip.captions == ("a street",)
    assert clip.provenance["mark"] == 20


def test_poses_are_unreals_and_actions_are_in_the_worlds_unit(tmp_path):
    write_mind(tmp_path)
    (case,) = find_mind(tmp_path, shape=SHAPE)
    clip = case.truth()
    actions = encode_actions(clip.c2w, d_bar=clip.d_bar)[1:]
    assert torch.allclose(actions[:, 0], torch.ones_like(actions[:, 0])), "2 cm a frame is one step forward"
    assert torch.allclose(actions[:, 9], torch.ones_like(actions[:, 9])), "1 degree a frame to the right"
    assert actions[:, [1, 2, 3, 4, 5, 6, 7, 8, 10, 11]].abs().max() < 1e-6


def test_in_third_person_the_camera_is_followed(tmp_path):
    folder = write_mind(tmp_path, third=True)
    rows = json.loads((folder / "action.json").read_text())["data"]
    c2w = read_poses(rows[:1])
    assert torch.allclose(c2w[0, :3, 3], torch.tensor([0.0, -2.5, -3.0], dtype=torch.float64)), (
        "x y z of Unreal"
    )
    assert c2w[0, 1, 2] > 0.3, "it looks down"


@pytest.mark.parametrize(("mark", "start", "outward", "at"), [(0, 0, 0, 1), (1, 0, 0, 1), (9, 0, 8, 9)])
def test_a_clip_without_context_begins_with_its_first_frame(tmp_path, mark, start, outward, at):
    write_mind(tmp_path, mark=mark)
    (case,) = find_mind(tmp_path, shape=SHAPE)
    assert (case.start, case.outward, case.mark) == (start, outward, at)
    assert len(case.truth().video) == case.num_frames <= SHAPE.most_frames


def test_keys_are_read_as_minds_code_does():
    row = {"ws": 1, "ad": 0, "ud": 0, "lr": 2}
    assert held_keys(row) == "forward+look_right"
    assert held_keys(dict.fromkeys(row, 0)) == "no_op"


def test_results_are_written_in_minds_layout(tmp_path):
    write_mind(tmp_path)
    (case,) = find_mind(tmp_path, shape=SHAPE)
    clip = case.truth()
    path = write_mind_video(clip.video, case, root=tmp_path / "model")
    assert path == tmp_path / "model" / "1st_data" / "mem_test" / "data-26" / "video.mp4"
    assert count_frames(path.read_bytes()) == 16
    noisy = (clip.video.int() + 5).clamp(0, 255).byte()
    lcm = lcm_result(noisy[17:], clip.video[17:])
    assert lcm["length"] == len(lcm["mse"]) == 16 and "lpips" not in lcm
    assert lcm["avg_psnr"] == pytest.approx(float(psnr(noisy[17:], clip.video[17:]).mean()))
    entry = mind_result([(case, {"lcm": lcm}), (case, {"error": "no video"})])["data"]
    assert entry[0]["mark_time"] == 20 and entry[0]["total_time"] == 60 and entry[0]["sample_frames"] == 16
    assert (entry[0]["path"], entry[0]["perspective"], entry[0]["test_type"]) == (
        "data-26",
        "1st_data",
        "mem_test",
    )
    assert entry[0]["error"] is None and entry[1]["error"] == "no video" and "lcm" not in entry[1]
    assert json.loads(json.dumps(entry)) == entry


def test_motion_is_scored_as_mind_does_between_estimated_cameras(tmp_path):
    write_mind(tmp_path)
    (case,) = find_mind(tmp_path, shape=SHAPE)
    clip = case.truth()
    judges = Judges(rule=RevisitRule(), lpips=None, estimator=Turning())
    action = case.extras(clip.video, clip, judges=judges, folder=tmp_path / "model")["mind"]["action"]
    assert action["__overall__"]["count"] == 15 and action["__overall__"]["rpe_rot_mean_deg"] < 1e-6
    assert set(action) == {"__overall__", "other", "act:forward+look_right"}
    lost = Judges(rule=RevisitRule(), lpips=None, estimator=Turning(lost=3))
    found = case.extras(clip.video, clip, judges=lost, folder=tmp_path / "model")["mind"]
    assert "frame 3 after the mark has no pose" in found["error"] and "action" not in found and "lcm" in found


class Turning:
    """An estimator that answers with a turn to the right, and loses one frame."""

    def __init__(self, *, lost: int | None = None) -> None:
        self.lost = lost

    def estimate(self, video, *, intrinsics_px):
        c2w = integrate(parse_script(f"pan_right*{len(video) - 1}"))
        if self.lost is not None:
            c2w[self.lost] = torch.nan
        return PoseEstimate(c2w=c2w, registered=c2w.isfinite().flatten(1).all(1))


def test_what_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no MIND clips"):
        find_mind(tmp_path, shape=SHAPE)
    folder = write_mind(tmp_path)
    (folder / "video.mp4").unlink()
    (case,) = find_mind(tmp_path, shape=SHAPE)
    with pytest.raises(NoTruth, match=r"data-26.*No such file"):
        case.truth()
    short = write_mind(tmp_path, name="data-27", frames=24, mark=20)
    cases = find_mind(tmp_path, shape=SHAPE)
    assert cases[1].folder == short
    with pytest.raises(NoTruth, match="data-27 has 24 frames"):
        cases[1].truth()
    (write_mind(tmp_path, name="data-28") / "action.json").write_text('{"data": []}')
    with pytest.raises(ValueError, match="lacks mark_time, total_time"):
        _ = find_mind(tmp_path, shape=SHAPE)[2].num_frames
