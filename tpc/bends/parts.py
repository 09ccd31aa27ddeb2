"""A map of its own for every part of a person's body: how it departs from the person's similarity.

Driving keypoints are first carried back by the person's similarity S: somebody who moved rigidly is then where they
were. A part's map B leads from the reference to that place, reference pixels to reference pixels, and is the identity
for whoever did not bend; in the driving frame the part's map is S B.

Every fit has a prior, as if the part had, beside its own keypoints, some that S maps exactly: they weigh little beside
a bone of full length, decide where a bone is seen head-on, and decide everything as the configured radius grows.
"""

import cv2
import numpy as np

from data.poses.poses import interpolate
from tpc.config import CalibrationConfig
from tpc.procrustes import apply_matrix
from tpc.silhouettes import (
    BONES,
    FACE,
    LEFT_SHOULDER,
    NUM_KEYPOINTS,
    RIGHT_SHOULDER,
    TORSO,
)
from tpc.trajectory import filter_jitter, from_turns, put, rotations, to_turns

NECK = NUM_KEYPOINTS  # one keypoint more: the middle of the shoulders
# Name -> parent, keypoints: of a limb the two ends of its bone, of a hand or foot where its limb ends.
PARTS: dict[str, tuple[str | None, tuple[int, ...]]] = {
    "torso": (None, TORSO),
    "head": ("torso", (*FACE, NECK)),
    "left_upper_arm": ("torso", (5, 7)),
    "right_upper_arm": ("torso", (6, 8)),
    "left_forearm": ("left_upper_arm", (7, 9)),
    "right_forearm": ("right_upper_arm", (8, 10)),
    "left_hand": ("left_forearm", (9,)),
    "right_hand": ("right_forearm", (10,)),
    "left_thigh": ("torso", (11, 13)),
    "right_thigh": ("torso", (12, 14)),
    "left_shin": ("left_thigh", (13, 15)),
    "right_shin": ("right_thigh", (14, 16)),
    "left_foot": ("left_shin", (15,)),
    "right_foot": ("right_shin", (16,)),
}
NAMES = tuple(PARTS)
PARENTS = tuple(-1 if parent is None else NAMES.index(parent) for parent, _ in PARTS.values())
OWN = tuple(list(points) for _, points in PARTS.values())
TORSO_PART, HEAD_PART = 0, 1
ENDS = tuple(p for p, own in enumerate(OWN) if len(own) == 1)  # hands and feet
LIMBS = tuple(p for p, own in enumerate(OWN) if len(own) == 2)

# Bounds of a part against the person's similarity.
LIMB_LENGTHS = (0.25, 2.0)
TORSO_STRETCHES = (0.5, 1.6)
HEAD_SCALES = (0.75, 1.3)
# Prior of each fit, squared parts of the part's length: of a limb so short that its direction says little.
LIMB_PRIOR, HEAD_PRIOR, TORSO_PRIOR = 0.01, 0.5, 0.05
# Parts of the body height.
LENGTHS = np.array(
    [{TORSO_PART: 0.29, HEAD_PART: 0.12}.get(p, BONES.get(tuple(OWN[p]), (0.15,))[0]) for p in range(len(OWN))]
)
# Degrees: a leg folded further than this at the reference's knee hides what unfolding it by more than that would show,
# and a thigh whose shin is not seen does not swing further.
FOLDED, UNFOLDED, MAX_SWING = 75, 40, 45
# Frames between which a part moves further than about this part of the body height are not averaged: that is motion.
JITTER = 0.005


