import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from relic.ops.actions import (
    CHANNELS,
    KEYS,
    ROTATION_PAIRS,
    STATIC,
    TRANSLATION_PAIRS,
    controls_of,
    decode_actions,
    encode_actions,
    exchange_actions,
    from_keys,
    integrate,
    mean_step,
    mirror_actions,
    null_controls,
    parse_script,
)
from relic.ops.camera import (
    accumulate,
    angles_from_rotation,
    invert_rigid,
    pose_features,
    project,
    relative,
    rigid,
    rotation_from_angles,
)
from tests.reference import camera as reference

PAIRS = TRANSLATION_PAIRS + ROTATION_PAIRS
seeds = st.integers(0, 2**32 - 1)


def walk(seed: int, frames: int, *, step: float = 1.0, turn: float = 5.0) -> Tensor:
    """A path (frames, 4, 4) that moves along and turns about every axis at once, in every frame."""
    generator = torch.Generator().manual_seed(seed)
    angles = turn * torch.randn(frames, 3, generator=generator, dtype=torch.float64)
    return accumulate(
        rigid(rotation_from_angles(angles), step * torch.randn(frames, 3, generator=generator).double())
    )


def straight(steps: list[float], *, turns: list[float] | None = None) -> Tensor:
    """A path that goes forward by given steps and pans right by given degrees, a frame at rest first."""
    turns = turns or [0.0] * len(steps)
    angles = torch.tensor([[0.0, 0, 0], *([turn, 0, 0] for turn in turns)], dtype=torch.float64)
    moves = torch.tensor([[0.0, 0, 0], *([0, 0, step] for step in steps)], dtype=torch.float64)
    return accumulate(rigid(rotation_from_angles(angles), moves))


def path_length(c2w: Tensor) -> float:
    return float((c2w[1:, :3, 3] - c2w[:-1, :3, 3]).norm(dim=-1).sum())


def assert_same_path(actual: Tensor, expected: Tensor) -> None:
    unit = torch.ones(4, dtype=torch.float64)
    unit[3] = max(1.0, path_length(expected))
    torch.testing.assert_close(actual / unit, expected / unit, rtol=0, atol=1e-9)


def one(name: str, value: float) -> Tensor:
    action = torch.zeros(1, 13, dtype=torch.float64)
    action[0, CHANNELS.index(name)] = value
    return action


# --- what each channel means

SIGHT = {  # which way a point up and right of the picture's centre moves, (right, down), or in and out
    "dolly_in": (1, -1),
    "dolly_out": (-1, 1),
    "truck_left": (1, 0),
    "truck_right": (-1, 0),
    "pedestal_up": (0, 1),
    "pedestal_down": (0, -1),
    "pan_left": (1, 0),
    "pan_right": (-1, 0),
    "tilt_up": (0, 1),
    "tilt_down": (0, -1),
}
SENSE = {  # the part of a pose after one frame that each channel raises: (row, column), sign
    "dolly_in": (2, 3, 1),
    "dolly_out": (2, 3, -1),
    "truck_left": (0, 3, -1),
    "truck_right": (0, 3, 1),
    "pedestal_up": (1, 3, -1),
    "pedestal_down": (1, 3, 1),
    "tilt_up": (1, 2, -1),  # the forward axis, column 2, rises: −y
    "tilt_down": (1, 2, 1),
    "pan_left": (0, 2, -1),
    "pan_right": (0, 2, 1),  # the forward axis swings to +x
    "roll_cw": (1, 0, 1),  # the right-hand axis, column 0, sinks: +y
    "roll_ccw": (1, 0, -1),
}


def test_the_thirteen_channels_are_in_the_published_order():
    assert " ".join(CHANNELS) == (
        "dolly_in dolly_out truck_left truck_right pedestal_up pedestal_down "
        "tilt_up tilt_down pan_left pan_right roll_cw roll_ccw static"
    )
    assert STATIC == 12


@pytest.mark.parametrize("name", SENSE)
def test_a_channel_moves_the_camera_the_way_it_is_named(name):
    row, column, sign = SENSE[name]
    pose = integrate(one(name, 1.0))[0]
    size = 1.0 if column == 3 else np.sin(np.deg2rad(1.0))
    assert float(sign * pose[row, column]) == pytest.approx(size)
    others = pose.clone()
    if column == 3:
        others[row, column] = 0
        assert torch.equal(others, torch.eye(4, dtype=torch.float64))
    else:
        assert torch.equal(pose[:3, 3], torch.zeros(3, dtype=torch.float64))
        axis = {"tilt": 0, "pan_": 1, "roll": 2}[name[:4]]
        assert pose[axis, axis] == 1  # it turns about its own axis only


