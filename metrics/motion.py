"""Histograms of how a person's keypoints move, after the Frechet Video Motion Distance (FVMD).

Liu et al., "Frechet Video Motion Distance", 2024 (github.com/DSL-Lab/FVMD-frechet-video-motion-distance), track a grid
of 20 x 20 points through pictures of 256 x 256. Velocity and acceleration of the points of a cell of 4 frames by 5 x 5
points become a histogram of 8 directions, to which each vector adds the logarithm of its length; all cells' histograms
in a row are the vector of a window. Here the points are the 17 keypoints of a body, and a cell is a part of it.
"""

import numpy as np

SIDE = 256.0  # of the picture that lengths are measured in, as FVMD resizes to
DIRECTIONS = 8
CELL_FRAMES = 4
LONGEST = 255.0  # pixels; longer vectors count as this
# Cells: head, trunk, arms, legs.
PARTS = ((0, 1, 2, 3, 4), (5, 6, 11, 12), (7, 9), (8, 10), (13, 15), (14, 16))


def motion_dimension(window: int) -> int:
    """Of the vectors of windows of some frames."""
    return 2 * (window // CELL_FRAMES) * len(PARTS) * DIRECTIONS


def normalised_keypoints(keypoints: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Keypoints (..., 2) of an image of (width, height) in pixels of one of 256 x 256."""
    return keypoints * (SIDE / np.asarray(size))


def motion_histograms(keypoints: np.ndarray, visible: np.ndarray, window: int, stride: int) -> np.ndarray:
    """Vectors (windows, `motion_dimension`) float32 of a person's way through a clip.

    Args:
        keypoints: (frames, 17, 2) from `normalised_keypoints`; visible: (frames, 17) bool.
        window: frames of each; stride: frames between their starts. Whole windows only.
    """
    starts = range(0, max(0, len(keypoints) - window + 1), stride)
    vectors = [_histograms(keypoints[s : s + window], visible[s : s + window]) for s in starts]
    return np.stack(vectors) if vectors else np.zeros((0, motion_dimension(window)), np.float32)


def _histograms(keypoints: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """The vector of one window. Before its first frame nothing moves, as in FVMD."""
    kinds, moved, seen = [], keypoints.astype(np.float64), visible
    for _ in ("velocity", "acceleration"):
        moved, seen = np.diff(moved, axis=0), seen[1:] & seen[:-1]
        before = len(keypoints) - len(moved)
        weights = np.log2(1 + np.minimum(np.linalg.norm(moved, axis=-1), LONGEST)) / np.log2(1 + LONGEST) * seen
        angles = np.arctan2(moved[..., 1], moved[..., 0])
        bins = np.minimum((angles + np.pi) // (2 * np.pi / DIRECTIONS), DIRECTIONS - 1)
        by_direction = np.where(bins[..., None] == np.arange(DIRECTIONS), weights[..., None], 0)  # (t, 17, 8)
        by_direction = np.pad(by_direction, ((before, 0), (0, 0), (0, 0)))
        cells = by_direction[: len(keypoints) // CELL_FRAMES * CELL_FRAMES].reshape(-1, CELL_FRAMES, 17, DIRECTIONS)
        kinds.append(np.stack([cells[:, :, part].sum(axis=(1, 2)) for part in PARTS], axis=1))
    return np.stack(kinds).astype(np.float32).reshape(-1)
