"""Misalignment of a reference and a clip: the paper's relative angle and box IoU, and the kinds of misalignment.

Whether a frame is misaligned is the paper's definition: angle or box IoU. Why is told by undoing shift, scale and turn
of the keypoints that both show. The paper's kinds are rotation and scale; boxes can also lie apart because of a shift
alone, or, when undoing all three does not help, because pose or visible parts of the body differ.
"""

from dataclasses import dataclass

import numpy as np

from core.errors import UserError
from data.poses.person import box_iou
from data.poses.poses import Poses
from evaluation.clips import PosedClipSet
from evaluation.config import ThresholdConfig
from tpc.procrustes import SimilarityTransform
from tpc.silhouettes import head_axis, keypoint_box, relative_angle, visible

ROTATION, SCALE, SHIFT, POSE = CAUSES = ("rotation", "scale", "shift", "pose or crop")
KINDS = tuple(f"{when} {cause}" for cause in CAUSES for when in ("temporal", "consistent"))
SUBSETS = ("original", "misaligned")
UNSEEN = "unseen"  # the subset of clips without a frame that can be compared
FEWEST_COMMON = 3  # keypoints that reference and frame must both show to be compared


@dataclass(frozen=True)
class Misalignment:
    """A reference against every frame of a clip, arrays (frames,); NaN where too little is seen to compare them."""

    # Radians in [-pi, pi], from the reference's pelvis-to-nose line to the frame's, as in the paper; where that line
    # is not seen, the rotation that fits the keypoints of both best (Procrustes)
    angle: np.ndarray
    by_points: np.ndarray  # bool, the angle is of the second kind
    box_iou: np.ndarray  # of the boxes around the visible keypoints, the paper's scale
    scale: np.ndarray  # size of the frame's person over the reference's: root mean square distance from the centroid
    # IoU of the boxes around the keypoints that both show; the same after the reference was shifted to the frame's
    # centroid; after it was resized as well; after it was turned as well
    shared_iou: np.ndarray
    unshifted_iou: np.ndarray
    unscaled_iou: np.ndarray
    undone_iou: np.ndarray


@dataclass(frozen=True)
class ClipSplit:
    """The subset that a clip belongs to."""

    name: str
    misaligned: bool | None  # or original; None when no frame can be compared
    kinds: tuple[str, ...]  # of `KINDS`, those that apply
    angle_deg: float | None  # median over compared frames of the absolute `Misalignment.angle`
    box_iou: float | None  # median over compared frames
    misaligned_frames: int
    frames: int  # of the clip, those too that could not be compared
    unseen_frames: int  # in which nobody, or too little, is seen to compare; no share counts them
    angles_by_points: int  # compared frames whose angle is not that of the pelvis-to-nose line

    @property
    def subset(self) -> str:
        """One of `SUBSETS`, or `UNSEEN`."""
        return UNSEEN if self.misaligned is None else SUBSETS[self.misaligned]


def misalignment(reference: Poses, driving: Poses, score: float = 0.3) -> Misalignment:
    """Compare a reference, one frame, with a clip; person 0 of both, in images that are brought to one size."""
    if reference.size != driving.size:
        reference = reference.resized(driving.size)
    points = reference.keypoints[0, 0].astype(np.float64)
    known = visible(reference.scores[0, 0], points, score)
    target = driving.keypoints[:, 0].astype(np.float64)
    target_known = visible(driving.scores[:, 0], target, score)
    common = known & target_known  # (frames, 17)

    angle = relative_angle(head_axis(points, known), head_axis(target, target_known))
    by_points = np.isnan(angle)
    fitted = SimilarityTransform.from_estimate(points, target, common.astype(np.float64))
    seen = (common.sum(-1) >= FEWEST_COMMON) & (fitted.valid if fitted else False)
    angle = np.where(by_points, fitted.rotation if fitted else np.nan, angle)

    source, aim = _centred(points, common), _centred(target, common)  # (frames, 17, 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.sqrt((aim**2).sum((-2, -1)) / (source**2).sum((-2, -1)))
    resized = source * scale[:, None, None]
    cosine, sine = np.cos(angle), np.sin(angle)
    turn = np.stack([np.stack([cosine, sine], -1), np.stack([-sine, cosine], -1)], -2)  # (frames, 2, 2)
    aim_box = keypoint_box(aim, common)
    boxes = [
        box_iou(keypoint_box(points, known), keypoint_box(target, target_known)),
        box_iou(keypoint_box(points, common), keypoint_box(target, common)),
        *(box_iou(keypoint_box(shape, common), aim_box) for shape in (source, resized, resized @ turn)),
    ]
    angle, scale, box, *shared = (np.where(seen, values, np.nan) for values in (angle, scale, *boxes))
    return Misalignment(angle, by_points & seen, box, scale, *shared)


