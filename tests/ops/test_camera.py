import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from torch import Tensor

from relic.ops.camera import (
    accumulate,
    angles_from_rotation,
    check_rigid,
    invert_rigid,
    opengl_to_opencv,
    orthonormalise,
    pose_features,
    project,
    relative,
    rigid,
    rotation_from_angles,
    shell_points,
    turn_deg,
    umeyama,
    unreal_to_opencv,
)
from tests.reference import camera as reference

INTRINSICS = torch.tensor([90.0, 80.0, 47.5, 31.5], dtype=torch.float64)
X, Y, Z = torch.eye(3, dtype=torch.float64)

angle = st.floats(-180, 180)
triple = st.tuples(angle, angle, angle)
seeds = st.integers(0, 2**32 - 1)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rotation(*angles: float) -> Tensor:
    return rotation_from_angles(vector(*angles))


def cameras(seed: int, count: int = 6) -> Tensor:
    """Poses anywhere, turned any way, (count, 4, 4)."""
    generator = torch.Generator().manual_seed(seed)
    angles = 360 * torch.rand(count, 3, generator=generator, dtype=torch.float64) - 180
    return rigid(rotation_from_angles(angles), 5 * torch.randn(count, 3, generator=generator).double())


def motions(seed: int, frames: int) -> Tensor:
    """Steps along every axis with turns about every axis, (frames, 4, 4)."""
    generator = torch.Generator().manual_seed(seed)
    angles = 5 * torch.randn(frames, 3, generator=generator, dtype=torch.float64)
    return rigid(rotation_from_angles(angles), torch.randn(frames, 3, generator=generator).double())


def close(actual: Tensor, expected: Tensor | np.ndarray, *, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=0, atol=atol)


# --- rigid matrices


@given(seeds)
def test_w2c_times_c2w_is_the_identity_both_ways(seed):
    c2w = cameras(seed)
    eye = torch.eye(4, dtype=torch.float64).expand_as(c2w)
    close(invert_rigid(c2w) @ c2w, eye, atol=1e-13)
    close(c2w @ invert_rigid(c2w), eye, atol=1e-13)


def test_rigid_matrices_pass_the_check_in_single_precision_and_when_there_are_none():
    check_rigid(cameras(0).float())
    check_rigid(cameras(0).reshape(2, 3, 4, 4))
    check_rigid(torch.empty(0, 4, 4))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c2w: c2w.fill_(torch.nan), r"path\[2\] holds NaN"),
        (lambda c2w: c2w[0, 3].fill_(torch.inf), r"path\[2\] holds NaN or infinity"),
        (lambda c2w: c2w[:3, :3].mul_(1.01), r"path\[2\] is not rigid.*remove scale"),
        (lambda c2w: c2w[:3, 1].add_(0.1 * c2w[:3, 0]), r"path\[2\] is not rigid.*shear"),
        (lambda c2w: c2w[:3, 0].neg_(), r"path\[2\] is a reflection.*left-handed"),
        (lambda c2w: c2w.copy_(c2w.mT.clone()), r"transposed"),
    ],
    ids=["nan", "infinity", "scale", "shear", "reflection", "transposed"],
)
def test_a_matrix_that_is_not_rigid_is_refused_by_what_is_wrong_with_it(spoil, message):
    c2w = cameras(3)
    spoil(c2w[2])
    with pytest.raises(ValueError, match=message):
        check_rigid(c2w, name="path")


def test_three_by_four_matrices_are_refused_by_their_shape():
    with pytest.raises(ValueError, match=r"shape \(6, 3, 4\)"):
        check_rigid(cameras(0)[:, :3])


@given(seeds)
def test_orthonormalising_gives_the_nearest_rotation_and_keeps_the_position(seed):
    c2w = cameras(seed)
    noise = 1e-3 * torch.randn(6, 3, 3, generator=torch.Generator().manual_seed(seed)).double()
    bent = c2w.clone()
    bent[:, :3, :3] += noise
    mended = orthonormalise(bent)
    check_rigid(mended, tolerance=1e-13)
    assert torch.equal(mended[:, :3, 3], c2w[:, :3, 3])
    distance = (mended - bent).flatten(1).norm(dim=1)
    assert (distance <= (c2w - bent).flatten(1).norm(dim=1) + 1e-12).all()


# --- angles


@given(triple)
def test_a_rotation_is_pan_then_tilt_then_roll_of_elementary_turns(angles):
    pan, tilt, roll = angles
    oracle = reference.turn("y", pan) @ reference.turn("x", tilt) @ reference.turn("z", roll)
    close(rotation(*angles), oracle, atol=1e-14)


