import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from relic.metrics import loop_closure, mind_gsc, mind_lcm
from tests.metrics.videos import noise


def by_torchmetrics(video: torch.Tensor, truth: torch.Tensor) -> tuple[float, float, float]:
    """The mean over frames of mse, psnr and ssim, a frame at a time and in [0, 1], as MIND does."""
    rows = []
    for pair in zip(video, truth, strict=True):
        a, b = (frame.permute(2, 0, 1)[None].double() / 255 for frame in pair)
        rows.append(
            [
                float((a - b).square().mean()),
                float(peak_signal_noise_ratio(a, b, data_range=1.0)),
                float(structural_similarity_index_measure(a, b, data_range=1.0)),
            ]
        )
    return tuple(torch.tensor(rows).mean(0).tolist())


def test_lcm_is_the_mean_over_frames_after_the_context():
    video, truth = noise(7, seed=1), noise(7, seed=2)
    scores = mind_lcm(video, truth, context_frames=3, lpips=lambda a, b: torch.arange(float(len(a))))
    assert scores[:3] == pytest.approx(by_torchmetrics(video[3:], truth[3:]), rel=1e-4)
    assert scores.lpips == 1.5


def test_gsc_folds_a_path_onto_its_reverse():
    video = noise(6, seed=1)
    assert mind_gsc(video)[:3] == pytest.approx(by_torchmetrics(video[:3], video[[5, 4, 3]]), rel=1e-4)
    there_and_back = torch.cat([video, video.flip(0)])
    assert mind_gsc(there_and_back).ssim == 1.0 and mind_gsc(there_and_back).lpips is None


def test_a_loop_closes_where_the_last_frame_is_the_first():
    video = noise(5, seed=1)
    assert loop_closure(video)[:3] == pytest.approx(by_torchmetrics(video[4:], video[:1]), rel=1e-4)
    video[4] = video[0]
    assert loop_closure(video).mse == pytest.approx(0, abs=1e-12) and loop_closure(video).ssim == 1.0


def test_what_cannot_be_scored_is_refused_by_name():
    video = noise(5)
    with pytest.raises(ValueError, match="even number"):
        mind_gsc(video)
    with pytest.raises(ValueError, match="two frames"):
        loop_closure(video[:1])
    with pytest.raises(ValueError, match="context_frames=5 of 5"):
        mind_lcm(video, video, context_frames=5)
    with pytest.raises(ValueError, match="belong together"):
        mind_lcm(video, video[:4], context_frames=1)
    with pytest.raises(ValueError, match="must be uint8"):
        mind_gsc(video.float())
