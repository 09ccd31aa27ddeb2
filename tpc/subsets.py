"""The keypoints that serve in a transform: the best of all subsets.

The paper takes the subset whose transform aligns the two silhouettes best; here all subsets are tried. A transform
follows from a few moments, which are sums over the points that serve: the transforms of all 2^k subsets come from two
small tables, one for each half of the points, added pairwise. Silhouettes are compared over samples of one of them.

Points are (x, y) in pixels, pixel centres at integers; transforms lead from the reference to the driving frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numba
import numpy as np

from tpc.procrustes import RELATIVE_FLATNESS, apply_matrix
from tpc.silhouettes import CHUNK, ReferenceSilhouette, Samples, Silhouette

TRANSFORMS = "procrustes", "affine", "linear"
_, AFFINE, LINEAR = range(len(TRANSFORMS))

COVERED = 255  # the cover of a cell that lies on the driving person as a whole
# Pieces are looked up in a driving silhouette blurred to the width of a piece times this part. Measured over pairs of
# poses; see docs/calibration.md.
BLUR = 0.7
# A subset is dropped when the pieces' IoU would have to be wrong by this many standard deviations for it to win. The
# error's distribution is that of some of the best subsets of the same frame.
DEVIATIONS = 4.0
NUM_CHECKED = 100
NEARLY_BEST = 0.05  # IoU: what may be among them
MARGIN = 0.15  # IoU: a subset this far below the best is not worth the rest of its samples
SAME_IOU = 1e-9  # what rounding may change
# Every subset is scored by all samples where that is quick: few samples to look up in all, or a silhouette of few.
MAX_OUTRIGHT = 8_000_000
MAX_OUTRIGHT_SAMPLES = 300
# Points within this part of the image's coordinates of each other coincide.
RELATIVE_DISTANCE = 1e-6


@dataclass(frozen=True)
class Selection:
    """Indices of the chosen keypoints, ascending, or none and the reason.

    The IoU is that of samples of the silhouettes, nan when it was not measured.
    """

    keypoints: tuple[int, ...]
    reason: str | None = None
    iou: float = float("nan")


@dataclass(frozen=True)
class SearchLimits:
    """Limits that the transform of a subset must keep to be a candidate."""

    min_points: int = 3
    min_scale: float = 1e-3
    max_scale: float = 1e3
    max_rotation: float = 180.0  # degrees


def select_exhaustive(
    source: np.ndarray,
    target: np.ndarray,
    weights: np.ndarray,
    reference: ReferenceSilhouette,
    silhouette: Silhouette,
    size: tuple[int, int],
    *,
    limits: SearchLimits,
    transform: str = "procrustes",
    origins: Sequence[tuple[float, float]] = ((0.0, 0.0), (0.0, 0.0)),
    tolerance: float = 0.0,
    outright: bool | None = None,
) -> Selection:
    """The subset whose transform gives the highest silhouette IoU, over all subsets of the points visible in both.

    The reference's outline is carried into the driving frame by the samples inside it: with n samples of A reference
    pixels each and a determinant s^2, the part of it on the frame covers s^2 A (samples on the frame) pixels, and
    shares s^2 A (samples that land on the driving person) of them. What leaves the frame does not count. This IoU of
    samples differs by some hundredths from that of the warped mask's pixels, mostly upwards, being the best of many.

    Ties, IoUs within `tolerance` of the highest, go to the larger subset, then to the smaller residual.

    Args:
        source, target: (17, 2) reference and driving pixels; weights: (17,), 0 = not visible in both.
        size: (width, height) of the driving frame.
        transform: procrustes, affine or linear; origins: of a linear one, see `LinearTransform`.
        outright: score every subset by all samples, however many; None = when they are few, and unless the transform
            is procrustes. Otherwise all are scored by few large pieces of the silhouette first, and those that could
            still win by more and smaller ones.
    """
    common = np.flatnonzero(weights > 0)
    if len(common) < limits.min_points:
        return Selection((), f"{len(common)} keypoints are visible in both; {limits.min_points} are needed")
    if reference.empty or silhouette.area == 0:
        return Selection((), "no silhouette of the person")
    x, y, w = source[common].astype(np.float64), target[common].astype(np.float64), weights[common] / weights.max()
    x0, y0 = x.mean(0), y.mean(0)  # moments are taken about the means, where they lose no digits
    smallest = (RELATIVE_DISTANCE * max(np.abs(x).max(), 1.0)) ** 2
    middles = np.asarray(origins, np.float64) - (x0, y0)
    subsets, points, found = solve(x - x0, y - y0, w, limits, smallest, transform, middles)
    if not len(found):
        return Selection((), "every subset of the keypoints gives a scale or a rotation outside the bounds")
    frame = np.concatenate([(-0.5, -0.5) - y0, np.asarray(size) - 0.5 - y0])
    pair = _Pair(reference.sample_area, reference.box - np.pad(x0, (0, 2)), silhouette.area, frame)
    members = np.arange(len(found), dtype=np.int32)
    if outright is None:
        samples = reference.samples.number
        few = samples <= MAX_OUTRIGHT_SAMPLES or samples * len(found) <= MAX_OUTRIGHT
        outright = few or transform != "procrustes"
    everything = best = int(points.argmax())  # with all points: kept to the end, so that no result is worse than it
    if not outright:
        finest = _Level.of(reference.samples, silhouette, x0, y0)
        for pieces in reference.pieces:
            level = _Level.of(pieces, silhouette, x0, y0, blurred=True)
            members, best = _contenders(members, best, found, level, finest, pair, tolerance)
        members = _with(members, everything)
    # First come the samples that the best transform so far takes beside the driving person. Others that are as good
    # miss mostly the same, so that the worse ones are known to lose after a few chunks.
    samples = reference.samples.listed()
    a, c, tx, ty, b, d = found[best, :6]
    missed = silhouette.covers(apply_matrix(np.array([[a, b, tx], [c, d, ty], [0, 0, 1]]), samples - x0) + y0)
    order = np.argsort(missed, kind="stable")
    finest = _Level.of(Samples.of(samples[order], np.ones(len(samples))), silhouette, x0, y0)
    scores = score_candidates(members, found, best, finest, pair, max(tolerance, SAME_IOU))
    if scores.max() <= 0:
        return Selection((), "no subset of the keypoints makes the silhouettes overlap")
    tied = np.flatnonzero(scores > 0)
    tied = tied[points[members[tied]] == points[members[tied]].max()]
    errors = found[members[tied], 6]
    tied = tied[errors * (1 - 1e-9) <= errors.min()]
    winner = tied[scores[tied].argmax()]
    bits = subsets[members[winner]]
    return Selection(tuple(int(i) for n, i in enumerate(common) if bits >> n & 1), None, float(scores[winner]))


def solve(
    source: np.ndarray,
    target: np.ndarray,
    weights: np.ndarray,
    limits: SearchLimits,
    smallest: float,
    transform: str,
    origins: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The transform of every subset of k points (k, 2) that keeps to the limits.

    Points coincide when their mean squared distance from their mean is below `smallest`. Returns subsets (n,), bit i
    of which is point i; their sizes (n,); (n, 7) a, c, tx, ty, b, d of [[a, b, tx], [c, d, ty]], of which the first
    four tell a similarity, and mean squared residual.
    """
    (x, y), (u, v) = source.T, target.T
    # For points as complex numbers z and w: 1, z, w, |z|^2, conj(z) w, |w|^2, z^2, z w.
    moments = [np.ones(len(x)), x, y, u, v, x * x + y * y, x * u + y * v, x * v - y * u, u * u + v * v]
    moments += [x * x - y * y, 2 * x * y, x * u - y * v, x * v + y * u]
    moments = np.stack([*(weights * moment for moment in moments), np.ones(len(x))], axis=1)
    half, tables = (len(x) + 1) // 2, []
    for part in (moments[:half], moments[half:]):
        table = np.zeros((1, moments.shape[1]))  # of all subsets of the points so far
        for own in part:
            table = np.concatenate([table, table + own])
        tables.append(table)
    bounds = limits.min_scale**2, limits.max_scale**2, np.cos(np.deg2rad(limits.max_rotation)) - 1e-12
    kind = TRANSFORMS.index(transform)
    return solve_subsets(*tables, bounds, limits.min_points, smallest, kind, source, target, origins)


