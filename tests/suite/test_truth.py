from dataclasses import replace

import pytest
import torch

from relic.engine.building import make_scene
from relic.engine.space import CLEARANCE, FreeSpace
from relic.ops.actions import encode_actions, integrate, parse_script
from relic.ops.camera import invert_rigid
from relic.suite.case import NoTruth
from relic.suite.scripts import load_scripts
from relic.suite.truth import ScriptedCase, Setting, find_start

pytest.importorskip("panda3d")

SETTING = Setting(size=(32, 48), fps=16.0, d_bar=0.05, seed=7919, backend="software")
SCRIPTS = {script.name: script for script in load_scripts()}


def case_of(tmp_path, script, **changes):
    return ScriptedCase(script=script, scene=0, setting=replace(SETTING, **changes), cache=tmp_path)


def filmed(tmp_path, name="out_and_back-5s-0", **changes):
    return case_of(tmp_path, SCRIPTS[name], **changes).truth()


def test_a_case_says_what_it_is(tmp_path):
    case = case_of(tmp_path, SCRIPTS["turn_round-60s-0"])
    assert (case.name, case.group, case.measures) == ("turn_round-60s-0-scene-0", "turn_round", "memory")
    assert case.words == "pan_left*160 pan_left*160 pan_right*160 (2 times), gamma 1.125"
    assert (case.num_frames, case.outward) == (961, 160)


def test_truth_moves_as_the_script_says_in_units_of_the_worlds_d_bar(tmp_path):
    clip = filmed(tmp_path)
    actions = SCRIPTS["out_and_back-5s-0"].actions()
    assert clip.video.shape == (81, 32, 48, 3) and clip.d_bar == 0.05 and clip.captions
    assert torch.allclose(encode_actions(clip.c2w, d_bar=clip.d_bar), actions, atol=1e-8)
    local = invert_rigid(clip.c2w[:1]) @ clip.c2w
    assert torch.allclose(local, integrate(actions, d_bar=0.05), atol=1e-9)


def test_a_path_that_returns_shows_the_same_picture(tmp_path):
    clip = filmed(tmp_path)
    assert torch.equal(clip.video[0], clip.video[-1]) and not torch.equal(clip.video[0], clip.video[40])


def test_a_second_time_the_clip_is_read_and_no_longer_filmed(tmp_path, monkeypatch):
    first = filmed(tmp_path)
    monkeypatch.setattr("relic.suite.truth.film", None)
    second = filmed(tmp_path)
    assert torch.equal(first.video, second.video) and torch.equal(first.c2w, second.c2w)
    assert first[3:] == second[3:] and torch.equal(first.intrinsics_px, second.intrinsics_px)
    with pytest.raises(TypeError):
        filmed(tmp_path, d_bar=0.06)  # another unit is another clip
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["loop-20s-0", "pedestal-10s-0", "dolly-60s-1"])
def test_every_pose_keeps_clear_of_walls_and_the_choice_is_the_same_each_time(name):
    path = integrate(SCRIPTS[name].actions(), d_bar=0.06)
    scene = make_scene(7919, 3)
    start = find_start(scene, path, seed=5)
    assert torch.equal(start, find_start(scene, path, seed=5))
    assert not torch.equal(start, find_start(scene, path, seed=6))
    gaps = FreeSpace(scene).gaps((start @ path)[:, :3, 3].numpy().T)
    assert gaps.min() >= CLEARANCE
    assert torch.allclose(start[:3, 1], torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)), "level"


def test_a_path_that_fits_nowhere_is_reported_and_not_shrunk(tmp_path):
    script = replace(SCRIPTS["dolly-5s-0"], words="dolly_in*80")
    with pytest.raises(NoTruth, match=r"clear of walls .* it is 80\.0 m long at d_bar=1 m a frame"):
        case_of(tmp_path, script, d_bar=1.0).truth()
    assert find_start(make_scene(7919, 0), integrate(parse_script("dolly_in*80")), seed=0) is None
