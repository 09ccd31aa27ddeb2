"""The exhaustive search over subsets of keypoints, compiled.

A similarity is fixed by a handful of moments of the points that serve, and moments of a subset are sums over its
points. So the transforms of all 2^k subsets come from two small tables, one for each half of the points, added
pairwise. How well a transform aligns the silhouettes is counted over samples of the reference's.
"""

import numba
import numpy as np

# Moments kept per subset: weight, x, y, u, v, |x|^2, Re and Im of conj(x) y, |y|^2 (all weighted), number of points.
NUM_MOMENTS = 10
CHUNK = 64  # samples between two checks whether a candidate can still win
COVERED = 255  # the cover of a cell that lies on the driving person as a whole


@numba.njit(cache=True, nogil=True)
def moment_table(source, target, weights):
    """(2^k, 10) moments of every subset of k points; bit i of the row number is point i."""
    k = len(source)
    table = np.zeros((1 << k, NUM_MOMENTS))
    for i in range(k):
        w, x, y, u, v = weights[i], source[i, 0], source[i, 1], target[i, 0], target[i, 1]
        real, imaginary = x * u + y * v, x * v - y * u
        own = (1.0, x, y, u, v, x * x + y * y, real, imaginary, u * u + v * v)
        for subset in range(1 << i):
            for m in range(NUM_MOMENTS - 1):
                table[subset | (1 << i), m] = table[subset, m] + w * own[m]
            table[subset | (1 << i), NUM_MOMENTS - 1] = table[subset, NUM_MOMENTS - 1] + 1.0
    return table


@numba.njit(cache=True, nogil=True)
def solve_subsets(low, high, limits, min_points, smallest):
    """The similarity of every subset that has enough points and a scale and angle within the limits.

    `limits`: least and largest scale, least cosine of the angle. `smallest`: mean squared distance from their mean
    below which points coincide.

    Returns the subsets (n,), their sizes (n,), and (n, 5) a, b, tx, ty of [[a, -b, tx], [b, a, ty]] and the mean
    squared residual.
    """
    total = len(low) * len(high)
    subsets, points = np.empty(total, np.int32), np.empty(total, np.int8)
    found = np.empty((total, 5))
    lowest, highest = limits[0] ** 2, limits[1] ** 2
    n = 0
    for upper in range(len(high)):
        h = high[upper]
        for lower in range(len(low)):
            q = low[lower]
            size = q[9] + h[9]
            if size < min_points:
                continue
            w = q[0] + h[0]
            share = 1.0 / w
            x, y = (q[1] + h[1]) * share, (q[2] + h[2]) * share
            u, v = (q[3] + h[3]) * share, (q[4] + h[4]) * share
            spread = (q[5] + h[5]) * share - x * x - y * y
            if spread <= smallest:
                continue
            a = ((q[6] + h[6]) * share - x * u - y * v) / spread
            b = ((q[7] + h[7]) * share - x * v + y * u) / spread
            squared = a * a + b * b
            if not (squared > 0.0 and lowest <= squared <= highest and a >= limits[2] * np.sqrt(squared)):
                continue
            subsets[n], points[n] = upper * len(low) + lower, size
            found[n, 0], found[n, 1], found[n, 2], found[n, 3] = a, b, u - a * x + b * y, v - b * x - a * y
            found[n, 4] = max((q[8] + h[8]) * share - u * u - v * v - squared * spread, 0.0)
            n += 1
    return subsets[:n], points[:n], found[:n]


@numba.njit(cache=True, nogil=True)
def precedes(points, found, i, j):
    """Whether candidate i comes before j at equal score: by more points, then by a smaller residual."""
    if points[i] != points[j]:
        return points[i] > points[j]
    return found[i, 4] < found[j, 4] * (1.0 - 1e-9)


@numba.njit(cache=True, nogil=True)
def count_inside(points, counts, a, b, tx, ty, frame):
    """How many samples fall on the frame (left, top, right, bottom) after the transform."""
    inside = 0
    for chunk in range(len(counts)):
        for i in range(CHUNK):
            x = a * points[chunk, 0, i] - b * points[chunk, 1, i] + tx
            y = b * points[chunk, 0, i] + a * points[chunk, 1, i] + ty
            inside += counts[chunk, i] * ((x >= frame[0]) & (y >= frame[1]) & (x < frame[2]) & (y < frame[3]))
    return inside


@numba.njit(inline="always")
def box_inside(box, a, b, tx, ty, frame):
    """Whether a box (centre x, y, half width, half height) falls on the frame as a whole after the transform."""
    x, y = a * box[0] - b * box[1] + tx, b * box[0] + a * box[1] + ty
    width, height = abs(a) * box[2] + abs(b) * box[3], abs(b) * box[2] + abs(a) * box[3]
    # Without branches, which would be hard to predict.
    fits_x = (x - width >= frame[0]) & (x + width < frame[2])
    return fits_x & (y - height >= frame[1]) & (y + height < frame[3])


