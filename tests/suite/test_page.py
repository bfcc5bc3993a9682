import torch

from relic.suite.page import barred, beside, image, since_last_seen


def test_panels_stand_side_by_side_under_bars_that_tell_truth_from_generated():
    video = torch.zeros(6, 8, 10, 3, dtype=torch.uint8)
    panel = barred(video, given=2)
    assert panel.shape == (6, 12, 10, 3) and (panel[:, 4:] == 0).all()
    assert (panel[1, 0, 0] != panel[2, 0, 0]).any() and torch.equal(panel[0, 0, 0], panel[1, 3, 9])
    assert beside([panel, panel, panel]).shape == (6, 12, 38, 3)


def test_the_curve_has_a_point_for_every_bin_that_holds_pairs():
    row = {"mean": 20.0, "cases": 3}
    found = {
        "memory/psnr_revisit": row,
        "memory/psnr_revisit_after_2_4s": row,
        "memory/psnr_revisit_after_0_2s": {"mean": 25.0, "cases": 1},
        "memory/psnr_revisit_after_64s_up": {"mean": 15.0, "cases": 1},
        "memory/psnr_revisit_after_4_8s": {"mean": None, "cases": 0},
        "memory/psnr_revisit_copy_first_after_2_4s": {"mean": 12.0, "cases": 3},
    }
    assert since_last_seen(found) == [(1.0, 25.0), (3.0, 20.0), (64.0, 15.0)]
    assert since_last_seen(found, tail="_copy_first") == [(3.0, 12.0)]


def test_a_picture_is_held_by_its_element():
    assert image(b"ab", "png") == '<img src="data:image/png;base64,YWI=">'
