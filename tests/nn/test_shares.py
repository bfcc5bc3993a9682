import pytest
import torch

import relic.nn.shares as module
from relic.nn.memory import Compressed, Full, Memory, SinkWindow, Window
from relic.nn.shares import attention_shares
from relic.types import Block
from tests.bundles import ACTIONS, BOUNDED, FRAMES, SHORT, image_of, world_of

BLOCKS = ACTIONS[1:].split(FRAMES)


def shares_of(policy, *, blocks: int = 5, change=None, **sampler):
    """Shares of attention of the last of some blocks, and the memory before it."""
    world = world_of(policy, **sampler)
    if change is not None:
        change(world.net)
    session = world.start(image_of(), "a red room", seed=3)
    for actions in BLOCKS[:blocks]:
        before = session.rollout.memory.fork()
        session.step(actions)
    context = session.rollout.context
    level = session.rollout.sampler.context_level
    block = session.block._replace(latents=context)
    return attention_shares(world.net, before, block, sigma=level, text=session.text), before, session


@pytest.mark.parametrize(
    "policy",
    [Full(), Window(latents=2), Window(latents=4), SinkWindow(sink=1, window=4), SHORT, BOUNDED],
    ids=str,
)
def test_shares_sum_to_one_in_every_layer(policy):
    shares, memory, _ = shares_of(policy)
    total = shares.window + shares.memory + shares.own
    torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)
    assert (shares.own > 0).all()
    assert (shares.memory > 0).all() == bool(memory.kept() and policy.span is not None)
    assert (shares.window > 0).all() == (memory.plan.ring > 0 or policy.span is None)


def test_where_all_keys_are_alike_shares_are_those_of_the_tokens():
    def blind(net):
        for block in net.dit.blocks:
            for parameter in (*block.self_attn.q.parameters(), *block.self_attn.norm_q.parameters()):
                parameter.zero_()
            block.control = None

    shares, memory, _ = shares_of(SHORT, change=blind)
    per_latent, held = memory.plan.tokens_per_latent, memory.length
    total = held + 2 * per_latent
    window = 2 * per_latent  # a window of 4 is the block and 2 latents before it
    expected = torch.tensor([window, held - window, 2 * per_latent], dtype=torch.float64) / total
    for share, value in zip(shares, expected, strict=True):
        torch.testing.assert_close(share, value.expand(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("queries", [5, 256])  # 5 does not divide the 12
def test_shares_are_the_probabilities_written_out_and_summed(monkeypatch, queries):
    monkeypatch.setattr(module, "QUERIES", queries)
    generator = torch.Generator().manual_seed(0)
    q, keys = (torch.randn(2, 3, n, 16, generator=generator) for n in (12, 20))
    probability = torch.softmax(torch.einsum("bknd,bkmd->bknm", q.double(), keys.double()) / 4, -1)
    groups = [probability[..., a:b].sum(-1).mean() for a, b in ((0, 7), (7, 7), (7, 20))]
    found = module._by_group(q, keys, borders=(0, 7, 7, 20))
    torch.testing.assert_close(found, torch.stack(groups), rtol=0, atol=1e-6)


def test_counting_changes_nothing():
    shares, before, session = shares_of(SHORT)
    length, keys = before.length, before._stored.k[..., : before.length, :].clone()
    context = session.rollout.context
    block = session.block._replace(latents=context)
    again = attention_shares(session.rollout.net, before, block, sigma=0.0, text=session.text)
    assert all(torch.equal(a, b) for a, b in zip(shares, again, strict=True))
    assert before.length == length and torch.equal(before._stored.k[..., :length, :], keys)


def test_a_memory_that_has_moved_on_is_refused():
    _, _, session = shares_of(SHORT, blocks=2)
    memory: Memory = session.rollout.memory
    block: Block = session.block
    with pytest.raises(ValueError, match="The memory is at block 3, the pass is of block 2: keep a fork"):
        attention_shares(session.rollout.net, memory, block, sigma=0.0, text=session.text)
    assert isinstance(memory.plan.policy, Compressed)
