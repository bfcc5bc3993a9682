from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from tests.data.recordings import clip_sample, latents_sample, write_dataset

settings.register_profile("data", max_examples=40, deadline=None)  # a busy machine is not a failure
settings.load_profile("data")


@pytest.fixture(scope="session")
def walks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six recordings of 97 to 145 frames in six scenes, 64x64 at 16 fps."""
    samples = [(f"walk{i}", clip_sample(97 + 16 * (i % 4), seed=i, scene=f"scene{i}")) for i in range(6)]
    return write_dataset(tmp_path_factory.mktemp("walks"), samples)


@pytest.fixture(scope="session")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six encoded windows of 33 frames in six scenes."""
    samples = [(f"walk{i}", latents_sample(33, seed=i, scene=f"scene{i}")) for i in range(6)]
    return write_dataset(tmp_path_factory.mktemp("encoded"), samples)
