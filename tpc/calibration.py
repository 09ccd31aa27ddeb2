"""Test-time Procrustes calibration of a reference image to a driving clip.

Keypoints of both -> who is who (`matching`) -> a transform for every person and frame, each judged (`estimation`) ->
gaps bridged and noise filtered (`trajectory`) -> images and masks (`warping`) -> a `Calibration` (`result`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from data.cuts import pose_jumps
from data.poses.person import COCO_MIRROR, box_iou
from data.poses.poses import Poses
from data.transforms import fit_matrix
from tpc.bends.bending import Bends, bend
from tpc.bends.layers import build_layers
from tpc.bends.parts import NAMES
from tpc.config import CalibrationConfig, resolve
from tpc.estimation import Estimate, ReferencePerson, estimate_clip
from tpc.matching import match_persons
from tpc.procrustes import SimilarityTransform, apply_matrix, residual
from tpc.result import Calibration, PersonFrame
from tpc.silhouettes import TORSO, draw_silhouette, head_axis, keypoint_box, relative_angle, visible
from tpc.trajectory import Track, follow, partway
from tpc.warping import Framing, mask_pyramid, warp_clip, warp_mask

Progress = Callable[[Iterable[int]], Iterable[int]]


def calibrate(
    reference: np.ndarray,
    reference_poses: Poses,
    driving_poses: Poses,
    size: tuple[int, int],
    config: CalibrationConfig | None = None,
    *,
    reference_masks: np.ndarray | None = None,
    driving_masks: Sequence[np.ndarray] | np.ndarray | None = None,
    frame_map: np.ndarray | SimilarityTransform | None = None,
    reference_map: np.ndarray | SimilarityTransform | None = None,
    progress: Progress | None = None,
    cuts: Sequence[int] | None = None,
) -> Calibration:
    """Carry the persons of a reference image to where they are in every frame of a driving clip.

    Convention: pixels (x, y), y down, pixel centres at integers. Calibrated images are resampled once, straight from
    the original reference to the model's frame.

    Args:
        reference: (h, w, 3) uint8 RGB, the original image; reference_poses: its persons, one frame.
        driving_poses: persons of the clip, in original driving pixels.
        size: (width, height) of the model's frame.
        reference_masks: (persons, h, w) bool in the order of the poses; None = drawn around the keypoints.
        driving_masks: for every frame (persons, H, W) bool in the order of the poses, any sequence of which one frame
            is read at a time; None, or an empty mask = drawn.
        frame_map, reference_map: (3, 3) similarities from the original images to the model's; None = fitted, centred.
        progress: wraps the loop over frames, such as `tqdm`.
        cuts: first frames of the clip's shots after the first, over which nothing is bridged, smoothed or propagated;
            None = where the poses jump.

    Raises:
        UserError: a value in `config` that is not allowed.
        ValueError: shapes or sizes that do not belong together.
    """
    start = time.perf_counter()
    config = resolve(config, masked=reference_masks is not None)
    _check(reference, reference_poses, driving_poses, size, reference_masks, driving_masks)
    framing = Framing(
        (int(size[0]), int(size[1])),
        _map("frame_map", frame_map, driving_poses.size, size),
        _map("reference_map", reference_map, reference_poses.size, size),
    )
    if config.driving_silhouette == "drawn":
        driving_masks = None
    persons, masks = _reference_persons(reference_poses, reference_masks, config)
    cuts = tuple(pose_jumps(driving_poses.keypoints, driving_poses.scores) if cuts is None else cuts)
    slots = match_persons(persons, driving_poses, config, cuts)
    order = progress(range(len(slots))) if progress else range(len(slots))
    estimates, targets, others = estimate_clip(persons, driving_poses, slots, driving_masks, framing, config, order)
    found = [[row[p].matrix for row in estimates] for p in range(len(persons))]
    tracks = [follow(part, person.centre, config, cuts) for part, person in zip(found, persons, strict=True)]
    bends, layers = None, []
    if config.transform == "articulated":
        poses = [[row[p].pose for row in estimates] for p in range(len(persons))]
        bends = [bend(q.keypoints, q.seen, poses[p], tracks[p], config, cuts) for p, q in enumerate(persons)]
        layers = [
            build_layers(q.keypoints, q.seen, q.scores, mask, config.bend_radius, reference)
            if bends[p].bent.any()
            else []
            for p, (q, mask) in enumerate(zip(persons, masks, strict=True))
        ]
    uncalibrated = np.linalg.inv(framing.frame_map) @ framing.reference_map
    placed = [partway(track, uncalibrated, q.centre, config) for track, q in zip(tracks, persons, strict=True)]
    warped = warp_clip(reference, masks, tracks, placed, targets, framing, config, bends, layers, cuts)

    def record(frame: int, p: int) -> PersonFrame:
        estimate, slot, iou = estimates[frame][p], int(slots[frame, p]), warped.iou[frame, p]
        found = _record(p, persons[p], placed[p], frame, estimate, slot, driving_poses, iou, framing, config)
        return found if warped.bends is None else _with_parts(found, warped.bends[p], placed[p], frame)

    model_masks = [warp_mask(mask_pyramid(mask), framing.reference_map, framing.size) for mask in masks]
    return Calibration(
        config=config,
        size=framing.size,
        reference_size=(reference.shape[1], reference.shape[0]),
        driving_size=tuple(driving_poses.size),
        frame_map=framing.frame_map,
        fps=float(driving_poses.fps),
        images=warped.images,
        masks=warped.masks,
        member=warped.member,
        matrices=np.stack([t.matrices for t in placed], 1) if placed else np.zeros((len(slots), 0, 3, 3)),
        records=tuple(tuple(record(frame, p) for p in range(len(persons))) for frame in range(len(slots))),
        target_masks=targets,
        other_masks=others,
        reference_masks=np.array(model_masks, bool).reshape(-1, *framing.size[::-1]),
        seconds=time.perf_counter() - start,
        cuts=cuts,
    )


def _reference_persons(
    poses: Poses, given: np.ndarray | None, config: CalibrationConfig
) -> tuple[list[ReferencePerson], np.ndarray]:
    """The persons, and their masks (persons, h, w) bool: those given, or drawn around the keypoints."""
    width, height = poses.size
    count = poses.keypoints.shape[1]
    masks = np.zeros((count, height, width), bool) if given is None else np.asarray(given).astype(bool)
    persons = []
    for p in range(count):
        person = ReferencePerson.of(
            poses.keypoints[0, p],
            poses.scores[0, p],
            poses.size,
            None if given is None else masks[p],
            config.reference_score_threshold,
        )
        persons.append(person)
        if given is None:
            masks[p] = draw_silhouette(person.keypoints, person.seen, poses.size)
    return persons, masks


def _record(
    index: int,
    person: ReferencePerson,
    track: Track,
    frame: int,
    estimate: Estimate,
    slot: int,
    poses: Poses,
    iou: float,
    framing: Framing,
    config: CalibrationConfig,
) -> PersonFrame:
    """One person in one frame, for `calibration.json`; slot -1 = the person is not in the frame."""
    facts = {"slot": None if slot < 0 else int(slot), "common": estimate.common, "mirrored": estimate.mirrored}
    if slot >= 0:
        keypoints = poses.keypoints[frame, slot].astype(np.float64)
        seen = visible(poses.scores[frame, slot], keypoints, config.score_threshold)
        facts |= _misalignment(person, keypoints, seen, framing)
    if not track.available[frame]:
        return PersonFrame(index, "uncalibrated", estimate.reason, **facts)
    matrix, error = track.matrices[frame], None
    if estimate.keypoints and slot >= 0:
        weights = np.zeros(len(person.seen))
        weights[list(estimate.keypoints)] = 1
        source = person.keypoints[COCO_MIRROR] if estimate.mirrored else person.keypoints
        error = round(float(residual(matrix, source, keypoints, weights)), 4)
    return PersonFrame(
        index,
        "calibrated" if track.calibrated[frame] else "interpolated",
        estimate.reason,
        matrix=matrix.tolist(),
        scale=float(np.sqrt(abs(np.linalg.det(matrix[:2, :2])))),
        rotation_deg=float(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0]))),
        keypoints=estimate.keypoints,
        residual_px=error,
        mask_iou=None if np.isnan(iou) else round(float(iou), 4),
        **facts,
    )


def _with_parts(record: PersonFrame, bends: Bends, track: Track, frame: int) -> PersonFrame:
    """The record with the maps of the parts, where the person bends, or the reason why it does not."""
    if not bends.bent[frame]:
        reasons = [reason for reason in (record.reason, bends.reasons[frame]) if reason]
        return replace(record, reason="; ".join(reasons) or None)
    matrices = track.matrices[frame] @ bends.matrices[frame]
    following = tuple(name for name, follows in zip(NAMES, bends.follows[frame], strict=True) if follows)
    return replace(record, parts=dict(zip(NAMES, matrices.tolist(), strict=True)), following=following)


def _misalignment(
    person: ReferencePerson, keypoints: np.ndarray, seen: np.ndarray, framing: Framing
) -> dict[str, float]:
    """The paper's two measures of misalignment before calibration, and the torso's scale; those that are known."""
    angle = relative_angle(head_axis(person.keypoints, person.seen), head_axis(keypoints, seen))
    boxes = (
        keypoint_box(apply_matrix(framing.reference_map, person.keypoints), person.seen),
        keypoint_box(apply_matrix(framing.frame_map, keypoints), seen),
    )
    torso = np.isin(np.arange(len(person.seen)), TORSO) & person.seen & seen
    similarity = SimilarityTransform.from_estimate(person.keypoints, keypoints, torso)
    measures = {
        "relative_angle_deg": round(float(np.degrees(angle)), 3),
        "box_iou": round(float(box_iou(*boxes)), 4),
        "torso_scale": round(float(similarity.scale), 4) if torso.sum() == len(TORSO) and similarity else np.nan,
    }
    return {name: value for name, value in measures.items() if not np.isnan(value)}


def _map(name: str, value: np.ndarray | SimilarityTransform | None, source: tuple, size: tuple) -> np.ndarray:
    if value is None:
        return fit_matrix(source, size, "contain")
    matrix = np.asarray(getattr(value, "matrix", value), np.float64)
    if matrix.shape != (3, 3):
        raise ValueError(f"{name} must be (3, 3), got {matrix.shape}")
    SimilarityTransform.from_matrix(matrix)  # raises when it is not a similarity
    return matrix


def _check(
    reference: np.ndarray,
    reference_poses: Poses,
    driving_poses: Poses,
    size: tuple[int, int],
    reference_masks: np.ndarray | None,
    driving_masks: Sequence[np.ndarray] | None,
) -> None:
    if reference.dtype != np.uint8 or reference.ndim != 3 or reference.shape[2] != 3 or reference.size == 0:
        raise ValueError(f"reference must be (h, w, 3) uint8, got {reference.shape} {reference.dtype}")
    height, width = reference.shape[:2]
    if tuple(reference_poses.size) != (width, height):
        raise ValueError(f"reference_poses are for {tuple(reference_poses.size)}, the reference is {(width, height)}")
    if len(reference_poses.keypoints) != 1:
        raise ValueError(f"reference_poses must hold one frame, got {len(reference_poses.keypoints)}")
    if len(driving_poses.keypoints) == 0:
        raise ValueError("driving_poses hold no frame")
    if min(size) < 1:
        raise ValueError(f"size must be positive (width, height), got {tuple(size)}")
    persons = reference_poses.keypoints.shape[1]
    if reference_masks is not None and np.shape(reference_masks) != (persons, height, width):
        raise ValueError(f"reference_masks must be {(persons, height, width)}, got {np.shape(reference_masks)}")
    if driving_masks is None:
        return
    frames, slots = driving_poses.keypoints.shape[:2]
    if len(driving_masks) != frames:
        raise ValueError(f"driving_masks must be for {frames} frames, got {len(driving_masks)}")
    expected = (slots, driving_poses.size[1], driving_poses.size[0])
    if np.shape(driving_masks[0]) != expected:
        raise ValueError(f"driving_masks must be {expected} for every frame, got {np.shape(driving_masks[0])}")