def test_the_positive_senses_are_right_up_and_clockwise():
    assert (rotation(10, 0, 0) @ Z)[0] > 0.1  # pan right: what is ahead moves to +x
    assert (rotation(0, 10, 0) @ Z)[1] < -0.1  # tilt up: to −y, which is up
    assert (rotation(0, 0, 10) @ X)[1] > 0.1  # roll clockwise: the right-hand side goes down


@given(triple)
def test_any_rotation_survives_the_way_through_angles(angles):
    matrix = rotation(*angles)
    back = angles_from_rotation(matrix)
    close(rotation_from_angles(back), matrix, atol=1e-14)
    assert back[1].abs() <= 90


@given(angle, st.floats(-89, 89), angle)
def test_angles_with_tilt_inside_90_degrees_are_found_again(pan, tilt, roll):
    difference = angles_from_rotation(rotation(pan, tilt, roll)) - vector(pan, tilt, roll)
    close((difference + 180) % 360 - 180, vector(0, 0, 0), atol=1e-11)


@given(angle, st.sampled_from([-90.0, 90.0]), angle, st.floats(-16, -1).map(lambda power: 10**power))
def test_looking_straight_up_or_down_loses_nothing(pan, tilt, roll, short_of_it):
    for matrix in (rotation(pan, tilt, roll), rotation(pan, tilt * (1 - short_of_it), roll)):
        world = rotation(roll, pan / 2, 40)
        matrix = world @ (world.mT @ matrix)  # rounded as a matrix from a product is
        close(rotation_from_angles(angles_from_rotation(matrix)), matrix, atol=3e-14)


def test_looking_straight_up_calls_all_roll_pan():
    close(angles_from_rotation(rotation(0, 90, 30)), vector(-30.0, 90.0, 0.0), atol=1e-9)


@given(seeds, st.floats(-9, 0).map(lambda power: 180 * 10**power))
def test_a_turn_is_measured_about_any_axis_from_tiny_to_half_round(seed, degrees):
    axis = np.random.default_rng(seed).normal(size=3)
    axis /= np.linalg.norm(axis)
    for truth in (degrees, 180 - degrees):
        matrix = torch.from_numpy(Rotation.from_rotvec(np.deg2rad(truth) * axis).as_matrix())
        assert float(turn_deg(matrix)) == pytest.approx(truth, abs=3e-14, rel=1e-6)


def test_no_turn_measures_zero_and_half_a_turn_180():
    assert turn_deg(torch.eye(3)) == 0
    assert turn_deg(rotation(180, 0, 0)) == pytest.approx(180, abs=1e-12)


# --- paths


@pytest.mark.parametrize("frames", [1, 2, 255, 256, 257, 513, 1000])
def test_accumulation_equals_one_product_at_a_time(frames):
    steps = motions(frames, frames)
    oracle = reference.chain(steps.numpy())
    close(accumulate(steps), oracle, atol=1e-12 * frames)


def test_accumulation_runs_over_any_leading_dimensions():
    steps = motions(1, 600).reshape(2, 300, 4, 4)
    close(accumulate(steps), torch.stack([accumulate(path) for path in steps]), atol=1e-11)


def test_rotations_stay_rotations_over_an_hour_of_frames():
    steps = motions(0, 57_600)
    check_rigid(accumulate(steps), tolerance=1e-12)
    check_rigid(accumulate(steps.float()), tolerance=8e-6)  # 2e-5 if only multiplied


@given(seeds)
def test_relative_motion_undoes_accumulation(seed):
    steps = motions(seed, 30)
    path = accumulate(steps)
    close(relative(path)[1:], steps[1:], atol=1e-11)
    close(path[:1] @ accumulate(relative(path)), path, atol=1e-11)
    assert torch.equal(relative(path)[0], torch.eye(4, dtype=torch.float64))


def test_relative_motion_does_not_depend_on_where_the_world_has_its_origin():
    path, elsewhere = accumulate(motions(2, 20)), cameras(9)[0]
    close(relative(elsewhere @ path), relative(path), atol=1e-11)


def test_pose_features_are_position_in_eighths_and_two_columns_of_the_rotation():
    c2w = cameras(4)
    features = pose_features(c2w)
    assert features.shape == (6, 9) and features.dtype == torch.float32
    close(features[:, :3].double(), c2w[:, :3, 3] / 8, atol=1e-6)
    close(features[:, 3:6].double(), c2w[:, :3, 0], atol=1e-7)
    close(features[:, 6:].double(), c2w[:, :3, 1], atol=1e-7)


