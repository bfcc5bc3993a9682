import json
from dataclasses import replace

import pytest

from relic.cli import main
from relic.data.claim import alone
from relic.nn.student import FewSteps
from relic.suite.play import play
from relic.verbs.evaluate import check_words, load_contestants
from tests.bundles import BOUNDED, SHORT, other_clip, world_of
from tests.suite.recordings import write_memobench, write_mind
from tests.suite.worlds import five_seconds

pytest.importorskip("panda3d")


POLICIES = ("own", "compressed:4:2,1")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("worlds") / "rooms"
    five_seconds().save(path)
    return path


def evaluate(bundle, out, *options):
    main(["evaluate", str(bundle), "--out", str(out), "--device", "cpu", *map(str, options)])
    return json.loads((out / "report.json").read_text())


def test_two_memories_are_played_side_by_side_and_reported(bundle, tmp_path, capsys):
    options = ["--groups", "turn_round", "--policy", *POLICIES]
    report = evaluate(bundle, tmp_path / "run", *options)
    said = capsys.readouterr().out
    assert "4 cases, rooms (own), rooms (compressed:4:2,1); cpu" in said
    assert "missing    LPIPS" in said or report["settings"]["lpips"]
    assert report["cases_scored"] == 1 and len(report["skipped"]) == 6
    assert report["settings"]["scenes"] == 1 and report["settings"]["groups"] == ["turn_round"]
    for label in ("truth", "rooms (own)", "rooms (compressed:4:2,1)"):
        assert report["summary"][label]["all"]["memory/psnr_revisit"]["cases"] == 1
        assert report["summary"][label]["group: turn_round"]["drift/colour"]["cases"] == 1
    (one, other) = (
        report["summary"][f"rooms ({name})"]["all"]["memory/psnr_lcm"]["mean"] for name in POLICIES
    )
    found = report["differences"]["rooms (compressed:4:2,1)"]["memory/psnr_lcm"]["mean"]
    assert found == pytest.approx(other - one, abs=1e-6)
    again = evaluate(bundle, tmp_path / "run", *options)
    assert again["cases"] == report["cases"], "nothing is played twice"
    with pytest.raises(SystemExit, match=r"was begun with seed=7919, not 5 .*another folder"):
        evaluate(bundle, tmp_path / "run", "--seed", 5, *options)


def test_processes_that_share_the_cases_write_what_one_does(bundle, tmp_path, capsys):
    options = ["--groups", "turn_round", "look_away", "--seconds", 5]
    whole = evaluate(bundle, tmp_path / "whole", *options)
    shared = tmp_path / "shared"
    main(
        [
            "evaluate",
            str(bundle),
            "--out",
            str(shared),
            "--device",
            "cpu",
            *map(str, options),
            "--part",
            "1",
            "2",
        ]
    )
    assert "part 1 of 2; others are to come" in capsys.readouterr().out
    parts = evaluate(bundle, shared, *options, "--part", 0, 2)
    drop = lambda rows: [{k: v for k, v in row.items() if k != "wall_s"} for row in rows]  # noqa: E731
    assert drop(parts["cases"]) == drop(whole["cases"])
    assert parts["summary"] == whole["summary"]
    with pytest.raises(SystemExit, match="part=2 2 must be one of 2 parts"):
        evaluate(bundle, shared, *options, "--part", 2, 2)
    with alone(shared, part=(0, 2)), alone(shared, part=(1, 2)):
        for part in ([], ["--part", 0, 2]):
            with pytest.raises(SystemExit, match="another run is writing to"):
                evaluate(bundle, shared, *options, *part)


def test_a_run_does_not_go_on_with_the_same_student_played_otherwise(tmp_path):
    options = ["--groups", "turn_round", "--seconds", 4]
    world = five_seconds()
    other = replace(world, config=replace(world.config, sampler=FewSteps(steps=2)))
    for name, saved in (("first", world), ("second", other)):
        (tmp_path / name).mkdir()
        saved.save(tmp_path / name / "rooms")
    evaluate(tmp_path / "first" / "rooms", tmp_path / "run", *options)
    with pytest.raises(SystemExit, match=r"cases/rooms was begun with sampler=FewSteps\(steps=1"):
        evaluate(tmp_path / "second" / "rooms", tmp_path / "run", *options)


def test_a_world_can_be_laid_beside_those_of_a_finished_run(bundle, tmp_path, monkeypatch):
    options = ["--groups", "turn_round", "--seconds", 4]
    first = evaluate(bundle, tmp_path / "run", *options)
    world = five_seconds()
    other = replace(world, config=replace(world.config, sampler=FewSteps(steps=2)))
    other.save(tmp_path / "two_steps")
    played = []
    monkeypatch.setattr("relic.suite.run.play", lambda w, *a, **k: played.append(w) or play(w, *a, **k))
    both = evaluate(bundle, tmp_path / "run", "--beside", tmp_path / "two_steps", *options)
    assert [w.config.sampler.steps for w in played] == [2]
    assert [row for row in both["cases"] if row["contestant"] != "two_steps"] == first["cases"]
    assert both["differences"]["two_steps"]["memory/psnr_lcm"]["mean"] != 0


