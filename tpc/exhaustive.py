"""The subset of keypoints whose transform aligns the two silhouettes best, over all subsets.

The paper asks for this subset and does not say how the subsets are enumerated. Here all of them are tried.
"""

from dataclasses import dataclass

import numpy as np

from tpc import search
from tpc.procrustes import apply_matrix
from tpc.skeleton import Silhouette
from tpc.subset import Selection

# Silhouettes are compared by about this many samples of the reference's: on a person 300 pixels tall every 4th to
# 5th pixel of every 4th to 5th row.
NUM_SAMPLES = 1000
BITMAP_SIDE = 256  # cells on the longer side of the driving person's box


@dataclass(frozen=True)
class Level:
    """One step of the search from coarse to fine."""

    width: float  # of a cell, as a part of the first level's
    share: float  # of the samples that score a cell
    cells: int  # that are opened, the best ones
    members: int  # that may remain in them, unless the best cell alone has more


# Measured over pairs of poses: IoU given up against scoring every subset, and time; see docs/calibration.md.
LEVELS = (
    Level(1.0, 0.3, 300, 100_000),
    Level(0.4, 0.5, 500, 20_000),
    Level(0.2, 0.6, 600, 3500),
    Level(0.06, 0.5, 600, 3500),
    Level(0.015, 0.5, 600, 3500),
)
ENOUGH = 3500  # candidates are scored one by one once no more are left
INDISTINCT = 0.004  # widths of a sample: what is left closer together than this is one candidate
SAME_IOU = 1e-9  # what rounding may change
MARGIN = 0.15  # IoU: a cell this far below the best is not worth the rest of its samples
# Every subset is scored outright where that is quick: few samples to look up in all, or a silhouette of few samples.
MAX_OUTRIGHT = 8_000_000
MAX_OUTRIGHT_SAMPLES = 300
# Points within this part of the picture's coordinates of each other coincide.
RELATIVE_DISTANCE = 1e-6


@dataclass(frozen=True)
class SearchLimits:
    """What a transform must satisfy to be a candidate."""

    min_points: int = 3
    min_scale: float = 1e-3
    max_scale: float = 1e3
    max_rotation: float = 180.0  # degrees


@dataclass(frozen=True)
class ReferenceSilhouette:
    """The reference person's outline, sampled once for all frames.

    Attributes:
        samples: (2, n) x and y of points spread evenly over the outline, reference pixels.
        sample_area: reference pixels that one sample stands for.
        corners: (2, 4) of the box of the samples.
        centre: (2,) their mean.
        radius: their root mean square distance from it.
    """

    samples: np.ndarray
    sample_area: float
    corners: np.ndarray
    centre: np.ndarray
    radius: float

    @classmethod
    def of(cls, silhouette: Silhouette) -> "ReferenceSilhouette":
        rows, columns = np.nonzero(silhouette.mask)
        if not len(rows):
            return cls(np.zeros((2, 0)), 0.0, np.zeros((2, 4)), np.zeros(2), 1.0)
        # The first quarter and the first half are spread evenly too: every second row and column, then the diagonals.
        order = np.argsort(np.array([[0, 2], [3, 1]])[rows % 2, columns % 2], kind="stable")
        samples = np.ascontiguousarray(silhouette.points()[order].T, np.float64)
        (left, top), (right, bottom) = samples.min(1), samples.max(1)
        corners = np.array([[left, right, right, left], [top, top, bottom, bottom]], np.float64)
        centre = samples.mean(1)
        radius = max(float(np.sqrt(((samples - centre[:, None]) ** 2).sum(0).mean())), 0.5)
        return cls(samples, silhouette.area / samples.shape[1], corners, centre, radius)


def select_exhaustive(
    source: np.ndarray,
    target: np.ndarray,
    weights: np.ndarray,
    reference: ReferenceSilhouette,
    silhouette: Silhouette,
    size: tuple[int, int],
    *,
    limits: SearchLimits,
    outright: bool | None = None,
) -> Selection:
    """The subset whose similarity gives the highest silhouette IoU, over all subsets of the points visible in both.

    The reference's outline is carried into the driving frame by the samples inside it: with n samples of A reference
    pixels each and a scale s, the part of it on the frame covers s^2 A (samples on the frame) pixels, and shares s^2
    A (samples that land on the driving person) of them. What leaves the frame does not count.

    Ties go to the larger subset, then to the smaller residual.

    Args:
        source, target: (17, 2) reference and driving pixels.
        weights: (17,), 0 = not visible in both.
        silhouette: the driving person.
        size: (width, height) of the driving frame.
        outright: score every subset, however many; None = when they are few. Otherwise from coarse to fine.
    """
    common = np.flatnonzero(weights > 0)
    if len(common) < limits.min_points:
        return Selection((), f"{len(common)} keypoints are visible in both; {limits.min_points} are needed")
    if reference.samples.shape[1] == 0 or silhouette.area == 0:
        return Selection((), "no silhouette of the person")
    x, y, w = source[common].astype(np.float64), target[common].astype(np.float64), weights[common] / weights.max()
    x0, y0 = x.mean(0), y.mean(0)  # moments are taken about the means, where they lose no digits
    half = (len(common) + 1) // 2
    low = search.moment_table(x[:half] - x0, y[:half] - y0, w[:half])
    high = search.moment_table(x[half:] - x0, y[half:] - y0, w[half:])
    smallest = (RELATIVE_DISTANCE * max(np.abs(x).max(), 1.0)) ** 2
    bounds = np.array([limits.min_scale, limits.max_scale, np.cos(np.deg2rad(limits.max_rotation)) - 1e-12])
    subsets, points, found = search.solve_subsets(low, high, bounds, limits.min_points, smallest)
    if not len(found):
        return Selection((), "every subset of the keypoints gives a scale or a rotation outside the bounds")
    scene = _Scene.of(reference, silhouette, size, x0, y0)
    members = np.arange(len(found), dtype=np.int32)
    if outright is None:
        num_samples = scene.samples.shape[1]
        outright = num_samples <= MAX_OUTRIGHT_SAMPLES or num_samples * len(found) <= MAX_OUTRIGHT
    first = int(points.argmax())  # with all points: kept to the end, so that no result is worse than it
    if not outright:
        members = _finalists(members, first, points, found, scene, reference.radius)
    scores = scene.score(members, found, first, 1.0, SAME_IOU)
    winner = search.pick(members, scores, points, found)
    if winner < 0:
        return Selection((), "no subset of the keypoints makes the silhouettes overlap")
    bits, iou = subsets[members[winner]], scores[winner]
    chosen = tuple(int(i) for n, i in enumerate(common) if bits >> n & 1)
    return Selection(chosen, None, float(iou))


