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
CORRECTION: Final = 1.0  # most that a point's own picture may correct, pixels by certainty
FEWEST_OF_KEY: Final = 8  # points of a picture, for a homography
LOOK_BACK: Final = 12  # pictures tried when all points are lost
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
    """Follow points through video (f, h, w, 3) uint8 -> tracks, and the factor of their pixels.

    A picture higher than 240 pixels is reduced by that factor; centres are at integers in both sizes.

    A frame on which too few points are found again is left out, and the next is followed from the last good
    one, or else from an earlier picture: a flash does no harm, a cut ends the tracks.
    """
    cv2 = core()
    factor = min(1.0, HIGHEST / video.shape[1])
    size = round(factor * video.shape[1]), round(factor * video.shape[2])
    registered = np.zeros(len(video), bool)
    anchor, origin = np.zeros(0, int), np.zeros((0, 2), np.float32)
    ids, pixels = np.zeros(0, int), np.zeros((0, 2), np.float32)
    keys: dict[int, np.ndarray] = {}  # pictures that points come from
    seen: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    previous = np.zeros(size, np.uint8)
    for frame, picture in enumerate(video):
        look = _look(cv2, picture, size=size)
        if keys:
            if not np.array_equal(look.grey, previous):
                kept, found = _step(cv2, previous, look, pixels)
                found_ids, found = _realign(cv2, keys, look, ids[kept], found[kept], anchor, origin)
                if len(found_ids) < FEWEST:
                    found_ids, found = _find_again(cv2, keys, look, anchor, origin)
                if len(found_ids) < FEWEST:
                    continue
                ids, pixels = found_ids, found
            certainty = _root(_certainty(look.structure, pixels))
            seen.append((np.full(len(ids), frame), ids, pixels, certainty))
        if not keys or frame - max(keys) >= KEY_EVERY or len(ids) < MOST // 3:
            new = _points(cv2, look.grey, pixels, most=MOST - len(ids))
            if not keys and len(new) < FEWEST:
                continue
            if len(new):
                keys[frame] = look.grey
                ids = np.concatenate([ids, np.arange(len(anchor), len(anchor) + len(new))])
                anchor = np.concatenate([anchor, np.full(len(new), frame)])
                origin, pixels = np.concatenate([origin, new]), np.concatenate([pixels, new])
        registered[frame], previous = True, look.grey
    nothing = (np.zeros(0, int), np.zeros(0, int), np.zeros((0, 2)), np.zeros((0, 2, 2)))
    number, track, pixel, certain = (np.concatenate(column) for column in zip(nothing, *seen, strict=True))
    tracks = Tracks(anchor, origin.astype(float), number, track, pixel, certain, registered)
    return tracks, factor


class _Look(NamedTuple):
    """A picture as it is measured. grey: (h, w) uint8, smoothed; structure: (h, w, 3), see `_look`."""

    grey: np.ndarray
    structure: np.ndarray


def _look(cv2: Any, picture: np.ndarray, *, size: tuple[int, int]) -> _Look:
    """Make a picture (h, w, 3) smoothed grey, with the mean squared gradients xx, xy, yy of each patch."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    if grey.shape != size:
        grey = cv2.resize(grey, size[::-1], interpolation=cv2.INTER_AREA)
    grey = cv2.GaussianBlur(grey, (0, 0), BLUR_PX)
    x, y = (cv2.Scharr(grey, cv2.CV_32F, *axis, scale=1 / 32) for axis in ((1, 0), (0, 1)))
    squares = np.stack([x * x, x * y, y * y], axis=-1)
    return _Look(grey, cv2.boxFilter(squares, -1, (WINDOW, WINDOW)))


def _step(cv2: Any, here: np.ndarray, there: _Look, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Follow pixels (n, 2) from one picture to the next -> which were found (n,), and where (n, 2)."""
    if not len(pixels):
        return np.zeros(0, bool), pixels
    settings = _settings(cv2) | {"maxLevel": max(0, int(np.log2(min(here.shape) / SMALLEST)))}
    found, forward, _ = cv2.calcOpticalFlowPyrLK(here, there.grey, pixels, None, **settings)
    back, backward, _ = cv2.calcOpticalFlowPyrLK(there.grey, here, found, None, **settings)
    kept = (forward[:, 0] == 1) & (backward[:, 0] == 1)
    return kept & _near(there, found, back - pixels, most=ROUND_TRIP), found


