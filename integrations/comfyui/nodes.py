"""A node that calibrates a reference to a driving video.

ComfyUI's conventions: IMAGE (batch, height, width, channels) float in [0, 1], MASK (batch, height, width) likewise,
POSE_KEYPOINT a dictionary a frame as OpenPose writes them. What takes time to import is imported when a node runs.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TRANSFORMS = ("procrustes", "articulated")
MAX_SIDE = 16384


class CalibrateReference:
    """One reference for each segment of the clip, its person where the driving person is and as large."""

    DESCRIPTION = (
        "Puts the person of a reference image where the person of a driving video is, and makes them as large: "
        "one calibrated reference for the clip, or for each of its segments."
    )
    CATEGORY = "TPC"
    FUNCTION = "calibrate"
    RETURN_TYPES = ("IMAGE", "MASK", "IMAGE", "STRING", "INT")
    RETURN_NAMES = ("reference_images", "person_masks", "report", "notes", "segments")
    OUTPUT_TOOLTIPS = (
        "one calibrated reference for each segment; ImageFromBatch picks one",
        "the person in each of them",
        "keypoints, calibrated images, and scale and angle over time",
        "what was found, and frames of the segments",
        "number of segments",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple]]:
        def whole(default: int, least: int, most: int, tooltip: str, step: int = 1) -> tuple:
            return "INT", {"default": default, "min": least, "max": most, "step": step, "tooltip": tooltip}

        return {
            "required": {
                "reference": ("IMAGE", {"tooltip": "the image to calibrate, the first of a batch"}),
                "transform": (
                    list(TRANSFORMS),
                    {
                        "default": TRANSFORMS[0],
                        "tooltip": "procrustes moves, turns and resizes the person; articulated also bends limbs as "
                        "in one frame, for segments of few frames",
                    },
                ),
                "strength": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.05,
                        "tooltip": "how far the person goes from the uncalibrated place to the calibrated one",
                    },
                ),
                "segment_length": whole(0, 0, 100_000, "frames that share a reference; 0: all, 1: one for each frame"),
                "segment_overlap": whole(0, 0, 1000, "frames that a segment repeats of the one before"),
                "max_persons": whole(1, 1, 16, "persons to look for"),
                "width": whole(0, 0, MAX_SIDE, "of the images; 0: as height and driving frames say", 8),
                "height": whole(0, 0, MAX_SIDE, "of the images; 0: as width and driving frames say", 8),
            },
            "optional": {
                "driving": ("IMAGE", {"tooltip": "frames of the driving video; poses are estimated in them"}),
                "driving_keypoints": ("POSE_KEYPOINT", {"tooltip": "poses of the driving video, not to be estimated"}),
                "reference_keypoints": ("POSE_KEYPOINT", {"tooltip": "pose of the reference; give a mask with it"}),
                "reference_mask": ("MASK", {"tooltip": "the person in the reference is 1; empty: estimated"}),
                "driving_mask": (
                    "MASK",
                    {"tooltip": "the person in the driving frames is 1; empty: estimated"},
                ),
            },
        }

    def calibrate(
        self,
        reference: Any,
        transform: str,
        strength: float,
        segment_length: int,
        segment_overlap: int,
        max_persons: int,
        width: int,
        height: int,
        driving: Any = None,
        driving_keypoints: list[dict] | None = None,
        reference_keypoints: list[dict] | None = None,
        reference_mask: Any = None,
        driving_mask: Any = None,
    ) -> tuple[Any, Any, Any, str, int]:
        try:
            from tqdm import tqdm

            from tpc.config import CalibrationConfig
            from tpc.export.arrays import PoseConfig, calibrate_segments
        except ImportError as error:
            raise ImportError(f"{error}. In the Python that runs ComfyUI: pip install {repository()}") from error
        import torch

        reference_masks = batch_of_masks(reference_mask)
        references = calibrate_segments(
            Batch(reference, to_image)[0],
            None if driving is None else Batch(driving, to_image),
            reference_keypoints=reference_keypoints,
            driving_keypoints=driving_keypoints,
            reference_mask=reference_masks and reference_masks[0],
            driving_masks=batch_of_masks(driving_mask),
            size=(width, height),
            length=segment_length or None,
            overlap=segment_overlap,
            config=CalibrationConfig(transform=transform, strength=strength),
            pose=PoseConfig(max_persons=max_persons),
            progress=tqdm,
        )
        images, masks = zip(*((image, shown.any(0)) for image, shown in references), strict=True)
        notes = references.notes()
        if len(reference) > 1:
            notes.append(f"the first of {len(reference)} references is calibrated")
        frames = [segment.frames for segment in references.segments]
        notes.append("segments: " + ", ".join(f"{each.start} to {each.stop - 1}" for each in frames))
        images, masks, report = (
            torch.from_numpy(np.stack(arrays).astype(np.float32)) for arrays in (images, masks, [references.report()])
        )
        return images.div_(255), masks, report.div_(255), "\n".join(notes), len(references)


def repository() -> str:
    """The folder to install: the clone that holds this file, however ComfyUI comes to it."""
    root = Path(__file__).resolve().parents[2]
    return str(root) if (root / "pyproject.toml").is_file() else "the folder of TPC-Animate"


class Batch(Sequence):
    """A tensor (n, ...) as arrays, each converted when it is asked for."""

    def __init__(self, tensor: Any, convert: Callable[[np.ndarray], np.ndarray]):
        self._tensor, self._convert = tensor, convert

    def __len__(self) -> int:
        return len(self._tensor)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._convert(self._tensor[index].cpu().float().numpy())


def to_image(pixels: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 of (h, w, 1, 3 or 4) in [0, 1]; without its alpha."""
    colours = pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)
    return np.rint(np.clip(np.nan_to_num(colours), 0, 1) * 255).astype(np.uint8)


def batch_of_masks(masks: Any) -> Batch | None:
    """Masks (h, w) bool; None where there is none, or nothing in any, as of pictures that come without."""
    if masks is None or not (masks >= 0.5).any():
        return None
    return Batch(masks if masks.ndim == 3 else masks[None], lambda mask: mask >= 0.5)


NODE_CLASS_MAPPINGS = {"TPCCalibrateReference": CalibrateReference}
NODE_DISPLAY_NAME_MAPPINGS = {"TPCCalibrateReference": "TPC Calibrate Reference"}
