from pathlib import Path

import numpy as np
import pytest
import torch

from relic.metrics.pose import PoseFiles, read_colmap, read_vipe
from relic.ops.actions import integrate, parse_script

TRUTH = integrate(parse_script("dolly_in+pan_left*6 tilt_up+roll_cw*6 pan_right+truck_left*8"))
SEEN = [0, 1, 2, 5, 9, 20]
VIDEO = torch.zeros(21, 16, 16, 3, dtype=torch.uint8)
INTRINSICS = torch.tensor([10.0, 10, 7.5, 7.5])


def quaternion(rotation: np.ndarray) -> np.ndarray:
    """w x y z of a rotation (3, 3) by its axis, the slow way."""
    values, vectors = np.linalg.eig(rotation)
    axis = np.real(vectors[:, np.argmin(np.abs(values - 1))])
    angle = np.arccos(np.clip((np.trace(rotation) - 1) / 2, -1, 1))
    skew = np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0],
                     rotation[1, 0] - rotation[0, 1]])  # fmt: skip
    sense = 1.0 if skew @ axis >= 0 else -1.0
    return np.concatenate([[np.cos(angle / 2)], sense * np.sin(angle / 2) * axis])


def write_colmap(path: Path, *, name: str = "images/frame_{:06d}.jpg", first: int = 0) -> None:
    lines = ["# Image list with two lines of data per image:", "#   IMAGE_ID, QW, QX, QY, QZ, …"]
    for number, frame in enumerate(SEEN):
        w2c = np.linalg.inv(TRUTH[frame].numpy())
        values = " ".join(f"{v:.12f}" for v in [*quaternion(w2c[:3, :3]), *w2c[:3, 3]])
        points = "" if number % 2 else "12.5 7.25 -1 3.0 4.0 17"
        lines += [f"{number + 1} {values} 1 {name.format(frame + first)}", points]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def check(found) -> None:
    assert found.registered.nonzero()[:, 0].tolist() == SEEN
    assert torch.allclose(found.c2w[SEEN], TRUTH[SEEN], atol=1e-5)
    assert found.c2w[3].isnan().all()


def test_vipe_archives_are_read_back(tmp_path):
    (tmp_path / "pose").mkdir()
    poses = TRUTH[SEEN].float().numpy()
    np.savez(tmp_path / "pose" / "clip.npz", data=poses, inds=np.array(SEEN))
    check(PoseFiles(tmp_path, stem="clip").estimate(VIDEO, intrinsics_px=INTRINSICS))


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", ["images/frame_{:06d}.jpg", "{}.png", "a picture {:04d}.png"])
def test_colmap_text_is_read_back(tmp_path, name, first):
    write_colmap(tmp_path / "clip" / "images.txt", name=name, first=first)
    check(PoseFiles(tmp_path, stem="other").of("clip").estimate(VIDEO, intrinsics_px=INTRINSICS))


def test_a_video_without_poses_says_where_they_should_be(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no poses of 'clip'.*clip\.npz nor .*images\.txt"):
        PoseFiles(tmp_path, stem="clip").estimate(VIDEO, intrinsics_px=INTRINSICS)


def test_poses_of_another_video_are_an_error(tmp_path):
    write_colmap(tmp_path / "images.txt")
    with pytest.raises(ValueError, match="frames 0 to 20, the video has 10 frames"):
        read_colmap(tmp_path / "images.txt", frames=10)
    np.savez(tmp_path / "twice.npz", data=TRUTH[:2].numpy(), inds=np.array([3, 3]))
    with pytest.raises(ValueError, match="several poses of one frame"):
        read_vipe(tmp_path / "twice.npz", frames=10)
    np.savez(tmp_path / "other.npz", poses=TRUTH.numpy())
    with pytest.raises(ValueError, match="lacks data, inds"):
        read_vipe(tmp_path / "other.npz", frames=10)
    (tmp_path / "broken.txt").write_text("1 0.5 0.5\n\n")
    with pytest.raises(ValueError, match="is not a picture"):
        read_colmap(tmp_path / "broken.txt", frames=10)
