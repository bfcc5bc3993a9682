"""Worlds of random weights that can play the shortest scripts of the suite."""

from __future__ import annotations

from dataclasses import replace

from relic.ops.retention import AnyPolicy
from relic.world import World
from tests.bundles import CLIP, SHORT, world_of


def five_seconds(policy: AnyPolicy = SHORT, *, d_bar: float = 0.05) -> World:
    """A world of 32x48 with a horizon of 81 frames."""
    world = world_of(policy, steps=1)
    config = replace(world.config, clip=replace(CLIP, horizons=(81,)))
    return replace(world, config=config, d_bar=d_bar)
