"""Calibrated references of a picture and a clip that a program holds as arrays, such as a node of ComfyUI."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import cv2
import numpy as np

from core.errors import UserError
from data.config import PoseConfig
from data.cuts import PictureChanges, pose_jumps
from data.inputs import fitting_poses
from data.poses.files import parse_poses
from data.poses.person import PackedMasks
from data.poses.poses import PoseEstimator, Poses, estimate_image, estimate_poses, open_estimator
from data.transforms import fit_matrix
from tpc.calibration import calibrate
from tpc.config import CalibrationConfig
from tpc.export.segments import Segment, segment_fill, segment_notes, segment_reference, segment_references, split
from tpc.report import draw_report
from tpc.result import Calibration
from tpc.silhouettes import draw_silhouettes

FPS = 25.0  # of frames that come without a rate, which smoothing asks for

Progress = Callable[[Iterable], Iterable]


@dataclass(frozen=True)
class SegmentReferences:
    """One calibrated reference for each segment of a clip, made when it is asked for by its number."""

    calibration: Calibration
    segments: list[Segment]
    reference: np.ndarray  # (h, w, 3) uint8, the original
    reference_poses: Poses
    reference_masks: np.ndarray | None  # (persons, h, w) bool
    driving: Sequence[np.ndarray] | None  # frames
    driving_poses: Poses

    def __len__(self) -> int:
        return len(self.segments)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """A calibrated reference (h, w, 3) uint8, and whom it shows where, (persons, h, w) bool.

        Where nobody is calibrated it is the reference as it was, fitted into the frame.
        """
        return segment_reference(self.calibration, self.segments[number], self.reference, self.reference_masks)

    def report(self) -> np.ndarray:
        """(h, w, 3) uint8: see `draw_report`."""
        return draw_report(self.calibration, self.reference, self.reference_poses, self.driving_poses, self.driving)

    def notes(self) -> list[str]:
        """Sentences: who was found and calibrated, and what to know before the references are used."""
        found = {"reference": self.reference_poses, "driving clip": self.driving_poses}
        notes = [f"no person was found in the {name}" for name, poses in found.items() if not poses.present().any()]
        (width, height), shape = self.calibration.size, self.driving_poses.size
        if max(width * shape[1], height * shape[0]) > 1.02 * min(width * shape[1], height * shape[0]):
            notes.append(f"driving frames of {shape[0]} x {shape[1]} are cut to the shape of {width} x {height}")
        notes += self.calibration.notes() + segment_notes(self.segments, self.calibration.cuts)
        return [self.calibration.outcome(), *notes]


def calibrate_segments(
    reference: np.ndarray,
    driving: Sequence[np.ndarray] | None = None,
    *,
    reference_keypoints: list[dict] | None = None,
    driving_keypoints: list[dict] | None = None,
    reference_mask: np.ndarray | None = None,
    driving_masks: Sequence[np.ndarray] | None = None,
    size: tuple[int, int] = (0, 0),
    length: int | None = None,
    overlap: int = 0,
    config: CalibrationConfig | None = None,
    pose: PoseConfig | None = None,
    progress: Progress = iter,
) -> SegmentReferences:
    """A reference for each segment of `length` frames (None: the clip), each repeating `overlap` of the one before.

    Persons are estimated where no keypoints are given; nobody need be in the picture or in the clip.

    Args:
        reference, driving: (h, w, 3) and each (H, W, 3) uint8 RGB; driving None = keypoints alone.
        reference_keypoints, driving_keypoints: a dictionary a frame as OpenPose writes them, in pixels or in [0, 1].
        reference_mask: (h, w) bool of all persons, instead of the estimator's; driving_masks: each (H, W) likewise, as
            many as frames, or one for all.
        size: (width, height) of the images, which the driving frames fill; 0 = as the other side and the frames say.
        progress: wraps the frames in which poses are estimated and, after them, the numbers of those calibrated.

    Raises:
        UserError: keypoints, masks and frames that do not belong together; `overlap` that is not below `length`.
    """
    split(1, length, overlap)  # whose errors need not wait for the poses
    pose, config = pose or PoseConfig(), config or CalibrationConfig()
    estimator = cache(lambda: open_estimator(pose))
    image_size = (reference.shape[1], reference.shape[0])
    if reference_keypoints is None:
        estimate = estimate_image(reference, estimator(), pose.max_persons)
        reference_poses, masks = estimate.poses, None if estimate.masks is None else estimate.masks[0]
    else:
        reference_poses, masks = parse_poses(reference_keypoints, image_size, argument="reference_keypoints")[:1], None
        reference_poses = fitting_poses(reference_poses, image_size, "reference_keypoints")
        reference_poses = first_persons(reference_poses, pose.max_persons)
    if reference_mask is not None:
        masks = persons_masks([reference_mask], reference_poses)[0]
    driving_poses, targets, cuts = read_driving(driving, driving_keypoints, estimator, pose, progress)
    if driving_masks is not None:
        targets = persons_masks(driving_masks, driving_poses)
    size = frame_size(size, driving_poses.size)
    config = replace(config, fill=segment_fill(config, length, driving_poses.frames, reference_poses.persons))
    calibration = calibrate(
        reference,
        reference_poses,
        driving_poses,
        size,
        config,
        reference_masks=masks,
        driving_masks=targets,
        frame_map=fit_matrix(driving_poses.size, size, "cover"),  # as models that are given a size cut the pose video
        reference_map=fit_matrix(image_size, size, "cover"),  # the scene without borders
        progress=progress,
        cuts=cuts,
    )
    segments = segment_references(calibration, length, overlap)
    return SegmentReferences(calibration, segments, reference, reference_poses, masks, driving, driving_poses)


def read_driving(
    frames: Sequence[np.ndarray] | None,
    keypoints: list[dict] | None,
    estimator: Callable[[], PoseEstimator],
    pose: PoseConfig,
    progress: Progress,
) -> tuple[Poses, PackedMasks | None, list[int]]:
    """Poses of a clip, given or estimated, masks where they are estimated, and cuts."""
    changes, masks = PictureChanges(), None
    if keypoints is not None:
        size = None if frames is None else (frames[0].shape[1], frames[0].shape[0])
        poses = first_persons(parse_poses(keypoints, size, FPS, "driving_keypoints"), pose.max_persons)
        if frames is not None:
            if poses.frames != len(frames):
                raise UserError(f"driving_keypoints are of {poses.frames} frames, the driving clip has {len(frames)}")
            poses = fitting_poses(poses, size, "driving_keypoints")
            changes.over(frames)
    elif frames is not None:
        estimate = estimate_poses(changes.watch(progress(frames)), FPS, estimator(), pose.max_persons)
        poses, masks = estimate.poses, estimate.masks
    else:
        raise UserError("give driving frames, or driving keypoints")
    cuts = pose_jumps(poses.keypoints, poses.scores)
    if frames is not None:
        cuts = changes.cuts(cuts)
    return poses if keypoints is not None else poses.smoothed(pose.smoothing, cuts), masks, cuts


def first_persons(poses: Poses, count: int) -> Poses:
    """The `count` persons who are in most frames, in their order."""
    kept = np.sort(np.argsort(-poses.present().sum(0), kind="stable")[:count])
    return Poses(poses.keypoints[:, kept], poses.scores[:, kept], poses.size, poses.fps)


def persons_masks(masks: Sequence[np.ndarray], poses: Poses) -> PackedMasks:
    """(frames, persons, h, w) of masks of everybody (h, w) bool, one a frame or one for all; resized to the picture.

    Of several persons each has what lies nearest to the body drawn around the keypoints.
    """
    if len(masks) not in (1, poses.frames):
        raise UserError(f"there are masks of {len(masks)} frames, and poses of {poses.frames}")
    result = PackedMasks.zeros((poses.frames, poses.persons), poses.size)
    for frame in range(poses.frames):
        mask = np.asarray(masks[frame if len(masks) > 1 else 0]).astype(np.uint8)
        if mask.shape[::-1] != poses.size:
            mask = cv2.resize(mask, poses.size, interpolation=cv2.INTER_NEAREST)
        present = np.flatnonzero(poses.present()[frame])
        if len(present) == 1:
            result[frame, present[0]] = mask > 0
        elif len(present) > 1:
            bodies = draw_silhouettes(poses[frame], threshold=0.0)[0, present].astype(np.uint8)
            nearest = np.argmin([cv2.distanceTransform(1 - body, cv2.DIST_L2, 5) for body in bodies], axis=0)
            for number, person in enumerate(present):
                result[frame, person] = (mask > 0) & (nearest == number)
    return result


def frame_size(wanted: tuple[int, int], driving: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the images; of `wanted` a 0 is what the other, or the driving frame, asks for."""
    width, height = wanted
    scale = width / driving[0] if width else height / driving[1] if height else 1.0
    return width or max(1, round(driving[0] * scale)), height or max(1, round(driving[1] * scale))
