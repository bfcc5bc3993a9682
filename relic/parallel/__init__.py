"""Parallelism and memory savings, applied from outside to single-device networks."""

from relic.parallel.apply import Compute, apply_compute

__all__ = ["Compute", "apply_compute"]