def test_a_run_takes_in_no_world_that_is_played_on_another_truth(bundle, tmp_path):
    options = ["--groups", "turn_round", "--seconds", 4]
    evaluate(bundle, tmp_path / "run", *options)
    five_seconds(d_bar=0.06).save(tmp_path / "other_unit")
    with pytest.raises(SystemExit, match=r"was begun with d_bar=0\.05, not 0\.06"):
        evaluate(tmp_path / "other_unit", tmp_path / "run", *options)
    five_seconds().save(tmp_path / "a b")
    evaluate(tmp_path / "a b", tmp_path / "run", *options)
    five_seconds().save(tmp_path / "a-b")
    with pytest.raises(SystemExit, match="cases/a-b was begun with label=a b, not a-b"):
        evaluate(tmp_path / "a-b", tmp_path / "run", *options)
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps({"suite": "relic", "seed": 7919}))
    with pytest.raises(SystemExit, match=r"was begun with an earlier version .*another folder"):
        evaluate(bundle, tmp_path / "run", *options)


def test_scripts_are_played_at_another_speed(bundle, tmp_path):
    options = ["--groups", "look_away", "--seconds", 4]
    report = evaluate(bundle, tmp_path / "run", *options, "--gamma", 2)
    assert report["settings"]["gamma"] == 2 and report["cases"][0]["words"].endswith(", gamma 2.5"), (
        "1.25 of its own"
    )
    with pytest.raises(SystemExit, match=r"was begun with gamma=2\.0, not 1\.0"):
        evaluate(bundle, tmp_path / "run", *options)


@pytest.mark.parametrize("suite", ["mind", "memobench"])
def test_folders_of_other_benchmarks_are_suites(tmp_path, suite):
    world_of(steps=1).save(tmp_path / "rooms")
    write_mind(tmp_path / "data") if suite == "mind" else write_memobench(tmp_path / "data")
    out = tmp_path / "run"
    report = evaluate(tmp_path / "rooms", out, "--suite", suite, "--data", tmp_path / "data")
    assert report["cases_scored"] == 1 and not report["skipped"]
    if suite == "mind":
        result = json.loads((out / "theirs" / "rooms" / "result.json").read_text())
        (entry,) = result["data"]
        assert entry["path"] == "data-26" and len(entry["lcm"]["psnr"]) == entry["sample_frames"] == 16
        assert "action" in entry or "has no pose" in entry["error"]
        assert (out / "theirs" / "rooms" / "1st_data" / "mem_test" / "data-26" / "video.mp4").is_file()
    else:
        assert report["summary"]["rooms"]["all"]["phase/psnr_back"]["cases"] == 1
        assert len(list((out / "theirs" / "rooms").rglob("*.png"))) == 41


# -- errors --------------------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused_before_anything_is_played(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("relic.verbs.evaluate.run", None)
    out = tmp_path / "run"
    cases = [
        (["--groups", "pann"], "groups: pann is not among dolly"),
        (["--seconds", 7], "seconds: 7 is not among 4, 5, 10, 20, 60"),
        (["--policy", "fool"], "policy 'fool' is not known"),
        (["--policy", "window:3"], "must be a multiple of block_latents=2"),
        (["--policy", "own", "own"], "they must differ"),
        (["--scenes", 0], "scenes=0 must be at least 1"),
        (["--gamma", 0], r"gamma=0\.0 must be positive"),
        (["--gamma", ".inf"], r"gamma=inf must be positive and finite"),
        (["--suite", "mind", "--data", tmp_path, "--gamma", 2], "gamma are of scripts"),
        (["--seconds", 20], "none of the .* cases can be played: 321 frames are beyond the horizon"),
        (["--lpips", tmp_path / "none.pth"], r"LPIPS: not measured, backbone not found at .*none\.pth"),
        (["--suite", "mind"], "suite=mind needs --data"),
        (["--suite", "mind", "--data", tmp_path], "holds no MIND clips"),
        (["--data", tmp_path], "is for mind and memobench"),
        (["--beside", tmp_path / "nowhere"], "No world at .*nowhere"),
    ]
    for options, message in cases:
        with pytest.raises(SystemExit, match=f"relic evaluate: .*{message}"):
            evaluate(bundle, out, *options)
    with pytest.raises(SystemExit):
        evaluate(bundle, out, "--suite", "other")
    assert not (out / "cases").exists()


def test_only_worlds_on_the_same_truth_stand_in_one_table(bundle, tmp_path):
    five_seconds(d_bar=0.06).save(tmp_path / "other_unit")
    world = five_seconds()
    replace(world, config=other_clip(world.config)).save(tmp_path / "other_rate")
    for name, message in (("other_unit", r"has d_bar 0\.05, other_unit 0\.06"), ("other_rate", "has fps 16")):
        with pytest.raises(ValueError, match=message):
            load_contestants([str(bundle), str(tmp_path / name)], policies=("own",), device="cpu")


def test_policies_share_the_weights_of_a_bundle(bundle):
    own, full = load_contestants([str(bundle)], policies=("own", "full"), device="cpu")
    assert own.world.net is full.world.net and own.world.config.policy == SHORT
    assert own.label == "rooms (own)" and full.world.config.policy != BOUNDED


def test_scripts_are_only_chosen_of_suites_that_have_them():
    with pytest.raises(ValueError, match="the clips of mind are as they are"):
        check_words("mind", data="x", groups=(), seconds=(5,), scenes=1)
    assert len(check_words("relic", data=None, groups=(), seconds=(5,), scenes=1)) == 18