def _contenders(
    members: np.ndarray,
    first: int,
    found: np.ndarray,
    level: "_Level",
    finest: "_Level",
    pair: "_Pair",
    tolerance: float,
) -> tuple[np.ndarray, int]:
    """The candidates that could still be within `tolerance` of the highest IoU, and the best one known so far."""
    scores = score_candidates(members, found, first, level, pair, MARGIN + tolerance)
    near = np.flatnonzero(scores >= max(scores.max() - NEARLY_BEST, 0.0))
    if not len(near):
        return members, first
    checked = np.append(near[:: max(1, len(near) // NUM_CHECKED)], scores.argmax())
    exact = score_candidates(members[checked], found, first, finest, pair, 1.0)
    first = int(members[checked[exact.argmax()]])
    # The part of the pieces' errors that is linear in the transform is taken out.
    transforms = found[members[checked], :4]
    mean, spread = transforms.mean(0), transforms.std(0) + 1e-12
    design = np.column_stack([np.ones(len(checked)), (transforms - mean) / spread])
    error = exact - scores[checked]
    # A trace of ridge keeps the equations solvable where all transforms agree.
    slope = np.linalg.solve(design.T @ design + 1e-6 * np.eye(design.shape[1]), design.T @ error)
    freedom = max(len(error) - design.shape[1], 1)
    deviation = np.sqrt(((error - design @ slope) ** 2).sum() / freedom)
    alive = np.flatnonzero(scores >= 0)
    expected = scores[alive] + slope[0] + (found[members[alive], :4] - mean) @ (slope[1:] / spread)
    return _with(members[alive[expected >= exact.max() - tolerance - DEVIATIONS * deviation]], first), first


def _with(members: np.ndarray, one: int) -> np.ndarray:
    return members if (members == one).any() else np.append(members, np.int32(one))


class _Pair(NamedTuple):
    """The two silhouettes, in coordinates whose origins are the means of the keypoints."""

    sample_area: float  # reference pixels that one of the finest samples stands for
    box: np.ndarray  # (4,) of the reference's samples, see `ReferenceSilhouette`
    area: float  # of the driving person, pixels
    frame: np.ndarray  # (4,) left, top, right, bottom of the driving frame


class _Level(NamedTuple):
    """Samples of the reference, in the same coordinates, and the driving person that they are looked up in."""

    points: np.ndarray  # these three: see `Samples`
    counts: np.ndarray
    left: np.ndarray
    # (rows, columns) uint8, part of a sample around each cell that the person covers, with a border of zeros
    cover: np.ndarray
    origin: np.ndarray  # (2,) of the first cell inside the border
    per_pixel: float  # cells

    @classmethod
    def of(
        cls, samples: Samples, silhouette: Silhouette, x0: np.ndarray, y0: np.ndarray, blurred: bool = False
    ) -> "_Level":
        cover, side = silhouette.mask.astype(np.uint8) * np.uint8(COVERED), 1
        if blurred:
            # A piece is as large as it becomes by the scale that makes the two silhouettes' areas equal.
            width = np.sqrt(silhouette.area / samples.number) / silhouette.cell
            side = 2 * max(round((BLUR * width - 1) / 2), 0) + 1
        border = side // 2 + 1
        cover = np.pad(cover, border)
        if side > 1:
            cover = cv2.blur(cover, (side, side), borderType=cv2.BORDER_CONSTANT)
        points = (samples.points - x0[:, None]).astype(samples.points.dtype)
        origin = np.asarray(silhouette.origin, np.float64) - y0 - (border - 1) * silhouette.cell
        return cls(points, samples.counts, samples.left, cover, origin, 1 / silhouette.cell)


@numba.njit(cache=True, nogil=True)
def solve_subsets(low, high, bounds, min_points, smallest, kind, source, target, origins):
    """See `solve`; `bounds`: least and largest squared scale, least cosine of the angle; `kind`: of `TRANSFORMS`."""
    total, n = len(low) * len(high), 0
    subsets, points = np.empty(total, np.int32), np.empty(total, np.int8)
    found = np.empty((total, 7))
    for upper in range(len(high)):
        for lower in range(len(low)):
            q, h = low[lower], high[upper]
            size, w = q[13] + h[13], q[0] + h[0]
            if size < min_points:
                continue
            share = 1.0 / w
            x, y = (q[1] + h[1]) * share, (q[2] + h[2]) * share
            u, v = (q[3] + h[3]) * share, (q[4] + h[4]) * share
            spread = (q[5] + h[5]) * share - x * x - y * y
            if spread <= smallest:
                continue
            a = ((q[6] + h[6]) * share - x * u - y * v) / spread
            b = ((q[7] + h[7]) * share - x * v + y * u) / spread
            # Of points as complex numbers: z -> (a + ib) z + (c + id) conj(z) + t. A similarity has c = d = 0.
            c, d, explained = 0.0, 0.0, (a * a + b * b) * spread
            from_x, from_y, to_x, to_y = x, y, u, v
            if kind == AFFINE:
                square = complex((q[9] + h[9]) * share - x * x + y * y, (q[10] + h[10]) * share - 2 * x * y)
                product = complex((q[11] + h[11]) * share - x * u + y * v, (q[12] + h[12]) * share - x * v - y * u)
                # Of the two normal equations; four times that of the scatter, which is 0 for points on a line.
                determinant = spread * spread - abs(square) ** 2
                if determinant <= 4 * RELATIVE_FLATNESS * spread * spread:
                    continue
                same = complex(a, b) * spread
                first = (same * spread - product * square.conjugate()) / determinant
                second = (product * spread - same * square) / determinant
                a, b, c, d = first.real, first.imag, second.real, second.imag
                explained = (same * first.conjugate() + product * second.conjugate()).real
            elif kind == LINEAR and explained > 0.0:
                turn = complex(a, b) / np.hypot(a, b)
                scale = box_ratio(upper * len(low) + lower, source, target, turn)
                fitted, a, b = complex(a, b), turn.real * scale, turn.imag * scale
                from_x, from_y, to_x, to_y = origins[0, 0], origins[0, 1], origins[1, 0], origins[1, 1]
                missed = complex(a, b) * complex(x - from_x, y - from_y) - complex(u - to_x, v - to_y)
                explained -= abs(fitted - complex(a, b)) ** 2 * spread + abs(missed) ** 2
            m00, m01, m10, m11 = a + c, d - b, b + d, a - c
            squared = abs(a * a + b * b - (c * c + d * d))
            if not (squared > 0.0 and bounds[0] <= squared <= bounds[1]):
                continue
            if not m00 >= bounds[2] * np.sqrt(m00 * m00 + m10 * m10):
                continue
            subsets[n], points[n] = upper * len(low) + lower, size
            found[n, 0], found[n, 1], found[n, 4], found[n, 5] = m00, m10, m01, m11
            found[n, 2], found[n, 3] = to_x - m00 * from_x - m01 * from_y, to_y - m10 * from_x - m11 * from_y
            found[n, 6] = max((q[8] + h[8]) * share - u * u - v * v - explained, 0.0)
            n += 1
    return subsets[:n], points[:n], found[:n]


@numba.njit(cache=True, nogil=True)
def box_ratio(subset, source, target, turn):
    """Diagonal of the box of a subset's target points over that of its source points (k, 2) after a turn."""
    least, most = np.full(4, np.inf), np.full(4, -np.inf)
    for i in range(len(source)):
        if subset >> i & 1:
            turned = turn * complex(source[i, 0], source[i, 1])
            for j, value in enumerate((turned.real, turned.imag, target[i, 0], target[i, 1])):
                least[j], most[j] = min(least[j], value), max(most[j], value)
    sides = most - least
    return np.hypot(sides[2], sides[3]) / np.hypot(sides[0], sides[1])


@numba.njit(cache=True, nogil=True)
def count_inside(points, counts, transform, frame):
    """The samples that fall on the frame after the transform, times what each counts."""
    a, c, tx, ty, b, d = transform
    inside = 0
    for chunk in range(len(counts)):
        for i in range(CHUNK):
            x = a * points[chunk, 0, i] + b * points[chunk, 1, i] + tx
            y = c * points[chunk, 0, i] + d * points[chunk, 1, i] + ty
            inside += counts[chunk, i] * ((x >= frame[0]) & (y >= frame[1]) & (x < frame[2]) & (y < frame[3]))
    return inside


@numba.njit(inline="always")
def box_inside(box, transform, frame):
    """True when a box (centre x, y, half width, half height) falls on the frame as a whole after the transform."""
    a, c, tx, ty, b, d = transform
    x, y = a * box[0] + b * box[1] + tx, c * box[0] + d * box[1] + ty
    width, height = abs(a) * box[2] + abs(b) * box[3], abs(c) * box[2] + abs(d) * box[3]
    # Without branches, which would be hard to predict.
    fits_x = (x - width >= frame[0]) & (x + width < frame[2])
    return fits_x & (y - height >= frame[1]) & (y + height < frame[3])


@numba.njit(cache=True, nogil=True)
def score_candidates(members, found, first, level, pair, margin):
    """Silhouette IoU (len(members),) of candidates; -1 where it is more than `margin` below the best.

    Candidate `first` is scored before the others: the better it is, the sooner they are known to lose.
    """
    scores, best, area = np.full(len(members), -1.0), 0.0, pair.area
    points, counts, left, flat = level.points, level.counts, level.left, level.cover.ravel()
    rows, columns = level.cover.shape
    zero, right, bottom, stride = np.int32(0), np.int32(columns - 1), np.int32(rows - 1), np.int32(columns)
    real, scale, origin = points.dtype.type, level.per_pixel, level.origin
    cells = np.empty(CHUNK, np.uint32)
    for k in range(-1, len(members)):
        i = first if k < 0 else members[k]
        transform = a, c, tx, ty, b, d = found[i, 0], found[i, 1], found[i, 2], found[i, 3], found[i, 4], found[i, 5]
        floor = max(best - margin, 0.0)
        size = pair.sample_area * abs(a * d - b * c)  # frame pixels that one sample stands for
        inside = left[0]
        if size * inside < floor * area:
            continue
        if not box_inside(pair.box, transform, pair.frame):
            inside = count_inside(points, counts, transform, pair.frame)
        warped = size * inside
        if area < floor * warped:
            continue
        # IoU >= floor needs an intersection of at least floor (area + warped) / (1 + floor).
        needed = COVERED * (floor * (area + warped) / ((1.0 + floor) * size) - 1e-9)
        # To cells of the cover; row r, counted without its border, covers [r - 1/2, r + 1/2) from the origin.
        ca, cb, cc, cd = real(a * scale), real(b * scale), real(c * scale), real(d * scale)
        cx, cy = real((tx - origin[0]) * scale + 1.5), real((ty - origin[1]) * scale + 1.5)
        covered = 0
        for chunk in range(len(counts)):
            if covered + COVERED * left[chunk] < needed:
                covered = -1
                break
            # Cells and sums apart: the first loop runs on vectors, the second would only be slowed down by them.
            for j in range(CHUNK):
                x, y = points[chunk, 0, j], points[chunk, 1, j]
                # Clamped to the border of zeros. Truncation and floor differ only in (-1, 0), which ends there too.
                column = min(max(np.int32(ca * x + cb * y + cx), zero), right)
                row = min(max(np.int32(cc * x + cd * y + cy), zero), bottom)
                cells[j] = np.uint32(row * stride + column)
            part = np.uint64(0)
            for j in range(CHUNK):
                part += np.uint64(counts[chunk, j]) * np.uint64(flat[cells[j]])
            covered += np.int64(part)
        if covered < 0:
            continue
        both = min(size * covered / COVERED, area)
        score = both / max(area + warped - both, 1e-300)
        best = max(best, score)
        if k >= 0:
            scores[k] = score
    for k in range(len(members)):
        if scores[k] < best - margin:
            scores[k] = -1.0
    return scores
