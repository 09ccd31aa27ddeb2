"""Which of the keypoints visible in both images serve in the transform: fixed sets, and the largest that agrees.

The exhaustive search over all subsets is in `tpc.exhaustive`.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from tpc.procrustes import SimilarityTransform, apply_matrix
from tpc.silhouettes import FACE, NUM_KEYPOINTS, TORSO, TRUNK

FIXED_RULES = {"all": tuple(range(NUM_KEYPOINTS)), "face": FACE, "torso": TORSO, "trunk": TRUNK}


@dataclass(frozen=True)
class Selection:
    """Numbers of the chosen keypoints, ascending, or none and the reason; the IoU is nan when it was not measured."""

    keypoints: tuple[int, ...]
    reason: str | None = None
    iou: float = float("nan")


def select_fixed(rule: str, common: np.ndarray, min_points: int) -> Selection:
    """The points of a fixed rule that are in `common` (17,) bool."""
    chosen = tuple(i for i in FIXED_RULES[rule] if common[i])
    if len(chosen) < min_points:
        group = "" if rule == "all" else f" of the {rule}"
        return Selection((), f"{len(chosen)} keypoints{group} are visible in both; {min_points} are needed")
    return Selection(chosen)


def select_consensus(
    source: np.ndarray,
    target: np.ndarray,
    weights: np.ndarray,
    tolerance: float,
    min_points: int,
) -> Selection:
    """The largest set of points that one similarity maps to within `tolerance` pixels; ties go to the smaller error.

    Every pair of points proposes a transform, which is refitted once to the points that agree with it.

    Args:
        source, target: (17, 2) pixels.
        weights: (17,), 0 = not visible in both.
        tolerance: target pixels.
    """
    common = np.flatnonzero(weights > 0)
    if len(common) < min_points:
        return Selection((), f"{len(common)} keypoints are visible in both; {min_points} are needed")
    proposals = np.zeros((len(common) * (len(common) - 1) // 2, NUM_KEYPOINTS))
    for row, pair in enumerate(combinations(common, 2)):
        proposals[row, list(pair)] = 1
    for _ in range(2):
        transform = SimilarityTransform.from_estimate(source, target, proposals * weights)
        if not transform:
            return Selection((), transform.reason)
        distance = np.linalg.norm(apply_matrix(transform.matrix, source) - target, axis=-1)
        agreeing = (distance <= tolerance) & (weights > 0) & transform.valid[:, None]
        proposals = agreeing.astype(np.float64)
    counts = agreeing.sum(-1)
    error = np.where(agreeing, np.minimum(distance, tolerance) ** 2, 0.0).sum(-1)
    best = np.lexsort((error, -counts))[0]
    if counts[best] < min_points:
        return Selection((), f"no {min_points} keypoints agree on one transform")
    return Selection(tuple(int(i) for i in np.flatnonzero(agreeing[best])))
