"""Camera poses by structure from motion with pycolmap 4. Written against its interface, not run here."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from relic.metrics.pose.estimator import PoseEstimate, check_video
from relic.metrics.pose.opencv import core

__all__ = ["Pycolmap"]


class Pycolmap:
    """Estimate poses with COLMAP's incremental mapper: slow, and nothing on pure rotations.

    Intrinsics are held fixed. COLMAP counts pixels from the corner of the first one, so its principal point
    lies half a pixel further. Of several models the largest is taken; other frames are not registered.

    Args:
        seed: Seed of COLMAP's random sampling.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def estimate(self, video: Tensor, *, intrinsics_px: Tensor) -> PoseEstimate:
        """Return the poses of video (f, h, w, 3) uint8 with `fx fy cx cy` (4,), pixel centres at integers.

        Raises:
            ImportError: If pycolmap or OpenCV is not installed.
            ValueError: If the video has another shape or type, or the intrinsics are no camera.
        """
        check_video(video, intrinsics_px)
        try:
            import pycolmap
        except ImportError as error:
            raise ImportError(
                "Pycolmap needs pycolmap, which is not installed: pip install pycolmap."
            ) from error
        cv2 = core()
        c2w = np.full((len(video), 4, 4), np.nan)
        with tempfile.TemporaryDirectory() as folder:
            pictures = Path(folder) / "pictures"
            pictures.mkdir()
            (Path(folder) / "models").mkdir()
            for number, picture in enumerate(video.cpu().numpy()):
                cv2.imwrite(str(pictures / f"{number:06d}.png"), picture[..., ::-1])
            model = self._model(pycolmap, Path(folder), pictures, intrinsics_px)
            for image in model.images.values() if model is not None else ():
                if image.has_pose:
                    pose = np.eye(4)
                    pose[:3] = image.cam_from_world().inverse().matrix()
                    c2w[int(Path(image.name).stem)] = pose
        poses = torch.from_numpy(c2w)
        return PoseEstimate(c2w=poses, registered=~poses.isnan().flatten(1).any(1))

    def _model(self, pycolmap: Any, folder: Path, pictures: Path, intrinsics_px: Tensor) -> Any:
        """Return the reconstruction with the most pictures, or None."""
        fx, fy, cx, cy = intrinsics_px.double().tolist()
        database = folder / "database.db"
        pycolmap.set_random_seed(self.seed)
        reader = pycolmap.ImageReaderOptions()
        reader.camera_model = "PINHOLE"
        reader.camera_params = f"{fx},{fy},{cx + 0.5},{cy + 0.5}"
        pycolmap.extract_features(
            database, pictures, camera_mode=pycolmap.CameraMode.SINGLE, reader_options=reader
        )
        pycolmap.match_sequential(database)
        options = pycolmap.IncrementalPipelineOptions()
        options.ba_refine_focal_length = False
        options.ba_refine_principal_point = False
        options.ba_refine_extra_params = False
        models = pycolmap.incremental_mapping(database, pictures, folder / "models", options=options)
        return max(models.values(), key=lambda model: model.num_reg_images(), default=None)