@pytest.mark.parametrize("name", SIGHT)
def test_the_picture_moves_against_the_camera(name):
    intrinsics = torch.tensor([100.0, 100.0, 0.0, 0.0], dtype=torch.float64)
    point = torch.tensor([[0.5, -0.5, 4.0]], dtype=torch.float64)
    first, _ = project(point, torch.eye(4, dtype=torch.float64), intrinsics_px=intrinsics)
    then, _ = project(point, invert_rigid(integrate(one(name, 0.5))[0]), intrinsics_px=intrinsics)
    for moved, sign in zip((then - first)[0].tolist(), SIGHT[name], strict=True):
        assert moved * sign > 0 if sign else abs(moved) < 0.02


def test_rolling_clockwise_lifts_what_is_on_the_right():
    intrinsics = torch.tensor([100.0, 100.0, 0.0, 0.0], dtype=torch.float64)
    right = torch.tensor([[1.0, 0.0, 4.0]], dtype=torch.float64)
    pixel, _ = project(right, invert_rigid(integrate(one("roll_cw", 5.0))[0]), intrinsics_px=intrinsics)
    assert pixel[0, 1] < -1


@given(seeds)
def test_a_motion_is_the_product_written_out_from_the_channels(seed):
    actions = np.random.default_rng(seed).uniform(0, 20, size=(5, 13))
    oracle = np.stack([reference.motion_of(action) for action in actions])
    torch.testing.assert_close(
        decode_actions(torch.from_numpy(actions)), torch.from_numpy(oracle), rtol=0, atol=1e-13
    )


# --- poses and actions


@given(seeds, st.floats(0.001, 1000), st.integers(1, 600))
def test_poses_come_back_from_their_actions(seed, d_bar, frames):
    c2w = walk(seed, frames, step=d_bar)
    seen_from_first = invert_rigid(c2w[0]) @ c2w
    assert_same_path(integrate(encode_actions(c2w, d_bar=d_bar), d_bar=d_bar), seen_from_first)


@given(seeds)
def test_actions_come_back_from_the_poses_they_make(seed):
    generator = np.random.default_rng(seed)
    actions = np.zeros((321, 13))
    for positive, negative in PAIRS:
        signed = generator.uniform(-9, 9, size=320)
        actions[1:, positive], actions[1:, negative] = signed.clip(min=0), (-signed).clip(min=0)
    actions[0, STATIC] = 1
    back = encode_actions(integrate(torch.from_numpy(actions)), d_bar=1.0)
    torch.testing.assert_close(back, torch.from_numpy(actions), rtol=0, atol=1e-9)


def test_actions_and_poses_round_trip_over_ten_thousand_frames():
    c2w = walk(0, 10_000)
    actions = encode_actions(c2w, d_bar=0.7)
    poses = integrate(actions, d_bar=0.7)
    assert_same_path(poses, invert_rigid(c2w[0]) @ c2w)
    torch.testing.assert_close(encode_actions(poses, d_bar=0.7), actions, rtol=0, atol=1e-9)


def test_a_path_that_looks_straight_up_and_turns_half_round_round_trips():
    angles = [
        [0, 0, 0],
        [0, 90, 0],
        [0, 0, 180],
        [180, 0, 0],
        [170, 90, 20],
        [10, -90, 5],
        [0, 89.9999999, 60],
    ]
    motion = rotation_from_angles(torch.tensor(angles, dtype=torch.float64))
    c2w = accumulate(rigid(motion, torch.ones(7, 3, dtype=torch.float64)))
    assert_same_path(integrate(encode_actions(c2w, d_bar=1.0)), invert_rigid(c2w[0]) @ c2w)


def test_integration_equals_a_loop_over_the_frames():
    actions = np.random.default_rng(0).uniform(0, 3, size=(700, 13))
    oracle = reference.chain(np.stack([reference.motion_of(action) for action in actions]))
    assert_same_path(integrate(torch.from_numpy(actions)), torch.from_numpy(oracle))


def test_single_precision_actions_stay_within_a_thousandth_of_a_step_over_321_frames():
    actions = encode_actions(walk(3, 321, turn=2.0), d_bar=1.0)
    exact, single = integrate(actions), integrate(actions.float())
    assert single.dtype == torch.float64
    assert (exact - single)[:, :3, 3].abs().max() < 1e-3
    assert (exact - single)[:, :3, :3].abs().max() < 1e-5


