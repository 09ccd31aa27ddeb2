"""Paint a person whose parts each move by a map of their own, bent smoothly at the joints.

The reference's person is cut into layers, one for each part (hands go with forearms, feet with shins), which overlap
around joints. A layer is a mesh over the person's mask; its vertices move by the maps of its part and of the parts it
is joined to, blended by how far to either side of the joint they lie (linear blend skinning). At a joint two layers
move alike, so that nothing tears; elsewhere, as between an arm and the side it hangs at, they part.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numba
import numpy as np

from tpc.bends.bending import painting_depth
from tpc.bends.outlines import Nudge
from tpc.bends.parts import (
    ENDS,
    HEAD_PART,
    NAMES,
    OWN,
    PARENTS,
    TORSO_PART,
    WIDTHS,
    kind,
    part_bones,
    part_distances,
    with_neck,
)
from tpc.silhouettes import body_height

MESH = 48  # cells along the body height
# Around a joint two layers overlap as far as this, as a part of the body height; a head's hair may lie on the torso.
OVERLAPS = {"head": 0.3, "upper_arm": 0.09, "forearm": 0.07, "thigh": 0.14, "shin": 0.1}
CLOTH_OVERLAP = 0.05
SEAM = 0.015  # of two legs, between which narrow cloth that is not told from trousers would tear
LAYERS = tuple(p for p in range(len(OWN)) if p not in ENDS)
END_OF = {PARENTS[p]: p for p in ENDS}
LEGS = tuple(NAMES.index(name) for name in ("left_thigh", "right_thigh", "left_shin", "right_shin"))
FAR = 1e6
HAND_MARGIN = 3.0
# Parts of the body height: around its bone in which a hand is looked for by its colours, and its blurred edge.
HAND_REACH, HAND_FRINGE = 0.07, 0.012
AHEAD = 0.1  # in the unit of `painting_depth`


@dataclass(frozen=True)
class Layer:
    """The mesh of a part."""

    part: int
    parts: tuple[int, ...]  # whose maps move it
    basis: np.ndarray  # (v, 3 len(parts)), weight of each part times the vertex's x, y, 1 in the reference
    values: np.ndarray  # (v, 3) float32, x and y in the reference, and reference pixels to the edge of the layer
    faces: np.ndarray  # (t, 3) int32


def build_layers(
    keypoints: np.ndarray,
    seen: np.ndarray,
    scores: np.ndarray,
    mask: np.ndarray,
    radius: float,
    image: np.ndarray | None = None,
) -> list[Layer]:
    """The layers of a person with keypoints (17, 2), seen, scores (17,), and a mask (h, w) bool; none without a body.

    `radius`: over which joints bend, as a part of the body height. By an image (h, w, 3) uint8, hands are told by
    their colours from what they hang before.
    """
    height = body_height(keypoints, seen)
    if height == 0 or not mask.any():
        return []
    points, seen = with_neck(keypoints.astype(np.float64), seen)
    cell = max(height / MESH, max(mask.shape) / 1000)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x = np.arange(columns[0] - 1.5 * cell, columns[-1] + 2.5 * cell, cell)
    y = np.arange(rows[0] - 1.5 * cell, rows[-1] + 2.5 * cell, cell)
    grid = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    occupied = _occupied(mask, x, y)
    bones = part_bones(points, seen, height)
    distances = part_distances(grid, bones, height)
    for limb, end in END_OF.items():
        # Beside a hand lie clothes as often as nothing, and its width varies less than theirs.
        beyond = HAND_MARGIN * np.maximum(distances[end] - 1, 0) if kind(end) == "hand" else 0
        distances[limb] = np.minimum(distances[limb], distances[end] + beyond)
    hands = {}
    for limb, end in END_OF.items():
        if image is not None and kind(end) == "hand" and bones[end] is not None:
            hands[limb] = _hand(image, mask, bones, end, height, grid)
    cloth = _cloth(points, seen, height, mask)
    depth = painting_depth(points[None], seen[None], scores[None], np.zeros(1, bool), height)[0]
    present = [p for p in LAYERS if bones[p] is not None]
    layers = []
    for p in present:
        margin, parts, sides = np.full(len(grid), FAR), [p], [np.zeros(len(grid))]
        for q in present:
            if q == p:
                continue
            edge = (distances[q] - distances[p]) * (WIDTHS[kind(p)] + WIDTHS[kind(q)]) / 2 * height
            joined, ahead = PARENTS[q] == p or PARENTS[p] == q, depth[p] - depth[q]
            if {TORSO_PART, HEAD_PART} & {p, q} and (not joined or "upper_arm" in (kind(p), kind(q))):
                # What lies before another part, such as an arm before the chest, is its own in all of its width.
                if ahead > AHEAD:
                    edge = np.maximum(edge, (1 - distances[p]) * WIDTHS[kind(p)] * height)
                elif ahead < -AHEAD:
                    edge = np.minimum(edge, (distances[q] - 1) * WIDTHS[kind(q)] * height)
            for limb in (p, q):
                if not joined and hands.get(limb) is not None:
                    # Between the two lie blurred pixels and shadows, which neither shows.
                    told = hands[limb] if limb == p else -hands[limb] - HAND_FRINGE * height
                    edge = np.where(np.isnan(told), edge, told)
            if joined:
                child = q if PARENTS[q] == p else p
                joint = points[OWN[child][-1 if child == HEAD_PART else 0]]
                away = np.linalg.norm(grid - joint, axis=1)
                overlap = 2 * OVERLAPS["thigh"] if child in cloth else OVERLAPS[kind(child)]
                edge = edge + np.maximum(overlap * height - away, 0)
                directions = [_towards(joint, bones[part].mean(0)) for part in (p, q)]
                parts.append(q)
                sides.append(_side(grid - joint, *directions, straight=child == HEAD_PART or child in cloth))
            elif p in cloth and q in cloth:
                edge = edge + CLOTH_OVERLAP * height
                if kind(p) == kind(q):
                    # Cloth hangs from both legs, and what lies between them moves by both.
                    gap = np.linalg.norm(bones[p].mean(0) - bones[q].mean(0))
                    apart = (distances[q] - distances[p]) * WIDTHS[kind(p)] * height / 2
                    parts.append(q)
                    sides.append(apart * radius * height / max(gap / 4, 1e-9))
            elif p in LEGS and q in LEGS:
                edge = edge + SEAM * height
            margin = np.minimum(margin, edge)
        if p in END_OF:
            start, joint = bones[p]
            parts.append(END_OF[p])
            sides.append((joint - grid) @ _towards(start, joint))
        weights = np.exp(np.minimum(-2 * np.array(sides) / max(radius * height, 1e-9), 60))
        layer = _mesh(p, parts, weights / weights.sum(0), grid, margin, occupied, cell)
        if len(layer.faces):
            layers.append(layer)
    return layers


def _mesh(
    part: int,
    parts: list[int],
    weights: np.ndarray,
    grid: np.ndarray,
    margin: np.ndarray,
    occupied: np.ndarray,
    cell: float,
) -> Layer:
    """The occupied cells of a grid (n, 2) where the margin (n,) is not far below 0; weights (parts, n)."""
    rows, columns = occupied.shape
    near = (margin > -cell).reshape(rows + 1, columns + 1)
    i, j = np.nonzero((near[:-1, :-1] | near[1:, :-1] | near[:-1, 1:] | near[1:, 1:]) & occupied)
    corner, below = i * (columns + 1) + j, (i + 1) * (columns + 1) + j
    faces = np.concatenate([np.stack([corner, corner + 1, below], 1), np.stack([corner + 1, below + 1, below], 1)])
    used, faces = np.unique(faces, return_inverse=True)
    homogeneous = np.concatenate([grid[used], np.ones((len(used), 1))], 1)
    basis = (weights[:, used].T[:, :, None] * homogeneous[:, None]).reshape(len(used), 3 * len(parts))
    values = np.concatenate([grid[used], margin[used, None]], 1).astype(np.float32)
    return Layer(part, tuple(parts), basis, values, faces.reshape(-1, 3).astype(np.int32))


def _occupied(mask: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(rows, columns) bool: cells between grid lines that have a pixel of the mask in or next to them."""
    total = cv2.integral(mask.astype(np.uint8))
    (left, right), (top, bottom) = (
        (np.clip(np.floor(lines[:-1]) - 1, 0, side).astype(int), np.clip(np.ceil(lines[1:]) + 2, 0, side).astype(int))
        for lines, side in ((x, mask.shape[1]), (y, mask.shape[0]))
    )
    ends = ((bottom, right, 1), (top, right, -1), (bottom, left, -1), (top, left, 1))
    return sum(sign * total[np.ix_(down, across)].astype(int) for down, across, sign in ends) > 0


