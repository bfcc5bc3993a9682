"""ODE solutions as shards: which windows are solved, what is kept of them, and that a stopped run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from relic.data import WorldDataModule
from relic.data.index import Index
from relic.data.schema import ACTIONS, JSON, LATENTS, LATENTS_SCHEMA, TRAJECTORY, load_array, load_json
from relic.data.trajectories import PairsSettings, plan_pairs, write_pairs
from relic.types import ClipSpec
from tests.data.recordings import latents_sample, write_dataset
from tests.data.test_encode import Stopped, contents, members

CLIP = ClipSpec(height=64, width=64, horizons=(33,))
LEVELS = (1.0, 0.5)


def settings(**changes) -> PairsSettings:
    given = {
        "horizons": (33,), "levels": LEVELS, "sampler": {"steps": 4, "shift": 1.0, "guidance": 1.0},
        "teacher_sha256": "ab" * 32, "per_shard": 3, **changes,
    }  # fmt: skip
    return PairsSettings(**given)


def straight(noise: Tensor, *, given: Tensor, actions: Tensor, text: Tensor) -> Tensor:
    """A teacher of a kind: from noise straight to the image, brightened by the actions and the prompt."""
    told = actions.sum((1, 2)) / 100 + text.sum(1) % 7
    end = given[:, :1] + torch.zeros_like(noise) + told[:, None, None, None, None]
    states = torch.stack([noise, 0.5 * (noise + end), end], dim=1)
    states[:, :, : given.shape[1]] = given[:, None]
    return states


def write(source: Path, out: Path, *, solve=straight, **changes) -> Path | None:
    run = {name: changes.pop(name) for name in ("batch", "part", "progress") if name in changes}
    given = {"clip": changes.pop("clip", CLIP), "settings": settings(**changes), "words": 8}
    return write_pairs(source, out, solve=solve, **{"batch": 2, **given, **run})


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    samples = [(f"w{i}", latents_sample(33, seed=i, scene=f"scene{i % 4}")) for i in range(8)]
    return write_dataset(tmp_path_factory.mktemp("latents"), samples)


@pytest.fixture(scope="module")
def pairs(latents, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pairs")
    assert write(latents, out) == out / "index.parquet"
    return out


def test_every_window_gets_a_solution_with_its_actions_description_and_provenance(latents, pairs):
    windows = {row.key: row for row in Index.open(latents).rows}
    rows = Index.open(pairs).rows
    assert len(rows) == 8 and all(row.valid and row.levels == LEVELS for row in rows)
    for row in rows:
        held = members(pairs, row)
        description = load_json(held[JSON], schema=LATENTS_SCHEMA)
        window = members(latents, windows[description["window"]])
        original = load_json(window[JSON], schema=LATENTS_SCHEMA)
        assert {name: description[name] for name in original} == original
        assert description["teacher_sha256"] == "ab" * 32 and description["sampler"]["steps"] == 4
        assert held[ACTIONS] == window[ACTIONS]
        states, truth = load_array(held[TRAJECTORY]), load_array(window[LATENTS])
        assert states.dtype == np.float16 and states.shape == (3, *truth.shape)
        assert (states[:, 0] == truth[0]).all()
        middle = 0.5 * (states[0].astype(float) + states[2])
        np.testing.assert_allclose(states[1], middle, atol=1e-2)


def test_some_shards_go_on_from_true_blocks_of_their_windows(latents, tmp_path):
    plan = plan_pairs(
        Index.open(latents), settings(prefix_share=0.5, per_shard=1), clip=replace(CLIP, block_latents=2)
    )
    known = [task.known for task in plan]
    assert set(known) <= {1, 3, 5, 7} and len(set(known)) > 1 and 2 <= known.count(1) <= 6
    write(latents, tmp_path, prefix_share=1.0)
    windows = {row.key: row for row in Index.open(latents).rows}
    for row in Index.open(tmp_path).rows:
        held = members(tmp_path, row)
        description = load_json(held[JSON], schema=LATENTS_SCHEMA)
        truth = load_array(members(latents, windows[description["window"]])[LATENTS])
        states = load_array(held[TRAJECTORY])
        # five of nine, in blocks of four
        assert (states[:, :5] == truth[:5]).all() and (states[0, 5:] != states[2, 5:]).any((1, 2, 3)).all()


def test_the_noise_is_a_function_of_seed_window_and_horizon(latents, pairs, tmp_path):
    write(latents, tmp_path / "one", batch=1, per_shard=8)
    write(latents, tmp_path / "other", seed=1)
    starts = []
    for root in (pairs, tmp_path / "one", tmp_path / "other"):
        starts.append([load_array(members(root, row)[TRAJECTORY])[0, 1:] for row in Index.open(root).rows])
    assert all((a == b).all() and (a != c).any() for a, b, c in zip(*starts, strict=True))
    assert len({start.tobytes() for start in starts[0]}) == 8
    assert abs(float(np.stack(starts[0]).astype(float).std()) - 1) < 0.02


def test_the_data_module_reads_the_states_and_says_their_levels(pairs):
    data = WorldDataModule(
        root=str(pairs), clip=ClipSpec(height=64, width=64, horizons=(17, 33)), content="trajectory",
        global_batch=2, batches_per_epoch=3, workers=0, validation_scenes=1, evaluation_scenes=1,
    )  # fmt: skip
    assert data.levels is None
    data.setup("fit")
    assert data.levels == LEVELS
    for batch in data.train_dataloader():
        assert batch.trajectory.shape[:2] == (2, 3) and batch.trajectory.shape[2] in (5, 9)


def test_solutions_at_different_levels_are_not_mixed_and_must_say_them(tmp_path):
    samples = [
        (f"w{i}", latents_sample(33, seed=i, scene=f"s{i}", states=3, levels=levels))
        for i, levels in enumerate([LEVELS, (1.0, 0.6)])
    ]
    root = write_dataset(tmp_path / "mixed", samples)
    data = WorldDataModule(root=str(root), clip=CLIP, content="trajectory", validation_scenes=0, workers=0)
    with pytest.raises(ValueError, match=r"w1 .* at levels \(1.0, 0.6\), w0"):
        data.setup("fit")
    silent = latents_sample(33, states=3)
    silent[JSON] = json.dumps({k: v for k, v in json.loads(silent[JSON]).items() if k != "levels"}).encode()
    short = latents_sample(33, states=3, levels=(1.0,))
    root = write_dataset(tmp_path / "silent", [("silent", silent), ("short", short)])
    reasons = {row.key: row.reason for row in Index.open(root).rows}
    assert "lacks levels" in reasons["silent"] and "holds 3 states; the 1 levels" in reasons["short"]


def test_a_horizon_takes_windows_of_its_length_or_the_beginning_of_longer_ones(tmp_path):
    turned = latents_sample(49, seed=1, scene="b")
    turned[JSON] = json.dumps({**json.loads(turned[JSON]), "pivot": 30}).encode()
    samples = [("short", latents_sample(33, scene="a")), ("long", turned)]
    source = write_dataset(tmp_path / "latents", samples)
    clip = ClipSpec(height=64, width=64, horizons=(49,))
    plan = plan_pairs(Index.open(source), settings(horizons=(49, 33, 17)), clip=clip)
    keys = {task.shard: [(w.row.key, w.num_frames) for w in task.windows] for task in plan}
    assert keys == {
        "shards/017f-00000.tar": [("short", 17)],
        "shards/033f-00000.tar": [("short", 33)],
        "shards/049f-00000.tar": [("long", 49)],
    }
    only = write_dataset(tmp_path / "only", samples[1:])
    write(only, tmp_path / "out", horizons=(17, 33), clip=clip)
    rows = {row.num_frames: row for row in Index.open(tmp_path / "out").rows}
    assert {frames: row.pivot for frames, row in rows.items()} == {17: None, 33: 30}
    for frames, row in rows.items():
        actions = load_array(members(tmp_path / "out", row)[ACTIONS])
        assert (actions == load_array(turned[ACTIONS])[:frames]).all()


def test_fewer_windows_are_spread_over_scenes_and_leave_none_out(latents):
    index = Index.open(latents)
    for count in (4, 6):
        (first, *rest) = plan_pairs(index, settings(windows=count, per_shard=8), clip=CLIP)
        assert not rest and len(first.windows) == count
        assert {w.row.scene for w in first.windows} == {f"scene{i}" for i in range(4)}
    plans = (plan_pairs(index, settings(windows=4, seed=seed), clip=CLIP) for seed in range(8))
    picks = {tuple(window.row.key for task in plan for window in task.windows) for plan in plans}
    assert len(picks) > 1
    with pytest.raises(ValueError, match=r"windows=3 would leave out some of the 4 scenes"):
        plan_pairs(index, settings(windows=3), clip=CLIP)


@pytest.mark.parametrize("calls", [0, 1, 2, 4])
def test_a_stopped_run_goes_on_to_the_same_bytes(latents, pairs, tmp_path, calls):
    left = iter(range(calls))

    def failing(noise, **given):
        if next(left, None) is None:
            raise Stopped
        return straight(noise, **given)

    with pytest.raises(Stopped):
        write(latents, tmp_path, solve=failing)
    assert not (tmp_path / "index.parquet").exists()
    again, seen = [], []
    write(
        latents, tmp_path, solve=lambda noise, **given: again.append(len(noise)) or straight(noise, **given),
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert sum(again) == {0: 8, 1: 8, 2: 5, 4: 2}[calls]  # whole shards of 3, 3 and 2
    assert seen[-1] == (8, 8) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert contents(tmp_path) == contents(pairs)


KILLED = """
import os, signal, sys
from tests.data.test_trajectories import straight, write
calls = iter(range(3))
def solve(noise, **given):
    if next(calls, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return straight(noise, **given)
write(sys.argv[1], sys.argv[2], solve=solve)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(latents, pairs, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-c", KILLED, str(latents), str(tmp_path)]
    assert subprocess.run(words, env=env, check=False).returncode == -signal.SIGKILL
    assert [p for p in (tmp_path / "shards").iterdir() if p.name.endswith(".tmp")]
    write(latents, tmp_path)
    assert contents(tmp_path) == contents(pairs)


def test_parts_share_the_work_and_the_last_one_writes_the_index(latents, pairs, tmp_path):
    assert write(latents, tmp_path, part=(1, 2)) is None
    assert [p.name for p in (tmp_path / "shards").iterdir()] == ["033f-00001.tar"]
    assert write(latents, tmp_path, part=(0, 2)) == tmp_path / "index.parquet"
    assert contents(tmp_path) == contents(pairs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, "begun with seed=0, not 3"),
        ({"prefix_share": 0.5}, "begun with prefix_share=0.0, not 0.5"),
        ({"levels": (1.0, 0.6)}, "begun with levels="),
        ({"sampler": {"steps": 8, "shift": 1.0, "guidance": 1.0}}, "begun with sampler="),
        ({"teacher_sha256": "cd" * 32}, "begun with another teacher"),
    ],
)
def test_other_arguments_into_the_same_folder_are_refused_by_name(latents, pairs, changes, message):
    with pytest.raises(ValueError, match=message):
        write(latents, pairs, **changes)


def test_what_does_not_fit_is_named(latents, tmp_path):
    def fails(message: str, **changes) -> None:
        with pytest.raises(ValueError, match=message):
            write(latents, tmp_path / "out", **changes)

    fails("longer than the 33 that the teacher was fitted to", horizons=(49,))
    fails("longer than every window; the longest have 33", horizons=(49,), clip=ClipSpec(
        height=64, width=64, horizons=(49,)))  # fmt: skip
    fails("encoded from 64x64", clip=ClipSpec(height=64, width=96, horizons=(33,)))
    fails("must name different lengths", horizons=(33, 33))
    fails(r"levels=\(0.9, 0.5\) must go from 1 down", levels=(0.9, 0.5))
    fails(r"prefix_share=2 must be in \[0, 1\]", prefix_share=2)
    fails("per_shard=0 must be at least 1", per_shard=0)
    fails("batch=0 must be at least 1", batch=0)
    fails("part=2 2 must be one of 2 parts", part=(2, 2))
    fails("NaN or infinity of w0", solve=lambda noise, **given: straight(noise, **given) * float("nan"))
    fails("made states .* are needed", solve=lambda noise, **given: straight(noise, **given)[:, 1:])
