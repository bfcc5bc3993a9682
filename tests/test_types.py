import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relic.types import Batch, Block, Clip, ClipSpec, Controls, latents_of


def number_after(word: str, error: Exception) -> int:
    found = re.search(rf"{word} (\d+)", str(error))
    assert found, f"no remedy in {error}"
    return int(found[1])


@given(st.integers(0, 10_000))
def test_latents_and_frames_count_one_and_then_groups_of_four(groups):
    assert latents_of(1 + 4 * groups) == 1 + groups


def test_the_published_horizons_are_21_41_and_81_latents():
    assert [latents_of(frames) for frames in (81, 161, 321)] == [21, 41, 81]


@given(st.integers(-10, 2000).filter(lambda frames: frames < 1 or frames % 4 != 1))
def test_a_number_of_frames_that_the_vae_cannot_take_is_refused_with_one_it_can(frames):
    with pytest.raises(ValueError, match=f"num_frames={frames} must be 4k") as caught:
        latents_of(frames)
    assert latents_of(number_after("use", caught.value)) >= 1


def test_the_default_clip_is_the_published_one():
    clip = ClipSpec()
    assert (clip.height, clip.width, clip.fps, clip.horizons, clip.block_latents) == (480, 832, 16, (81,), 4)
    assert (clip.latent_height, clip.latent_width) == (60, 104)


def test_the_longest_horizon_is_found_wherever_it_stands():
    assert ClipSpec(horizons=(161, 321, 81)).max_frames == 321


@given(st.integers(-5, 2000).filter(lambda size: size < 16 or size % 16 != 0))
def test_a_size_off_the_grid_is_refused_with_one_on_it(size):
    for name in ("height", "width"):
        with pytest.raises(ValueError, match=rf"{name}={size} must be a multiple of 16") as caught:
            ClipSpec(**{name: size})
        ClipSpec(**{name: number_after("use", caught.value)})


@given(st.integers(0, 200), st.integers(1, 9))
def test_a_horizon_is_the_image_latent_and_whole_blocks_or_is_refused_with_one_that_is(groups, block):
    frames = 1 + 4 * groups
    if groups % block == 0:
        assert ClipSpec(horizons=(frames,), block_latents=block).max_frames == frames
        return
    with pytest.raises(ValueError, match=f"block_latents={block} does not divide") as caught:
        ClipSpec(horizons=(frames,), block_latents=block)
    ClipSpec(horizons=(number_after("use", caught.value),), block_latents=block)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fps": 0}, "fps=0 must be positive"),
        ({"block_latents": 0}, "block_latents=0 must be at least 1"),
        ({"horizons": ()}, "at least one clip length"),
        ({"horizons": (81, 80)}, "num_frames=80 must be 4k"),
    ],
)
def test_a_clip_that_cannot_be_is_refused_when_made(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ClipSpec(**wrong)


def test_a_batch_is_moved_by_lightning_with_its_empty_fields():
    from lightning.fabric.utilities.apply_func import move_data_to_device

    actions = torch.zeros(1, 9, 13)
    batch = Batch(
        None, None, None, actions, torch.zeros(1, 2), torch.ones(1), torch.ones(1, dtype=torch.int64)
    )
    moved = move_data_to_device(batch, torch.device("meta"))
    assert isinstance(moved, Batch)
    assert moved.latents is None and moved.actions.device.type == "meta"


def test_values_that_cross_borders_can_be_unpacked_and_replaced():
    clip = Clip(torch.zeros(1, 2, 2, 3), torch.eye(4)[None], torch.ones(4), fps=16.0, d_bar=0.5)
    assert clip.captions == () and clip.provenance == {}
    assert clip._replace(fps=8.0).fps == 8.0
    actions, poses = Controls(torch.zeros(1, 1, 13), None)
    assert Block(actions, Controls(actions, poses), index=0).index == 0
