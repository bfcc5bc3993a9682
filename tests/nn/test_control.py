import pytest
import torch

from relic.nn.attention import attend
from relic.nn.control import ControlConfig, ControlEncoders, group_frames
from relic.ops.actions import controls_of, null_controls
from relic.ops.camera import pose_features, rigid, rotation_from_angles, shell_points
from relic.ops.rope import ray_table, turn_heads
from relic.types import Controls

GRID = (2, 3)


def encoders_of(heads=2, **config):
    return ControlEncoders(ControlConfig(width=8, **config), heads=heads, head_width=24)


def test_frames_are_grouped_as_the_autoencoder_groups_them():
    frames = torch.arange(9.0).reshape(1, 9, 1)
    grouped = group_frames(frames, starts_clip=True)
    assert grouped.tolist() == [[[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]]
    assert group_frames(frames[:, 1:], starts_clip=False).tolist() == [[[1, 2, 3, 4], [5, 6, 7, 8]]]


@pytest.mark.parametrize(
    ("frames", "starts_clip", "rule"), [(8, True, "4k[+]1"), (9, False, "multiple of 4")]
)
def test_other_numbers_of_frames_are_refused(frames, starts_clip, rule):
    with pytest.raises(ValueError, match=f"{frames} frames of control.*{rule}"):
        group_frames(torch.zeros(1, frames, 13), starts_clip=starts_clip)


@pytest.mark.parametrize("rays", [0.0, 0.8])
def test_a_later_block_is_encoded_as_it_is_inside_the_whole_clip(rays):
    encoders = encoders_of(rays=rays, inverse_depths=(0.1, 0.0))
    actions = torch.rand(1, 17, 13)
    controls = controls_of(actions)
    whole = encoders(controls, starts_clip=True, grid=GRID)
    later = controls._replace(actions=actions[:, 9:], poses=controls.poses[:, 9:])
    block = encoders(later, starts_clip=False, grid=GRID)
    torch.testing.assert_close(block.action, whole.action[:, 3:])
    torch.testing.assert_close(block.pose, whole.pose[:, 3:])
    if not rays:
        assert whole.rays is None
    else:
        assert whole.rays.keys() == {1} and whole.rays[1].shape == (1, 2, 5 * 6, 2, 24)
        torch.testing.assert_close(block.rays[1], whole.rays[1][:, :, 3 * 6 :])


def test_without_poses_nothing_is_added_to_queries_and_keys():
    states = encoders_of(poses=False)(controls_of(torch.rand(1, 5, 13)), starts_clip=True, grid=GRID)
    assert states.pose is None and states.rays is None


def test_the_null_action_drops_poses_and_rays():
    encoders = encoders_of(rays=0.8, inverse_depths=(0.0,))
    states = encoders(null_controls(torch.rand(1, 5, 13)), starts_clip=True, grid=GRID)
    assert states.pose is None and states.rays is None


def test_a_network_with_rays_is_built_without_memory_first():
    with torch.device("meta"):
        encoders = encoders_of(heads=3, rays=0.8, inverse_depths=(0.0,))
    made = encoders.to_empty(device="cpu").rays(torch.rand(1, 3, 36), grid=GRID, factors=(2,))
    assert all(table.device.type == "cpu" and table.isfinite().all() for table in made.values())


def test_a_cell_looks_at_the_mean_of_the_points_that_its_tokens_look_at():
    encoders, poses = encoders_of(rays=0.8, inverse_depths=(0.1, 0.0)), torch.rand(1, 3, 36)
    points = shell_points(
        poses.unflatten(-1, (4, 9)), rows=GRID[0], columns=GRID[1], reach=0.8, inverse_depths=(0.1, 0.0)
    ).unflatten(3, GRID)  # (b, t, z, h, w, 3)
    table = encoders.rays(poses, grid=GRID, factors=(2,))[2].unflatten(2, (3, 1, -1))
    for cell in range(table.shape[4]):  # the last one may hold fewer tokens
        mean = points[..., 0:2, 2 * cell : 2 * cell + 2, :].flatten(3, 4).mean(3)
        expected = ray_table(mean.transpose(1, 2), head_width=24)  # (b, z, t, 2, d)
        torch.testing.assert_close(table[:, :, :, 0, cell], expected)


def looking(path, *, heads=2, inverse_depths=(0.05, 0.0)):
    """Return the rays of a path (f, 4, 4) in d̄."""
    encoders = encoders_of(heads=heads, rays=0.8, inverse_depths=inverse_depths)
    controls = Controls(actions=torch.zeros(1, len(path), 13), poses=pose_features(path)[None])
    return encoders(controls, starts_clip=True, grid=GRID).rays[1]


def path_of(angles_deg, position):
    """Return five frames that look one way, from one place."""
    pose = rigid(rotation_from_angles(torch.tensor(angles_deg)), torch.tensor(position)).double()
    return pose.expand(5, 4, 4)


def scores(rays):
    """Return the attention scores, (k, n, n), of two heads' random queries and keys under rays."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, rays.shape[2], 24).double()
    q, k = (turn_heads(x, rays.double()) for x in (q, k))
    return (q @ k.mT)[0]


def test_scores_know_how_far_apart_two_tokens_look_and_not_where_they_are():
    whole = looking(path_of([10.0, 5.0, 0.0], [3.0, -1.0, 2.0]))
    again = looking(path_of([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]))
    # another place moves all points alike; differences are in the clip's axes, so turning it changes them
    moved = looking(path_of([0.0, 0.0, 0.0], [7.0, -2.0, 4.0]))
    torch.testing.assert_close(scores(moved), scores(again), atol=1e-4, rtol=0)
    assert (scores(whole) - scores(again)).abs().max() > 0.1


def test_heads_at_infinity_see_turns_alone_and_near_ones_see_steps_too():
    still, aside = torch.eye(4).double().repeat(2, 9, 1, 1)
    aside[5:, 0, 3] = 4.0  # the last latent stands elsewhere
    near, far = (scores(looking(aside)[:, i : i + 1]) for i in range(2))
    torch.testing.assert_close(far, scores(looking(still)[:, 1:]))
    assert (near - scores(looking(still)[:, :1]))[:, 12:, :12].abs().max() > 0.1


def test_what_is_read_is_told_relative_to_where_the_reader_looks():
    rays = looking(path_of([40.0, -10.0, 0.0], [1.0, 0.0, 3.0]))
    torch.manual_seed(0)
    x = torch.randn(1, 2, rays.shape[2], 24)
    torch.testing.assert_close(turn_heads(turn_heads(x, rays), rays, back=True), x)
    # a token that reads itself alone reads its own value, whatever way it looks
    q, v = 1e3 * torch.eye(rays.shape[2]).expand(1, 2, -1, -1), turn_heads(x, rays)
    torch.testing.assert_close(turn_heads(attend(q, q, v), rays, back=True), x)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [({"rays": -1.0}, "must be positive"),
     ({"inverse_depths": ()}, "one or more"), ({"inverse_depths": (0.1, -0.1)}, "one or more")],
)  # fmt: skip
def test_rays_that_are_no_view_are_refused(settings, rule):
    with pytest.raises(ValueError, match=rule):
        ControlConfig(**settings)


def test_rays_need_heads_that_share_their_depths_and_have_room():
    config = ControlConfig(width=8, rays=0.8, inverse_depths=(0.1, 0.05, 0.0))
    with pytest.raises(ValueError, match="don't divide heads=2"):
        ControlEncoders(config, heads=2, head_width=24)
    with pytest.raises(ValueError, match="width 6 have no channels to spare"):
        ControlEncoders(config, heads=3, head_width=6)
