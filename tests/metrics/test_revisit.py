import pytest
import torch

from relic.metrics import RevisitPairs, RevisitRule, find_revisits, near_identical, verified
from relic.ops.covisibility import frustum_overlap
from tests.metrics.videos import SIZE, intrinsics, path

OUT_AND_BACK = "pan_right*50 static*10 pan_left*50"  # 100°, of a view of 90°
NAN = float("nan")


def found(script: str, **settings) -> RevisitPairs:
    return find_revisits(path(script), intrinsics(), fps=16, size=SIZE, **settings)


def check(pairs: RevisitPairs, estimated: torch.Tensor, **settings) -> RevisitPairs:
    return verified(pairs, estimated, intrinsics_px=intrinsics(), size=SIZE, d_bar=1.0, **settings)


def test_the_way_back_of_a_turn_revisits_the_same_poses_of_the_way_out():
    pairs = found(OUT_AND_BACK)
    assert len(pairs.now) > 10 and int(pairs.now[-1]) == 110
    assert torch.equal(pairs.seen, 110 - pairs.now)  # 10 still frames between
    c2w = path(OUT_AND_BACK)
    for now, seen, away in zip(*(column.tolist() for column in pairs[:3]), strict=True):
        shares = frustum_overlap(c2w[[seen, away]], c2w[now], reach=(1.0, 2 / 3))
        assert shares[0] == 1.0 and shares[1] < 0.3  # an exact return sees all, and it really had left
        assert seen < away < now


def test_the_gap_is_the_time_out_of_sight_and_not_the_time_of_the_clip():
    rests = found("static*80 " + OUT_AND_BACK + " static*80")
    last = rests.keep(rests.now == int(rests.now.max()))
    assert int(last.now) == 270  # still a revisit at the end of the rest
    brief = found(OUT_AND_BACK)
    assert float(last.gap) == float(brief.gap[-1]) < 110 / 16
    assert int(last.seen) == 80  # of equal poses, the latest


def test_what_never_left_or_left_for_a_moment_is_no_revisit():
    for script in ("static*60", "pan_right*10 pan_left*10", "pan_right*80", "truck_left*3 truck_right*3"):
        assert found(script).now.tolist() == []
    assert len(found("pan_right*50 pan_left*50", rule=RevisitRule(gap_seconds=7.0)).now) == 0
    assert len(found("pan_right*50 pan_left*50", rule=RevisitRule(gap_seconds=4.0)).now) > 0


def test_the_most_covisible_frame_is_taken_though_another_pose_is_nearer():
    c2w = path("roll_cw*4 roll_ccw*4 pan_right*3 pan_right*50 pan_left*53")[4:]  # starts rolled by 8°
    near = c2w.clone()
    near[1:7] = c2w[7]  # turned by 6°, until it leaves
    pairs = find_revisits(near, intrinsics(), fps=16, size=SIZE, d_bar=1.0)
    shares = frustum_overlap(near[[0, 1]], near[-1], reach=(1.0, 2 / 3))
    assert shares[0] > shares[1] > 0.8 and int(pairs.seen[-1]) == 0


def test_a_full_turn_revisits_its_start():
    pairs = found("pan_right*180")
    assert int(pairs.now[-1]) == 180 and int(pairs.seen[-1]) == 0
    assert near_identical(pairs, path("pan_right*180")).now.tolist() == [180]


def test_walks_are_measured_in_steps_whatever_the_unit():
    c2w = path("dolly_in*60 static*4 dolly_out*60")
    metres = c2w.clone()
    metres[:, :3, 3] *= 0.05
    settings = {"fps": 16, "size": SIZE}
    own = find_revisits(metres, intrinsics(), **settings)
    assert len(own.now) > 5
    for other in (find_revisits(c2w, intrinsics(), **settings),
                  find_revisits(metres, intrinsics(), d_bar=0.05, **settings)):  # fmt: skip
        assert torch.equal(own.now, other.now) and torch.equal(own.seen, other.seen)
        assert (own.gap - other.gap).abs().max() <= 2 / 16  # a point on the very edge may fall to either side


def test_like_views_from_elsewhere_may_have_a_wall_between_and_are_no_revisit():
    c2w = path("pan_right*50 pan_left*50")
    for step, apart, revisited in ((7.0, 8.0, True), (9.0, 8.0, False), (9.0, 10.0, True)):
        c2w[51:, 1, 3] = step
        rule = RevisitRule(covisibility=0.6, left_below=0.2, apart=apart)
        pairs = find_revisits(c2w, intrinsics(), fps=16, size=SIZE, d_bar=1.0, rule=rule)
        assert bool(len(pairs.now)) == revisited


