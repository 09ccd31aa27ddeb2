"""One calibrated image for each segment of a clip: for models that take one reference for many frames."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from core.errors import UserError
from data.transforms import fit_matrix
from tpc.config import CalibrationConfig
from tpc.result import Calibration
from tpc.segments import RULES, continued_image, segment_frame
from tpc.warping import ImagePyramid, mask_pyramid, place_whole, warp_mask


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

    One reference moves as a whole, as by hand, and has no hole; several would let the background jump. Other presets
    than the best one stay what they are.
    """
    needs_scene = config.visibility == "scene" or (config.start is not None and config.start >= 0)
    if config.preset != "best" or config.fill is not None or needs_scene:
        return config.fill
    return "reference" if (length is None or length >= frames) and persons == 1 else "scene"


def segment_config(config: CalibrationConfig, length: int | None, frames: int, persons: int) -> CalibrationConfig:
    """The calibration that one reference for many frames wants, where `config` leaves it open.

    To be bent into one frame's pose helps none of the others.
    """
    transform, fill = config.transform or "procrustes", segment_fill(config, length, frames, persons)
    return replace(config, transform=transform, fill=fill)


def segment_references(
    calibration: Calibration, length: int | None, overlap: int = 0, rule: str = RULES[0]
) -> list[Segment]:
    """Choose for every segment the frame whose calibrated images stand for all of it, see `segment_frame`."""
    return [
        Segment(frames, segment_frame(calibration, frames, rule))
        for frames in split(calibration.frames, length, overlap)
    ]


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
        return continued_image(calibration, segment.frame), shown
    for person, mask in enumerate(() if masks is None else masks):
        shown[person] = warp_mask(mask_pyramid(mask), _fitted(calibration), size)
    return plain_reference(calibration, image), shown


def plain_reference(calibration: Calibration, image: np.ndarray) -> np.ndarray:
    """The original image (H, W, 3) uint8 in the model's frame (h, w, 3), as an uncalibrated model is given it."""
    return place_whole(ImagePyramid(np.ascontiguousarray(image)), _fitted(calibration), calibration.size)


def _fitted(calibration: Calibration) -> np.ndarray:
    return fit_matrix(calibration.reference_size, calibration.size, "contain")
