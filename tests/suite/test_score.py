from dataclasses import replace

import pytest
import torch

from relic.metrics import PoseEstimate
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
