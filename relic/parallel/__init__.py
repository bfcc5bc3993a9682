"""Parallelism and memory savings, applied from outside to single-device networks."""

from relic.parallel.apply import Compute, apply_compute
from relic.parallel.gradients import average_gradients, clip_gradients
from relic.parallel.optimizers import Muon, primed
from relic.parallel.recording import Recorder
from relic.parallel.shard import gathered, shard_network

__all__ = [
    "Compute",
    "Muon",
    "Recorder",
    "apply_compute",
    "average_gradients",
    "clip_gradients",
    "gathered",
    "primed",
    "shard_network",
]