@given(seeds)
def test_every_value_is_a_magnitude_and_one_of_each_pair_is_zero(seed):
    actions = encode_actions(walk(seed, 20, turn=60.0), d_bar=2.0)
    assert (actions >= 0).all()
    for positive, negative in PAIRS:
        assert (torch.minimum(actions[:, positive], actions[:, negative]) == 0).all()
    assert torch.equal(actions[0], from_keys(["static"]))


def test_each_sample_of_a_batch_has_its_own_unit():
    paths, units = torch.stack([walk(0, 9), walk(1, 9)]), torch.tensor([0.5, 3.0])
    alone = [encode_actions(path, d_bar=float(unit)) for path, unit in zip(paths, units, strict=True)]
    assert (encode_actions(paths, d_bar=units) - torch.stack(alone)).abs().max() < 1e-10


def test_actions_do_not_depend_on_where_the_recording_started():
    c2w, elsewhere = walk(0, 30), walk(1, 2)[1]
    there = encode_actions(elsewhere @ c2w, d_bar=1.0)
    torch.testing.assert_close(there, encode_actions(c2w, d_bar=1.0), rtol=0, atol=1e-9)


def test_actions_with_a_missing_channel_are_refused():
    with pytest.raises(ValueError, match=r"12 channels.*13 of dolly_in"):
        decode_actions(torch.zeros(5, 12))


def test_the_mirrored_action_undoes_a_motion_along_or_about_one_axis():
    for name in CHANNELS[:12]:
        action = one(name, 1.5)
        there_and_back = integrate(torch.cat([action, mirror_actions(action)]))[-1]
        torch.testing.assert_close(there_and_back, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-14)
    static = from_keys(["static"])
    assert torch.equal(mirror_actions(static), static)


# --- the paper's formulas, which read literally mean something else


def test_the_rotation_formula_of_the_paper_gives_the_inverse_turn():
    c2w = straight([0.0], turns=[10.0])
    w2c = invert_rigid(c2w)[:, :3, :3]
    literal = w2c[1] @ w2c[0].mT
    torch.testing.assert_close(literal, relative(c2w)[1, :3, :3].mT)
    assert angles_from_rotation(literal)[0] == pytest.approx(-10)
    assert encode_actions(c2w, d_bar=1.0)[1, CHANNELS.index("pan_right")] == pytest.approx(10)


def test_a_step_is_taken_along_the_axes_from_before_the_turn():
    both = one("dolly_in", 1.0) + one("pan_right", 90.0)
    poses = integrate(torch.cat([both, both]))
    torch.testing.assert_close(poses[:, :3, 3], torch.tensor([[0, 0, 1], [1, 0, 1]]).double())


# --- d̄ and static


def test_the_unit_is_the_mean_of_the_moving_steps():
    assert mean_step(straight([1.0, 0.0, 3.0, 0.0])) == (2.0, True)


def test_jitter_under_a_thousandth_of_the_longest_step_does_not_count_as_moving():
    assert mean_step(straight([2.0, 0.0019, 0.0, 4.0]))[0] == pytest.approx(3.0)
    assert mean_step(straight([2.0, 0.0041, 0.0, 4.0]))[0] == pytest.approx(6.0041 / 3)


@pytest.mark.parametrize("c2w", [straight([0.0, 0.0], turns=[5.0, 5.0]), straight([])], ids=["turns", "one"])
def test_a_recording_that_never_translates_gets_one_scene_unit_and_says_so(c2w):
    assert mean_step(c2w) == (1.0, False)


def test_the_unit_scales_with_the_world_and_the_actions_do_not():
    small, large = walk(0, 20), walk(0, 20)
    large[:, :3, 3] *= 250
    assert mean_step(large)[0] == pytest.approx(250 * mean_step(small)[0])
    torch.testing.assert_close(
        encode_actions(large, d_bar=mean_step(large)[0]),
        encode_actions(small, d_bar=mean_step(small)[0]),
        rtol=0,
        atol=1e-9,
    )


@pytest.mark.parametrize(
    ("step", "turn", "static"),
    [(0.0, 0.0, 1), (0.019, 0.019, 1), (0.021, 0.0, 0), (0.0, 0.021, 0), (1.0, 2.0, 0)],
)
def test_static_means_under_two_hundredths_of_a_unit_and_of_a_degree(step, turn, static):
    actions = encode_actions(straight([3 * step], turns=[turn]), d_bar=3.0)
    assert actions[1, STATIC] == static


