"""Outlines of the reference's and the driving person's masks: what they say beside the keypoints."""

import math
from dataclasses import dataclass

import cv2
import numba
import numpy as np

from tpc.bends.parts import ENDS, HEAD_PART, OWN, PARENTS, TORSO_PART, fit_parts, part_bones, part_distances, with_neck
from tpc.procrustes import apply_matrix
from tpc.silhouettes import (
    BITMAP_SIDE,
    NUM_KEYPOINTS,
    Silhouette,
    body_height,
    outline_points,
    silhouette_from_mask,
)

# Alignment of outlines: how far apart two that belong together may lie and how far a keypoint is from
# where it was estimated, both as parts of the body height, and what the outlines weigh against the keypoints.
OUTLINE_REACH, OUTLINE_STEPS = 0.05, 5
KEYPOINT_ERROR, OUTLINE_WEIGHT = 0.02, 600.0
# Clothes, and a body seen from another side, move outlines over exact keypoints too. Where keypoints would move less
# than this on average, they are taken for exact and move by this share of it.
EXACT_SHIFT, EXACT_SHARE = 0.02, 0.25

# What remains between two outlines, if it is less than so many parts of the body height, is taken up by the bent
# reference within about that distance. Seen in images of this size, whatever the frame's.
GAP_REACH, GAP_SPREAD = 0.022, 0.044
GAP_SIDE, GAP_DOUBT = 128, 0.5


@dataclass(frozen=True)
class Outline:
    """Points on the outline of a reference person."""

    points: np.ndarray  # (n, 2)
    normals: np.ndarray  # (n, 2), outwards
    parts: np.ndarray  # (n,) that they belong to
    shares: np.ndarray  # (n, 17), how far a point moves with each keypoint
    height: float  # of the body in pixels

    @classmethod
    def of(cls, keypoints: np.ndarray, seen: np.ndarray, mask: np.ndarray) -> "Outline":
        """Of a person with keypoints (17, 2), seen (17,), and a mask (h, w) bool."""
        height = body_height(keypoints, seen)
        size = mask.shape[1], mask.shape[0]
        places, normals = outline_points(silhouette_from_mask(mask, max_side=BITMAP_SIDE), size)
        if height == 0 or not len(places):
            return cls(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0, int), np.zeros((0, NUM_KEYPOINTS)), height)
        points, both = with_neck(keypoints, seen)
        bones = part_bones(points, both, height)
        distances = part_distances(places, bones, height)
        parts = distances.argmin(0)
        shares = np.zeros((len(places), NUM_KEYPOINTS))
        for p, own in enumerate(OWN):
            mine = parts == p
            limb = OWN[PARENTS[p]] if p in ENDS else own
            if p == TORSO_PART:
                near = 1 / (((places[mine, None] - points[own]) ** 2).sum(-1) + (0.05 * height) ** 2) * both[own]
                shares[np.ix_(mine, own)] = near / near.sum(1, keepdims=True)
            elif p == HEAD_PART:
                shares[np.ix_(mine, own[:-1])] = both[own[:-1]] / max(both[own[:-1]].sum(), 1)
            elif mine.any():
                start, end = points[limb]
                along = (places[mine] - start) @ (end - start) / max(((end - start) ** 2).sum(), 1e-9)
                along = np.clip(along, 0, 1.3)  # a hand moves a little more than the wrist
                shares[np.ix_(mine, limb)] = np.stack([1 - along, along], 1)
        near = distances.min(0) < 3
        return cls(places[near], normals[near], parts[near], shares[near], height)


