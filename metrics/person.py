"""Measures of the generated person's pose and colours that need no feature network.

Keypoints are (17, 2) pixels (x, y) in COCO order with scores (17,) in [0, 1].
"""

import cv2
import numpy as np
from skimage.color import deltaE_ciede2000, rgb2lab

# Body parts as lines between COCO keypoints, and the width of the line in parts of the person's height. Widths are
# narrower than the body, so that the background does not come in.
PARTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], float]] = {
    "head": ((3, 4), (0,), 0.05),
    "chest": ((5, 6), (5, 6, 11, 12), 0.10),
    "belly": ((5, 6, 11, 12), (11, 12), 0.10),
    "left upper arm": ((5,), (7,), 0.03),
    "right upper arm": ((6,), (8,), 0.03),
    "left forearm": ((7,), (9,), 0.025),
    "right forearm": ((8,), (10,), 0.025),
    "left thigh": ((11,), (13,), 0.05),
    "right thigh": ((12,), (14,), 0.05),
    "left shin": ((13,), (15,), 0.035),
    "right shin": ((14,), (16,), 0.035),
}


def keypoint_error(
    keypoints: np.ndarray,
    scores: np.ndarray,
    target: np.ndarray,
    target_scores: np.ndarray,
    height: float,
    threshold: float = 0.3,
) -> float:
    """Mean distance of the keypoints from their targets in units of the person's height; NaN without targets.

    Args:
        keypoints, scores: of the generated image; scores all 0 when nobody was found.
        target, target_scores, height: of the person in the target, in the same pixels.
        threshold: a keypoint is visible when its score is above it.
    """
    wanted = target_scores > threshold
    if not wanted.any() or not height > 0:
        return float("nan")
    distance = np.linalg.norm(keypoints.astype(np.float64) - target, axis=-1) / height
    # A keypoint that the result lacks counts for one height: a person who cannot be found is no success.
    distance = np.where(scores > threshold, np.minimum(distance, 1.0), 1.0)
    return float(distance[wanted].mean())


def part_colours(
    image: np.ndarray, keypoints: np.ndarray, scores: np.ndarray, height: float, threshold: float = 0.3
) -> dict[str, np.ndarray]:
    """Median colour (3,), CIE L*a*b*, of every body part whose keypoints are visible in an image (h, w, 3) uint8."""
    lab = rgb2lab(image)
    colours = {}
    for name, (start, end, width) in PARTS.items():
        if not (scores[[*start, *end]] > threshold).all():
            continue
        mask = np.zeros(image.shape[:2], np.uint8)
        ends = [tuple(int(v) for v in np.round(keypoints[list(part)].mean(axis=0))) for part in (start, end)]
        cv2.line(mask, *ends, 1, max(1, round(width * height)))
        if mask.any():
            colours[name] = np.median(lab[mask > 0], axis=0)
    return colours


def part_colour_difference(generated: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> float:
    """Identity without a network: mean CIEDE2000 difference of the body parts' colours, over parts seen in both.

    Each image's parts lie where its own keypoints say, so a person in the wrong place keeps their colours. About 1
    is the least difference that is seen; NaN when no part is visible in both.
    """
    shared = [name for name in truth if name in generated]
    if not shared:
        return float("nan")
    pairs = (np.stack([colours[name] for name in shared]) for colours in (generated, truth))
    return float(deltaE_ciede2000(*pairs).mean())