@numba.njit(inline="always")
def sum_cover(points, counts, left, a, b, tx, ty, flat, shape, needed, places):
    """The cover (0 to 255) under the mapped samples, times what each counts; -1 once `needed` is out of reach.

    The transform leads to cells of the cover, `flat` of `shape`. It has a border of zeros, to which coordinates are
    clamped.

    Args:
        points, counts: (chunks, 2, CHUNK) and (chunks, CHUNK), padded with points that count nothing.
        left: (chunks,) what each chunk and all after it count.
        places: (CHUNK,) uint32 to work in.
    """
    total, zero, columns = 0, np.int32(0), np.int32(shape[1])
    right, bottom = np.int32(shape[1] - 1), np.int32(shape[0] - 1)
    real = points.dtype.type
    a, b, tx, ty = real(a), real(b), real(tx), real(ty)
    for chunk in range(len(counts)):
        if total + COVERED * left[chunk] < needed:
            return -1
        # Places and sums apart: the first loop runs on vectors, the second would only be slowed down by them.
        for i in range(CHUNK):
            x, y = points[chunk, 0, i], points[chunk, 1, i]
            # Truncation and floor differ only for coordinates in (-1, 0), and both end on the border.
            column = min(max(np.int32(a * x - b * y + tx), zero), right)
            row = min(max(np.int32(b * x + a * y + ty), zero), bottom)
            places[i] = np.uint32(row * columns + column)
        part = np.uint64(0)
        for i in range(CHUNK):
            part += np.uint64(counts[chunk, i]) * np.uint64(flat[places[i]])
        total += np.int64(part)
    return total


@numba.njit(inline="always")
def overlap(
    points, counts, left, sample_area, box, a, b, tx, ty, flat, shape, origin, per_pixel, area, frame, floor, places
):
    """Silhouette IoU of one transform, or -1 when it is below `floor`."""
    size = sample_area * (a * a + b * b)  # frame pixels that one sample stands for
    inside = left[0]
    if size * inside < floor * area:
        return -1.0
    if not box_inside(box, a, b, tx, ty, frame):
        inside = count_inside(points, counts, a, b, tx, ty, frame)
    warped = size * inside
    if area < floor * warped:
        return -1.0
    # IoU >= floor needs an intersection of at least floor (area + warped) / (1 + floor).
    needed = COVERED * (floor * (area + warped) / ((1.0 + floor) * size) - 1e-9)
    # Row r of the cover, counted without its border, covers [r - 1/2, r + 1/2) cells from the origin.
    shift_x, shift_y = (tx - origin[0]) * per_pixel + 1.5, (ty - origin[1]) * per_pixel + 1.5
    covered = sum_cover(
        points, counts, left, a * per_pixel, b * per_pixel, shift_x, shift_y, flat, shape, needed, places
    )
    if covered < 0:
        return -1.0
    both = min(size * covered / COVERED, area)
    return both / max(area + warped - both, 1e-300)


@numba.njit(cache=True, nogil=True)
def score_candidates(
    members, found, first, points, counts, left, sample_area, box, cover, origin, per_pixel, area, frame, margin
):
    """IoU (len(members),) of candidates; -1 where it is more than `margin` below the best.

    Candidate `first` is scored before the others: the better it is, the sooner they are known to lose.
    """
    scores = np.empty(len(members))
    best, flat, shape = 0.0, cover.ravel(), cover.shape
    places = np.empty(CHUNK, np.uint32)
    for k in range(-1, len(members)):
        i = first if k < 0 else members[k]
        a, b, tx, ty = found[i, 0], found[i, 1], found[i, 2], found[i, 3]
        floor = max(best - margin, 0.0)
        score = overlap(
            points,
            counts,
            left,
            sample_area,
            box,
            a,
            b,
            tx,
            ty,
            flat,
            shape,
            origin,
            per_pixel,
            area,
            frame,
            floor,
            places,
        )
        best = max(best, score)
        if k >= 0:
            scores[k] = score
    for k in range(len(members)):
        if scores[k] < best - margin:
            scores[k] = -1.0
    return scores


@numba.njit(cache=True, nogil=True)
def keep_contenders(members, found, scores, slope, least):
    """The members whose score, corrected by a linear function of the transform, is at least `least`."""
    kept, n = np.empty(len(members), np.int32), 0
    for k in range(len(members)):
        if scores[k] < 0.0:
            continue
        i = members[k]
        correction = slope[0] + slope[1] * found[i, 0] + slope[2] * found[i, 1] + slope[3] * found[i, 2]
        if scores[k] + correction + slope[4] * found[i, 3] >= least:
            kept[n] = i
            n += 1
    return kept[:n]


@numba.njit(cache=True, nogil=True)
def pick(members, scores, points, found):
    """Position in `members` of the candidate that precedes all others with a positive score, -1 without one."""
    winner = -1
    for k in range(len(members)):
        if scores[k] <= 0.0:
            continue
        if winner < 0 or precedes(points, found, members[k], members[winner]):
            winner = k
        elif not precedes(points, found, members[winner], members[k]) and scores[k] > scores[winner]:
            winner = k
    return winner
