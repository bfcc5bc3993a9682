import io

import torch
from PIL import Image

from relic.callbacks.panel import gif_bytes, path_from_above, side_by_side
from relic.ops.actions import integrate, parse_script


def test_the_path_is_drawn_ahead_to_the_top_and_right_to_the_right():
    def red_centre(script: str) -> torch.Tensor:
        picture = path_from_above(integrate(parse_script(script)), size=64)[-1].int()
        red = (picture[..., 0] - picture[..., 1]) > 80
        rows, columns = red.nonzero(as_tuple=True)
        return torch.stack([rows.float().mean(), columns.float().mean()])

    ahead, right = red_centre("dolly_in*20"), red_centre("truck_right*20")
    assert ahead[0] < 20 and abs(ahead[1] - 32) < 3
    assert right[1] > 44 and abs(right[0] - 32) < 8


def test_the_wedge_turns_with_the_camera():
    poses = integrate(parse_script("pan_right*45"))  # 2 degrees a frame: looks right at the end
    first, last = path_from_above(poses, size=65)[[0, -1]].int()

    def wedge(picture: torch.Tensor) -> torch.Tensor:
        return (((picture[..., 0] - picture[..., 1]) > 80).nonzero().float().mean(0) - 32).round()

    assert wedge(first)[0] < -1 and abs(wedge(first)[1]) <= 1
    assert wedge(last)[1] > 1 and abs(wedge(last)[0]) <= 1


def test_truth_sample_and_path_stand_side_by_side():
    truth, sample = (
        torch.full((5, 16, 24, 3), 10, dtype=torch.uint8),
        torch.full((5, 16, 24, 3), 20, dtype=torch.uint8),
    )
    joined = side_by_side(truth, sample, torch.eye(4).expand(5, 4, 4))
    assert joined.shape == (5, 16, 24 + 2 + 24 + 2 + 16, 3)
    assert (joined[:, :, :24] == 10).all() and (joined[:, :, 26:50] == 20).all()


def test_a_gif_holds_every_frame_at_the_stated_rate():
    video = torch.randint(0, 255, (4, 8, 8, 3), dtype=torch.uint8)
    picture = Image.open(io.BytesIO(gif_bytes(video, fps=10)))
    assert picture.n_frames == 4 and picture.info["duration"] == 100
