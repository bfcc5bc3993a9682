import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from relic.data.video import count_frames
from relic.metrics.pose.visual_odometry import VisualOdometry
from relic.metrics.revisit import RevisitRule
from relic.ops.retention import Window
from relic.suite.judges import Judges
from relic.suite.page import barred, beside
from relic.suite.play import Contestant, play
from relic.suite.report import build_report, write_report
from relic.suite.run import TRUTH, folder_of, run, video_path
from relic.suite.score import look_by_second, score_video
from relic.suite.scripts import load_scripts
from relic.suite.summary import machine
from relic.suite.truth import ScriptedCase, Setting
from tests.bundles import world_of
from tests.suite.worlds import five_seconds

pytest.importorskip("panda3d")

SETTING = Setting(size=(32, 48), fps=16, d_bar=0.05, seed=7919, backend="software")
JUDGES = Judges(rule=RevisitRule(), lpips=None, estimator=VisualOdometry())
NAMES = ("look_away-5s-0", "pan-5s-1")


def cases_in(root):
    scripts = {script.name: script for script in load_scripts()}
    return [
        ScriptedCase(script=scripts[name], scene=0, setting=SETTING, cache=root / "truth") for name in NAMES
    ]


def contestants():
    return [
        Contestant(label="short", world=five_seconds()),
        Contestant(label="short (window:4)", world=five_seconds(Window(latents=4))),
        Contestant(label="too short", world=replace(world_of(steps=1), d_bar=0.05)),
    ]


def played(root):
    return run(cases_in(root), contestants(), out=root, judges=JUDGES, seed=0, fps=16)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    return root, played(root)


def test_every_case_has_a_record_of_the_truth_and_of_each_contestant(finished):
    root, records = finished
    labels = (TRUTH, "short", "short (window:4)", "too short")
    assert [(r["case"], r["contestant"]) for r in records] == [
        (f"{name}-scene-0", label) for name in NAMES for label in labels
    ]
    scored = {(r["case"], r["contestant"]): r for r in records if "scores" in r}
    assert len(scored) == 6, "the world that is too short plays none"
    assert {r["skipped"] for r in records if "skipped" in r} == {
        "81 frames are beyond the horizon of this world, 41"
    }
    record = scored["look_away-5s-0-scene-0", "short"]
    assert record["prefix"] == 41 and record["measures"] == "memory" and record["seconds"] == 5
    path = video_path(root, "short (window:4)", "pan-5s-1-scene-0")
    assert path.parent.name == folder_of("short (window:4)") == "short-window-4"
    assert count_frames(path.read_bytes()) == 81


def test_truth_is_the_best_of_all_and_modes_are_not_mixed(finished):
    _, records = finished
    memory = {r["contestant"]: r["scores"] for r in records if r["case"].startswith("look") and "scores" in r}
    assert memory[TRUTH]["memory/psnr_revisit"] > 59 > memory["short"]["memory/psnr_revisit"]
    assert memory[TRUTH]["memory/ssim_lcm"] == pytest.approx(1.0)
    assert "memory/psnr_revisit_autoencoder" in memory["short"]
    assert "memory/psnr_self" not in memory["short"]
    action = next(r for r in records if r["case"].startswith("pan") and r["contestant"] == "short")
    assert "memory/psnr_revisit" not in action["scores"] and "drift/colour" in action["scores"]


def test_a_stopped_run_goes_on_with_what_is_missing(finished, monkeypatch):
    root, records = finished
    (lost,) = root.glob("cases/short/pan*.json")
    before = lost.read_bytes()
    lost.unlink()
    plays = []
    monkeypatch.setattr(
        "relic.suite.run.play", lambda *words, **named: plays.append(1) or play(*words, **named)
    )
    again = played(root)
    assert len(plays) == 1
    found = json.loads(lost.read_bytes())
    kept = json.loads(before)
    assert {k: v for k, v in found.items() if k != "wall_s"} == {
        k: v for k, v in kept.items() if k != "wall_s"
    }
    assert [r["case"] for r in again] == [r["case"] for r in records]
    assert not list(root.rglob("*.tmp"))


def test_the_report_holds_everything_itself(finished):
    root, records = finished
    report = build_report(
        records, contestants(), title="a <test>", rule=str(RevisitRule()), settings={"suite": "relic"},
        machine=machine("cpu"), not_measured=["LPIPS: not measured"],
        vbench={"short": {"dynamic_degree": 0.5}},
    )  # fmt: skip
    write_report(root, report)
    assert json.loads((root / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["cases_scored"] == 2 and len(report["skipped"]) == 2
    assert report["summary"]["short"]["all"]["vbench/dynamic_degree"]["mean"] == 0.5
    assert report["summary"][TRUTH]["all"]["memory/clips"] == {"sum": 1}
    page = (root / "report.html").read_text()
    assert page.count("<video") == 2 and page.count("data:video/mp4") == 2
    assert "a &lt;test&gt;" in page and "LPIPS: not measured" in page and "beyond the horizon" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert "floor: first frame, repeated" in page and "dynamic degree" in page


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


def test_an_estimator_that_breaks_down_ends_nothing_and_is_counted(tmp_path):
    class Broken:
        def estimate(self, video, *, intrinsics_px):
            raise np.linalg.LinAlgError("Singular matrix")

    clip = cases_in(tmp_path)[1].truth()
    broken = replace(JUDGES, estimator=Broken())
    scores = score_video(clip.video, clip, prefix=1, measures="action", judges=broken)
    assert scores["action/estimator_failed"] == 1 and scores["action/coverage"] == 0
    assert score_video(clip.video, clip, prefix=1, measures="action", judges=JUDGES)["action/coverage"] > 0


def test_panels_stand_side_by_side_under_bars_that_tell_truth_from_generated():
    video = torch.zeros(6, 8, 10, 3, dtype=torch.uint8)
    panel = barred(video, given=2)
    assert panel.shape == (6, 12, 10, 3) and (panel[:, 4:] == 0).all()
    assert (panel[1, 0, 0] != panel[2, 0, 0]).any() and torch.equal(panel[0, 0, 0], panel[1, 3, 9])
    assert beside([panel, panel, panel]).shape == (6, 12, 38, 3)
