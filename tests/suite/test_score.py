from dataclasses import replace

import pytest
import torch

from relic.metrics import PoseEstimate
from relic.ops.camera import rotation_from_angles
from relic.suite.score import look_by_second, score_video
from tests.suite.runs import JUDGES, cases_in

pytest.importorskip("panda3d")


def test_scores_are_of_the_named_metrics(tmp_path):
    clip = cases_in(tmp_path)[0].truth()
    frozen = clip.video[:1].expand_as(clip.video)
    scores = score_video(frozen, clip, prefix=41, measures="memory", judges=JUDGES, reconstruction=None)
    assert scores["memory/psnr_revisit"] == pytest.approx(scores["memory/psnr_revisit_copy_first"])
    looks = look_by_second(clip.video, fps=16)
    assert len(looks["exposure"]) == 6 and looks["exposure"][0] == pytest.approx(
        float(clip.video[:16].float().mean((1, 2)).matmul(torch.tensor([0.299, 0.587, 0.114])).mean() / 255),
        abs=1e-5,
    )


def test_a_video_in_which_no_camera_is_found_is_scored_by_its_pictures_alone(tmp_path):
    class Blind:
        def estimate(self, video, *, intrinsics_px):
            nowhere = torch.full((len(video), 4, 4), torch.nan, dtype=torch.float64)
            return PoseEstimate(nowhere, torch.zeros(len(video), dtype=torch.bool))

    clip = cases_in(tmp_path)[1].truth()
    blind = replace(JUDGES, estimator=Blind())
    scores = score_video(clip.video, clip, prefix=1, measures="action", judges=blind)
    assert scores["action/unscored"] == 1 and scores["action/coverage"] == 0
    assert "action/rpe_trans" not in scores or scores["action/rpe_trans"] != scores["action/rpe_trans"]
    assert score_video(clip.video, clip, prefix=1, measures="action", judges=JUDGES)["action/coverage"] > 0


def test_a_perfect_memory_behind_a_soft_autoencoder_does_not_drift(tmp_path):
    clip = cases_in(tmp_path)[0].truth()
    blurred = torch.nn.functional.avg_pool2d(clip.video.permute(0, 3, 1, 2).float(), 5, 1, 2)
    soft = blurred.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    video = torch.cat([clip.video[:41], soft[41:]])
    found = [
        score_video(video, clip, prefix=41, measures="memory", judges=JUDGES, reconstruction=rebuilt)
        for rebuilt in (soft, None)
    ]
    assert abs(found[0]["drift/sharpness"]) < 0.1 and found[1]["drift/sharpness"] < -0.5
    assert found[0]["memory/psnr_lcm"] <= 60


def test_a_video_gone_flat_is_the_worst_and_not_left_out(tmp_path):
    clip = cases_in(tmp_path)[0].truth()
    flat = torch.cat([clip.video[:41], torch.full_like(clip.video[41:], 90)])
    scores = score_video(flat, clip, prefix=41, measures="memory", judges=JUDGES)
    assert scores["drift/sharpness"] == -10


def test_losing_track_early_is_not_taken_for_obeying(tmp_path):
    class Brief:
        def estimate(self, video, *, intrinsics_px):
            c2w = clip.c2w.clone()
            c2w[len(c2w) // 3 :] = torch.nan
            return PoseEstimate(c2w, c2w.isfinite().all(2).all(1))

    clip = cases_in(tmp_path)[1].truth()
    scores = score_video(
        clip.video, clip, prefix=1, measures="action", judges=replace(JUDGES, estimator=Brief())
    )
    assert scores["action/unscored"] == 1 and "action/rpe_rot_deg" not in scores
    assert 0.3 < scores["action/coverage"] < 0.4


def test_behind_a_prefix_only_generated_frames_are_asked_whether_they_obeyed(tmp_path):
    class Strays:
        """Finds the true camera but for the prefix, or but for what comes after it."""

        def __init__(self, frames: slice) -> None:
            self.frames = frames

        def estimate(self, video, *, intrinsics_px):
            c2w = clip.c2w.clone()
            angles = torch.zeros(len(c2w[self.frames]), 3, dtype=torch.float64)
            angles[:, 0] = 5.0 * torch.arange(len(angles))
            c2w[self.frames, :3, :3] = rotation_from_angles(angles) @ c2w[self.frames, :3, :3]
            return PoseEstimate(c2w, torch.ones(len(video), dtype=torch.bool))

    clip = cases_in(tmp_path)[0].truth()
    before, after = (
        score_video(
            clip.video, clip, prefix=41, measures="memory", judges=replace(JUDGES, estimator=Strays(frames))
        )
        for frames in (slice(0, 40), slice(41, None))
    )
    assert before["memory/rpe_rot_deg"] == pytest.approx(0, abs=1e-5) and before["memory/coverage"] == 1
    assert after["memory/rpe_rot_deg"] > 4 and after["memory/rpe_rot_deg_8"] > 30
    assert not [name for name in (*before, *after) if name.startswith("action/")]


def test_a_video_shorter_than_two_seconds_has_a_drift(tmp_path):
    clip = cases_in(tmp_path)[1].truth()
    short = clip._replace(video=clip.video[:25], c2w=clip.c2w[:25])
    scores = score_video(short.video, short, prefix=1, measures="action", judges=JUDGES)
    assert scores["drift/colour"] >= 0
