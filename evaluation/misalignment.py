"""Misalignment of a reference and a clip: the paper's relative angle and box IoU, and the kinds of misalignment."""

from dataclasses import dataclass

import numpy as np

from core.errors import UserError
from data.poses.person import box_iou
from data.poses.poses import Poses
from tpc.silhouettes import LEFT_HIP, RIGHT_HIP, head_axis, keypoint_box, relative_angle, visible

KINDS = ("temporal rotation", "consistent rotation", "temporal scale", "consistent scale")
SUBSETS = ("original", "misaligned")


@dataclass
class ThresholdConfig:
    """Thresholds above which a clip counts as misaligned."""

    # radians between the pelvis-to-nose lines above which a frame is misaligned (paper: pi/6)
    angle: float = float(np.pi / 6)
    box_iou: float = 0.7  # IoU of the persons' boxes below which it is (paper: 0.7)
    share: float = 0.25  # of a clip's frames that must be misaligned for the clip to be
    consistent_share: float = 0.75  # of a clip's frames above which a kind is consistent and not temporal
    score: float = 0.3  # a keypoint is visible when its score is above it

    def check(self) -> None:
        for name, high in (("angle", np.pi), ("box_iou", 1), ("share", 1), ("consistent_share", 1), ("score", 1)):
            value = getattr(self, name)
            if not 0 <= value <= high:
                raise UserError(f"{name}={value} must be in 0 to {high:.4g}")
        if self.share > self.consistent_share:
            raise UserError("share must not be above thresholds.consistent_share")


@dataclass(frozen=True)
class Misalignment:
    """A reference against every frame of a clip; NaN where keypoints are missing."""

    angle: np.ndarray  # (frames,) radians in [-pi, pi], from the reference's pelvis-to-nose line to the frame's
    box_iou: np.ndarray  # (frames,) of the boxes around the visible keypoints
    # (frames,) the same after the reference was turned by `angle` about its pelvis: what the angle does not explain
    unturned_iou: np.ndarray


@dataclass(frozen=True)
class ClipSplit:
    """The subset that a clip belongs to."""

    name: str
    misaligned: bool  # or original
    kinds: tuple[str, ...]  # of `KINDS`, those that apply
    angle_deg: float | None  # median over frames of the absolute angle, None when it is never known
    box_iou: float | None  # median over frames
    misaligned_frames: int  # of how many frames
    frames: int

    @property
    def subset(self) -> str:
        """One of `SUBSETS`."""
        return SUBSETS[self.misaligned]


def misalignment(reference: Poses, driving: Poses, score: float = 0.3) -> Misalignment:
    """Compare a reference, one frame, with a clip; person 0 of both, in images that are brought to one size."""
    if reference.size != driving.size:
        reference = reference.resized(driving.size)
    points = reference.keypoints[0, 0].astype(np.float64)
    known = visible(reference.scores[0, 0], points, score)
    target = driving.keypoints[:, 0].astype(np.float64)
    target_known = visible(driving.scores[:, 0], target, score)
    target_box = keypoint_box(target, target_known)
    angle = relative_angle(head_axis(points, known), head_axis(target, target_known))
    pelvis = points[[LEFT_HIP, RIGHT_HIP]].mean(axis=0)
    cosine, sine = np.cos(angle), np.sin(angle)
    turn = np.stack([np.stack([cosine, sine], -1), np.stack([-sine, cosine], -1)], -2)  # (frames, 2, 2)
    turned = (points - pelvis) @ turn + pelvis  # (frames, 17, 2)
    box, unturned = box_iou(keypoint_box(points, known), target_box), box_iou(keypoint_box(turned, known), target_box)
    # A reference that is not turned at all is compared as it is.
    return Misalignment(angle, box, np.where(np.isnan(angle), box, unturned))


def classify(name: str, measured: Misalignment, thresholds: ThresholdConfig) -> ClipSplit:
    """Original or misaligned, and in which way."""
    with np.errstate(invalid="ignore"):
        turned = np.abs(measured.angle) > thresholds.angle
        apart = measured.box_iou < thresholds.box_iou
        scaled = measured.unturned_iou < thresholds.box_iou
    misaligned = turned | apart
    is_misaligned = bool(misaligned.mean() >= thresholds.share)
    kinds: tuple[str, ...] = ()
    if is_misaligned:
        # Where neither alone is frequent enough, the boxes decide.
        kinds = _kinds("rotation", turned, thresholds) + _kinds("scale", scaled, thresholds)
        kinds = kinds or _kinds("scale", apart, thresholds) or ("temporal scale",)
    return ClipSplit(
        name,
        is_misaligned,
        kinds,
        _median(np.degrees(np.abs(measured.angle))),
        _median(measured.box_iou),
        int(misaligned.sum()),
        len(misaligned),
    )


def _kinds(change: str, frames: np.ndarray, thresholds: ThresholdConfig) -> tuple[str, ...]:
    """The kind of a change that holds in some frames, (frames,) bool; none when they are few."""
    if frames.mean() < thresholds.share:
        return ()
    return (f"consistent {change}" if frames.mean() >= thresholds.consistent_share else f"temporal {change}",)


def _median(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return round(float(np.median(known)), 4) if len(known) else None
