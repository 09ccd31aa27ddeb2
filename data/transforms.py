"""From an image's own pixels to the model's frame and back.

Convention: matrices are 3 x 3 and map (x, y, 1) of the source to the target, both in pixels with y down and pixel
centres at integers. Aspect ratio is always kept.
"""

import cv2
import numpy as np

FIT_MODES = ("cover", "contain")


def frame_size(source: tuple[int, int], area: int, multiple: int) -> tuple[int, int]:
    """Width and height of about `area` pixels with the source's aspect ratio, both multiples of `multiple`.

    Args:
        source: width and height of the driving video in pixels.
        area: pixels of the result, such as 128 * 128.
        multiple: what the model's images must divide by.
    """
    width, height = source
    scale = (area / (width * height)) ** 0.5
    sides = (max(1, round(side * scale / multiple)) * multiple for side in (width, height))
    return next(sides), next(sides)


def fit_matrix(source: tuple[int, int], target: tuple[int, int], mode: str = "cover") -> np.ndarray:
    """Similarity without rotation that centres an image in a frame.

    Args:
        source, target: width and height in pixels.
        mode: "cover" fills the frame and cuts what sticks out; "contain" shows everything and leaves borders.

    Returns:
        (3, 3) float64, source pixels -> target pixels.
    """
    if mode not in FIT_MODES:
        raise ValueError(f"mode must be one of {FIT_MODES}, got {mode!r}")
    scales = (target[0] / source[0], target[1] / source[1])
    scale = max(scales) if mode == "cover" else min(scales)
    # Pixel centres at integers: the image spans [-0.5, size - 0.5].
    shift = [(t - 1) / 2 - scale * (s - 1) / 2 for s, t in zip(source, target, strict=True)]
    return np.array([[scale, 0, shift[0]], [0, scale, shift[1]], [0, 0, 1]], dtype=np.float64)


def apply_fit(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int], border: str = "replicate") -> np.ndarray:
    """Resample an image or mask by a matrix of `fit_matrix`, averaging over source pixels when it shrinks.

    Args:
        image: (h, w) or (h, w, 3) uint8.
        matrix: (3, 3), image pixels -> result pixels.
        size: width and height of the result.
        border: "replicate" the outermost pixels, or "zero", where the image does not reach.

    Returns:
        (height, width) or (height, width, 3) uint8.
    """
    scale = matrix[0, 0]
    if scale < 1:
        # One area-averaged resize to the final scale, then a shift by less than a pixel and the cut.
        height, width = image.shape[:2]
        small = (max(1, round(width * scale)), max(1, round(height * scale)))
        resize = np.diag([small[0] / width, small[1] / height, 1.0])
        resize[:2, 2] = (resize[[0, 1], [0, 1]] - 1) / 2
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
        matrix = matrix @ np.linalg.inv(resize)
    mode = cv2.BORDER_REPLICATE if border == "replicate" else cv2.BORDER_CONSTANT
    return cv2.warpAffine(image, matrix[:2], size, flags=cv2.INTER_LINEAR, borderMode=mode)


def map_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Apply a (3, 3) matrix to points (..., 2)."""
    return points @ matrix[:2, :2].T + matrix[:2, 2]
