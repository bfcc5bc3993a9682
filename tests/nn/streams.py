"""What tests of memory, forcing and rollout share: a small causal network, clips, a stream over them."""

from __future__ import annotations

import torch
from torch import nn

from relic.nn.control import ControlConfig
from relic.nn.dit import DiT, DiTConfig
from relic.nn.memory import Memory, MemoryPlan, Policy
from relic.types import Controls

SMALL = DiTConfig(
    width=24,
    depth=2,
    heads=2,
    ffn=32,
    latent_channels=2,
    text_width=6,
    text_length=3,
    freq_width=32,
    control=None,
)
CONTROLLED = DiTConfig(
    width=24, depth=2, heads=2, ffn=32, latent_channels=2, text_width=6, text_length=3, freq_width=32,
    control=ControlConfig(width=8),
)  # fmt: skip
ROWS, COLUMNS = 3, 5  # neither divides by 2 or 4: cells at the edge are smaller


def network(config: DiTConfig = SMALL, *, seed: int = 0) -> DiT:
    """A network in float64 whose every weight matters."""
    torch.manual_seed(seed)
    net = DiT(config).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net.requires_grad_(False)


def plan_of(policy: Policy, *, latents: int | None, block_latents: int = 4, **changes: object) -> MemoryPlan:
    sizes = {"rows": ROWS, "columns": COLUMNS, "layers": 2, "heads": 2, "head_width": 12}
    return MemoryPlan(policy=policy, block_latents=block_latents, num_latents=latents, **{**sizes, **changes})


def memory_of(policy: Policy, *, batch: int = 2, pool: object = None, **settings: object) -> Memory:
    settings = {"latents": 13, **settings}
    extra = {} if pool is None else {"pool": pool}
    return Memory(plan_of(policy, **settings), batch=batch, dtype=torch.float64, **extra)


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clip(latents: int, *, batch: int = 2, seed: int = 1) -> torch.Tensor:
    return normal(batch, latents, 2, 2 * ROWS, 2 * COLUMNS, seed=seed)


def levels(latents: int, *, batch: int = 2) -> torch.Tensor:
    sigma = torch.rand(batch, latents, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sigma[:, 0] = 0
    return sigma


def part(controls: Controls | None, block: range) -> Controls | None:
    """The controls of a block's frames."""
    if controls is None:
        return None
    frames = slice(0, 1) if block.start == 0 else slice(4 * block.start - 3, 4 * block.stop - 3)
    return Controls(controls.actions[:, frames], controls.poses[:, frames])


@torch.no_grad()
def stream(net, memory, latents, sigma, text, *, controls=None, c2w=None) -> torch.Tensor:
    """Pass a clip through the network block by block, committing each as it is; return all velocities."""
    out = []
    while memory.latents < latents.shape[1]:
        block = memory.plan.block(memory.block)
        at = slice(block.start, block.stop)
        velocity, fresh = net(
            latents[:, at], sigma=sigma[:, at], text=text, controls=part(controls, block),
            memory=memory.view(fresh=True),
        )  # fmt: skip
        memory.commit(fresh, c2w=None if c2w is None else c2w[:, at])
        out.append(velocity)
    return torch.cat(out, dim=1)
