"""Driving poses with the proportions of another person: the one of the reference.

`bones` gives every bone of the driving skeletons the reference person's length and leaves its direction and its
foreshortening: under an orthographic camera a bone of length l seen at an angle a from the image plane is l cos(a) long
there, so the same rotations of joints of another body are the same vectors, each times the ratio of the two lengths.
`similarity` scales and shifts the driving poses to the reference in one frame, as simpler alignments do.

Lengths are measured in units of the standing height, over the whole clip of the driver, and in the reference's one
picture, where short and foreshortened are told apart by the other side, by the rest of the limb, by a driving frame
in the same posture, and in doubt by the proportions of people.
"""

from __future__ import annotations

import numpy as np

from data.poses.poses import Poses
from data.transforms import fit_matrix, map_points

MODES = ("off", "similarity", "bones")

# Points beside the 17 keypoints: middles of hips, shoulders and ears.
HIPS, SHOULDERS, HEAD = 17, 18, 19
_MIDDLES = ((11, 12), (5, 6), (3, 4))
PARTS = ("trunk", "shoulders", "hips", "neck", "upper_arm", "forearm", "thigh", "shin", "head")
# Part, ends, length in standing heights: means of the training bodies of `assets/people`, which stand upright.
_SEGMENTS = (
    ("trunk", HIPS, SHOULDERS, 0.296),
    ("shoulders", 5, 6, 0.186),
    ("hips", 11, 12, 0.111),
    ("neck", SHOULDERS, HEAD, 0.117),
    ("upper_arm", 5, 7, 0.158),
    ("upper_arm", 6, 8, 0.158),
    ("forearm", 7, 9, 0.144),
    ("forearm", 8, 10, 0.144),
    ("thigh", 11, 13, 0.231),
    ("thigh", 12, 14, 0.231),
    ("shin", 13, 15, 0.229),
    ("shin", 14, 16, 0.229),
    ("head", 3, 4, 0.086),
    ("head", 0, 3, 0.075),
    ("head", 0, 4, 0.075),
    ("head", 1, 3, 0.055),
    ("head", 2, 4, 0.055),
)
_PART = np.array([PARTS.index(part) for part, *_ in _SEGMENTS])
_ENDS = np.array([ends for _, *ends, _ in _SEGMENTS])
_LENGTHS = np.array([length for *_, length in _SEGMENTS])
# What parts are of the standing height: bones by their length, the crown above the ears by the head, the sole by itself.
_UPRIGHT = {"trunk": 0.296, "neck": 0.117, "thigh": 0.230, "shin": 0.228, "head": 0.066}
_SOLE = 0.063


