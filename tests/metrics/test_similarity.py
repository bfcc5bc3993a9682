import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchmetrics.functional.image import structural_similarity_index_measure

from relic.metrics import FrameMean, LPIPSUnavailable, load_lpips, psnr, sharpness, sharpness_ratio, ssim
from relic.metrics.similarity import ALEXNET_FILE, CHUNK_PIXELS
from tests.metrics.videos import noise
from tests.reference import similarity as reference

SCORES = (psnr, ssim, sharpness_ratio)


def blurred(video: torch.Tensor, size: int = 9) -> torch.Tensor:
    pictures = F.avg_pool2d(video.float().permute(0, 3, 1, 2), size, 1, size // 2, count_include_pad=False)
    return pictures.round().to(torch.uint8).permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def alexnet():
    """Random weights of AlexNet's convolutions, in torchvision's names."""
    generator = torch.Generator().manual_seed(1)
    shapes = {
        0: (64, 3, 11, 11),
        3: (192, 64, 5, 5),
        6: (384, 192, 3, 3),
        8: (256, 384, 3, 3),
        10: (256, 256, 3, 3),
    }
    weights = {}
    for layer, shape in shapes.items():
        bound = (shape[1] * shape[2] * shape[3]) ** -0.5
        weights[f"features.{layer}.weight"] = bound * torch.randn(shape, generator=generator)
        weights[f"features.{layer}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    return weights


@pytest.fixture(scope="module")
def backbone(alexnet, tmp_path_factory):
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.safetensors"
    save_file(alexnet, path)
    return path


def test_ssim_equals_torchmetrics_frame_by_frame():
    video, truth = noise(seed=1), noise(seed=2)
    for other in (truth, blurred(video), video.flip(0)):
        pictures = (v.permute(0, 3, 1, 2).double() for v in (video, other))
        expected = structural_similarity_index_measure(*pictures, data_range=255.0, reduction="none")
        torch.testing.assert_close(ssim(video, other).double(), expected, atol=2e-5, rtol=0)  # float32


def test_ssim_and_sharpness_equal_the_windows_written_out():
    video, truth = noise(2, 15, 19, seed=1), blurred(noise(2, 15, 19, seed=1), 3)
    for frame in range(2):
        a, b = video[frame].numpy(), truth[frame].numpy()
        assert float(ssim(video, truth)[frame]) == pytest.approx(reference.ssim(a, b), abs=2e-5)
        assert float(sharpness(video)[frame]) == pytest.approx(reference.sharpness(a), rel=1e-5)


def test_equal_videos_score_the_best_there_is():
    video = noise()
    assert psnr(video, video).tolist() == pytest.approx([148.13] * 3, abs=0.01)
    assert ssim(video, video).tolist() == [1.0] * 3
    assert sharpness_ratio(video, video).tolist() == [1.0] * 3


def test_a_grey_blur_is_not_sharp_and_half_the_contrast_is_half_as_sharp():
    truth = noise()
    blur, pale = blurred(truth), (truth.float() / 2).round().to(torch.uint8)
    assert sharpness_ratio(blur, truth).max() < 0.1
    assert sharpness_ratio(torch.full_like(truth, 128), truth).tolist() == [0.0] * 3
    torch.testing.assert_close(sharpness_ratio(pale, truth), torch.full((3,), 0.5), atol=0.02, rtol=0)


def test_an_edge_that_is_blurred_keeps_its_height_and_loses_its_sharpness():
    truth = torch.zeros(1, 40, 48, 3, dtype=torch.uint8)
    truth[:, :, 24:] = 200
    assert sharpness_ratio(blurred(truth, 5), truth) < 0.25


def test_black_frames_have_defined_scores():
    black, video = torch.zeros(3, 40, 48, 3, dtype=torch.uint8), noise()
    assert ssim(black, black).tolist() == sharpness_ratio(black, black).tolist() == [1.0] * 3
    assert sharpness(black).tolist() == [0.0] * 3
    assert sharpness_ratio(video, black).tolist() == [float("inf")] * 3
    assert ssim(black, video).isfinite().all() and psnr(black, video).isfinite().all()


def test_chunks_change_nothing():
    height, width = 48, 64
    frames = 2 * (CHUNK_PIXELS // (height * width)) + 3
    video = noise(1, height, width).repeat(frames, 1, 1, 1)
    video[:, 0] = torch.arange(frames)[:, None, None] % 256
    truth = noise(1, height, width, seed=3).repeat(frames, 1, 1, 1)
    for score in (ssim, sharpness_ratio):
        single = torch.cat([score(video[i : i + 1], truth[i : i + 1]) for i in (0, 1, frames - 1)])
        torch.testing.assert_close(score(video, truth)[[0, 1, -1]], single)


@pytest.mark.parametrize("score", SCORES)
def test_videos_that_do_not_belong_together_are_refused(score):
    video = noise()
    for other in (video[:2], video[:1], video[:, :32]):
        with pytest.raises(ValueError, match="belong together"):
            score(video, other)


@pytest.mark.parametrize("score", [ssim, sharpness_ratio])
def test_what_is_no_uint8_video_is_refused(score):
    for wrong in (noise().float(), noise()[..., :1], noise()[0], noise()[:0]):
        with pytest.raises(ValueError, match="must be uint8"):
            score(wrong, wrong)
    with pytest.raises(ValueError, match="sides of at least"):
        score(noise()[:, :2], noise()[:, :2])


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_lpips_equals_the_lpips_package_with_the_same_weights(alexnet, backbone):
    lpips = pytest.importorskip("lpips")
    oracle = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    names = {f"features.{name}": p for name, p in oracle.net.named_parameters()}
    for name, parameter in names.items():  # features.slice2.3.weight -> features.3.weight
        parameter.data.copy_(alexnet["features." + name.split(".", 2)[2]])
    video, truth = noise(4, 64, 96, seed=1), noise(4, 64, 96, seed=2)
    pictures = (v.permute(0, 3, 1, 2).float() / 127.5 - 1 for v in (video, truth))
    with torch.no_grad():
        expected = oracle(*pictures).flatten()
    net = load_lpips(backbone)
    torch.testing.assert_close(net(video, truth), expected, atol=1e-6, rtol=1e-5)
    assert net(video, video).tolist() == [0.0] * 4
    assert not net.state_dict()  # a checkpoint of what holds it stays small


def test_lpips_scores_a_long_clip_in_chunks_like_single_frames(backbone):
    net, frames = load_lpips(backbone), CHUNK_PIXELS // (64 * 96) + 2
    video = noise(1, 64, 96).repeat(frames, 1, 1, 1)
    truth = noise(2, 64, 96, seed=5)[torch.arange(frames) % 2]
    single = torch.cat([net(video[i : i + 1], truth[i : i + 1]) for i in (0, 1)])
    torch.testing.assert_close(net(video, truth)[-2:], single[[frames % 2, 1 - frames % 2]])


def test_a_backbone_may_be_torchvisions_file_in_half_precision(alexnet, backbone, tmp_path):
    weights = {name: tensor.half() for name, tensor in alexnet.items()}
    torch.save(weights | {"classifier.6.bias": torch.zeros(1000)}, tmp_path / "alexnet.pth")
    pair = noise(1, 64, 96, seed=1), noise(1, 64, 96, seed=2)
    torch.testing.assert_close(
        load_lpips(tmp_path / "alexnet.pth")(*pair), load_lpips(backbone)(*pair), rtol=1e-2, atol=0
    )


def test_torchs_cache_is_where_a_backbone_is_looked_for(alexnet, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        LPIPSUnavailable, match=rf"not measured, backbone not found at .*{ALEXNET_FILE}; put http"
    ):
        load_lpips()
    (tmp_path / "checkpoints").mkdir()
    torch.save(alexnet, tmp_path / "checkpoints" / ALEXNET_FILE)
    assert load_lpips()(noise(1, 64, 96), noise(1, 64, 96)).tolist() == [0.0]


def test_a_file_that_is_no_alexnet_is_refused_by_name(alexnet, tmp_path):
    with pytest.raises(LPIPSUnavailable, match=r"nowhere\.pth"):
        load_lpips(tmp_path / "nowhere.pth")
    for changed in (alexnet | {"features.12.weight": torch.zeros(1)}, dict(list(alexnet.items())[1:])):
        save_file(changed, tmp_path / "odd.safetensors")
        with pytest.raises(ValueError, match="is not torchvision's AlexNet"):
            load_lpips(tmp_path / "odd.safetensors")


def test_lpips_needs_pictures_that_survive_its_pooling(backbone):
    net = load_lpips(backbone)
    assert net(noise(1, 31, 31), noise(1, 31, 31, seed=1)).isfinite().all()
    with pytest.raises(ValueError, match="31 pixels"):
        net(noise(1, 30, 40), noise(1, 30, 40))


@pytest.mark.parametrize("score", SCORES)
def test_the_mean_counts_each_frame_once(score):
    clips = [(noise(n, seed=n), noise(n, seed=n + 9)) for n in (1, 4)]
    metric = FrameMean(score)
    assert metric.total.isfinite() and metric.frames == 0
    for clip in clips:
        metric.update(*clip)
    expected = torch.cat([score(*clip) for clip in clips]).double().mean()
    torch.testing.assert_close(metric.compute(), expected)
    with pytest.raises(ValueError, match="must be uint8"):
        metric.update(noise().float(), noise().float())


def test_importing_the_package_loads_nothing_heavy():
    heavy = "torch", "torchmetrics", "lpips", "cv2", "scipy", "torchvision"
    code = f"import relic.metrics, sys; print(*set({heavy}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_public_name_is_found_and_no_file_hides_it():
    import relic.metrics

    files = {path.stem for path in Path(relic.metrics.__file__).parent.glob("*.py")}
    assert not files & set(relic.metrics.__all__)
    assert all(getattr(relic.metrics, name) is not None for name in relic.metrics.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fid'"):
        _ = relic.metrics.fid
