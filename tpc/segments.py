"""The calibrated image that stands for a segment of a clip: for models that take one reference for many frames."""

from collections.abc import Sequence
from typing import Protocol

import cv2
import numpy as np

from tpc.config import CalibrationConfig
from tpc.warping import continued, quad_mask

RULES = ("nearest", "median", "first")
SIDE = 64  # pixels of the longer side at which silhouettes are compared


class CalibratedFrames(Protocol):
    """What is asked of a `tpc.Calibration`, which has these."""

    config: CalibrationConfig
    size: tuple[int, int]
    reference_size: tuple[int, int]
    frame_map: np.ndarray
    masks: Sequence[np.ndarray]
    member: np.ndarray
    matrices: np.ndarray
    target_masks: Sequence[np.ndarray]

    def frame_image(self, frame: int) -> np.ndarray: ...


def segment_frame(calibration: CalibratedFrames, frames: range, rule: str = RULES[0]) -> int | None:
    """Choose the frame whose calibrated images stand for all of these; None where nobody is calibrated.

    Of the frames with the most calibrated persons: the one whose silhouettes overlap most with those of the driving
    persons in all frames (nearest), the one whose similarity is closest to their median (median), or the first.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    calibrated = (calibration.member[frames.start : frames.stop] >= 0).sum(1)
    if not calibrated.any():
        return None
    candidates = [frame for frame in frames if calibrated[frame - frames.start] == calibrated.max()]
    if rule == "nearest":
        return _nearest(calibration, frames, candidates)
    return _median(calibration, candidates) if rule == "median" else candidates[0]


def continued_image(calibration: CalibratedFrames, frame: int) -> np.ndarray:
    """A frame's calibrated image; where the reference moves along as a whole, continued beyond its edges."""
    image, calibrated = calibration.frame_image(frame), np.flatnonzero(calibration.member[frame] >= 0)
    if calibration.config.fill != "reference" or len(calibrated) > 1:
        return image
    matrix = calibration.frame_map @ calibration.matrices[frame, calibrated[0]]
    return continued(image, ~quad_mask(matrix, calibration.reference_size, calibration.size))


def _shown(calibration: CalibratedFrames, frame: int) -> np.ndarray:
    members = [member for member in calibration.member[frame] if member >= 0]
    return np.logical_or.reduce([calibration.masks[member] for member in members], axis=0)


def _nearest(calibration: CalibratedFrames, frames: Sequence[int], candidates: Sequence[int]) -> int:
    """The candidate with the greatest mean IoU with the driving silhouettes of all frames."""
    shown = _small([_shown(calibration, frame) for frame in candidates], calibration.size)
    driven = _small([calibration.target_masks[frame].any(0) for frame in frames], calibration.size)
    driven = driven[driven.any(1)]
    if not len(driven):
        return candidates[0]
    common = shown @ driven.T
    union = shown.sum(1)[:, None] + driven.sum(1) - common
    return candidates[int(np.argmax((common / np.maximum(union, 1e-6)).mean(1)))]


def _median(calibration: CalibratedFrames, candidates: Sequence[int]) -> int:
    """The candidate whose maps move the corners of the reference closest to their medians over the candidates."""
    width, height = calibration.reference_size
    corners = np.array([[0, 0, 1], [width, 0, 1], [0, height, 1]], np.float64).T
    available = calibration.member[candidates] >= 0
    moved = (calibration.matrices[candidates] @ corners)[..., :2, :]
    distance = np.abs(moved - np.median(moved, axis=0)).sum((2, 3)) * available
    return candidates[int(np.argmin(distance.sum(1)))]


def _small(masks: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Masks (n, h, w) bool as rows of coverages 0 to 1 at `SIDE` pixels."""
    scale = min(1.0, SIDE / max(size))
    small = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    resized = [cv2.resize(mask.astype(np.float32), small, interpolation=cv2.INTER_AREA) for mask in masks]
    return np.stack(resized).reshape(len(masks), -1)
