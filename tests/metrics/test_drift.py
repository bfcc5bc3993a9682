import math

import pytest
import torch

from relic.metrics import DriftScore, drift_of, look, sharpness
from tests.metrics.videos import noise


def flat(*colour: int, frames: int = 4) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.uint8).expand(frames, 16, 24, 3).contiguous()


# CIE L*a*b* (D65) of sRGB colours, as published with the standard's matrix
@pytest.mark.parametrize(
    ("colour", "lab"),
    [
        ((255, 255, 255), (100, 0, 0)), ((0, 0, 0), (0, 0, 0)), ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)), ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((119, 119, 119), (50.03, 0, 0)), ((64, 64, 64), (27.09, 0, 0)), ((5, 5, 5), (1.37, 0, 0)),
    ],
)  # fmt: skip
def test_colours_are_those_of_cie_lab(colour, lab):
    seen = look(flat(*colour))
    found = [float(row[0]) for row in (seen.lightness, seen.green_red, seen.blue_yellow)]
    assert found == pytest.approx(lab, abs=0.02)
    assert float(seen.saturation[0]) == pytest.approx(math.hypot(*lab[1:]), abs=0.02)
    luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    assert float(seen.exposure[0]) == pytest.approx(luma / 255, abs=1e-5)


def test_colours_that_cancel_are_saturated_all_the_same():
    video = flat(255, 0, 0)
    video[:, :8] = torch.tensor([0, 255, 255], dtype=torch.uint8)
    seen = look(video)
    assert float(seen.green_red[0]) < 20 < float(seen.saturation[0])
    assert torch.equal(look(noise()).sharpness, sharpness(noise()))


def test_drift_is_the_change_from_the_first_seconds_to_the_last():
    video = torch.cat([flat(100, 100, 100, frames=8), noise(20, 16, 24), flat(150, 100, 100, frames=8)])
    change = drift_of(video, fps=4, seconds=2)
    seen = look(video)
    for name, row in zip(seen._fields[:-1], seen[:-1], strict=True):
        assert change[f"drift/{name}"] == pytest.approx(float(row[-1] - row[0]), abs=1e-4)
    lab = [change[f"drift/{name}"] for name in ("lightness", "green_red", "blue_yellow")]
    assert change["drift/colour"] == pytest.approx(math.hypot(*lab)) and change["drift/green_red"] > 15
    assert change["drift/sharpness"] == 0.0  # flat at both ends


def test_half_the_contrast_is_half_as_sharp():
    sharp = noise(4)
    pale = (sharp.float() / 2 + 60).round().to(torch.uint8)
    assert drift_of(torch.cat([sharp, pale]), fps=4)["drift/sharpness"] == pytest.approx(-1, abs=0.05)
    grey = flat(90, 90, 90).repeat(1, 3, 2, 1)[:, :40]
    assert drift_of(torch.cat([sharp, grey]), fps=4)["drift/sharpness"] == -math.inf


def test_a_still_video_does_not_drift_and_truth_stands_beside():
    still, truth = noise(1).expand(8, -1, -1, -1), noise(8, seed=4)
    change = drift_of(still, fps=2, truth=truth)
    own = {name: value for name, value in change.items() if not name.endswith("_truth")}
    assert set(own.values()) == {0.0}
    assert {f"{name}_truth": value for name, value in drift_of(truth, fps=2).items()} == {
        name: value for name, value in change.items() if name.endswith("_truth")
    }


def test_sizes_accumulate_and_signs_do_not_cancel():
    dark, light = flat(50, 50, 50), flat(60, 60, 60)
    metric = DriftScore()
    for clip in (torch.cat([dark, light]), torch.cat([light, dark])):
        metric.update(clip, fps=4, truth=torch.cat([dark, dark]))
    scores = metric.compute()
    assert float(scores["drift/exposure"]) == pytest.approx(10 / 255, abs=1e-6)
    assert float(scores["drift/exposure_truth"]) == 0.0 and int(scores["drift/clips"]) == 2
    metric.update(torch.cat([noise(4, 16, 24), dark]), fps=4)
    scores = metric.compute()
    assert int(scores["drift/not_finite"]) == 1 and scores["drift/sharpness"] == 0.0


@pytest.mark.parametrize("settings", [{"fps": 4, "seconds": 1.2}, {"fps": 4, "seconds": 0.0}, {"fps": 0}])
def test_ends_that_overlap_are_refused(settings):
    with pytest.raises(ValueError, match="must be"):
        drift_of(noise(8), **settings)


def test_black_and_bad_videos():
    black = flat(0, 0, 0, frames=8)
    assert set(drift_of(black, fps=4).values()) == {0.0}
    with pytest.raises(ValueError, match="belong together"):
        drift_of(black, fps=4, truth=black[:7])
    with pytest.raises(ValueError, match="must be uint8"):
        look(black.float())
