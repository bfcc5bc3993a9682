from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relic.data.index import Index
from relic.data.schema import C2W, dump_array
from relic.verbs.inspect import action_shares, inspect
from tests.data.recordings import clip_sample, latents_sample, write_dataset


def test_the_card_tells_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [(f"walk{i}", clip_sample(97, seed=i, scene=f"hall{i % 2}")) for i in range(3)]
    root = write_dataset(tmp_path, samples)
    inspect(str(root))
    card = capsys.readouterr().out
    for line in (
        "recordings: 3 in 2 scenes, 0.3 min",
        "64x64 (3)",
        "16 (3)",
        "'a hall0 with",
        "problems   none",
        "largest",
    ):
        assert line in card
    assert card.index("dolly_in") < card.index("roll_cw"), "sorted by share"
    picture = np.asarray(Image.open(root / "card.png").convert("RGB"))
    assert min(picture.shape[:2]) > 800 and picture.std() > 20


def test_shares_add_up(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, [("a", latents_sample(33, seed=0)), ("b", latents_sample(33, seed=2))])
    shares = action_shares(Index.open(root).rows)
    assert shares[[0, 2]].tolist() == [0.5, 0.5]


def test_latents_have_a_card_without_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_dataset(tmp_path / "data", [("a", latents_sample(33, vae_sha256="ab" * 32))])
    inspect(str(root), out=str(tmp_path / "pictures" / "card.png"))
    card = capsys.readouterr().out
    assert "encoded windows: 1 in 1 scenes" in card and "abababababab... (1)" in card
    assert Image.open(tmp_path / "pictures" / "card.png").height < 900


def test_problems_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = clip_sample(17) | {C2W: dump_array(np.full((17, 4, 4), np.nan))}
    samples = [
        ("walk0", clip_sample(17)),
        ("walk1", bad),
        ("walk2", clip_sample(17)),
        ("walk3", clip_sample(17)),
    ]
    root = write_dataset(tmp_path, samples, per_shard=1)
    (root / "shards" / "00002.tar").unlink()
    inspect(str(root))
    card = capsys.readouterr().out
    assert "problems   2" in card
    assert "walk1 in shards/00001.tar" in card and "NaN" in card
    assert "shards/00002.tar" in card


def test_damaged_shards_and_nothing_valid_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_dataset(tmp_path, [("walk0", clip_sample(17))])
    shard = root / "shards" / "00000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.warns(UserWarning, match="cut short"):
        write_dataset(root, [])
    inspect(str(root))
    card = capsys.readouterr().out
    assert "00000.tar is damaged" in card and "no sample is valid" in card
    assert not (root / "card.png").exists()
