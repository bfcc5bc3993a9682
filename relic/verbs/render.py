"""`relic render`: an action-labelled data set from the embedded engine; stopped, it goes on where it was."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import yaml
from tqdm import tqdm

from relic.data.claim import alone
from relic.data.index import INDEX_NAME, write_index
from relic.data.shards import pack_sample, scan_shard, write_shard
from relic.engine.building import make_scene
from relic.engine.captions import describe
from relic.engine.capture import Backend, Camera, choose_backend, intrinsics_of
from relic.engine.recording import ENGINE, provenance_of
from relic.engine.trajectories import make_trajectory
from relic.ops.randomness import derive_seed
from relic.types import ClipSpec

__all__ = ["Recording", "Shard", "plan_shards", "render"]

SCHEMA: Final = "relic-render/1"
SETTINGS_NAME: Final = "dataset.yaml"
SHORTEST_S: Final = 6.0  # of a recording, unless there is less to render
BYTES_PER_PIXEL: Final = 0.2  # of h264 at the quality of the shards, with room to spare
SHARD_BYTES: Final = 256 * 2**20


class Recording(NamedTuple):
    """One recording to make: the `number`-th of scene `scene`, `frames` long."""

    scene: int
    number: int
    frames: int

    @property
    def key(self) -> str:
        return f"scene-{self.scene:05d}-rec-{self.number:04d}"


class Shard(NamedTuple):
    """A tar of recordings of one scene."""

    name: str
    recordings: tuple[Recording, ...]

    @property
    def frames(self) -> int:
        return sum(recording.frames for recording in self.recordings)


def render(
    *,
    out: str,
    scenes: int = 8,
    minutes: float = 4.0,
    size: tuple[int, int] = (128, 256),
    fps: int = 16,
    seed: int = 0,
    workers: int | None = None,
    backend: Backend = "auto",
    clip_seconds: tuple[float, float] = (30.0, 75.0),
) -> None:
    """Render an action-labelled data set with the embedded engine.

    What is rendered depends on the seed and the sizes, not on the number of workers. Stopped at any moment,
    the same command goes on; finished shards are kept.

    Args:
        out: Folder of the data set.
        scenes: Number of scenes, each a house with a court.
        minutes: Minutes of video over all scenes.
        size: Height and width in pixels, multiples of 16.
        fps: Frames a second.
        seed: Seed of scenes and camera paths.
        workers: Processes that render; by default one a core.
        backend: Renderer: egl (graphics driver), software (needs none), or auto: egl with a GPU.
        clip_seconds: Shortest and longest recording, where there are minutes enough.
    """
    ClipSpec(height=size[0], width=size[1], fps=fps)
    shards = plan_shards(
        scenes=scenes, minutes=minutes, fps=fps, size=size, seed=seed, clip_seconds=clip_seconds
    )
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be at least 1.")
    chosen = choose_backend(backend)
    settings = {
        "schema": SCHEMA, "engine": ENGINE, "scenes": scenes, "minutes": float(minutes), "size": list(size),
        "fps": fps, "seed": seed, "backend": chosen, "clip_seconds": [float(s) for s in clip_seconds],
    }  # fmt: skip
    root = Path(out)
    with _explained(root, shards, size), alone(root):
        claim_folder(root, settings)
        remaining = [shard for shard in shards if not _is_finished(root, shard)]
        workers = min(workers or os.cpu_count() or 1, sum(len(shard.recordings) for shard in remaining))
        with tqdm(total=sum(s.frames for s in shards), unit="frame", desc="render", disable=None) as bar:
            bar.update(bar.total - sum(shard.frames for shard in remaining))
            _render_all(root, remaining, settings, workers=workers, bar=bar)
        if remaining or not (root / INDEX_NAME).exists():
            write_index(root)
    print(f"{root}: {len(shards)} shards, {sum(s.frames for s in shards)} frames, {chosen}")


def plan_shards(
    *,
    scenes: int,
    minutes: float,
    fps: int,
    size: tuple[int, int],
    seed: int,
    clip_seconds: tuple[float, float] = (30.0, 75.0),
) -> list[Shard]:
    """Divide the minutes among scenes and recordings: a pure function of its arguments.

    Raises:
        ValueError: If a number is out of range.
    """
    shortest, longest = clip_seconds
    if scenes < 1:
        raise ValueError(f"scenes={scenes} must be at least 1.")
    if not minutes > 0 or round(minutes * 60 * fps / scenes) < 2:
        raise ValueError(f"minutes={minutes} must leave each of {scenes} scenes at least two frames.")
    if not SHORTEST_S <= shortest <= longest:
        raise ValueError(f"clip_seconds={clip_seconds} must rise, from {SHORTEST_S:g} s or more.")
    shards = []
    for scene in range(scenes):
        frames = round(minutes * 60 * fps * (scene + 1) / scenes) - round(minutes * 60 * fps * scene / scenes)
        rng = np.random.default_rng(derive_seed("recordings", seed, scene))
        lengths = _lengths(frames, low=shortest * fps, high=longest * fps, rng=rng)
        recordings = [Recording(scene, number, length) for number, length in enumerate(lengths)]
        shards += _pack(recordings, frame_bytes=BYTES_PER_PIXEL * size[0] * size[1])
    return shards


def _lengths(frames: int, *, low: float, high: float, rng: np.random.Generator) -> list[int]:
    """Divide frames into recordings between `low` and `high` long, or a single one if there are too few."""
    least = max(1, int(np.ceil(frames / high)))
    count = int(rng.integers(least, max(least, int(frames / low)) + 1))
    weights = rng.uniform(0.8, 1.2, count)
    spare = frames - count * min(low, frames / count)
    ends = np.round(np.cumsum(min(low, frames / count) + spare * weights / weights.sum())).astype(int)
    return np.diff(ends, prepend=0).tolist()


def _pack(recordings: Sequence[Recording], *, frame_bytes: float) -> list[Shard]:
    """Put the recordings of a scene in one shard, or in several of bounded size."""
    parts: list[list[Recording]] = [[]]
    for recording in recordings:
        filled = sum(other.frames for other in parts[-1])
        if parts[-1] and (filled + recording.frames) * frame_bytes > SHARD_BYTES:
            parts.append([])
        parts[-1].append(recording)
    stem = f"scene-{recordings[0].scene:05d}"
    names = [f"{stem}.tar"] if len(parts) == 1 else [f"{stem}-part-{i:02d}.tar" for i in range(len(parts))]
    return [Shard(name, tuple(part)) for name, part in zip(names, parts, strict=True)]


def record(recording: Recording, settings: Mapping[str, Any]) -> dict[str, bytes]:
    """Render a recording into the members of a sample: a pure function of its arguments (on one machine)."""
    height, width = settings["size"]
    size, fps = (height, width), settings["fps"]
    scene = make_scene(settings["seed"], recording.scene)
    c2w = make_trajectory(scene, seed=recording.number, frames=recording.frames, fps=fps)
    intrinsics_px = intrinsics_of(size)
    with Camera(scene, size=size, backend=settings["backend"]) as camera:
        return pack_sample(
            frames=(camera.picture(pose) for pose in c2w.numpy()),
            c2w=c2w,
            intrinsics_px=intrinsics_px,
            fps=fps,
            captions=describe(scene, c2w, fps=fps, intrinsics_px=intrinsics_px),
            provenance=provenance_of(scene, camera) | {"recording": recording.number},
        )


def _render_all(
    root: Path, shards: Sequence[Shard], settings: Mapping[str, Any], *, workers: int, bar: tqdm
) -> None:
    """Render and write shards in order; workers render recordings, only this process writes files."""

    def samples(
        shard: Shard, made: Callable[[Recording], dict[str, bytes]]
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        for recording in shard.recordings:
            yield recording.key, made(recording)
            bar.update(recording.frames)

    os.environ.setdefault("LP_NUM_THREADS", "0")  # the driver's own threads would compete with other workers
    if workers <= 1:
        for shard in shards:
            write_shard(root / "shards" / shard.name, samples(shard, lambda r: record(r, settings)))
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_end_with_parent)
    try:
        made: dict[Recording, Future[dict[str, bytes]]] = {
            recording: pool.submit(record, recording, settings)
            for shard in shards
            for recording in shard.recordings
        }
        for shard in shards:
            write_shard(root / "shards" / shard.name, samples(shard, lambda r: made.pop(r).result()))
    except BrokenProcessPool as error:
        raise OSError(
            "a worker ended abruptly, perhaps for lack of memory: run the same command with fewer workers."
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    """Let this worker end when the process that started it is killed."""
    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        watch = threading.Thread(target=lambda: (connection.wait([sentinel]), os._exit(1)), daemon=True)
        watch.start()


def claim_folder(root: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a data set before its first shard; remove half-written leftovers.

    Raises:
        ValueError: If the folder holds a data set of other settings, or one that was not rendered.
    """
    shards, path = root / "shards", root / SETTINGS_NAME
    if path.exists():
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        for name, value in settings.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{root} was rendered with {name}={_words(found.get(name))}, now {name}={_words(value)}: "
                    "take another folder, or the same arguments to go on."
                )
    elif any(shards.glob("*.tar")):
        raise ValueError(f"{root} holds shards but no {SETTINGS_NAME}: take another folder.")
    else:
        shards.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                yaml.safe_dump(dict(settings), file, sort_keys=False)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    for leftover in (*root.glob(".*.tmp"), *shards.glob(".*.tmp")):
        leftover.unlink()


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _is_finished(root: Path, shard: Shard) -> bool:
    """Return whether a shard is there whole."""
    path = root / "shards" / shard.name
    try:
        found = {member.key for member in scan_shard(path)}
    except (FileNotFoundError, ValueError):
        return False
    return found == {recording.key for recording in shard.recordings}


@contextmanager
def _explained(root: Path, shards: Sequence[Shard], size: tuple[int, int]) -> Iterator[None]:
    """Say what to do when the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        remaining = [shard for shard in shards if not _is_finished(root, shard)]
        needed = sum(shard.frames for shard in remaining) * size[0] * size[1] * BYTES_PER_PIXEL / 2**20
        free = shutil.disk_usage(root).free / 2**20
        done = f"{len(shards) - len(remaining)} of {len(shards)} shards are finished and kept"
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno or 0)} in {root}: {done}; the rest takes up to {needed:.1f} MiB, "
            f"{free:.1f} MiB are free. Make room and run the same command to go on",
        ) from error
