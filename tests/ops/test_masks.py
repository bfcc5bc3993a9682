import pytest
import torch

from relic.ops.masks import block_causal_mask, forcing_mask, memory_mask, pack, pack_behind, pack_once
from relic.ops.retention import Compressed, Full, SinkWindow, Window

GRID = {"rows": 2, "columns": 3}  # 6 tokens; cells of factor 2: 2


def by_latent(mask: torch.Tensor, *, queries: int) -> torch.Tensor:
    """Of the full keys, latents that see latents."""
    tokens = len(mask) // queries
    return mask[::tokens, : queries * tokens : tokens]


def test_block_causal_is_a_staircase():
    mask = block_causal_mask(blocks=2, block_latents=2, tokens=1)
    expected = [[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1] * 5, [1] * 5]
    assert mask.int().tolist() == expected


def test_a_window_cuts_the_stairs_off_and_a_sink_stays():
    window, sink = (
        by_latent(memory_mask(p, blocks=3, block_latents=2, **GRID), queries=7).int().tolist()
        for p in (Window(latents=2), SinkWindow(sink=1, window=2))
    )
    assert window[6] == [0, 0, 0, 0, 0, 1, 1] and window[0] == [1, 0, 0, 0, 0, 0, 0]
    assert sink[6] == [1, 0, 0, 0, 0, 1, 1]


def test_latents_behind_the_window_are_seen_pooled_and_not_in_full():
    policy = Compressed(window=2, schedule=(1, 2))
    mask = memory_mask(policy, blocks=2, block_latents=2, **GRID)
    assert mask.shape == (30, 30 + 2 * 2)  # latents 1 and 3 are the ones that are pooled
    assert by_latent(mask, queries=5)[4].int().tolist() == [1, 0, 1, 1, 1]
    assert mask[-1, 30:].int().tolist() == [1, 1, 0, 0] and not mask[:18, 30:].any()


def test_noisy_blocks_see_clean_ones_before_them_and_themselves():
    mask = by_latent(forcing_mask("teacher", Full(), blocks=2, block_latents=2, **GRID), queries=7)
    packing = pack("teacher", Full(), blocks=2, block_latents=2)
    assert packing.times == (0, 1, 2, 1, 2, 3, 4)  # [clean | noisy]
    assert mask[3].int().tolist() == [1, 0, 0, 1, 1, 0, 0]
    assert mask[6].int().tolist() == [1, 1, 1, 0, 0, 1, 1]
    assert not mask[:3, 3:].any()  # clean ones see no noisy one


def test_hybrid_forcing_shows_what_the_memory_would():
    policy = Compressed(window=2, schedule=(1, 2))
    sizes = {"blocks": 3, "block_latents": 2, **GRID}
    assert torch.equal(forcing_mask("hybrid", policy, **sizes), memory_mask(policy, **sizes))


def test_blocks_behind_a_given_past_are_the_noisy_half_of_teacher_forcing():
    policy = Compressed(window=2, schedule=(1, 2))
    whole = pack("teacher", policy, blocks=4, block_latents=2)
    clean = pack_once(policy, last=3, block_latents=2)
    noisy = pack_behind(policy, first=1, last=4, block_latents=2)
    assert noisy.given == 7 and noisy.times == (*range(7), *range(1, 9)) == whole.times
    assert clean.segments + noisy.segments == whole.segments
    late = pack_behind(policy, first=3, last=4, block_latents=2)
    assert late.times == (*range(7), 5, 6, 7, 8)
    assert [list(segment.queries) for segment in late.segments] == [[7, 8], [9, 10]]
    assert late.segments[0].sees == ((0, 1), (1, 2), (2, 1), (3, 2), (4, 1), (7, 1), (8, 1))


@pytest.mark.parametrize("policy", [Full(), Window(latents=4), Compressed(window=4, schedule=(1, 2, 2))])
@pytest.mark.parametrize("forcing", ["teacher", "diffusion", "hybrid"])
def test_every_token_sees_itself_and_nothing_later(policy, forcing):
    mask = forcing_mask(forcing, policy, blocks=3, block_latents=2, **GRID)
    packing = pack(forcing, policy, blocks=3, block_latents=2)
    assert mask.diagonal().all()
    latents = by_latent(mask, queries=len(packing.times))
    block = [-(-t // 2) for t in packing.times]
    assert all(block[j] <= block[i] for i, j in latents.nonzero().tolist())


def test_passes_that_cannot_be_laid_out_are_refused():
    with pytest.raises(ValueError, match="blocks=0"):
        pack("hybrid", Full(), blocks=0, block_latents=4)
    with pytest.raises(ValueError, match="multiple of block_latents=4"):
        pack("hybrid", Window(latents=6), blocks=1, block_latents=4)