def align_outline(
    outline: Outline,
    source: np.ndarray,
    target: np.ndarray,
    seen: np.ndarray,
    matrix: np.ndarray,
    silhouette: Silhouette,
    size: tuple[int, int],
    radius: float,
) -> np.ndarray:
    """Driving keypoints (17, 2) moved so that the outline of the bent reference lies on the driving silhouette.

    Points of either outline are drawn to the other along its normals (point-to-line ICP, both ways), against a prior
    that keypoints stay where the estimator put them. The silhouettes say more than the keypoints about where a limb
    lies across its length; what they do not see, such as an arm before the chest, stays as estimated.

    Args:
        source, target, seen: keypoints (17, 2) of reference and driving frame, (17,) those of both.
        matrix: (3, 3) the person's similarity; silhouette, size: of the driving person and image; radius: of bends.
    """
    theirs, their_normals = outline_points(silhouette, size)
    usable = outline.shares[:, ~seen].sum(1) < 0.5
    if not len(theirs) or not usable.any():
        return target
    scale, height = np.sqrt(abs(np.linalg.det(matrix[:2, :2]))), outline.height
    turn = matrix[:2, :2] / scale
    back = np.linalg.inv(matrix)
    start = np.where(seen[:, None], apply_matrix(back, np.where(seen[:, None], target, 0)), source)
    theirs, their_normals = apply_matrix(back, theirs), their_normals @ turn
    border = int(np.ceil(2 * OUTLINE_REACH * height * scale / silhouette.cell)) + 2
    mask = np.pad(silhouette.mask, min(border, 256)).astype(np.uint8)
    outside = _signed_distance(mask)
    shares, points = outline.shares * seen, start
    reference, both = with_neck(source, seen)
    stay, reach = 1 / (KEYPOINT_ERROR * height) ** 2, OUTLINE_REACH * height
    for step in range(OUTLINE_STEPS):
        if step % 3 == 0:
            moved, _ = with_neck(points, seen)
            maps = fit_parts(reference, moved[None], both[None], height, radius)[0][0]
            linear = maps[outline.parts, :2, :2]
            places = (linear @ outline.points[..., None])[..., 0] + maps[outline.parts, :2, 2]
            across = np.linalg.inv(maps[:, :2, :2]).swapaxes(1, 2)[outline.parts]
            normals = (across @ outline.normals[..., None])[..., 0]
            normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
        in_frame = apply_matrix(matrix, places)
        cells = (in_frame - silhouette.origin) / silhouette.cell + min(border, 256)
        gap, slope = _look_up(outside, cells)
        gap, slope = gap * silhouette.cell / scale, slope @ turn
        edge = 1.5 * silhouette.cell
        shown = (in_frame > edge).all(1) & (in_frame < np.array(size) - 1 - edge).all(1)
        ours = usable & shown & ((slope * normals).sum(1) > 0.5)
        moments, pull = np.zeros((2 * NUM_KEYPOINTS, 2 * NUM_KEYPOINTS)), np.zeros(2 * NUM_KEYPOINTS)
        _equations(places, normals, shares, usable, ours, gap, slope, theirs, their_normals, reach, moments, pull)
        weight = OUTLINE_WEIGHT / (0.01 * height) ** 2 / (len(places) + len(theirs))
        moments = weight * moments + stay * np.eye(2 * NUM_KEYPOINTS)
        shift = np.linalg.solve(moments, weight * pull - stay * (points - start).reshape(-1))
        shift = shift.reshape(-1, 2)
        points, places = points + shift, places + shares @ shift
    shift = points - start
    average = max(float(np.sqrt((shift[seen] ** 2).sum(1).mean())), 1e-9)
    share = EXACT_SHARE + (1 - EXACT_SHARE) / (1 + (EXACT_SHIFT * height / average) ** 8)
    return np.where(seen[:, None], apply_matrix(matrix, start + share * shift), target)


@numba.njit(cache=True, nogil=True)
def _equations(places, normals, shares, usable, ours, gap, slope, theirs, their_normals, reach, moments, pull):
    """Add to moments (34, 34) and pull (34,) how keypoints move for outlines to meet: points to lines, both ways.

    Ours: places (n, 2), normals, shares (n, 17), the gap (n,) to their outline and its slope (n, 2), where `ours`.
    Theirs: places (m, 2) and normals, each with the nearest usable one of ours that faces the same way.
    """
    for i in range(len(places)):
        if ours[i]:
            weight = 1 / (1 + (gap[i] / reach) ** 2) ** 2
            _add(shares[i], slope[i, 0], slope[i, 1], -gap[i], weight, moments, pull)
    for j in range(len(theirs)):
        nearest, least = -1, np.inf
        for i in range(len(places)):
            along = their_normals[j, 0] * normals[i, 0] + their_normals[j, 1] * normals[i, 1]
            if usable[i] and along > 0.5:
                away = (theirs[j, 0] - places[i, 0]) ** 2 + (theirs[j, 1] - places[i, 1]) ** 2
                if away < least:
                    nearest, least = i, away
        if nearest >= 0:
            dx, dy = their_normals[j, 0], their_normals[j, 1]
            missing = (theirs[j, 0] - places[nearest, 0]) * dx + (theirs[j, 1] - places[nearest, 1]) * dy
            _add(shares[nearest], dx, dy, missing, 1 / (1 + least / reach**2) ** 2, moments, pull)