def _finalists(
    members: np.ndarray, first: int, points: np.ndarray, found: np.ndarray, scene: "_Scene", radius: float
) -> np.ndarray:
    """The candidates worth scoring one by one; `first` is always among them."""
    # An odd stride: an even one would pick the same subsets of the first points again and again.
    width = _first_width(found[:: len(found) // 1024 | 1], scene, radius)
    for level in LEVELS:
        cell, leaders = search.group_candidates(members, points, found, scene.centre, radius, level.width * width)
        scores = scene.score(leaders, found, first, level.share, MARGIN)
        opened = search.best_cells(cell, scores, level.cells, level.members)
        members = members[opened | (members == first)]
        if len(members) <= ENOUGH:
            return members
    # Nearly all subsets agree, as they do where both pictures show one pose.
    leaders = search.group_candidates(members, points, found, scene.centre, radius, INDISTINCT * scene.sample_width)[1]
    return np.union1d(leaders, first).astype(np.int32)


def _first_width(found: np.ndarray, scene: "_Scene", radius: float) -> float:
    """Pixels: a sample's width, or less where the transforms differ by little; it makes about a thousand cells."""
    a, b, x, y = found[:, 0], found[:, 1], found[:, 2], found[:, 3]
    place = a * scene.centre[0] - b * scene.centre[1] + x, b * scene.centre[0] + a * scene.centre[1] + y
    spread = [np.subtract(*np.quantile(v, [0.84, 0.16])) / 2 for v in (a * radius, b * radius, *place)]
    typical = float(np.prod(spread)) ** 0.25 if min(spread) > 0 else 0.0
    return min(scene.sample_width, max(0.8 * typical, 4 * INDISTINCT * scene.sample_width))


@dataclass(frozen=True)
class _Scene:
    """Both silhouettes in coordinates whose origins are the means of the keypoints."""

    samples: np.ndarray
    sample_area: float
    sample_width: float  # driving pixels, at the scale that makes the two areas equal
    corners: np.ndarray
    centre: np.ndarray
    bitmap: np.ndarray
    origin: np.ndarray
    pitch: float
    area: float
    frame: np.ndarray

    @classmethod
    def of(
        cls,
        reference: ReferenceSilhouette,
        silhouette: Silhouette,
        size: tuple[int, int],
        x0: np.ndarray,
        y0: np.ndarray,
    ) -> "_Scene":
        return cls(
            reference.samples - x0[:, None],
            reference.sample_area,
            float(np.sqrt(silhouette.area / reference.samples.shape[1])),
            reference.corners - x0[:, None],
            reference.centre - x0,
            np.pad(silhouette.mask, 1).astype(np.uint8),
            np.asarray(silhouette.origin, np.float64) - y0,
            float(silhouette.cell),
            silhouette.area,
            np.concatenate([(-0.5, -0.5) - y0, np.asarray(size) - 0.5 - y0]),
        )

    def score(self, members: np.ndarray, found: np.ndarray, first: int, part: float, margin: float) -> np.ndarray:
        total = self.samples.shape[1]
        n = max(1, round(part * total))
        return search.score_candidates(
            members,
            found,
            first,
            self.samples,
            n,
            self.sample_area * total / n,
            self.corners,
            self.bitmap,
            self.origin,
            self.pitch,
            self.area,
            self.frame,
            margin,
        )


def silhouette_iou(
    matrix: np.ndarray, reference: ReferenceSilhouette, silhouette: Silhouette, size: tuple[int, int]
) -> float:
    """Silhouette IoU of any affine matrix (3, 3), measured as in `select_exhaustive`; 0 without silhouettes."""
    if reference.samples.shape[1] == 0 or silhouette.area == 0:
        return 0.0
    moved = apply_matrix(matrix, reference.samples.T)
    on_frame = ((moved >= -0.5) & (moved < np.asarray(size) - 0.5)).all(-1)
    position = np.floor((moved - silhouette.origin) / silhouette.cell + 0.5)
    rows, columns = silhouette.mask.shape
    inside = on_frame & (position >= 0).all(-1) & (position < (columns, rows)).all(-1)
    column, row = position[inside].astype(int).T
    size_of_sample = reference.sample_area * abs(np.linalg.det(matrix[:2, :2]))
    both = min(size_of_sample * np.count_nonzero(silhouette.mask[row, column]), silhouette.area)
    return float(both / (silhouette.area + size_of_sample * np.count_nonzero(on_frame) - both))
