"""Driving poses with the proportions of another person: the one of the reference.

    python -m data.poses.retarget reference_poses=r.npz driving_poses=d.npz output=out.npz [mode=bones]

Reads every format of `data.poses.files`; several persons are matched from left to right.

`bones` gives every bone of the driving skeletons the reference person's length and leaves its direction and its
foreshortening: under an orthographic camera a bone of length l seen at an angle a from the image plane is l cos(a)
long there, so the same rotations of joints of another body are the same vectors, times the ratio of the two lengths.
`similarity` scales and shifts the driving poses to the reference in one frame, as simpler alignments do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from core.config import load_config
from core.errors import UserError, run_command
from core.files import check_paths
from data.config import RETARGET_MODES, RetargetConfig
from data.cuts import pose_jumps, shots
from data.poses.files import load_poses, save_openpose
from data.poses.lengths import HEAD, HIPS, PARTS, SHOULDERS, length_ratios, segment_lengths, unmeasured, with_middles
from data.poses.poses import Poses, local_lines
from data.transforms import fit_matrix, map_points

# Point: its parent and the part in between; from the hips' middle on, parents first.
_TREE = {
    SHOULDERS: (HIPS, "trunk"),
    11: (HIPS, "hips"),
    12: (HIPS, "hips"),
    13: (11, "thigh"),
    14: (12, "thigh"),
    15: (13, "shin"),
    16: (14, "shin"),
    HEAD: (SHOULDERS, "neck"),
    5: (SHOULDERS, "shoulders"),
    6: (SHOULDERS, "shoulders"),
    7: (5, "upper_arm"),
    8: (6, "upper_arm"),
    9: (7, "forearm"),
    10: (8, "forearm"),
    **{point: (HEAD, "head") for point in range(5)},
}
# Degrees from the image's down up to which a person's own down is taken to be that, and from which on it counts.
UPRIGHT, TURNED = 30.0, 60.0
STEADY = 0.5  # seconds (standard deviation) over which down, and the place of people without feet, are averaged
CROWN = 0.56  # of the neck's length, from shoulders to ears: how far above the ears the crown is


def retarget(
    driving: Poses,
    reference: Poses,
    mode: str = "bones",
    *,
    slots: np.ndarray | None = None,
    height_ratio: float = 1.0,
    reference_map: np.ndarray | None = None,
    threshold: float = 0.3,
    cuts: Sequence[int] = (),
) -> tuple[Poses, list[str]]:
    """Driving poses in the proportions of the reference's persons, and notes about what could not be done.

    Args:
        driving: poses of the clip; scores stay as they are.
        reference: poses of the reference image, one frame; its size and place count for `similarity` alone.
        mode: one of `RETARGET_MODES`.
        slots: (frames, reference persons) int, the slot of the driving poses that each person of the reference takes,
            -1 = absent; None: both from left to right. Others stay as they are.
        height_ratio: of `bones`, standing height of the result in the driver's; two pictures do not tell it.
        reference_map: of `similarity`, (3, 3) from the reference's pixels to the driving frame's; None: centred, as
            large as the frame shows it whole.
        threshold: keypoints with scores up to it are not measured, and move with their neighbours.
        cuts: first frames of the clip's shots after the first.
    """
    if mode not in RETARGET_MODES:
        raise ValueError(f"mode must be one of {RETARGET_MODES}, got {mode!r}")
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
            notes.append(f"person {person} of the reference is not in the driving poses")
            continue
        place = frames, slots[frames, person]
        points, scores = driving.keypoints[place].astype(np.float64), driving.scores[place]
        own, own_seen = reference.keypoints[0, person].astype(np.float64), reference.scores[0, person] > threshold
        if mode == "similarity":
            found = _aligned(points, scores > threshold, map_points(own, reference_map), own_seen)
        else:
            starts = np.searchsorted(frames, cuts)
            starts = np.unique(starts[(starts > 0) & (starts < len(frames))]).tolist()
            found = _with_lengths(points, scores > threshold, own, own_seen, height_ratio, driving.fps, starts)
        if isinstance(found, str):
            notes.append(f"person {person} is not retargeted: {found}")
            continue
        if mode == "bones" and (guessed := unmeasured(segment_lengths(*with_middles(own[None], own_seen[None])))):
            parts = ", ".join(guessed).replace("_", " ")
            notes.append(f"person {person}: the reference does not show {parts}; taken to be as people are")
        nowhere = (scores == 0) & (points == 0).all(-1)
        keypoints[place] = np.where(nowhere[..., None], 0, found)
    return Poses(keypoints, driving.scores, driving.size, driving.fps), notes


def left_to_right(driving: Poses, reference: Poses, threshold: float = 0.3) -> np.ndarray:
    """Slots (frames, reference persons) that give the persons of both their order from left to right."""
    orders = []
    for poses in (reference, driving):
        seen = poses.scores > threshold
        columns = [poses.keypoints[:, p, :, 0][seen[:, p]] for p in range(poses.persons)]
        orders.append(np.argsort([np.median(x) if len(x) else np.inf for x in columns], kind="stable"))
    slots = np.full((driving.frames, reference.persons), -1)
    for person, slot in zip(*orders, strict=False):
        slots[:, person] = np.where(driving.present(threshold)[:, slot], slot, -1)
    return slots


def _aligned(points: np.ndarray, seen: np.ndarray, own: np.ndarray, own_seen: np.ndarray) -> np.ndarray | str:
    """Points (f, 17, 2), scaled and shifted onto `own` (17, 2) in the first frame that shows most of both, or why not.

    Most is all that any frame does, or 13 keypoints, which a whole person has.
    """
    common = seen & own_seen
    counts = common.sum(1)
    if counts.max() < 2:
        return "no two keypoints are visible in both"
    first = int(np.argmax(counts >= min(counts.max(), 13)))
    source, target = points[first, common[first]], own[common[first]]
    middle, goal = source.mean(0), target.mean(0)
    sizes = [np.linalg.norm(each - each.mean(0)) for each in (source, target)]
    if min(sizes) < 1e-6:
        return "its keypoints lie on one point"
    return goal + (points - middle) * (sizes[1] / sizes[0])


def _with_lengths(
    points: np.ndarray,
    seen: np.ndarray,
    own: np.ndarray,
    own_seen: np.ndarray,
    height_ratio: float,
    fps: float,
    cuts: Sequence[int],
) -> np.ndarray | str:
    """Points (f, 17, 2) with bones as long as those of `own` (17, 2), or why not."""
    both, both_seen = with_middles(points, seen)
    own, own_seen = with_middles(own[None], own_seen[None])
    for what, known, measured in (
        ("the reference shows", own_seen, segment_lengths(own, own_seen)),
        ("no driving frame shows", both_seen, segment_lengths(both, both_seen)),
    ):
        trunk = known[:, SHOULDERS] & (known[:, HIPS] | known[:, HEAD])
        if not (trunk & (np.isfinite(measured).sum(1) > 1)).any():
            return f"{what} {'no ' if what.startswith('the') else ''}shoulders with hips or head"
    ratios = length_ratios(both, both_seen, own[0], own_seen[0], fps, cuts) * height_ratio
    parts = [placed(points[s], seen[s], ratios, STEADY * fps) for s in shots(len(points), cuts)]
    return np.concatenate(parts)


def placed(keypoints: np.ndarray, seen: np.ndarray, ratios: np.ndarray, steady: float) -> np.ndarray:
    """Keypoints (f, 17, 2) of a shot with bones times `ratios` (parts,), where such a person stands.

    The lower foot is as low as the driver's: a foot on the ground is, and jumps are as high. Across, the way of the
    hips is as much longer as legs and steps are, so that feet on the ground do not slide. Without feet, the crown
    stays where it was. `steady` frames are the standard deviation of averages over time.
    """
    points, known = with_middles(*filled(keypoints, seen))
    known = known[0]
    new = rebuilt(points, known, ratios)
    down = downwards(points, known, steady)  # (f, 2)
    across = np.stack([down[:, 1], -down[:, 0]], 1)
    feet = [foot for foot in (15, 16) if known[foot]]
    if feet and known[HIPS]:
        lowest = [np.einsum("fjx,fx->fj", p[:, feet] - points[:, HIPS, None], down).max(1) for p in (points, new)]
        stride = np.mean([ratios[PARTS.index(part)] for part in ("thigh", "shin")])
        way = np.einsum("fx,fx->f", points[:, HIPS] - np.median(points[:, HIPS], axis=0), across)
        moved = (lowest[0] - lowest[1])[:, None] * down + (way * (stride - 1))[:, None] * across
    else:
        end, scale = (HEAD, ratios[PARTS.index("head")]) if known[HEAD] else (SHOULDERS, 1)
        up = CROWN * (points[:, end] - points[:, SHOULDERS])
        moved = points[:, end] + up - new[:, end] - scale * up
        moved = local_lines(moved, np.ones_like(moved), steady)
    new += moved[:, None]
    # What is not seen keeps its place beside where it would be.
    own = np.array([ratios[PARTS.index(_TREE[point][1])] for point in range(17)])
    return new[:, :17] + own[:, None] * (keypoints - points[:, :17])


def filled(keypoints: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints (f, 17, 2) in lines over the frames in which they are not seen, and which (f, 17) are in any."""
    frames, points = np.arange(len(keypoints)), keypoints.copy()
    for point in np.flatnonzero(seen.any(0) & ~seen.all(0)):
        known = seen[:, point]
        for axis in range(2):
            points[:, point, axis] = np.interp(frames, frames[known], keypoints[known, point, axis])
    return points, np.tile(seen.any(0), (len(keypoints), 1))