def retarget(
    driving: Poses,
    reference: Poses,
    mode: str = "bones",
    *,
    slots: np.ndarray | None = None,
    height_ratio: float = 1.0,
    reference_map: np.ndarray | None = None,
    threshold: float = 0.3,
) -> tuple[Poses, list[str]]:
    """Driving poses in the proportions of the reference's persons, and notes about what could not be done.

    Args:
        driving: poses of the clip; scores stay as they are.
        reference: poses of the reference image, one frame; its size and place count for `similarity` alone.
        mode: one of `MODES`.
        slots: (frames, reference persons) int, the slot of the driving poses that each person of the reference takes,
            -1 = absent; None: both from left to right. Others stay as they are.
        height_ratio: of `bones`, standing height of the result in the driver's; two pictures do not tell it.
        reference_map: of `similarity`, (3, 3) from the reference's pixels to the driving frame's; None: centred, as
            large as the frame shows it whole.
        threshold: keypoints with scores up to it are not measured, and move with their neighbours.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if reference.frames != 1:
        raise ValueError(f"reference must be one frame, got {reference.frames}")
    if mode == "off":
        return driving, []
    slots = left_to_right(driving, reference, threshold) if slots is None else np.asarray(slots)
    if slots.shape != (driving.frames, reference.persons):
        raise ValueError(f"slots must be {(driving.frames, reference.persons)}, got {slots.shape}")
    if reference_map is None:
        reference_map = fit_matrix(reference.size, driving.size, "contain")
    keypoints, notes = driving.keypoints.copy(), []
    for person in range(reference.persons):
        frames = np.flatnonzero(slots[:, person] >= 0)
        if not len(frames):
            notes.append(f"person {person} of the reference is not in the clip")
            continue
        place = frames, slots[frames, person]
        points, seen = driving.keypoints[place].astype(np.float64), driving.scores[place] > threshold
        own, own_seen = reference.keypoints[0, person].astype(np.float64), reference.scores[0, person] > threshold
        if mode == "similarity":
            found = _aligned(points, seen, map_points(own, reference_map), own_seen)
        else:
            found = _with_lengths(points, seen, own, own_seen, height_ratio)
        if isinstance(found, str):
            notes.append(f"person {person} is not retargeted: {found}")
            continue
        missing = (driving.scores[place] == 0) & (driving.keypoints[place] == 0).all(-1)  # of no place at all
        keypoints[place] = np.where(missing[..., None], 0, found)
    return Poses(keypoints, driving.scores, driving.size, driving.fps), notes


def left_to_right(driving: Poses, reference: Poses, threshold: float = 0.3) -> np.ndarray:
    """Slots (frames, reference persons) that give the persons of both their order from left to right."""
    columns = []
    for poses in (reference, driving):
        x = np.where(poses.scores > threshold, poses.keypoints[..., 0], np.nan)
        middles = [np.nanmedian(x[:, p]) if np.isfinite(x[:, p]).any() else np.inf for p in range(poses.persons)]
        columns.append(np.argsort(middles, kind="stable"))
    slots = np.full((driving.frames, reference.persons), -1)
    for person, slot in zip(*columns, strict=False):
        slots[:, person] = np.where(driving.present(threshold)[:, slot], slot, -1)
    return slots


def _aligned(points: np.ndarray, seen: np.ndarray, own: np.ndarray, own_seen: np.ndarray) -> np.ndarray | str:
    """Points (f, 17, 2) scaled and shifted so that in the first frame that shows most of what both show they fit."""
    common = seen & own_seen
    counts = common.sum(1)
    if counts.max() < 2:
        return "no two keypoints are visible in both"
    first = int(np.argmax(counts >= min(counts.max(), 13)))
    source, target = points[first, common[first]], own[common[first]]
    middle, goal = source.mean(0), target.mean(0)
    spread = np.linalg.norm(source - middle)
    if spread < 1e-6:
        return "its keypoints lie on one point"
    return goal + (points - middle) * (np.linalg.norm(target - goal) / spread)


def _with_lengths(
    points: np.ndarray, seen: np.ndarray, own: np.ndarray, own_seen: np.ndarray, height_ratio: float
) -> np.ndarray | str:
    """Points (f, 17, 2) with the bones of `own` (17, 2), standing as tall as before, times `height_ratio`."""
    points, seen = with_middles(points, seen)
    own, own_seen = with_middles(own[None], own_seen[None])
    if not (seen[:, HIPS] | seen[:, SHOULDERS]).any():
        return "neither both hips nor both shoulders are visible in any frame"
    if not (own_seen[0, HIPS] | own_seen[0, SHOULDERS]):
        return "neither both hips nor both shoulders are visible in the reference"
    ratios = length_ratios(points, seen, own, own_seen) * height_ratio
    return placed(points, seen, rebuilt(points, seen, ratios))[:, :17]


def with_middles(points: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints (f, 17, 2) and which are seen (f, 17), with `HIPS`, `SHOULDERS` and `HEAD` behind them."""
    middles = np.stack([points[:, pair].mean(1) for pair in map(list, _MIDDLES)], 1)
    known = np.stack([seen[:, pair].all(1) for pair in map(list, _MIDDLES)], 1)
    # Without both ears: the one, or the other points of the face.
    for group in ([3, 4], [0, 1, 2]):
        some = seen[:, group].any(1) & ~known[:, 2]
        weight = seen[:, group, None] / np.maximum(seen[:, group].sum(1), 1)[:, None, None]
        middles[:, 2] = np.where(some[:, None], (points[:, group] * weight).sum(1), middles[:, 2])
        known[:, 2] |= some
    return np.concatenate([points, middles], 1), np.concatenate([seen, known], 1)


