import pytest
import torch

from relic.engine.capture import intrinsics_of
from relic.metrics import find_revisits
from relic.ops.actions import CHANNELS, STATIC, integrate
from relic.suite.scripts import load_scripts, parse_suite, prefix_frames, select_scripts

SCRIPTS = load_scripts("relic")


def test_the_suite_has_eleven_groups_of_four_lengths_and_a_short_one():
    groups = dict.fromkeys(script.group for script in SCRIPTS)
    assert len(groups) == 11
    for group in groups:
        lengths = {len(s.actions()) for s in SCRIPTS if s.group == group}
        assert lengths == {65, 81, 161, 321, 961}
    assert len({script.name for script in SCRIPTS}) == len(SCRIPTS)


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.returns], ids=lambda s: s.name)
def test_what_says_that_it_returns_does(script):
    poses = integrate(script.actions())
    assert torch.allclose(poses[-1], poses[0], atol=1e-9)
    turned = (poses[:, :3, 2] @ poses[0, :3, 2]).clamp(-1, 1).arccos()
    assert torch.rad2deg(turned).max() > 60, "the view is left in between"
    assert script.measures == "memory" and script.outward > 0


def test_memory_groups_return_and_leave_frames_after_the_outward_path():
    memory = {s.group for s in SCRIPTS if s.measures == "memory"}
    assert memory == {s.group for s in SCRIPTS if s.returns}
    assert memory == {"out_and_back", "look_away", "turn_round", "loop"}


@pytest.mark.parametrize(
    "script", [s for s in SCRIPTS if s.measures == "memory" and s.seconds < 60], ids=lambda s: s.name
)
def test_memory_scripts_show_again_in_the_generated_part_what_the_prefix_showed(script):
    poses = integrate(script.actions(), d_bar=0.05)
    prefix = prefix_frames(script.outward, block_frames=16, num_frames=len(poses))
    size = (128, 256)
    pairs = find_revisits(poses, intrinsics_of(size), fps=16, size=size, d_bar=0.05, prefix_frames=prefix)
    assert len(pairs.now) >= 5


@pytest.mark.parametrize("seconds", [4, 5, 10, 20, 60])
def test_the_two_senses_of_each_axis_are_balanced(seconds):
    axes = ("dolly", "truck", "pedestal", "pan", "tilt", "roll")
    held = sum(s.actions()[1:] for s in SCRIPTS if s.group in axes and s.seconds == seconds).sum(0)
    held = held[:STATIC].reshape(6, 2)
    assert torch.equal(held[:, 0], held[:, 1]) and (held > 0).all()


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.group == "combined"], ids=lambda s: s.name)
def test_combinations_use_every_axis_and_hold_two_keys(script):
    actions = script.actions()[1:, :STATIC]
    assert (actions.sum(0) > 0).all(), [c for c, v in zip(CHANNELS, actions.sum(0), strict=False) if not v]
    assert ((actions > 0).sum(1) == 2).float().mean() > 0.5


def test_no_script_tilts_or_rolls_beyond_what_training_paths_do():
    for script in SCRIPTS:
        axis_up = integrate(script.actions())[:, 1, 1]
        assert torch.rad2deg(axis_up.clamp(-1, 1).arccos()).max() < 45, script.name


def test_a_part_can_be_taken():
    part = select_scripts(SCRIPTS, groups=("pan", "loop"), seconds=(5,))
    assert [s.name for s in part] == ["pan-5s-0", "pan-5s-1", "loop-5s-0"]
    assert select_scripts(SCRIPTS) == tuple(s for s in SCRIPTS if s.seconds >= 5)
    with pytest.raises(ValueError, match="groups: pann is not among dolly, truck"):
        select_scripts(SCRIPTS, groups=("pann",))
    with pytest.raises(ValueError, match="seconds: 7 is not among 4, 5, 10, 20, 60"):
        select_scripts(SCRIPTS, seconds=(7,))
    with pytest.raises(ValueError, match="'other' is not one of relic"):
        load_scripts("other")


def test_a_suite_whose_lengths_are_wrong_is_refused():
    group = {"measures": "action", "scripts": [{"seconds": 5, "script": "pan_left*79"}]}
    with pytest.raises(ValueError, match="pan-5s-0 is 79 frames long; 5 s are 80"):
        parse_suite({"fps": 16, "groups": {"pan": group}})
    with pytest.raises(ValueError, match="measures='joy' must be action or memory"):
        parse_suite({"fps": 16, "groups": {"pan": {**group, "measures": "joy"}}})
    late = {"measures": "memory", "scripts": [{"seconds": 5, "script": "pan_left*80", "outward": 80}]}
    with pytest.raises(ValueError, match="outward=80 must leave frames"):
        parse_suite({"fps": 16, "groups": {"pan": late}})


@pytest.mark.parametrize(("outward", "prefix"), [(0, 1), (1, 17), (16, 17), (40, 49), (79, 65)])
def test_a_prefix_is_the_image_and_whole_blocks_and_leaves_one_to_generate(outward, prefix):
    assert prefix_frames(outward, block_frames=16, num_frames=81) == prefix