def test_static_is_an_extra_indicator_beside_values_that_stay():
    action = encode_actions(straight([0.01], turns=[0.015]), d_bar=1.0)[1]
    named = dict(zip(CHANNELS, action.tolist(), strict=True))
    assert named["static"] == 1
    assert named["dolly_in"] == pytest.approx(0.01) and named["pan_right"] == pytest.approx(0.015)


def test_static_alone_moves_nothing():
    poses = integrate(from_keys(["static"]).expand(3, 13))
    assert torch.equal(poses, torch.eye(4, dtype=torch.float64).expand(3, 4, 4))


# --- keys and scripts


@pytest.mark.parametrize(("key", "name"), KEYS.items())
@pytest.mark.parametrize("gamma", [1.0, 3.0])
def test_a_key_gives_one_unit_or_two_degrees_times_gamma(key, name, gamma):
    size = gamma * (1.0 if name.startswith(("dolly", "truck", "pedestal")) else 2.0)
    assert torch.equal(from_keys(key, gamma=gamma), one(name, size)[0])
    assert torch.equal(from_keys([name], gamma=gamma), one(name, size)[0])


def test_every_channel_but_static_has_one_key():
    assert sorted(KEYS.values()) == sorted(CHANNELS[:12])


@given(st.sets(st.sampled_from("".join(KEYS))), st.floats(0.1, 5))
def test_opposite_keys_cancel_and_the_others_add_up(held, gamma):
    action = from_keys(held, gamma=gamma)
    moving = {KEYS[key] for key in held}
    for positive, negative in PAIRS:
        wanted = {CHANNELS[positive], CHANNELS[negative]} & moving
        alone = wanted if len(wanted) == 1 else set()
        assert {CHANNELS[i] for i in (positive, negative) if action[i] > 0} == alone
    assert bool(action[STATIC]) == (not action[:STATIC].any())


def test_holding_nothing_is_static():
    assert torch.equal(from_keys([]), one("static", 1.0)[0])
    assert torch.equal(from_keys("ws"), one("static", 1.0)[0])


def test_an_unknown_key_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'x' is neither a key \(wsadeqikjlou\).*pan_left"):
        from_keys("wx")


def test_gamma_is_the_speed_of_exploration():
    script = "dolly_in*4 dolly_in+pan_left*4"
    slow, fast = (encode_actions(integrate(parse_script(script, gamma=g)), d_bar=1.0) for g in (1.0, 3.0))
    torch.testing.assert_close(3 * slow[1:], fast[1:], rtol=0, atol=1e-12)


def test_a_script_is_a_static_frame_and_then_its_words():
    actions = parse_script("dolly_in*2 pan_left+w static*3 e")
    named = ["static", "w", "w", "jw", "static", "static", "static", "e"]
    assert torch.equal(actions, torch.stack([from_keys([n] if n == "static" else n) for n in named]))
    assert parse_script("").shape == (1, 13)


@pytest.mark.parametrize("script", ["dolly_in*x", "dolly_in*-2", "dolly_in*1.5", "dolly_in*²"])
def test_a_script_with_a_bad_count_is_refused_with_the_right_form(script):
    with pytest.raises(ValueError, match=r"name\*frames"):
        parse_script(script)


# --- what networks are given


def test_controls_hold_the_poses_integrated_from_the_actions():
    actions = encode_actions(torch.stack([walk(0, 9), walk(1, 9)]), d_bar=1.0).float()
    controls = controls_of(actions)
    assert controls.actions is actions
    assert controls.poses is not None and controls.poses.shape == (2, 9, 9)
    assert torch.equal(controls.poses, pose_features(integrate(actions)))


def test_the_null_action_is_all_zeros_without_a_pose_and_is_not_static():
    controls = null_controls(torch.ones(2, 9, 13))
    assert controls.poses is None
    assert torch.equal(controls.actions, torch.zeros(2, 9, 13))
    assert not torch.equal(controls.actions[0, 0], from_keys(["static"]).float())


def test_exchanged_actions_are_those_of_the_neighbour_in_speed():
    actions = torch.zeros(4, 5, 13)
    actions[:, 1:, 0] = torch.tensor([0.3, 0.9, 0.2, 1.0])[:, None]
    actions[0, 1:, 9] = 1e-3  # not only the speed is exchanged
    assert torch.equal(exchange_actions(actions), actions[[2, 3, 0, 1]])
    assert torch.equal(exchange_actions(exchange_actions(actions)), actions)
    assert torch.equal(exchange_actions(actions[:3]), actions[[2, 1, 0]])
