"""Callbacks for any Trainer whose module has `generate(clips, prefix_frames=, seed=)`."""

from relic.callbacks.sample_video import SampleVideo
from relic.callbacks.video_writer import VideoWriter

__all__ = ["SampleVideo", "VideoWriter"]