def test_pose_features_take_one_unit_per_sample():
    paths = torch.stack([accumulate(motions(seed, 5)) for seed in (0, 1)])
    units = torch.tensor([0.5, 4.0], dtype=torch.float64)
    alone = torch.stack(
        [pose_features(path, d_bar=float(unit)) for path, unit in zip(paths, units, strict=True)]
    )
    assert torch.equal(pose_features(paths, d_bar=units), alone)


def test_shell_points_lie_on_the_rays_through_the_middles_of_cells():
    rows, columns, reach = 3, 4, 0.8
    c2w = cameras(7)
    poses = pose_features(c2w).double()[:, None]
    points = shell_points(poses, rows=rows, columns=columns, reach=reach, inverse_depths=(0.2, 0.0))
    assert points.shape == (6, 2, 12, 3)
    near, far = points.unbind(1)
    close(far.norm(dim=-1), torch.ones(6, 12, dtype=torch.float64), atol=1e-6)
    focal = torch.tensor([1 / reach, 4 / 3 / reach, 0, 0], dtype=torch.float64)  # pixels from -1 to 1
    pixels, depth = project(near / 0.2, invert_rigid(c2w), intrinsics_px=focal)
    x, y = torch.tensor([-0.75, -0.25, 0.25, 0.75]), torch.tensor([-2 / 3, 0, 2 / 3])
    close(pixels[0], torch.stack([x.repeat(3), y.repeat_interleave(4)], dim=-1).double(), atol=1e-5)
    assert (depth > 0).all()
    close((near / 0.2 - c2w[:, None, :3, 3]).norm(dim=-1), torch.full((6, 12), 5.0).double(), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        again = shell_points(
            poses.float(), rows=rows, columns=columns, reach=reach, inverse_depths=(0.2, 0.0)
        )
    assert again.dtype == torch.float32
    close(again.double(), points, atol=1e-5)


def test_shell_points_of_several_frames_are_their_mean_and_don_t_mind_their_order():
    poses = pose_features(cameras(7)).double()
    sizes = {"rows": 2, "columns": 3, "reach": 0.8, "inverse_depths": (0.5, 0.0)}
    alone = torch.stack([shell_points(poses[i : i + 1], **sizes) for i in range(4)])
    close(shell_points(poses[:4], **sizes), alone.mean(0), atol=1e-12)
    close(shell_points(poses[:4].flip(0), **sizes), shell_points(poses[:4], **sizes), atol=1e-12)


# --- pictures and other worlds


def test_a_point_in_front_has_positive_depth_and_lands_at_the_optical_centre():
    w2c = invert_rigid(cameras(5)[0])
    ahead = invert_rigid(w2c) @ torch.tensor([0.0, 0.0, 3.0, 1.0], dtype=torch.float64)
    pixel, depth = project(ahead[None, :3], w2c, intrinsics_px=INTRINSICS)
    close(depth, vector(3.0))
    close(pixel[0], INTRINSICS[2:])


@given(seeds)
def test_flipping_a_picture_and_its_camera_keeps_reprojection(seed):
    c2w, width = cameras(seed), 96
    points = torch.randn(6, 10, 3, generator=torch.Generator().manual_seed(seed)).double()
    flip = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0])).double()
    flipped = INTRINSICS * torch.tensor([1, 1, -1, 1]) + torch.tensor([0, 0, width - 1, 0])
    pixels, depth = project(points, invert_rigid(c2w), intrinsics_px=INTRINSICS)
    mirrored, same = project(points @ flip[:3, :3], invert_rigid(flip @ c2w @ flip), intrinsics_px=flipped)
    check_rigid(flip @ c2w @ flip)
    close(same, depth, atol=1e-11)
    torch.testing.assert_close(mirrored[..., 0], width - 1 - pixels[..., 0], rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(mirrored[..., 1], pixels[..., 1], rtol=1e-7, atol=1e-6)


@given(seeds)
def test_an_opengl_camera_sees_the_same_pixels_after_conversion(seed):
    c2w_gl = cameras(seed)[0]
    points = torch.randn(10, 3, generator=torch.Generator().manual_seed(seed)).double()
    pixels, _ = project(points, invert_rigid(opengl_to_opencv(c2w_gl)), intrinsics_px=INTRINSICS)
    oracle = [reference.opengl_pixel(p, c2w_gl.numpy(), INTRINSICS.numpy()) for p in points.numpy()]
    torch.testing.assert_close(pixels, torch.from_numpy(np.stack(oracle)), rtol=1e-7, atol=1e-6)
    ahead = c2w_gl[:3, 3] - c2w_gl[:3, 2]  # an OpenGL camera looks along its −z
    assert project(ahead[None], invert_rigid(opengl_to_opencv(c2w_gl)), intrinsics_px=INTRINSICS)[1] > 0


def unreal(position, pitch, yaw, roll) -> Tensor:
    one = [torch.tensor(value, dtype=torch.float64) for value in (position, pitch, yaw, roll)]
    return unreal_to_opencv(one[0], pitch_deg=one[1], yaw_deg=one[2], roll_deg=one[3])


@given(triple, st.tuples(*[st.floats(-1e4, 1e4)] * 3))
def test_an_unreal_camera_keeps_its_forward_right_and_up_vectors(angles, position):
    pitch, yaw, roll = angles
    c2w = unreal(position, pitch, yaw, roll)
    forward, right, up = reference.unreal_axes(pitch, yaw, roll)
    into_ours = np.array([[0, 1, 0], [0, 0, -1], [1, 0, 0]])  # x = Unreal's Y, y = −Z, z = X
    check_rigid(c2w)
    close(c2w[:3, 0], into_ours @ right)
    close(c2w[:3, 1], into_ours @ -up)
    close(c2w[:3, 2], into_ours @ forward)
    close(c2w[:3, 3], into_ours @ np.array(position) / 100, atol=1e-10)


def test_an_unreal_camera_at_rest_looks_along_z_and_yaw_turns_it_right():
    close(unreal([0, 0, 0], 0, 0, 0), torch.eye(4, dtype=torch.float64))
    close(unreal([0, 0, 0], 0, 90, 0)[:3, 2], X)
    close(unreal([0, 0, 0], 90, 0, 0)[:3, 2], -Y)
    close(unreal([100, 200, 300], 0, 0, 0)[:3, 3], vector(2.0, -3.0, 1.0))


# --- alignment


@given(seeds, st.floats(0.01, 100))
def test_alignment_recovers_a_known_similarity(seed, scale):
    source = torch.randn(12, 3, generator=torch.Generator().manual_seed(seed)).double()
    truth = cameras(seed)[0]
    found_scale, found_rotation, found_shift = umeyama(
        source, scale * source @ truth[:3, :3].mT + truth[:3, 3]
    )
    assert float(found_scale) == pytest.approx(scale, rel=1e-10)
    close(found_rotation, truth[:3, :3], atol=1e-10)
    close(found_shift, truth[:3, 3], atol=1e-9 * max(1.0, scale))


@given(seeds)
def test_alignment_of_noisy_paths_turns_as_scipy_does(seed):
    generator = torch.Generator().manual_seed(seed)
    source, target = torch.randn(2, 12, 3, generator=generator).double()
    target = target + 2 * source @ cameras(seed)[0, :3, :3].mT
    found = umeyama(source, target, with_scale=False)[1]
    oracle, _ = Rotation.align_vectors(target - target.mean(0), source - source.mean(0))
    close(found, oracle.as_matrix(), atol=1e-8)


@given(seeds)
def test_no_nearby_similarity_fits_better(seed):
    generator = torch.Generator().manual_seed(seed)
    source, target = torch.randn(2, 8, 3, generator=generator).double()
    scale, turn, shift = umeyama(source, target)

    def error(scale: Tensor, turn: Tensor, shift: Tensor) -> Tensor:
        return (target - (scale * source @ turn.mT + shift)).square().sum()

    best = error(scale, turn, shift)
    nudge = rotation_from_angles(torch.randn(3, generator=generator).double())
    for other in ((scale * 1.01, turn, shift), (scale, nudge @ turn, shift), (scale, turn, shift + 0.01)):
        assert error(*other) >= best - 1e-9


def test_a_mirrored_path_is_still_aligned_by_a_rotation():
    source = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)).double()
    found = umeyama(source, source * torch.tensor([-1, 1, 1]))[1]
    assert float(torch.linalg.det(found)) == pytest.approx(1)


def test_a_straight_path_aligns_exactly_though_its_roll_is_free():
    source = torch.arange(5.0).double()[:, None] * X
    scale, turn, shift = umeyama(source, 3 * torch.arange(5.0).double()[:, None] * Y + Z)
    close(scale * source @ turn.mT + shift, 3 * torch.arange(5.0).double()[:, None] * Y + Z)
    check_rigid(rigid(turn, shift))


def test_alignment_refuses_paths_that_stand_still_or_do_not_match():
    with pytest.raises(ValueError, match="does not move"):
        umeyama(torch.ones(5, 3), torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"two \(n, 3\) paths"):
        umeyama(torch.randn(5, 3), torch.randn(4, 3))
