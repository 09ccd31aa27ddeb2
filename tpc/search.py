"""The exhaustive search over subsets of keypoints, compiled.

A similarity is fixed by a handful of moments of the points that serve, and moments of a subset are sums over its
points. So the transforms of all 2^k subsets come from two small tables, one for each half of the points, added
pairwise. Which of them aligns the silhouettes best is found from coarse to fine: transforms that differ by less than
a cell are scored together, and only the best cells are opened.
"""

import numba
import numpy as np

# Moments kept per subset: weight, x, y, u, v, |x|^2, Re and Im of conj(x) y, |y|^2 (all weighted), number of points.
NUM_MOMENTS = 10
CHUNK = 64  # samples between two checks whether a candidate can still win
EMPTY = -1


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
def group_candidates(members, points, found, centre, radius, width):
    """Put candidates into cells of similar transforms.

    Two share a cell when scale and turn, times `radius`, and the place of `centre` round to the same multiples of
    `width`.

    Returns the cell of each of `members`, and the candidate that stands for each cell: the one that precedes the
    others.
    """
    capacity = 1024
    while capacity < 2 * len(members):
        capacity *= 2
    slots = np.full(capacity, EMPTY, np.int32)
    keys = np.empty((len(members), 4), np.int32)
    cell, leader = np.empty(len(members), np.int32), np.empty(len(members), np.int32)
    step, count = 1.0 / width, 0
    for n in range(len(members)):
        i = members[n]
        a, b = found[i, 0], found[i, 1]
        x, y = a * centre[0] - b * centre[1] + found[i, 2], b * centre[0] + a * centre[1] + found[i, 3]
        k0, k1 = np.int32(rounded(a * radius * step)), np.int32(rounded(b * radius * step))
        k2, k3 = np.int32(rounded(x * step)), np.int32(rounded(y * step))
        mixed = np.uint64(0)
        for k in (k0, k1, k2, k3):
            mixed = (mixed ^ np.uint64(np.uint32(k))) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        slot = np.int64(mixed & np.uint64(capacity - 1))
        while slots[slot] != EMPTY:
            at = slots[slot]
            if keys[at, 0] == k0 and keys[at, 1] == k1 and keys[at, 2] == k2 and keys[at, 3] == k3:
                break
            slot = (slot + 1) & (capacity - 1)
        if slots[slot] == EMPTY:
            slots[slot] = count
            keys[count, 0], keys[count, 1], keys[count, 2], keys[count, 3] = k0, k1, k2, k3
            leader[count] = i
            count += 1
        cell[n] = slots[slot]
        if precedes(points, found, i, leader[cell[n]]):
            leader[cell[n]] = i
    return cell, leader[:count]


@numba.njit(cache=True, nogil=True)
def rounded(value):
    """The nearest integer, within what 32 bits hold."""
    return min(max(np.rint(value), -2.0e9), 2.0e9)


@numba.njit(cache=True, nogil=True)
def count_inside(samples, n, a, b, tx, ty, frame):
    """How many of the first n mapped samples fall on the frame (left, top, right, bottom)."""
    inside = 0
    for i in range(n):
        x = a * samples[0, i] - b * samples[1, i] + tx
        y = b * samples[0, i] + a * samples[1, i] + ty
        inside += (x >= frame[0]) & (y >= frame[1]) & (x < frame[2]) & (y < frame[3])
    return inside


@numba.njit(cache=True, nogil=True)
def count_hits(samples, n, a, b, tx, ty, bitmap, needed):
    """How many of the first n mapped samples (bitmap coordinates) hit the bitmap; -1 once `needed` is out of reach.

    The bitmap has a border of zeros; coordinates are clamped to it.
    """
    hits, zero, columns = 0, np.int32(0), np.int32(bitmap.shape[1])
    right, bottom = np.int32(bitmap.shape[1] - 1), np.int32(bitmap.shape[0] - 1)
    flat = bitmap.ravel()
    for start in range(0, n, CHUNK):
        stop = min(n, start + CHUNK)
        # Slices counted from zero let the compiler drop its checks for negative indices and use vector instructions.
        xs, ys = samples[0, start:stop], samples[1, start:stop]
        part = np.int32(0)
        for i in range(stop - start):
            # Truncation and floor differ only for coordinates in (-1, 0), and both end on the border.
            column = min(max(np.int32(a * xs[i] - b * ys[i] + tx), zero), right)
            row = min(max(np.int32(b * xs[i] + a * ys[i] + ty), zero), bottom)
            part += flat[np.uint32(row * columns + column)]
        hits += part
        if hits + (n - stop) < needed:
            return -1
    return hits


@numba.njit(cache=True, nogil=True)
def overlap(samples, n, sample_area, corners, a, b, tx, ty, bitmap, origin, pitch, area, frame, floor):
    """Silhouette IoU of one transform by the first n samples, or -1 when it is below `floor`."""
    size = sample_area * (a * a + b * b)  # frame pixels that one sample stands for
    if size * n < floor * area:
        return -1.0
    inside = n
    if count_inside(corners, corners.shape[1], a, b, tx, ty, frame) < corners.shape[1]:
        inside = count_inside(samples, n, a, b, tx, ty, frame)
    warped = size * inside
    if area < floor * warped:
        return -1.0
    # IoU >= floor needs an intersection of at least floor (area + warped) / (1 + floor).
    needed = floor * (area + warped) / ((1.0 + floor) * size) - 1e-9
    # Row r of the bitmap, counted without its border, covers [r - 1/2, r + 1/2) pitches from the origin.
    shift_x, shift_y = (tx - origin[0]) / pitch + 1.5, (ty - origin[1]) / pitch + 1.5
    hits = count_hits(samples, n, a / pitch, b / pitch, shift_x, shift_y, bitmap, needed)
    if hits < 0:
        return -1.0
    both = min(size * hits, area)
    return both / max(area + warped - both, 1e-300)


@numba.njit(cache=True, nogil=True)
def score_candidates(
    members, found, first, samples, n, sample_area, corners, bitmap, origin, pitch, area, frame, margin
):
    """IoU (len(members),) of candidates by the first n samples; -1 where it is more than `margin` below the best.

    Candidate `first` is scored before the others: the better it is, the sooner they are known to lose.
    """
    scores = np.empty(len(members))
    best = 0.0
    for k in range(-1, len(members)):
        i = first if k < 0 else members[k]
        a, b, tx, ty = found[i, 0], found[i, 1], found[i, 2], found[i, 3]
        floor = max(best - margin, 0.0)
        score = overlap(samples, n, sample_area, corners, a, b, tx, ty, bitmap, origin, pitch, area, frame, floor)
        best = max(best, score)
        if k >= 0:
            scores[k] = score
    for k in range(len(members)):
        if scores[k] < best - margin:
            scores[k] = -1.0
    return scores


@numba.njit(cache=True, nogil=True)
def best_cells(cell, scores, most_cells, most_members):
    """Which members (len(cell),) bool lie in the cells of the highest scores, up to so many cells and members.

    The best cell is kept whatever its size.
    """
    sizes = np.zeros(len(scores), np.int64)
    for c in cell:
        sizes[c] += 1
    keep = np.zeros(len(scores), np.bool_)
    members = 0
    for rank, c in enumerate(np.argsort(-scores)[:most_cells]):
        members += sizes[c]
        if scores[c] < 0.0 or (rank > 0 and members > most_members):
            break
        keep[c] = True
    return keep[cell]


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