def test_with_a_true_prefix_only_what_it_saw_can_be_remembered():
    script = "pan_right*50 pan_left*50 pan_right*50 pan_left*50"
    pairs = found(script, prefix_frames=51)
    assert len(pairs.now) > 10 and int(pairs.seen.max()) < 51 <= int(pairs.now.min())
    assert int(found(script).seen.max()) > 51
    first = found(script, prefix_frames=1)
    assert set(first.seen.tolist()) == {0} and len(first.now)


def test_near_identical_poses_are_told_from_like_ones():
    script = "pan_right*50 pan_left*50"
    moved = path(script)
    pairs = found(script)
    assert torch.equal(near_identical(pairs, moved, d_bar=1.0).now, pairs.now)
    moved[60:, 0, 3] += 0.3
    assert near_identical(pairs, moved, d_bar=1.0).now.tolist() == []
    assert torch.equal(near_identical(pairs, moved, d_bar=2.0).now, pairs.now)


def test_a_camera_that_left_and_returned_is_verified_through_the_noise_of_an_estimator():
    c2w, pairs = path(OUT_AND_BACK), found(OUT_AND_BACK)
    noisy = c2w.clone()
    noisy[:, :3, 3] += 0.5 * torch.randn(len(c2w), 3, generator=torch.Generator().manual_seed(0))
    for estimated in (c2w, noisy):
        assert torch.equal(check(pairs, estimated).now, pairs.now)


@pytest.mark.parametrize(
    "script", ["static*110", "pan_right*50 static*60", "pan_right+static*10 static*50 pan_left*50"]
)
def test_a_camera_that_rests_or_does_not_return_did_not_move(script):
    pairs = found(OUT_AND_BACK)
    assert check(pairs, path(script)[:111]).now.tolist() == []


def test_frames_without_a_camera_verify_nothing():
    c2w, pairs = path(OUT_AND_BACK), found(OUT_AND_BACK)
    lost = c2w.clone()
    lost[105:] = NAN
    assert check(pairs, lost).now.tolist() == [n for n in pairs.now.tolist() if n < 105]
    lost[:] = NAN
    assert check(pairs, lost).now.tolist() == []
    lost[[*range(20), *range(90, 111)]] = c2w[[*range(20), *range(90, 111)]]
    assert check(pairs, lost).now.tolist() == []  # who knows whether it left


def test_bad_paths_are_refused_by_name():
    c2w = path(OUT_AND_BACK)
    for change, words in (
        (lambda m: m.mul_(2), "not rigid"),
        (lambda m: m[7].fill_(NAN), r"c2w\[7\] holds NaN"),
    ):
        bad = c2w.clone()
        change(bad)
        with pytest.raises(ValueError, match=words):
            find_revisits(bad, intrinsics(), fps=16, size=SIZE)
    with pytest.raises(ValueError, match="at least one frame"):
        find_revisits(c2w[:0], intrinsics(), fps=16, size=SIZE)
    for settings, words in (
        ({"fps": 0}, "fps=0 must be positive"), ({"size": (64, 96)}, "another size"),
        ({"d_bar": 0.0}, "d_bar=0.0 must be positive"), ({"prefix_frames": 112}, "prefix_frames=112"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            find_revisits(c2w, intrinsics(), **({"fps": 16, "size": SIZE} | settings))
    with pytest.raises(ValueError, match="four finite numbers"):
        find_revisits(c2w, intrinsics() * NAN, fps=16, size=SIZE)


def test_bad_estimates_are_refused_by_name():
    c2w, pairs = path(OUT_AND_BACK), found(OUT_AND_BACK)
    with pytest.raises(ValueError, match="NaN where it is not registered"):
        check(pairs, c2w[:50])
    with pytest.raises(ValueError, match=r"estimated_c2w \(registered\)\[\d+\] is not rigid"):
        check(pairs, 2 * c2w)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"covisibility": 0.0}, "covisibility=0.0"), ({"covisibility": NAN}, "covisibility=nan"),
        ({"left_below": 0.9}, "left_below=0.9"), ({"gap_seconds": 0.0}, "gap_seconds=0.0"),
        ({"apart": 0.0}, "apart=0.0"), ({"slack": 0.25}, "slack=0.25"),
        ({"same_turn_deg": -1.0}, "same_turn_deg=-1.0"),
    ],
)  # fmt: skip
def test_a_rule_checks_itself(settings, words):
    with pytest.raises(ValueError, match=words):
        RevisitRule(**settings)


def test_a_rule_prints_all_its_numbers():
    assert all(
        number in str(RevisitRule()) for number in ("0.8", "8 d̄", "1 s", "0.3", "0.15", "0.25", "0.5°")
    )
