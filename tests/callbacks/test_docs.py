"""The example of docs/callbacks.md runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

from relic.callbacks import ActionFollowing, MemoryRetrieval, Recordings, Throughput
from relic.data.shards import pack_sample
from relic.ops.actions import integrate, parse_script
from tests.data.recordings import INTRINSICS, noise_frames, write_dataset
from tests.test_configs import HORIZONS, TEACHERS, build

PAGE = Path(__file__).parents[2] / "docs" / "callbacks.md"
pytest.importorskip("cv2")


def test_both_callbacks_score_a_module_that_knows_nothing_of_relic(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = parse_script("pan_left*40 pan_right*40 pan_left*40 pan_right*40 truck_left*8")
    samples = [
        (
            f"walk{i}",
            pack_sample(
                frames=noise_frames(len(path), seed=i), c2w=integrate(path, d_bar=0.1), fps=16.0,
                intrinsics_px=INTRINSICS, captions=("a room",), provenance={"scene": f"room{i}", "seed": i},
            ),
        )
        for i in range(5)
    ]  # fmt: skip
    write_dataset(tmp_path / "runs" / "clips", samples)
    code = re.search(r"<!-- run by [^>]*-->\n```python\n(.*?)```", PAGE.read_text(), re.S).group(1)
    code = code.replace("num_clips=4", "num_clips=2").replace(
        "max_epochs=1,", "max_epochs=1, accelerator='cpu',"
    )
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    memory, action, best = names["callbacks"][:3]  # the trainer adds its own
    assert memory.latest["memory/clips"] == memory.latest["memory/did_not_move"] == 2
    assert torch.isfinite(torch.tensor(memory.latest["memory/psnr_revisit"]))
    assert action.latest["action/coverage"] == 1  # a frozen video: registered, and not moving
    assert action.latest["action/rpe_rot_deg"] == pytest.approx(2.0, abs=0.05)
    assert float(best.best_model_score) == pytest.approx(memory.latest["memory/psnr_revisit"], abs=1e-3)


def test_the_block_for_relic_fit_makes_the_callbacks_it_names(tmp_path):
    block = re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.S).group(1)
    (tmp_path / "callbacks.yaml").write_text(block)
    extra = ("--config", str(tmp_path / "callbacks.yaml"), "--trainer.accelerator=cpu")
    made = build(TEACHERS[0], HORIZONS[0], extra=extra).trainer.callbacks
    memory, action = (next(c for c in made if type(c) is kind) for kind in (MemoryRetrieval, ActionFollowing))
    assert memory.source == Recordings(root="runs/clips", num_frames=321, num_clips=8)
    assert (memory.every_n_validations, memory.max_seconds, action.source.num_frames) == (2, 120, 81)
    assert any(isinstance(c, Throughput) for c in made)
