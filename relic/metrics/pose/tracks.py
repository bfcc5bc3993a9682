"""Points followed through a video by Lucas–Kanade: what visual odometry measures."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from relic.metrics.pose.opencv import core

__all__ = ["Tracks", "follow"]

MOST: Final = 300  # points followed at a time
SPACING: Final = 1 / 42  # between new points, of the picture's height
QUALITY: Final = 0.002  # of a point, against the best of its picture
FLAT: Final = 1e-2  # least quality, mean squared grey levels a pixel: a picture of less has no points
ROUND_TRIP: Final = 0.25  # a point followed there and back must return this near, pixels by certainty
HIGHEST: Final = 240  # pixels; higher pictures are reduced
WINDOW: Final = 15  # pixels of a patch, each side
BLUR_PX: Final = 0.8  # pictures are smoothed: a drawn edge moves in steps
SMALLEST: Final = 14  # pixels of the pyramid's top, the shorter side
FEWEST: Final = 12  # points that survive a step; with fewer the frame is lost
BORDER: Final = 2  # pixels
KEY_EVERY: Final = 6  # frames between pictures that points come from
CONTRAST: Final = 200.0  # mean squared grey levels a pixel at which a position is half certain


class Tracks(NamedTuple):
    """Points and where they were seen again. The first sighting of a point, its anchor, is exact.

    anchor: (n,) frame of the first sighting; origin: (n, 2) pixels there.
    frame, track: (m,) of each later sighting, sorted by frame; pixel: (m, 2).
    certainty: (m, 2, 2) symmetric, weighs an error in pixels: near 1 across a strong edge, 0 along it.
    registered: (f,) bool, frames that hold enough points of earlier ones (or begin the video).
    """

    anchor: np.ndarray
    origin: np.ndarray
    frame: np.ndarray
    track: np.ndarray
    pixel: np.ndarray
    certainty: np.ndarray
    registered: np.ndarray


def follow(video: np.ndarray) -> tuple[Tracks, float]:
    """Follow points through video (f, h, w, 3) uint8 -> tracks, and the size of their pixels' picture, a share.

    A picture higher than 240 pixels is reduced: coordinates are those of the smaller one, centres at integers.

    A frame on which too few points are found again is left out, and the next is followed from the last good
    one: a flash does no harm, a cut ends the tracks.
    """
    cv2 = core()
    factor = min(1.0, HIGHEST / video.shape[1])
    frames, height, width = len(video), *(round(factor * side) for side in video.shape[1:3])
    spacing = max(3, round(SPACING * height))
    registered = np.zeros(frames, bool)
    keys: dict[int, np.ndarray] = {}  # pictures that points come from
    anchor, origin = np.zeros(0, int), np.zeros((0, 2), np.float32)
    seen: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
    ids, pixels = np.zeros(0, int), np.zeros((0, 2), np.float32)
    last, previous = -1, np.zeros((height, width), np.uint8)
    for frame in range(frames):
        grey = _grey(cv2, video[frame], size=(height, width))
        structure = _structure(cv2, grey)
        if last >= 0:
            if not np.array_equal(grey, previous):
                kept, found = _step(cv2, previous, grey, pixels, structure=structure)
                kept_ids, found = ids[kept], found[kept]
                for key in np.unique(anchor[kept_ids]):
                    mine = np.flatnonzero(anchor[kept_ids] == key)
                    good, better = _realign(cv2, keys[key], grey, origin[kept_ids[mine]], found[mine], structure=structure)
                    found[mine] = better
                    kept_ids[mine[~good]] = -1
                found, kept_ids = found[kept_ids >= 0], kept_ids[kept_ids >= 0]
                if len(kept_ids) < FEWEST:
                    for key in sorted(keys, reverse=True)[:12]:
                        mine = np.flatnonzero(anchor == key)
                        kept, found = _step(cv2, keys[key], grey, origin[mine], structure=structure)
                        mine, found = mine[kept], found[kept]
                        if len(mine):
                            good, found = _realign(cv2, keys[key], grey, origin[mine], found, structure=structure)
                            mine, found = mine[good], found[good]
                        if len(mine) > 2*FEWEST:
                            kept_ids = mine
                            break
                    else:
                        continue
                ids, pixels = kept_ids, found
            seen.append((frame, ids, pixels, _root(_certainty(structure, pixels))))
        registered[frame], previous = True, grey
        if last < 0 or frame - max(keys) >= KEY_EVERY or len(ids) < MOST // 3:
            new = _points(cv2, grey, pixels, spacing=spacing, most=MOST - len(ids))
            if last < 0 and len(new) < FEWEST:
                registered[frame] = False
                continue
            if len(new):
                keys[frame] = grey
                ids = np.concatenate([ids, np.arange(len(anchor), len(anchor) + len(new))])
                anchor = np.concatenate([anchor, np.full(len(new), frame)])
                origin, pixels = np.concatenate([origin, new]), np.concatenate([pixels, new])
        last = frame
    tracks = Tracks(
        anchor=anchor,
        origin=origin.astype(float),
        frame=np.concatenate([np.zeros(0, int), *(np.full(len(part[1]), part[0]) for part in seen)]),
        track=np.concatenate([np.zeros(0, int), *(part[1] for part in seen)]),
        pixel=np.concatenate([np.zeros((0, 2)), *(part[2] for part in seen)]),
        certainty=np.concatenate([np.zeros((0, 2, 2)), *(part[3] for part in seen)]),
        registered=registered,
    )
    return tracks, factor


def _grey(cv2: Any, picture: np.ndarray, *, size: tuple[int, int]) -> np.ndarray:
    """Return a picture (h, w, 3) as smoothed grey of `size` (height, width)."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    if grey.shape != size:
        grey = cv2.resize(grey, size[::-1], interpolation=cv2.INTER_AREA)
    return cv2.GaussianBlur(grey, (0, 0), BLUR_PX)


