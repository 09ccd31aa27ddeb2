"""Which part of a filmed image becomes the model's frame, so that nobody is cut by accident.

Convention as in `data.framing`: matrices are 3 x 3 and map (x, y, 1) of the source to the target, in pixels with y
down and pixel centres at integers. Boxes are in the same coordinates: an image reaches from -0.5 to size - 0.5.
"""

import numpy as np

from data.poses.person import Box, person_box
from data.poses.poses import Poses

# person: as large as the image allows, moved until everybody is inside; pad: the same, made smaller with black
# borders where they would not fit; centre: the middle of the image, whomever it cuts.
CROPS = ("person", "pad", "centre")
_TOLERANCE = 0.5  # source pixels that a box may be larger than the window
_MARGIN = 0.1  # of a skeleton's longer side: keypoints end at the eyes, wrists and ankles


def crop_matrix(source: tuple[int, int], target: tuple[int, int], box: Box | None, mode: str) -> np.ndarray | None:
    """Similarity without rotation from an image to the model's frame.

    Args:
        source, target: (width, height) in pixels.
        box: around everybody over the whole clip; None: nobody to mind.
        mode: one of `CROPS`.

    Returns:
        (3, 3) float64; None when the box does not fit into the largest window of the target's shape (mode "person").
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
        start = (side - window) / 2  # in units of pixels from the image's edge
        if box is not None and window <= side:
            if high - low > window + _TOLERANCE:
                return None
            start = min(max(start, high + 0.5 - window), max(low + 0.5, high + 0.5 - window))
        starts.append(start)
    shift = [scale * (0.5 - start) - 0.5 for start in starts]
    return np.array([[scale, 0, shift[0]], [0, scale, shift[1]], [0, 0, 1]], dtype=np.float64)


def skeleton_box(poses: Poses, margin: float = _MARGIN) -> Box | None:
    """Box around the visible keypoints of all persons and frames of a clip, cut to the image.

    Args:
        margin: part of each skeleton's longer side that is added around it, for the top of the head and the feet.
    """
    boxes = [
        person_box(keypoints, scores, margin=margin)
        for keypoints, scores in zip(poses.keypoints.reshape(-1, 17, 2), poses.scores.reshape(-1, 17), strict=True)
    ]
    return joint_box([box for box in boxes if box is not None], poses.size)


def mask_box(mask: np.ndarray) -> Box | None:
    """Box around the True pixels of a mask (h, w), to their outer edges; None without any."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return None
    return Box(columns[0] - 0.5, rows[0] - 0.5, columns[-1] + 0.5, rows[-1] + 0.5)


def joint_box(boxes: list[Box], size: tuple[int, int]) -> Box | None:
    """Smallest box around boxes, cut to an image of (width, height); None without boxes."""
    if not boxes:
        return None
    low = np.clip(np.min([box[:2] for box in boxes], axis=0), -0.5, np.array(size) - 0.5)
    high = np.clip(np.max([box[2:] for box in boxes], axis=0), -0.5, np.array(size) - 0.5)
    return Box(*low.tolist(), *high.tolist())