def length_ratios(points: np.ndarray, seen: np.ndarray, own: np.ndarray, own_seen: np.ndarray) -> np.ndarray:
    """(parts,) lengths of the reference's parts in those of the driver's, both of one standing height."""
    ours, theirs = segments(points, seen), segments(own, own_seen)
    driver, body = proportions(ours), proportions(theirs)
    return body / driver


def segments(points: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """(f, segments) lengths of `_SEGMENTS` in those of people of standing height 1; NaN where one is not seen."""
    lengths = np.linalg.norm(points[:, _ENDS[:, 1]] - points[:, _ENDS[:, 0]], axis=-1) / _LENGTHS
    return np.where(seen[:, _ENDS].all(-1) & (lengths > 0), lengths, np.nan)


def proportions(lengths: np.ndarray) -> np.ndarray:
    """(parts,) lengths in standing heights, in those of average people, from (f, segments) of `segments`."""
    size = body_sizes(lengths)
    part = np.array([_length(lengths[:, p == _PART] / size[:, None]) for p in range(len(PARTS))])
    return part / standing(part)


def _length(values: np.ndarray) -> float:
    return float(np.nanquantile(values, 0.9)) if np.isfinite(values).any() else 1.0


def standing(part: np.ndarray) -> float:
    """Standing height of a body with parts (parts,) in those of average people of height 1."""
    return _SOLE + sum(share * part[PARTS.index(name)] for name, share in _UPRIGHT.items())


def body_sizes(lengths: np.ndarray) -> np.ndarray:
    """(f,) standing heights in pixels that the longest segments of each frame, (f, segments), speak for."""
    sizes = np.array([np.nanquantile(row, 0.75) if np.isfinite(row).any() else np.nan for row in lengths])
    return np.full(len(sizes), np.nanmedian(sizes))


def rebuilt(points: np.ndarray, seen: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """Points (f, 20, 2) of the new skeleton, relative to its root: the hips' middle, or that of the shoulders."""
    scale = dict(zip(PARTS, ratios, strict=True))
    rooted = seen[:, HIPS]
    root = np.where(rooted[:, None], points[:, HIPS], points[:, SHOULDERS])
    new = np.zeros_like(points)
    trunk = scale["trunk"] * (points[:, SHOULDERS] - points[:, HIPS])
    new[:, SHOULDERS] = np.where((rooted & seen[:, SHOULDERS])[:, None], trunk, 0)
    for middle, pair, name in ((HIPS, (11, 12), "hips"), (SHOULDERS, (5, 6), "shoulders")):
        for end in pair:
            new[:, end] = new[:, middle] + scale[name] * (points[:, end] - points[:, middle])
    new[:, HEAD] = new[:, SHOULDERS] + scale["neck"] * (points[:, HEAD] - points[:, SHOULDERS])
    for end in range(5):
        new[:, end] = new[:, HEAD] + scale["head"] * (points[:, end] - points[:, HEAD])
    for start, end, name in (
        (5, 7, "upper_arm"), (6, 8, "upper_arm"), (7, 9, "forearm"), (8, 10, "forearm"),
        (11, 13, "thigh"), (12, 14, "thigh"), (13, 15, "shin"), (14, 16, "shin"),
    ):  # fmt: skip
        new[:, end] = new[:, start] + scale[name] * (points[:, end] - points[:, start])
    return new


def placed(points: np.ndarray, seen: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Points (f, 20, 2) of the new skeleton in the image: feet on the driver's ground, the rest where it was."""
    down = np.array([0.0, 1.0])
    feet = [15, 16]
    root = np.where(seen[:, HIPS, None], points[:, HIPS], points[:, SHOULDERS])
    before = np.max((points[:, feet] - root[:, None]) @ down, 1)
    after = np.max(new[:, feet] @ down, 1)
    return new + (root + (before - after)[:, None] * down)[:, None]