def _realign(cv2: Any, key: np.ndarray, grey: np.ndarray, origin: np.ndarray, pixels: np.ndarray, *, structure: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Measure points against the picture that they come from, warped by the homography that fits best."""
    height, width = grey.shape
    if len(origin) < 8:
        return np.zeros(len(origin), bool), pixels
    cv2.setRNGSeed(0)
    plane, _ = cv2.findHomography(origin, pixels, cv2.RANSAC, 2.0, maxIters=200)
    if plane is None:
        return np.zeros(len(origin), bool), pixels
    warped = cv2.warpPerspective(key, plane, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    start = cv2.perspectiveTransform(origin[:, None], plane)[:, 0]
    settings = {"winSize": (WINDOW, WINDOW), "maxLevel": 0, "flags": cv2.OPTFLOW_USE_INITIAL_FLOW,
        "criteria": (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 0.003)}
    limit = np.array([width - 1 - BORDER, height - 1 - BORDER])
    found, forward, _ = cv2.calcOpticalFlowPyrLK(warped, grey, start, pixels.copy(), **settings)
    back, backward, _ = cv2.calcOpticalFlowPyrLK(grey, warped, found, start + (pixels - found), **settings)
    kept = (forward[:, 0] == 1) & (backward[:, 0] == 1) & ((found >= BORDER) & (found <= limit)).all(1)
    certainty = _certainty(structure, np.clip(found, 0, limit))
    for miss, most in ((back - start, ROUND_TRIP), (found - pixels, 1.0)):
        kept &= np.einsum("ni,nij,nj->n", miss, certainty, miss) < most**2
    return kept, found


def _step(
    cv2: Any, here: np.ndarray, there: np.ndarray, pixels: np.ndarray, *, structure: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Follow pixels (n, 2) from one picture to the next -> which were found (n,), and where (n, 2)."""
    if len(pixels) == 0:
        return np.zeros(0, bool), pixels
    height, width = there.shape
    settings = {
        "winSize": (WINDOW, WINDOW),
        "maxLevel": max(0, int(np.log2(min(height, width) / SMALLEST))),
        "criteria": (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 0.003),
    }
    found, forward, _ = cv2.calcOpticalFlowPyrLK(here, there, pixels, None, **settings)
    back, backward, _ = cv2.calcOpticalFlowPyrLK(there, here, found, None, **settings)
    limit = np.array([width - 1 - BORDER, height - 1 - BORDER])
    kept = (forward[:, 0] == 1) & (backward[:, 0] == 1) & ((found >= BORDER) & (found <= limit)).all(1)
    miss = (back - pixels)[kept]
    certainty = _certainty(structure, found[kept])
    kept[kept] = np.einsum("ni,nij,nj->n", miss, certainty, miss) < ROUND_TRIP**2
    return kept, found


def _points(cv2: Any, grey: np.ndarray, pixels: np.ndarray, *, spacing: int, most: int) -> np.ndarray:
    """Find up to `most` new points (n, 2) float32, apart from one another and from `pixels`."""
    none = np.zeros((0, 2), np.float32)
    if most < MOST // 10:
        return none
    quality = cv2.cornerMinEigenVal(grey, 3)
    best = float(quality.max())
    if best * 255**2 < FLAT:
        return none
    free = np.full(grey.shape, 255, np.uint8)
    free[:BORDER], free[-BORDER:], free[:, :BORDER], free[:, -BORDER:] = 0, 0, 0, 0
    for x, y in pixels:
        cv2.circle(free, (round(float(x)), round(float(y))), spacing, 0, -1)
    points = cv2.goodFeaturesToTrack(grey, most, QUALITY, spacing, mask=free, blockSize=3)
    return none if points is None else points[:, 0]


def _structure(cv2: Any, grey: np.ndarray) -> np.ndarray:
    """Return the mean squared gradients xx, xy, yy of each patch (h, w, 3), grey levels a pixel."""
    x, y = (cv2.Scharr(grey, cv2.CV_32F, *axis, scale=1 / 32) for axis in ((1, 0), (0, 1)))
    return cv2.boxFilter(np.stack([x * x, x * y, y * y], axis=-1), -1, (WINDOW, WINDOW))


def _certainty(structure: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Return G(G + contrast)⁻¹ (n, 2, 2) of the patches about pixels (n, 2): eigenvalues in [0, 1)."""
    column, row = np.round(pixels).astype(int).T
    xx, xy, yy = structure[row, column].astype(float).T
    gradient = np.stack([xx, xy, xy, yy], axis=1).reshape(-1, 2, 2)
    return gradient @ np.linalg.inv(gradient + CONTRAST * np.eye(2))


def _root(matrix: np.ndarray) -> np.ndarray:
    """Return the symmetric square roots of positive semidefinite matrices (n, 2, 2)."""
    values, vectors = np.linalg.eigh((matrix + np.swapaxes(matrix, 1, 2)) / 2)
    return (vectors * np.sqrt(np.maximum(values, 0))[:, None]) @ np.swapaxes(vectors, 1, 2)
