"""Camera poses from video: the estimator protocol, visual odometry, pycolmap, files of other programs."""

from relic.metrics.pose.colmap import Pycolmap
from relic.metrics.pose.estimator import PoseEstimate, PoseEstimator, anchor_to
from relic.metrics.pose.files import PoseFiles, read_colmap, read_vipe
from relic.metrics.pose.visual_odometry import VisualOdometry

__all__ = [
    "PoseEstimate",
    "PoseEstimator",
    "PoseFiles",
    "Pycolmap",
    "VisualOdometry",
    "anchor_to",
    "read_colmap",
    "read_vipe",
]