def _centred(points: np.ndarray, common: np.ndarray) -> np.ndarray:
    """Points (..., 17, 2) from the centroid of those in `common`, (frames, 17); 0 for the others."""
    weights = common[..., None] / np.maximum(common.sum(-1), 1)[:, None, None]
    centroid = np.where(common[..., None], points * weights, 0).sum(-2, keepdims=True)
    return np.where(common[..., None], points - centroid, 0)


def classify(name: str, measured: Misalignment, thresholds: ThresholdConfig) -> ClipSplit:
    """Original or misaligned, and in which way."""
    seen = ~np.isnan(measured.angle)
    causes = _causes(measured, thresholds)
    misaligned = np.any(list(causes.values()), axis=0)
    is_misaligned = bool(misaligned[seen].mean() >= thresholds.share) if seen.any() else None
    kinds: tuple[str, ...] = ()
    if is_misaligned:
        shares = {cause: float(frames[seen].mean()) for cause, frames in causes.items()}
        # Where no cause alone is frequent enough, the most frequent one.
        frequent = [c for c in CAUSES if shares[c] >= thresholds.share] or [max(CAUSES, key=shares.__getitem__)]
        lasting = {True: "consistent", False: "temporal"}
        kinds = tuple(f"{lasting[shares[cause] >= thresholds.consistent_share]} {cause}" for cause in frequent)
    return ClipSplit(
        name,
        is_misaligned,
        kinds,
        _median(np.degrees(np.abs(measured.angle))),
        _median(measured.box_iou),
        int(misaligned.sum()),
        len(seen),
        int((~seen).sum()),
        int(measured.by_points.sum()),
    )


def _causes(measured: Misalignment, thresholds: ThresholdConfig) -> dict[str, np.ndarray]:
    """Cause -> (frames,) bool: misaligned frames that it accounts for; each has one cause at least, others none."""
    lowest = thresholds.box_iou
    with np.errstate(invalid="ignore", divide="ignore"):
        turned, apart = np.abs(measured.angle) > thresholds.angle, measured.box_iou < lowest
        explained = measured.undone_iou >= lowest  # by a turn, a scale and a shift together
        # A box resized about its centre has this IoU with itself.
        scaled = (turned | apart) & (np.minimum(measured.scale, 1 / measured.scale) ** 2 < lowest)
        turned = turned | (apart & explained & (measured.unscaled_iou < lowest))
        rest = apart & ~turned & ~scaled
        rest &= ~(cropped := rest & (measured.shared_iou >= lowest))
        shifted = rest & (measured.unshifted_iou >= lowest)
    # A turn and a scale that only together take the boxes apart.
    both = rest & ~shifted & explained
    posed = cropped | (rest & ~shifted & ~explained)
    return {ROTATION: turned | both, SCALE: scaled | both, SHIFT: shifted, POSE: posed}


def split_clips(clips: PosedClipSet, thresholds: ThresholdConfig) -> dict[str, ClipSplit]:
    """The subset of every clip by name.

    Raises:
        UserError: no clip has a frame that can be compared with its reference.
    """
    found = {
        name: classify(name, misalignment(*clips.poses(name), thresholds.score), thresholds) for name in clips.names
    }
    if all(split.misaligned is None for split in found.values()):
        raise UserError(
            f"none of {len(found)} clips has a frame that shows {FEWEST_COMMON} keypoints of its reference, both with "
            f"scores above thresholds.score={thresholds.score}"
        )
    return found


def _median(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return round(float(np.median(known)), 4) if len(known) else None
