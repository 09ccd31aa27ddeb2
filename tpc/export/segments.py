"""One calibrated image for each segment of a clip: for models that take one reference for many frames."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from core.errors import UserError
from data.transforms import fit_matrix
from tpc.config import CalibrationConfig
from tpc.result import Calibration
from tpc.warping import ImagePyramid, continued, mask_pyramid, place_whole, quad_mask, warp_mask

RULES = ("nearest", "median", "first")
SIDE = 64  # pixels of the longer side at which silhouettes are compared


@dataclass(frozen=True)
class Segment:
    """Frames that share one reference."""

    frames: range
    frame: int | None  # whose calibrated images the reference shows; None: nobody is calibrated in any of them


def split(frames: int, length: int | None, overlap: int = 0) -> list[range]:
    """Segments of `length` frames, the last perhaps shorter, each repeating `overlap` of the one before; None: one.

    A model that continues from the last frames of its previous segment repeats those.
    """
    if length is not None and not 0 <= overlap < length:
        raise UserError(f"segment_overlap={overlap} must be 0 to {length - 1}, below segments={length}")
    if length is None or length >= frames:
        return [range(frames)]
    starts = range(0, max(1, frames - overlap), length - overlap)
    return [range(start, min(start + length, frames)) for start in starts]


def segment_notes(segments: Sequence[Segment], cuts: Sequence[int]) -> list[str]:
    """Sentences to read before the references are used; often none."""
    notes = []
    if missing := [str(number) for number, segment in enumerate(segments) if segment.frame is None]:
        notes.append(f"nobody is calibrated in segment {', '.join(missing)}; its reference is the image as it was")
    if divided := [str(cut) for cut in cuts for segment in segments if cut in segment.frames[1:]]:
        notes.append(
            f"the cuts before frames {', '.join(divided)} lie within segments, and one reference cannot fit both "
            "shots; animate them one by one"
        )
    return notes


def segment_fill(config: CalibrationConfig, length: int | None, frames: int, persons: int) -> str | None:
    """What is painted around the persons of references for segments of a clip, where the configuration leaves it open.

    One reference moves as a whole, as by hand, and has no hole; several would let the background jump.
    """
    if (config.fill, config.visibility, config.start) != (None, None, None):
        return config.fill
    return "reference" if (length is None or length >= frames) and persons == 1 else "scene"


def segment_references(
    calibration: Calibration, length: int | None, overlap: int = 0, rule: str = RULES[0]
) -> list[Segment]:
    """Choose for every segment the frame whose calibrated images stand for all of it.

    Of the frames with the most calibrated persons: the one whose silhouettes overlap most with those of the driving
    persons in all frames (nearest), the one whose similarity is closest to their median (median), or the first.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    found = []
    for frames in split(calibration.frames, length, overlap):
        calibrated = (calibration.member[frames.start : frames.stop] >= 0).sum(1)
        if not calibrated.any():
            found.append(Segment(frames, None))
            continue
        candidates = [frame for frame in frames if calibrated[frame - frames.start] == calibrated.max()]
        if rule == "nearest":
            chosen = _nearest(calibration, frames, candidates)
        elif rule == "median":
            chosen = _median(calibration, candidates)
        else:
            chosen = candidates[0]
        found.append(Segment(frames, chosen))
    return found


def segment_reference(
    calibration: Calibration, segment: Segment, image: np.ndarray, masks: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A segment's calibrated reference, (h, w, 3) uint8, and whom it shows where, (persons, h, w) bool.

    Where nobody is calibrated: the original image (H, W, 3) uint8 and its masks (persons, H, W) bool, all of it fitted
    into the frame.
    """
    width, height = size = calibration.size
    shown = np.zeros((calibration.persons, height, width), bool)
    if segment.frame is not None:
        for person, member in enumerate(calibration.member[segment.frame]):
            if member >= 0:
                shown[person] = calibration.masks[member]
        return _continued(calibration, segment.frame), shown
    for person, mask in enumerate(() if masks is None else masks):
        shown[person] = warp_mask(mask_pyramid(mask), _fitted(calibration), size)
    return plain_reference(calibration, image), shown


def _continued(calibration: Calibration, frame: int) -> np.ndarray:
    """A frame's calibrated image; where the reference moves along as a whole, continued beyond its edges."""
    image, calibrated = calibration.frame_image(frame), np.flatnonzero(calibration.member[frame] >= 0)
    if calibration.config.fill != "reference" or len(calibrated) > 1:
        return image
    matrix = calibration.frame_map @ calibration.matrices[frame, calibrated[0]]
    return continued(image, ~quad_mask(matrix, calibration.reference_size, calibration.size))


def plain_reference(calibration: Calibration, image: np.ndarray) -> np.ndarray:
    """The original image (H, W, 3) uint8 in the model's frame (h, w, 3), as an uncalibrated model is given it."""
    return place_whole(ImagePyramid(np.ascontiguousarray(image)), _fitted(calibration), calibration.size)


def _fitted(calibration: Calibration) -> np.ndarray:
    return fit_matrix(calibration.reference_size, calibration.size, "contain")


def _shown(calibration: Calibration, frame: int) -> np.ndarray:
    members = [member for member in calibration.member[frame] if member >= 0]
    return np.logical_or.reduce([calibration.masks[member] for member in members], axis=0)


def _nearest(calibration: Calibration, frames: Sequence[int], candidates: Sequence[int]) -> int:
    """The candidate with the greatest mean IoU with the driving silhouettes of all frames."""
    shown = _small([_shown(calibration, frame) for frame in candidates], calibration.size)
    driven = _small([calibration.target_masks[frame].any(0) for frame in frames], calibration.size)
    driven = driven[driven.any(1)]
    if not len(driven):
        return candidates[0]
    common = shown @ driven.T
    union = shown.sum(1)[:, None] + driven.sum(1) - common
    return candidates[int(np.argmax((common / np.maximum(union, 1e-6)).mean(1)))]


def _median(calibration: Calibration, candidates: Sequence[int]) -> int:
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