def _hand(
    image: np.ndarray,
    mask: np.ndarray,
    bones: list[np.ndarray | None],
    end: int,
    height: float,
    grid: np.ndarray,
) -> np.ndarray | None:
    """Pixels (n,) from places (n, 2) to a hand's edge, positive inside, nan far off; None if colours do not tell.

    Colours are told apart by two normal distributions: of the hand around its bone, and of torso and legs nearby.
    """
    reach, (wrist, tip) = HAND_REACH * height, bones[end]
    middle, step = (wrist + tip) / 2, max(1, int(reach / 40))
    low = np.maximum(np.rint(middle - 2 * reach), 0).astype(int)
    high = np.minimum(np.rint(middle + 2 * reach) + 1, image.shape[1::-1]).astype(int)
    if (high - low < 2 * step).any():
        return None
    box = slice(low[1], high[1], step), slice(low[0], high[0], step)
    colours = cv2.cvtColor(np.ascontiguousarray(image[box]), cv2.COLOR_RGB2LAB).astype(np.float64)
    shown, shape = mask[box].reshape(-1), mask[box].shape
    x, y = np.meshgrid(np.arange(low[0], high[0], step), np.arange(low[1], high[1], step))
    places = np.stack([x, y], -1).reshape(-1, 2)
    distances = part_distances(places, bones, height)
    others = [p for p in LAYERS if p in (TORSO_PART, *LEGS)]
    sure = shown & (distances[end] < 0.5) & ((places - wrist) @ (tip - wrist) < 0.6 * ((tip - wrist) ** 2).sum())
    behind = shown & (distances[others].min(0) < 1) & (distances[end] > 1.5) & (distances[PARENTS[end]] > 1.5)
    if min(sure.sum(), behind.sum()) < 12:
        return None
    colours = colours.reshape(-1, 3)
    score = _likelihood(colours, colours[sure]) - _likelihood(colours, colours[behind])
    if min((score[sure] > 0).mean(), (score[behind] < 0).mean()) < 0.85:
        return None
    smooth = cv2.GaussianBlur(np.clip(score, -6, 6).reshape(shape), (0, 0), max(0.006 * height / step, 0.5))
    _, labels = cv2.connectedComponents(((smooth > 0) & shown.reshape(shape)).astype(np.uint8))
    counts = np.bincount(labels.reshape(-1)[sure], minlength=2)
    counts[0] = 0
    own = (labels == counts.argmax()).astype(np.uint8)
    inside = cv2.distanceTransform(own, cv2.DIST_L2, 5) - cv2.distanceTransform(1 - own, cv2.DIST_L2, 5)
    cells = ((grid - low) / step).astype(np.float32)
    found = (
        cv2.remap(inside, cells[:, :1], cells[:, 1:], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[:, 0] * step
    )
    far = part_distances(grid, bones, height)[end] * WIDTHS["hand"] > HAND_REACH
    return np.where(far | ((grid - wrist) @ (tip - wrist) < 0), np.nan, found)


def _likelihood(colours: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Log likelihood (n,) of colours (n, 3) in the normal distribution of samples (m, 3)."""
    spread = np.cov(samples.T) + 25 * np.eye(3)
    offsets = colours - samples.mean(0)
    return -0.5 * ((offsets @ np.linalg.inv(spread)) * offsets).sum(1) - 0.5 * np.linalg.slogdet(spread)[1]


def _towards(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Unit vector (2,), or (0, 1) between equal points."""
    length = np.linalg.norm(end - start)
    return (end - start) / length if length > 1e-9 else np.array([0.0, 1.0])


def _side(offsets: np.ndarray, own: np.ndarray, other: np.ndarray, straight: bool) -> np.ndarray:
    """How far (n,) offsets from a joint (n, 2) lie on the side of the part in direction `own`, against `other`.

    On the outer side of a bent joint both parts say the same. On its inner side, where they lie against each other,
    each counts what it shows there as its own, unless the joint is to be taken as `straight`.
    """
    a, b = offsets @ own, offsets @ other
    sine = max(float(np.linalg.norm(own - other)) / 2, 0.3)
    side = (a - b) / (2 * sine)
    return side if straight else side + np.maximum(a + b, 0) / (2 * (1 + sine))


def _cloth(points: np.ndarray, seen: np.ndarray, height: float, mask: np.ndarray) -> tuple[int, ...]:
    """The parts of the legs that a skirt or a robe covers: thighs, or thighs and shins.

    Cloth is where the mask covers what lies between two legs that stand apart, or, where they stand together, what
    lies beyond both of them.
    """
    covered: list[int] = []
    for pair, shares, room in ((LEGS[:2], (0.5, 0.7, 0.9), 0.055), (LEGS[2:], (0.2, 0.35, 0.5), 0.042)):
        if not seen[[i for p in pair for i in OWN[p]]].all():
            break
        votes = []
        for share in shares:
            left, right = ((1 - share) * points[OWN[p][0]] + share * points[OWN[p][1]] for p in pair)
            gap = np.linalg.norm(left - right) / height
            if gap > 2.5 * room:
                votes.append(all(_is_set(mask, part * left + (1 - part) * right) for part in (0.4, 0.5, 0.6)))
            else:
                out = _towards(right, left) * 1.6 * room * height
                votes.append(_is_set(mask, left + out) and _is_set(mask, right - out))
        if sum(votes) < 2:
            break
        covered += pair
    return tuple(covered)


def _is_set(mask: np.ndarray, place: np.ndarray) -> bool:
    x, y = np.rint(place).astype(int)
    return bool(0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x])


@dataclass(frozen=True)
class Patch:
    """Where a layer lies in a frame, and where in the reference its pixels come from."""

    left: int
    top: int
    places: np.ndarray  # (h, w, 2) float32
    share: np.ndarray  # (h, w) float32 in [0, 1] of each pixel that is covered

    @property
    def box(self) -> tuple[slice, slice]:
        height, width = self.share.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


class Coverage(NamedTuple):
    """A person's mask as layers sample it, see `warping.ImagePyramid`: pixel i of it is pixel `unit` i + `half`."""

    mask: np.ndarray  # (h, w) uint8, 255 = covered
    unit: float
    half: float
    scale: float  # frame pixels per reference pixel


def lay(
    layer: Layer, maps: np.ndarray, coverage: Coverage, size: tuple[int, int], nudge: Nudge | None = None
) -> Patch | None:
    """The layer in a frame of (width, height) after part maps (parts, 3, 3) into it; None where it is not seen."""
    screen = layer.basis @ maps[list(layer.parts), :2].transpose(0, 2, 1).reshape(-1, 2)
    if nudge is not None:
        screen = screen + nudge(screen)
    low = np.maximum(np.floor(screen.min(0)), 0)
    high = np.minimum(np.ceil(screen.max(0)) + 1, size)
    if not (low < high).all():
        return None
    (left, top), (width, height) = low.astype(int), (high - low).astype(int)
    patch = Patch(int(left), int(top), np.zeros((height, width, 2), np.float32), np.zeros((height, width), np.float32))
    steps = np.array([1 / coverage.unit, coverage.half, coverage.scale], np.float32)
    screen = (screen - low).astype(np.float32)
    _rasterize(screen, layer.values, layer.faces, coverage.mask, steps, patch.places, patch.share)
    return patch


@numba.njit(cache=True, nogil=True)
def _rasterize(screen, values, faces, mask, steps, places, share):
    """Draw triangles (t, 3) of vertices (v, 2) with values (v, 3), see `Layer`, into the arrays of a `Patch`.

    Triangles that are turned over are left out.
    """
    height, width = share.shape
    last_row, last_column = mask.shape[0] - 1, mask.shape[1] - 1
    shrink, half, scale = steps[0], steps[1], steps[2]
    one, zero = np.float32(1.0), np.float32(0.0)
    for f in range(faces.shape[0]):
        i, j, k = faces[f, 0], faces[f, 1], faces[f, 2]
        ax, ay, bx, by, cx, cy = screen[i, 0], screen[i, 1], screen[j, 0], screen[j, 1], screen[k, 0], screen[k, 1]
        area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
        if area < 1e-6:
            continue
        left, right = max(0, int(np.ceil(min(ax, bx, cx)))), min(width - 1, int(np.floor(max(ax, bx, cx))))
        top, bottom = max(0, int(np.ceil(min(ay, by, cy)))), min(height - 1, int(np.floor(max(ay, by, cy))))
        inverse = one / area
        for row in range(top, bottom + 1):
            for column in range(left, right + 1):
                x, y = np.float32(column), np.float32(row)
                u = ((bx - x) * (cy - y) - (cx - x) * (by - y)) * inverse
                v = ((cx - x) * (ay - y) - (ax - x) * (cy - y)) * inverse
                w = one - u - v
                if u < -1e-4 or v < -1e-4 or w < -1e-4:
                    continue
                # Full up to the layer's edge, so that two that were one leave no seam, and gone a pixel further.
                edge = min((u * values[i, 2] + v * values[j, 2] + w * values[k, 2]) * scale + one, one)
                if edge <= zero:
                    continue
                px = u * values[i, 0] + v * values[j, 0] + w * values[k, 0]
                py = u * values[i, 1] + v * values[j, 1] + w * values[k, 1]
                sx, sy = (px - half) * shrink, (py - half) * shrink
                x0, y0 = int(np.floor(sx)), int(np.floor(sy))
                dx, dy = sx - np.float32(x0), sy - np.float32(y0)
                covered = zero
                for n in range(2):
                    for m in range(2):
                        if 0 <= x0 + m <= last_column and 0 <= y0 + n <= last_row:
                            weight = (dx if m else one - dx) * (dy if n else one - dy)
                            covered += weight * np.float32(mask[y0 + n, x0 + m])
                covered *= edge / np.float32(255.0)
                if covered >= share[row, column]:
                    share[row, column] = covered
                    places[row, column, 0], places[row, column, 1] = px, py
