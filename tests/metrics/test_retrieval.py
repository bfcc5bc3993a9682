import subprocess
import sys
from pathlib import Path

import pytest
import torch

from relic.metrics import (
    RevisitScore,
    SelfRevisitScore,
    find_revisits,
    psnr,
    self_revisit,
    sharpness,
    ssim,
    truth_revisit,
)
from tests.metrics.videos import SIZE, clip, noise

SCRIPT = "pan_left*10 pan_right*60 static*10 pan_left*60"
PREFIX = 73  # the way out
NAN = float("nan")


def distance(video: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Stands for LPIPS: the mean absolute difference."""
    return (video.float() - truth.float()).abs().mean((1, 2, 3))


@pytest.fixture(scope="module")
def world():
    return clip(SCRIPT)


@pytest.fixture(scope="module")
def pairs(world):
    return find_revisits(world.c2w, world.intrinsics_px, fps=16, size=SIZE, d_bar=1.0, prefix_frames=PREFIX)


def test_truth_mode_compares_each_frame_with_its_true_self(world, pairs):
    generated = noise(len(world.video), *SIZE, seed=5)
    reconstruction = (world.video.float() * 0.9).to(torch.uint8)
    scored = truth_revisit(pairs, generated, world.video, reconstruction=reconstruction, lpips=distance)
    assert list(scored) == ["generated", "copy_first", "nearest_seen", "autoencoder"]
    now, seen, first = pairs.now, pairs.seen, torch.zeros_like(pairs.now)
    shown = generated[now], world.video[first], world.video[seen], reconstruction[now]
    for scores, frames in zip(scored.values(), shown, strict=True):
        wanted = world.video[now]
        torch.testing.assert_close(scores.psnr, psnr(frames, wanted).clamp(max=60))
        torch.testing.assert_close(scores.ssim, ssim(frames, wanted))
        torch.testing.assert_close(scores.lpips, distance(frames, wanted))
        torch.testing.assert_close(scores.sharpness, sharpness(frames))
        torch.testing.assert_close(scores.sharpness_truth, sharpness(wanted))


def test_self_mode_compares_each_frame_with_the_one_shown_before(world, pairs):
    generated = noise(len(world.video), *SIZE, seed=5)
    scored = self_revisit(pairs, generated, world.video, reconstruction=world.video)
    assert list(scored) == ["generated", "away", "truth", "autoencoder"]
    torch.testing.assert_close(scored["generated"].psnr, psnr(generated[pairs.now], generated[pairs.seen]))
    torch.testing.assert_close(scored["away"].psnr, psnr(generated[pairs.away], generated[pairs.seen]))
    assert scored["truth"].psnr.tolist() == [60.0] * len(pairs.now)  # exact returns
    assert scored["truth"].lpips is None


def test_the_accumulated_scores_are_means_over_all_pairs(world, pairs):
    other = clip(SCRIPT + " static*20", seed=3)
    metric = RevisitScore(lpips=distance)
    values = []
    for number, truth in enumerate((world, other)):
        generated = noise(len(truth.video), *SIZE, seed=number)
        metric.update(generated, truth, prefix_frames=PREFIX)
        own = find_revisits(
            truth.c2w, truth.intrinsics_px, fps=16, size=SIZE, d_bar=1.0, prefix_frames=PREFIX
        )
        values.append(truth_revisit(own, generated, truth.video, lpips=distance)["generated"])
    scores = metric.compute()
    for name in ("psnr", "ssim", "lpips"):
        expected = torch.cat([getattr(v, name) for v in values]).double().mean()
        torch.testing.assert_close(scores[f"memory/{name}_revisit"], expected)
    sharp, true = (
        torch.cat([getattr(v, n) for v in values]).mean() for n in ("sharpness", "sharpness_truth")
    )
    assert float(scores["memory/sharpness_ratio"]) == pytest.approx(float(sharp / true), rel=1e-5)
    assert int(scores["memory/pairs"]) == sum(len(v.psnr) for v in values)
    assert int(scores["memory/clips"]) == int(scores["memory/unverified"]) == 2
    assert not any("moved" in name and "did_not" not in name for name in scores)
    assert not any("autoencoder" in name for name in scores)


def test_psnr_is_given_by_time_out_of_sight(world, pairs):
    metric = RevisitScore(gap_bins_s=(0, 3, 5, 1000))
    generated = noise(len(world.video), *SIZE, seed=5)
    metric.update(generated, world, prefix_frames=PREFIX)
    scores = metric.compute()
    decibels = psnr(generated[pairs.now], world.video[pairs.now])
    for low, high, name in ((0, 3, "0_3s"), (3, 5, "3_5s"), (5, 1000, "5_1000s")):
        inside = (pairs.gap >= low) & (pairs.gap < high)
        key = f"memory/psnr_revisit_after_{name}"
        assert (key in scores) == bool(inside.any())
        if inside.any():
            assert float(scores[key]) == pytest.approx(float(decibels[inside].mean()), rel=1e-5)
    assert "memory/psnr_revisit_after_1000s_up" not in scores
    assert sum("psnr_revisit_after" in name for name in scores) >= 2


def test_a_camera_that_does_not_return_is_counted_in_both_modes_and_scored_in_one(world):
    frozen = torch.eye(4, dtype=torch.float64).expand_as(world.c2w)
    for estimated in (frozen, torch.full_like(world.c2w, NAN)):
        video = world.video[:1].expand(len(world.video), -1, -1, -1)
        by_truth, by_self = RevisitScore(), SelfRevisitScore()
        for metric in (by_truth, by_self):
            metric.update(video, world, estimated_c2w=estimated, prefix_frames=PREFIX)
        truth, own = by_truth.compute(), by_self.compute()
        assert int(truth["memory/did_not_move"]) == int(own["memory/did_not_move_self"]) == 1
        assert truth["memory/psnr_revisit"].isfinite() and "memory/psnr_revisit_moved" not in truth
        assert own["memory/psnr_self"].isnan() and int(own["memory/pairs_self"]) == 0


def test_self_mode_scores_generated_frames_only_and_measures_poses_in_steps(world):
    def pairs_of(truth, **settings):
        metric = SelfRevisitScore()
        metric.update(truth.video, truth, estimated_c2w=truth.c2w, **settings)
        return int(metric.compute()["memory/pairs_self"])

    assert 0 < pairs_of(world, prefix_frames=130) < pairs_of(world)
    moved = world.c2w.clone()
    moved[PREFIX:, 0, 3] = 0.4
    assert pairs_of(world._replace(c2w=moved)) == 0 < pairs_of(world._replace(c2w=moved, d_bar=2.0))


def test_what_moved_is_also_scored_apart(world):
    metric = RevisitScore()
    still = torch.eye(4, dtype=torch.float64).expand_as(world.c2w)
    noisy = noise(len(world.video), *SIZE, seed=5)
    metric.update(world.video, world, prefix_frames=PREFIX, estimated_c2w=world.c2w)
    metric.update(noisy, world, prefix_frames=PREFIX, estimated_c2w=still)
    scores = metric.compute()
    assert float(scores["memory/psnr_revisit_moved"]) == 60.0 > float(scores["memory/psnr_revisit"])
    assert int(scores["memory/did_not_move"]) == 1 and int(scores["memory/unverified"]) == 0


def test_a_path_without_a_revisit_is_counted_and_not_scored():
    for script in ("static*40", "pan_right*60", "dolly_in*40"):
        world = clip(script)
        by_truth, by_self = RevisitScore(), SelfRevisitScore()
        by_truth.update(world.video, world, prefix_frames=9)
        by_self.update(world.video, world, estimated_c2w=world.c2w)
        truth, own = by_truth.compute(), by_self.compute()
        assert int(truth["memory/no_pair"]) == int(own["memory/no_pair_self"]) == 1
        assert int(truth["memory/pairs"]) == int(own["memory/did_not_move_self"]) == 0
        assert truth["memory/psnr_revisit"].isnan() and own["memory/psnr_self"].isnan()


def test_black_videos_have_finite_scores(world):
    black = torch.zeros_like(world.video)
    metric = RevisitScore()
    metric.update(black, world, prefix_frames=PREFIX)
    scores = metric.compute()
    assert scores["memory/psnr_revisit"].isfinite() and scores["memory/ssim_revisit"].isfinite()
    assert float(scores["memory/sharpness_ratio"]) == 0.0


def test_no_pairs_score_to_nothing(world, pairs):
    none = pairs.keep(torch.zeros(len(pairs.now), dtype=torch.bool))
    for scored in (f(none, world.video, world.video, lpips=distance) for f in (truth_revisit, self_revisit)):
        assert all(len(values) == 0 for scores in scored.values() for values in scores)


def test_what_does_not_belong_together_is_refused(world, pairs):
    metric = RevisitScore()
    with pytest.raises(ValueError, match="generated has"):
        metric.update(world.video[:-1], world, prefix_frames=PREFIX)
    with pytest.raises(ValueError, match="a pose a frame"):
        metric.update(world.video, world._replace(c2w=world.c2w[:-1]), prefix_frames=PREFIX)
    with pytest.raises(ValueError, match="estimated_c2w is"):
        metric.update(world.video, world, prefix_frames=PREFIX, estimated_c2w=world.c2w[:-1])
    with pytest.raises(ValueError, match="reconstruction has"):
        truth_revisit(pairs, world.video, world.video, reconstruction=world.video[1:])
    with pytest.raises(ValueError, match="must rise"):
        RevisitScore(gap_bins_s=(0, 4, 2))


TWO = """
import sys, torch, torch.distributed as dist
from relic.metrics import RevisitScore, SelfRevisitScore
from tests.metrics.test_retrieval import PREFIX, SCRIPT, SIZE, distance
from tests.metrics.videos import clip, noise

rank, ranks, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if ranks > 1:
    dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=ranks)
