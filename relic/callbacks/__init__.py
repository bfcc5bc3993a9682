"""Callbacks for any Trainer whose module has `generate(clips, prefix_frames=, seed=)`; for a teacher, the gap
probe.
"""

from relic.callbacks.action_following import ActionFollowing
from relic.callbacks.gap_probe import GapProbe, HeldOut
from relic.callbacks.memory_retrieval import MemoryRetrieval
from relic.callbacks.recordings import Recordings
from relic.callbacks.sample_video import SampleVideo
from relic.callbacks.throughput import Throughput
from relic.callbacks.video_writer import VideoWriter

__all__ = [
    "ActionFollowing",
    "GapProbe",
    "HeldOut",
    "MemoryRetrieval",
    "Recordings",
    "SampleVideo",
    "Throughput",
    "VideoWriter",
]
