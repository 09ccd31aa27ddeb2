"""Maps from an image's own pixels to the model's frame: sizes, matrices, crops that cut nobody, resampling.

Convention: matrices are 3 x 3 and map (x, y, 1) of the source to the target, both in pixels with y down and pixel
centres at integers. Aspect ratio is always kept.
"""

import cv2
import numpy as np

from data.config import CROPS, FIT_MODES
from data.poses.person import Box


def frame_size(source: tuple[int, int], area: int, multiple: int) -> tuple[int, int]:
    """Width and height of about `area` pixels with the source's aspect ratio, both multiples of `multiple`."""
    width, height = source
    scale = (area / (width * height)) ** 0.5
    sides = (max(1, round(side * scale / multiple)) * multiple for side in (width, height))
    return next(sides), next(sides)


def fit_matrix(source: tuple[int, int], target: tuple[int, int], mode: str = "cover") -> np.ndarray:
    """Similarity without rotation (3, 3) that centres an image of (width, height) in a frame.

    Mode "cover" fills the frame and cuts what sticks out; "contain" shows everything and leaves borders.
    """
    if mode not in FIT_MODES:
        raise ValueError(f"mode must be one of {FIT_MODES}, got {mode!r}")
    scales = (target[0] / source[0], target[1] / source[1])
    scale = max(scales) if mode == "cover" else min(scales)
    # Pixel centres at integers: the image spans [-0.5, size - 0.5].
    shift = [(t - 1) / 2 - scale * (s - 1) / 2 for s, t in zip(source, target, strict=True)]
    return np.array([[scale, 0, shift[0]], [0, scale, shift[1]], [0, 0, 1]], dtype=np.float64)


def resize_matrix(source: tuple[int, int], target: tuple[int, int]) -> np.ndarray:
    """Map (3, 3) of a resize from one (width, height) to another; edges map to edges."""
    matrix = np.diag([target[0] / source[0], target[1] / source[1], 1.0])
    matrix[:2, 2] = (matrix[[0, 1], [0, 1]] - 1) / 2
    return matrix


def crop_matrix(source: tuple[int, int], target: tuple[int, int], box: Box | None, mode: str) -> np.ndarray | None:
    """Similarity without rotation (3, 3) from an image of (width, height) to the model's frame, by one of `CROPS`.

    None for mode "person" when the box around everybody does not fit into the largest window of the target's shape.
    """
    if mode not in CROPS:
        raise ValueError(f"mode must be one of {CROPS}, got {mode!r}")
    scale = max(target[0] / source[0], target[1] / source[1])
    if mode == "centre":
        box = None
    elif mode == "pad" and box is not None:
        scale = min(scale, target[0] / max(box.width, 1e-6), target[1] / max(box.height, 1e-6))
    ends = [(0.0, 0.0)] * 2 if box is None else [(box.left, box.right), (box.top, box.bottom)]
    starts = []
    for side, length, (low, high) in zip(source, target, ends, strict=True):
        window = length / scale
        start = (side - window) / 2  # pixels from the image's edge
        if box is not None and window <= side:
            if high - low > window + 0.5:  # half a pixel is no cut
                return None
            start = min(max(start, high + 0.5 - window), max(low + 0.5, high + 0.5 - window))
        starts.append(start)
    shift = [scale * (0.5 - start) - 0.5 for start in starts]
    return np.array([[scale, 0, shift[0]], [0, scale, shift[1]], [0, 0, 1]], dtype=np.float64)


def apply_fit(
    image: np.ndarray,
    matrix: np.ndarray,
    size: tuple[int, int],
    border: str = "replicate",
    enlarging: int = cv2.INTER_LINEAR,  # OpenCV's filter
) -> np.ndarray:
    """Resample an image or mask (h, w[, 3]) uint8 by a `fit_matrix` or `crop_matrix` into a frame of (width, height).

    Where the image does not reach, `border` decides: "replicate" the outermost pixels, or "zero".
    """
    scale = matrix[0, 0]
    if scale < 1:
        # One area-averaged resize to the final scale, then a shift by less than a pixel and the cut.
        height, width = image.shape[:2]
        small = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
        matrix = matrix @ np.linalg.inv(resize_matrix((width, height), small))
    mode = cv2.BORDER_REPLICATE if border == "replicate" else cv2.BORDER_CONSTANT
    return cv2.warpAffine(
        image, matrix[:2], size, flags=cv2.INTER_LINEAR if scale <= 1 else enlarging, borderMode=mode
    )


def map_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Points (..., 2) mapped by a (2, 3) or (3, 3) matrix."""
    return points @ matrix[:2, :2].T + matrix[:2, 2]
