"""Callbacks for any Trainer whose module has `generate(clips, prefix_frames=, seed=)`; for a teacher, the gap
probe.
"""

from relic.callbacks.gap_probe import GapProbe, HeldOut
from relic.callbacks.sample_video import SampleVideo
from relic.callbacks.video_writer import VideoWriter

__all__ = ["GapProbe", "HeldOut", "SampleVideo", "VideoWriter"]