def with_neck(points: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints (..., 17, 2) and which are seen (..., 17), with the neck behind them."""
    shoulders = [LEFT_SHOULDER, RIGHT_SHOULDER]
    neck = points[..., shoulders, :].mean(-2, keepdims=True)
    return np.concatenate([points, neck], -2), np.concatenate([seen, seen[..., shoulders].all(-1, keepdims=True)], -1)


def keypoint_matrices(matrix: np.ndarray, parts: dict[str, np.ndarray] | None) -> np.ndarray:
    """(17, 3, 3) maps of the keypoints: of the part whose own each is, its parent's before its own; or `matrix`."""
    owners = (next(name for name, (_, own) in PARTS.items() if k in own) for k in range(NUM_KEYPOINTS))
    return np.array([matrix if parts is None else parts[name] for name in owners], np.float64)


def fit_parts(
    source: np.ndarray, target: np.ndarray, seen: np.ndarray, height: float, radius: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Part maps (frames, parts, 3, 3) of keypoints (18, 2) to (frames, 18, 2), `seen` (frames, 18) in both.

    Also (frames, parts) bool, which are known (the others hold the identity), (frames,) bool, whether the torso is
    mirrored, and (frames,) int, whether both legs would have to unfold, -1 where thighs are not seen. `height` of the
    body is in pixels, `radius` a part of it.
    """
    frames = len(target)
    matrices, known = np.tile(np.eye(3), (frames, len(PARTS), 1, 1)), np.zeros((frames, len(PARTS)), bool)
    x = source @ [1, 1j]
    y = np.where(seen, target @ [1, 1j], x)
    lengths = LENGTHS * height
    priors = np.minimum((radius * height / lengths) ** 4, 1e12)
    for p, share in ((TORSO_PART, TORSO_PRIOR), (HEAD_PART, HEAD_PRIOR)):
        own, weight = OWN[p], (share + priors[p]) * lengths[p] ** 2
        matrices[:, p] = _similar(x[own], y[:, own], seen[:, own], weight, priors[p])
        known[:, p] = seen[:, own].sum(1) >= 2 if p == TORSO_PART else seen[:, NECK] & seen[:, own[:-1]].any(1)
        if p == TORSO_PART:
            whole, middle = seen[:, own].sum(1) >= 3, _mean(source[own], seen[:, own])
            linear, mirrored = _affine(source[own], target[:, own], seen[:, own], weight)
            mirrored &= whole
            affine = put(linear, middle, apply_matrix(matrices[:, p], middle[:, None])[:, 0])
            matrices[:, p] = np.where(whole[:, None, None], affine, matrices[:, p])
    # All limbs at once, then what they end in: arrays (frames, limbs), (frames, ends).
    limbs, ends = list(LIMBS), list(ENDS)
    a, b = np.array([OWN[p] for p in limbs]).T
    weight = (LIMB_PRIOR + priors[limbs]) * lengths[limbs] ** 2
    u, v = x[b] - x[a], y[:, b] - y[:, a]
    turn = np.conj(u) * v + weight
    turn = np.where(abs(turn) > 0, turn, 1) / np.where(abs(turn) > 0, abs(turn), 1)
    # As long as the bone, as wide as the person.
    stretch = np.clip(np.sqrt((abs(v) ** 2 + weight) / (abs(u) ** 2 + weight)), *LIMB_LENGTHS)
    along = (source[b] - source[a]) / np.maximum(abs(u), 1e-9)[:, None]
    linear = np.eye(2) + (stretch - 1)[..., None, None] * (along[:, :, None] * along[:, None])
    turns = np.ones((frames, len(PARTS)), complex)
    turns[:, limbs], known[:, limbs] = turn, seen[:, a] & seen[:, b]
    matrices[:, limbs] = put(rotations(turn) @ linear, source[a], _held(x[a], y[:, a], priors[limbs]))
    # The limb's turn at the person's own size, however long the limb looks.
    parents, wrists = [PARENTS[p] for p in ends], [OWN[p][0] for p in ends]
    known[:, ends] = known[:, parents]
    place = _held(x[wrists], y[:, wrists], priors[ends])
    matrices[:, ends] = put(rotations(turns[:, parents]), source[wrists], place)
    unfolding = np.ones(frames, int)
    for side in ("left", "right"):
        leg = [NAMES.index(f"{side}_{name}") for name in ("thigh", "shin", "foot")]
        hip, knee, ankle = (*OWN[leg[0]], OWN[leg[1]][1])
        folded, angles = _knee(x[hip], x[knee], x[ankle]), _knee(y[:, hip], y[:, knee], y[:, ankle])
        unfolds = known[:, leg[1]] & (folded < FOLDED) & (angles - folded > UNFOLDED)
        swings = ~known[:, leg[1]] & (abs(np.degrees(np.angle(turns[:, leg[0]]))) > MAX_SWING)
        known[:, leg] &= ~(unfolds | swings)[:, None]
        unfolding = np.where(seen[:, hip] & seen[:, knee], unfolding * (unfolds | swings), -1)
    matrices[~known] = np.eye(3)
    return matrices, known, mirrored, unfolding


def _held(x: np.ndarray, y: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """(n, k, 2) places y (n, k), complex, held to x (k,) by a prior (k,)."""
    place = (y + prior * x) / (1 + prior)
    return np.stack([place.real, place.imag], -1)


def _knee(hip: np.ndarray, knee: np.ndarray, ankle: np.ndarray) -> np.ndarray:
    """Angles (n,) between thigh and shin in degrees, of points as complex numbers; 180 = straight."""
    return abs(np.degrees(np.angle((ankle - knee) * np.conj(hip - knee) + 1e-12)))


def _mean(points: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(n, 2) of points (k, 2) or (n, k, 2) with seen (n, k)."""
    weights = seen / np.maximum(seen.sum(1, keepdims=True), 1)
    return (weights[..., None] * points).sum(1)


def _similar(x: np.ndarray, y: np.ndarray, seen: np.ndarray, weight: float, prior: float) -> np.ndarray:
    """Procrustes fits (n, 3, 3) of complex points (k,) to (n, k), held to the identity by `weight`; scales bounded."""
    share = seen / np.maximum(seen.sum(1, keepdims=True), 1)
    mean, place = (share * x).sum(1), (share * y).sum(1)
    dx, dy = x - mean[:, None], y - place[:, None]
    turn = ((share * np.conj(dx) * dy).sum(1) + weight) / ((share * abs(dx) ** 2).sum(1) + weight)
    size = abs(turn)
    turn = np.where(size > 0, turn, 1) / np.where(size > 0, size, 1) * np.clip(size, *HEAD_SCALES)
    place = (place + prior * mean) / (1 + prior)
    start, end = (np.stack([z.real, z.imag], -1) for z in (mean, place))
    return put(rotations(turn), start, end)


def _affine(source: np.ndarray, target: np.ndarray, seen: np.ndarray, weight: float) -> tuple[np.ndarray, np.ndarray]:
    """Affine fits (n, 2, 2) of points (k, 2) to (n, k, 2), towards the identity by `weight`, their stretches bounded.

    Also (n,) bool, those that mirror; they are the identity.
    """
    share = seen / np.maximum(seen.sum(1, keepdims=True), 1)
    target = np.where(seen[..., None], target, source)
    dx, dy = source - _mean(source, seen)[:, None], target - _mean(target, seen)[:, None]
    cross = np.einsum("nk,nki,nkj->nij", share, dy, dx) + weight * np.eye(2)
    scatter = np.einsum("nk,nki,nkj->nij", share, dx, dx) + max(weight, 1e-9) * np.eye(2)
    u, s, vt = np.linalg.svd(cross @ np.linalg.inv(scatter))
    mirrored = np.linalg.det(u @ vt) < 0
    linear = u @ (np.clip(s, *TORSO_STRETCHES)[..., None] * vt)
    return np.where(mirrored[:, None, None], np.eye(2), linear), mirrored


def settle(
    matrices: np.ndarray,
    known: np.ndarray,
    bent: np.ndarray,
    source: np.ndarray,
    height: float,
    config: CalibrationConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """Maps with short gaps bridged, then unknown parts moved by their parents', then noise filtered; who follows."""
    result, follows = matrices.copy(), np.zeros_like(known)
    for p, parent in enumerate(PARENTS):
        middle = source[OWN[p]].mean(0)
        parameters = to_turns(matrices[:, p], middle)
        turns = np.flatnonzero(known[:, p])
        parameters[turns, 0] = np.unwrap(parameters[turns, 0])
        parameters, filled = interpolate(parameters, known[:, p], config.max_gap)
        result[:, p] = from_turns(parameters, middle)
        follows[:, p] = bent & ~known[:, p] & ~filled
        if parent >= 0:
            result[follows[:, p], p] = result[follows[:, p], parent]
    for p in range(len(PARENTS)):
        middle = source[OWN[p]].mean(0)
        parameters = to_turns(result[:, p], middle)
        parameters[:, 0] = np.unwrap(parameters[:, 0])
        # Where the part's middle and a point beside it go says how far it moved.
        reach = 0.1 * height
        ends = np.stack([parameters[:, 4], parameters[:, 5], reach * parameters[:, 0]], 1) / (JITTER * height)
        parameters = filter_jitter(parameters, ends, bent, config.smoothing)
        result[:, p] = from_turns(parameters, middle)
    result[~bent] = np.eye(3)
    return result, follows


# Half the width of a part, clothes included, as a part of the body height.
WIDTHS = {
    "torso": 0.035, "head": 0.055, "upper_arm": 0.035, "forearm": 0.028, "hand": 0.03, "thigh": 0.055, "shin": 0.038,
    "foot": 0.035,
}  # fmt: skip
END_LENGTHS = {"hand": 0.08, "foot": 0.07}  # beyond wrist and ankle


def kind(part: int) -> str:
    """The part's name without its side."""
    return NAMES[part].removeprefix("left_").removeprefix("right_")


def part_bones(points: np.ndarray, seen: np.ndarray, height: float) -> list[np.ndarray | None]:
    """The line (2, 2) around which each part lies, or the corners (k, 2) of a torso; None for a part not seen."""
    bones: list[np.ndarray | None] = []
    for p, own in enumerate(OWN):
        visible, bone = [i for i in own if seen[i]], None
        if p == TORSO_PART and len(visible) >= 2:
            bone = points[visible]
        elif p == HEAD_PART and set(visible) - {NECK}:
            middle = points[[i for i in visible if i != NECK]].mean(0)
            up = middle - points[NECK] if seen[NECK] else np.zeros(2)
            up = up / np.linalg.norm(up) if up.any() else np.array([0.0, -1.0])
            bone = middle + 0.04 * height * np.array([-up, up])
        elif p in ENDS and bones[PARENTS[p]] is not None:
            start, end = bones[PARENTS[p]]
            length = max(np.linalg.norm(end - start), 1e-9)
            bone = np.array([end, end + (end - start) / length * END_LENGTHS[kind(p)] * height])
        elif len(own) == 2 and len(visible) == 2:
            bone = points[own]
        bones.append(bone)
    return bones


def part_distances(places: np.ndarray, bones: list[np.ndarray | None], height: float) -> np.ndarray:
    """(parts, n) distances of places (n, 2) to the parts, in units of half their widths; 1e6 for those not seen."""
    return np.stack([
        np.full(len(places), 1e6) if bone is None else _distance(places, bone) / (WIDTHS[kind(p)] * height)
        for p, bone in enumerate(bones)
    ])  # fmt: skip


def _distance(places: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """(n,) pixels to a line between two corners, or to the hull of more."""
    hull = corners if len(corners) == 2 else cv2.convexHull(corners.astype(np.float32))[:, 0].astype(np.float64)
    edges, offsets = np.roll(hull, -1, 0) - hull, places[:, None] - hull
    share = np.clip((offsets * edges).sum(-1) / np.maximum((edges**2).sum(-1), 1e-12), 0, 1)
    nearest = np.linalg.norm(offsets - share[..., None] * edges, axis=-1).min(1)
    turns = edges[:, 0] * offsets[..., 1] - edges[:, 1] * offsets[..., 0]
    inside = len(hull) > 2 and ((turns >= 0).all(1) | (turns <= 0).all(1))
    return np.where(inside, 0, nearest)