def rebuilt(points: np.ndarray, known: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """Points (f, 20, 2) of the skeleton with bones times `ratios` (parts,), whose root stays in its place.

    The root is the first of `known` (20,) of the middles of hips, shoulders and head. A point hangs on the nearest of
    its ancestors that is known, by the mean ratio of the bones in between, else on the root.
    """
    new = points.copy()
    root = next((middle for middle in (HIPS, SHOULDERS, HEAD) if known[middle]), HIPS)
    for point, (parent, part) in _TREE.items():
        if point == root:
            continue
        chain = [ratios[PARTS.index(part)]]
        while not known[parent] and parent in _TREE:
            parent, part = _TREE[parent]
            chain.append(ratios[PARTS.index(part)])
        parent = parent if known[parent] else root
        new[:, point] = new[:, parent] + np.mean(chain) * (points[:, point] - points[:, parent])
    return new


def downwards(points: np.ndarray, known: np.ndarray, steady: float) -> np.ndarray:
    """(f, 2) unit vectors that point where the person stands: down in the image, unless the person is turned in it."""
    angle = np.zeros(len(points))
    ends = [foot for foot in (15, 16) if known[foot]] or ([HIPS] if known[HIPS] else [])
    if ends and known[SHOULDERS]:
        axis = points[:, ends].mean(1) - points[:, SHOULDERS]
        axis = local_lines(axis, np.ones_like(axis), steady)
        angle = np.arctan2(axis[:, 0], axis[:, 1])  # from the image's down
        angle *= np.clip((abs(np.degrees(angle)) - UPRIGHT) / (TURNED - UPRIGHT), 0, 1)
    return np.stack([np.sin(angle), np.cos(angle)], 1)


def main(arguments: list[str]) -> None:
    config = load_config(RetargetConfig, arguments, about=__doc__)
    check_paths({name: getattr(config, name) for name in ("reference_poses", "driving_poses")})
    output = Path(config.output)
    if output.suffix.lower() not in (".npz", ".json"):
        raise UserError(f"output={output} must end in .npz, or in .json for OpenPose's format")
    sizes = (None if size is None else tuple(size) for size in (config.reference_size, config.driving_size))
    reference = load_poses(config.reference_poses, next(sizes), argument="reference_poses")
    driving = load_poses(config.driving_poses, next(sizes), config.fps, argument="driving_poses")
    if reference.frames != 1:
        raise UserError(f"reference_poses={config.reference_poses} has {reference.frames} frames; a picture has one")
    poses, notes = retarget(
        driving,
        reference,
        config.mode,
        height_ratio=config.height_ratio,
        cuts=pose_jumps(driving.keypoints, driving.scores),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    (poses.save if output.suffix.lower() == ".npz" else partial(save_openpose, poses))(output)
    print(f"{output}: {poses.frames} frames of {poses.persons} persons")
    for note in notes:
        print(f"note: {note}")


if __name__ == "__main__":
    run_command(main)