metrics = RevisitScore(lpips=distance), SelfRevisitScore(lpips=distance)
for number in range(rank, 3, ranks):  # of four, the last rank has none
    world = clip((SCRIPT, SCRIPT + " static*9", "static*99")[number], seed=number)
    c2w = world.c2w if number else world.c2w[:1].expand_as(world.c2w)
    generated = noise(len(world.video), *SIZE, seed=10 + number)
    for metric in metrics:
        metric.update(generated, world, prefix_frames=PREFIX, estimated_c2w=c2w)
scores = metrics[0].compute() | metrics[1].compute()
if rank == 0:
    torch.save(scores, f"{out}/scores.pt")
if ranks > 1:
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_several_processes_score_as_one_does(tmp_path):
    found = []
    for ranks in (1, 2, 4):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        runs = [
            subprocess.Popen(
                [sys.executable, "-c", TWO, str(rank), str(ranks), str(folder)], cwd=Path(__file__).parents[2]
            )
            for rank in range(ranks)
        ]
        assert [run.wait(timeout=120) for run in runs] == [0] * ranks
        found.append(torch.load(folder / "scores.pt"))
    one, *others = found
    assert all(set(other) == set(one) for other in others)
    assert int(one["memory/did_not_move"]) == int(one["memory/no_pair"]) == 1
    for name, value in one.items():
        for other in others:
            torch.testing.assert_close(other[name], value, rtol=1e-12, atol=0, equal_nan=True)
