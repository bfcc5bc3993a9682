"""Planted faults on engine clips: the memory scores rank what should be ranked."""

import math
import sys
from pathlib import Path

import pytest

from relic.metrics import RevisitRule

pytest.importorskip("panda3d", reason="planted faults are filmed: pip install 'relic-world[engine]'")


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import faults

sys.path.pop(0)


@pytest.fixture(scope="module")
def table():
    cases = faults.make_cases(2, size=(64, 96))
    return {n: faults.score(cases, f, rule=RevisitRule(), lpips=None) for n, f in faults.FAULTS.items()}


FAULTY = set(faults.FAULTS) - {"truth", "truth with noise"}


def test_in_truth_mode_truth_is_best_and_every_fault_is_far_below_a_good_model(table):
    for score, margin in (("psnr_revisit", 10), ("ssim_revisit", 0.15)):
        best, good = (table[name][f"memory/{score}"] for name in ("truth", "truth with noise"))
        assert best > good
        assert all(table[name][f"memory/{score}"] < good - margin for name in FAULTY)


def test_only_the_blur_loses_its_sharpness(table):
    ratios = {name: scores["memory/sharpness_ratio"] for name, scores in table.items()}
    assert ratios.pop("grey blur") < 0.05
    assert all(0.5 < ratio < 1.6 for ratio in ratios.values())


def test_a_camera_that_does_not_return_did_not_move(table):
    stays = {"frozen camera", "frozen first frame", "grey blur", "actions mirrored", "turned half as far"}
    for name in set(table) - {"return path shuffled"}:
        scores, frozen = table[name], 2 * (name in stays)
        assert scores["memory/did_not_move"] == scores["memory/did_not_move_self"] == frozen
        assert math.isnan(scores["memory/psnr_self"]) == bool(frozen)
        assert (scores["memory/pairs_self"] == 0) == bool(frozen)


def test_another_scene_is_not_the_one_shown_before(table):
    other, truth = (table[n] for n in ("truth from another scene", "truth"))
    assert other["memory/psnr_self"] < 20 < truth["memory/psnr_self"] == 60
    assert abs(other["memory/psnr_self"] - truth["memory/psnr_self_away"]) < 5  # no better than a wrong view


def test_floors_and_ceilings_stand_beside_the_score(table):
    scores = table["truth with noise"]
    assert scores["memory/psnr_revisit_copy_first"] < scores["memory/psnr_revisit"]
    assert scores["memory/psnr_revisit_nearest_seen"] == 60  # the paths return exactly
    assert scores["memory/psnr_self_away"] < scores["memory/psnr_self"] < scores["memory/psnr_self_truth"]


def test_action_errors_tell_wrong_motion_from_wrong_pictures(table):
    errors = {name: scores.get("action/rpe_rot_deg_8") for name, scores in table.items()}
    for right in ("truth", "truth with noise", "truth from another scene"):
        assert errors[right] == pytest.approx(0, abs=1e-4)
    assert errors["turned half as far"] == pytest.approx(errors["frozen camera"] / 2, rel=0.05)
    assert errors["frozen camera"] < errors["actions mirrored"] < errors["return path shuffled"]
    assert errors["frames dropped"] == pytest.approx(errors["frozen camera"], rel=0.1)  # the same, too much
    assert table["grey blur"]["action/unscored"] == 2


def test_cameras_found_in_the_pictures_tell_who_came_back():
    pytest.importorskip("cv2")
    cases = faults.make_cases(1, size=(128, 256))
    for name, stayed in (("truth", 0), ("frozen camera", 1), ("grey blur", 1)):
        scores = faults.score(cases, faults.FAULTS[name], rule=RevisitRule(), lpips=None, estimated=True)
        assert scores["memory/did_not_move"] == scores["memory/did_not_move_self"] == stayed, name
