from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from relic.data.picture import fitted, open_image


def test_a_picture_of_another_size_is_cropped_in_the_middle_and_scaled(capsys):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 30:90] = 200  # the middle, in the proportions of the world
    scaled = fitted(Image.fromarray(wide), height=32, width=48)
    assert scaled.shape == (32, 48, 3) and (scaled == 200).all()
    assert "40x120: its middle 40x60 is scaled to 32x48" in capsys.readouterr().out
    tall = fitted(Image.fromarray(wide.transpose(1, 0, 2)), height=32, width=48)
    assert tall.shape == (32, 48, 3)


def test_what_is_no_picture_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No image at .*none.png; give --image"):
        open_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="is not a picture that can be read"):
        open_image(tmp_path / "text.png")
    whole = BytesIO()
    Image.fromarray(np.zeros((40, 120, 3), np.uint8)).save(whole, "png")
    (tmp_path / "half.png").write_bytes(whole.getvalue()[:-40])
    with pytest.raises(ValueError, match=r"half.png is not a picture that can be read"):
        open_image(tmp_path / "half.png")
