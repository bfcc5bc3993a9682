import json

import pytest

from relic.data.video import count_frames
from relic.suite.play import play, reconstruct
from relic.suite.run import TRUTH, folder_of, video_path
from tests.suite.runs import NAMES, played


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


def test_worlds_that_share_an_autoencoder_see_the_truth_through_it_once(finished, monkeypatch):
    root, _ = finished
    for lost in root.glob("cases/short*/look*.json"):
        lost.unlink()
    seen = []
    monkeypatch.setattr(
        "relic.suite.run.reconstruct", lambda *words, **named: seen.append(1) or reconstruct(*words, **named)
    )
    played(root)
    assert len(list(root.glob("cases/short*/look*.json"))) == 2 and len(seen) == 1


def test_a_case_whose_video_is_gone_or_that_was_skipped_is_tried_again(finished):
    root, records = finished
    (video,) = root.glob("videos/short/pan*.mp4")
    before = video.read_bytes()
    video.unlink()
    skipped = next(r for r in records if "skipped" in r)
    paths = root.glob(f"cases/*/{skipped['case']}.json")
    record = next(path for path in paths if "skipped" in json.loads(path.read_text()))
    record.write_text(json.dumps(skipped | {"skipped": "a reason that is gone"}))
    again = played(root)
    assert video.read_bytes() == before
    assert "a reason that is gone" not in json.dumps(again)