def _realign(
    cv2: Any,
    keys: dict[int, np.ndarray],
    look: _Look,
    ids: np.ndarray,
    pixels: np.ndarray,
    anchor: np.ndarray,
    origin: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Measure points (n,) against the pictures that they come from -> those that fit, and where.

    Following alone drifts. Each picture is warped by the homography that fits its points best, so that
    patches look alike; the homography only guides, and each point is measured by itself.
    """
    height, width = look.grey.shape
    settings = _settings(cv2) | {"maxLevel": 0, "flags": cv2.OPTFLOW_USE_INITIAL_FLOW}
    kept, better = np.zeros(len(ids), bool), pixels.copy()
    for key in np.unique(anchor[ids]):
        mine = np.flatnonzero(anchor[ids] == key)
        if len(mine) < FEWEST_OF_KEY:
            continue
        start, near = origin[ids[mine]], pixels[mine]
        cv2.setRNGSeed(0)
        plane, _ = cv2.findHomography(start, near, cv2.RANSAC, 2.0, maxIters=200)
        if plane is None:
            continue
        edge = {"flags": cv2.INTER_LINEAR, "borderMode": cv2.BORDER_REPLICATE}
        warped = cv2.warpPerspective(keys[int(key)], plane, (width, height), **edge)
        start = cv2.perspectiveTransform(start[:, None], plane)[:, 0]
        found, forward, _ = cv2.calcOpticalFlowPyrLK(warped, look.grey, start, near.copy(), **settings)
        guess = start + (near - found)
        back, backward, _ = cv2.calcOpticalFlowPyrLK(look.grey, warped, found, guess, **settings)
        good = (forward[:, 0] == 1) & (backward[:, 0] == 1)
        good &= _near(look, found, back - start, most=ROUND_TRIP)
        kept[mine] = good & _near(look, found, found - near, most=CORRECTION)
        better[mine] = found
    return ids[kept], better[kept]


def _find_again(
    cv2: Any, keys: dict[int, np.ndarray], look: _Look, anchor: np.ndarray, origin: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Look for the points of an earlier picture, the newest first -> their ids (n,) and pixels (n, 2)."""
    for key in sorted(keys, reverse=True)[:LOOK_BACK]:
        ids = np.flatnonzero(anchor == key)
        kept, found = _step(cv2, keys[key], look, origin[ids])
        ids, found = _realign(cv2, keys, look, ids[kept], found[kept], anchor, origin)
        if len(ids) > 2 * FEWEST:
            return ids, found
    return np.zeros(0, int), np.zeros((0, 2), np.float32)


def _settings(cv2: Any) -> dict[str, Any]:
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 0.003)
    return {"winSize": (WINDOW, WINDOW), "criteria": criteria}


def _near(look: _Look, pixels: np.ndarray, miss: np.ndarray, *, most: float) -> np.ndarray:
    """Say which pixels (n, 2) are inside the picture and off by less than `most`, weighed by certainty."""
    height, width = look.grey.shape
    limit = np.array([width - 1 - BORDER, height - 1 - BORDER])
    inside = np.logical_and(pixels >= BORDER, pixels <= limit).all(axis=1)
    certainty = _certainty(look.structure, np.clip(pixels, 0, limit))
    return inside & (np.einsum("ni,nij,nj->n", miss, certainty, miss) < most**2)


def _points(cv2: Any, grey: np.ndarray, pixels: np.ndarray, *, most: int) -> np.ndarray:
    """Find up to `most` new points (n, 2) float32, apart from one another and from `pixels`."""
    none, spacing = np.zeros((0, 2), np.float32), max(3, round(SPACING * len(grey)))
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
