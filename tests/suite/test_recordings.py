import pytest
import torch

from relic.data.video import encode_video
from relic.suite.recordings import Shape, crop_window, fit_picture, read_frames
from tests.bundles import CLIP
from tests.suite.recordings import SHAPE, moving


def test_a_shape_is_that_of_a_worlds_clip():
    shape = Shape.of(CLIP, d_bar=0.02, most_frames=41)
    assert shape == SHAPE
    assert [shape.whole(frames) for frames in (1, 8, 9, 40, 41, 500)] == [1, 1, 9, 33, 41, 41]


@pytest.mark.parametrize("source", [(1080, 1920), (36, 64), (64, 36), (32, 48)])
def test_the_middle_of_a_picture_fills_the_other_size(source):
    scale, height, width, top, left = crop_window(source, (32, 48))
    assert height >= 32 and width >= 48 and (height == 32 or width == 48)
    assert abs((height - 32) / 2 - top) <= 0.5 and abs((width - 48) / 2 - left) <= 0.5
    assert height == pytest.approx(source[0] * scale, abs=0.5)


def test_intrinsics_follow_the_pixels():
    source, size = (36, 64), (32, 48)
    found = fit_picture(torch.tensor([50.0, 50.0, 31.5, 17.5]), source=source, size=size)
    scale, _, _, top, left = crop_window(source, size)
    point = torch.tensor([0.2, -0.1])  # in focal lengths
    before = 50 * point + torch.tensor([31.5, 17.5])
    after = found[:2] * point + found[2:]
    # pixel centres are integers: edges lie at -0.5
    assert torch.allclose(
        after, ((before + 0.5) * scale - 0.5 - torch.tensor([left, top])).double(), atol=1e-5
    )


def test_a_part_of_a_video_is_read_and_cropped(tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(encode_video(moving(20), fps=24)[0])
    part, source = read_frames(path, start=5, stop=9, size=(32, 48))
    assert part.shape == (4, 32, 48, 3) and source == (36, 64)
    whole, _ = read_frames(path, start=0, stop=20, size=(36, 64))
    assert (whole[5].float() - torch.from_numpy(moving(20)[5]).float()).abs().mean() < 12
    with pytest.raises(ValueError, match="video holds"):
        read_frames(path, start=5, stop=30, size=(32, 48))
    with pytest.raises(FileNotFoundError):
        read_frames(tmp_path / "none.mp4", start=0, stop=1, size=(32, 48))