@numba.njit(cache=True, nogil=True)
def _add(shares, dx, dy, error, weight, moments, pull):
    """One equation: the keypoints' moves, by their shares (17,) and along (dx, dy), add up to the error."""
    for a in range(len(shares)):
        if shares[a] != 0:
            for b in range(len(shares)):
                if shares[b] != 0:
                    both = weight * shares[a] * shares[b]
                    moments[2 * a, 2 * b] += both * dx * dx
                    moments[2 * a, 2 * b + 1] += both * dx * dy
                    moments[2 * a + 1, 2 * b] += both * dx * dy
                    moments[2 * a + 1, 2 * b + 1] += both * dy * dy
            pull[2 * a] += weight * shares[a] * dx * error
            pull[2 * a + 1] += weight * shares[a] * dy * error


def _look_up(field: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values (n,) of a field (h, w) at places (n, 2), and its slopes (n, 2) there."""
    around = places[:, None] + np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    x, y = np.moveaxis(around.astype(np.float32), -1, 0)
    value, right, left, below, above = cv2.remap(field, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE).T
    return value, np.stack([right - left, below - above], 1) / 2


@dataclass(frozen=True)
class Nudge:
    """How far a bent person moves in a frame for its outline to lie on the driving one."""

    field: np.ndarray  # (h, w, 2) float16, frame pixels
    corner: tuple[float, float]  # frame pixels (x, y)
    cell: float  # frame pixels per pixel of the field
    after: np.ndarray | None = None  # (3, 3) map that the frame has gone through since

    @classmethod
    def between(cls, mask: np.ndarray, target: np.ndarray, height: float, cell: float) -> "Nudge":
        """From mask to target (h, w) bool of a body of so many of their pixels; `cell`: frame pixels in each."""
        reach, sigma = max(GAP_REACH * height, 1.0), max(GAP_SPREAD * height, 1.0)
        both, room = mask | target, math.ceil(2 * sigma) + 2
        if not both.any():
            return cls(np.zeros((1, 1, 2), np.float16), (0, 0), cell)
        box = tuple(
            slice(max(int(on[0]) - room, 0), int(on[-1]) + room + 1)
            for on in (np.flatnonzero(both.any(1)), np.flatnonzero(both.any(0)))
        )
        near, gap = (_signed_distance(m[box]) for m in (mask, target))
        own, slope = _slopes(near), _slopes(gap)
        gap = gap - near  # from the outline, not from the pixels beside it
        # On the outline, where the other one lies along the same line.
        weight = ((np.abs(near) < 1) & (np.abs(gap) < reach) & ((own * slope).sum(-1) > 0.5)).astype(np.float32)
        # Pixels say where an outline is to about half of their width: less than that is not moved.
        gap = np.sign(gap) * np.maximum(np.abs(gap) - GAP_DOUBT, 0)
        moves = np.dstack([-(weight * gap)[..., None] * slope, weight])
        # Smooth enough for every few pixels.
        step = max(1, int(sigma))
        moves = cv2.copyMakeBorder(moves, 0, -moves.shape[0] % step, 0, -moves.shape[1] % step, cv2.BORDER_CONSTANT)
        size = moves.shape[1] // step, moves.shape[0] // step
        moves = cv2.resize(moves, size, interpolation=cv2.INTER_AREA)
        moves = cv2.GaussianBlur(moves, (0, 0), sigma / step, borderType=cv2.BORDER_CONSTANT)
        field = (moves[..., :2] / (moves[..., 2:] + 0.01) * np.float32(cell)).astype(np.float16)
        return cls(field, (box[1].start * cell, box[0].start * cell), step * cell)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """(n, 2) moves of places (n, 2) in the frame."""
        places = places if self.after is None else apply_matrix(np.linalg.inv(self.after), places)
        x, y = ((places + 0.5 - self.corner) / self.cell - 0.5).astype(np.float32).T
        moves = cv2.remap(
            self.field.astype(np.float32), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        ).reshape(-1, 2)
        return moves if self.after is None else moves @ self.after[:2, :2].T


def _signed_distance(mask: np.ndarray) -> np.ndarray:
    """Pixels (h, w) float32 to the outline of a mask (h, w), negative inside."""
    inside = mask.astype(np.uint8)
    distance = cv2.distanceTransform(1 - inside, cv2.DIST_L2, 5) - cv2.distanceTransform(inside, cv2.DIST_L2, 5)
    return distance - np.where(inside > 0, np.float32(-0.5), np.float32(0.5))


def _slopes(distance: np.ndarray) -> np.ndarray:
    """Slopes (h, w, 2) of a `_signed_distance`, of about unit length."""
    soft = cv2.GaussianBlur(distance, (0, 0), 1)
    return np.dstack([cv2.Sobel(soft, cv2.CV_32F, dx, 1 - dx, scale=1 / 8) for dx in (1, 0)])
