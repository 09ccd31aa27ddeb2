"""Measures of a generated image against the true one, pixel by pixel, and of the person's pose and colours in it.

Images are uint8 RGB arrays (..., h, w, 3) of one shape; masks (..., h, w) bool choose the pixels that count, all
without one. A measure over no pixel at all is NaN. Keypoints are (17, 2) pixels (x, y) in COCO order.
"""

import cv2
import numpy as np
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import structural_similarity

IDENTICAL_PSNR = 100.0  # dB given to identical images, whose PSNR is infinite, as the published code does
SSIM_VARIANTS = {
    "grey-uniform": dict(win_size=7),  # on the grey image (DisCo)
    "rgb-gaussian": dict(win_size=11, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1),
}


def mean_absolute_error(generated: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> float:
    """L1: mean absolute difference over pixels and channels, in grey levels of 0 to 255."""
    _check(generated, truth, mask)
    return _mean(np.abs(generated.astype(np.int16) - truth.astype(np.int16)), mask)


def flicker(
    generated: tuple[np.ndarray, np.ndarray], truth: tuple[np.ndarray, np.ndarray], mask: np.ndarray | None = None
) -> float:
    """Mean absolute difference between what changes from one frame to the next and what truly changes, 0 to 255.

    Both are pairs of the frame before and the frame. A constant error, such as a wrong colour, costs nothing.
    """
    changes = []
    for before, after in (generated, truth):
        _check(before, after, mask)
        changes.append(after.astype(np.int16) - before.astype(np.int16))
    return _mean(np.abs(changes[0] - changes[1]), mask)


def historical_l1(generated: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> float:
    """The L1 of DisCo's code: the mean absolute difference divided by height times width.

    Values are comparable only between images of one size. Published tables give it in units of 1e-4, at 256 x 256.
    """
    height, width = truth.shape[-3:-1]
    return mean_absolute_error(generated, truth, mask) / (height * width)


def psnr(generated: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / mean squared difference); identical images give 100."""
    _check(generated, truth, mask)
    return _decibel(_mean((generated.astype(np.float64) - truth.astype(np.float64)) ** 2, mask))


def overflowing_psnr(generated: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> float:
    """The "PSNR" that much of the published literature prints: squared differences computed in eight bits.

    Difference and square wrap around modulo 256, so the mean is at most 255 and the value never below
    10 log10(255) = 24.07 dB; for unrelated images it levels off at about 27.9 dB.
    """
    _check(generated, truth, mask)
    with np.errstate(over="ignore"):
        wrapped = (generated - truth) ** 2
    return _decibel(_mean(wrapped, mask))


def ssim(
    generated: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None, variant: str = "rgb-gaussian"
) -> float:
    """Structural similarity of two images (h, w, 3), by scikit-image; windows of the mask's pixels reach beyond it."""
    _check(generated, truth, mask)
    if variant not in SSIM_VARIANTS:
        raise ValueError(f"variant must be one of {tuple(SSIM_VARIANTS)}, got {variant!r}")
    if generated.ndim != 3:
        raise ValueError(f"ssim takes single images (h, w, 3), got {generated.shape}")
    settings = SSIM_VARIANTS[variant]
    if min(truth.shape[:2]) < settings["win_size"]:
        raise ValueError(f"images must be at least {settings['win_size']} pixels wide, got {truth.shape[:2]}")
    if variant == "grey-uniform":
        generated, truth = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (generated, truth))
    similarity = structural_similarity(generated, truth, data_range=255, full=True, **settings)[1]
    edge = (settings["win_size"] - 1) // 2  # pixels whose window leaves the image do not count
    inside = (slice(edge, -edge),) * 2
    return _mean(similarity[inside], None if mask is None else mask[inside])


def _mean(values: np.ndarray, mask: np.ndarray | None) -> float:
    if mask is not None:
        values = values[mask]
    return float(values.mean(dtype=np.float64)) if values.size else float("nan")


def _decibel(squared: float) -> float:
    return IDENTICAL_PSNR if squared == 0 else float(10 * np.log10(255.0**2 / squared))


def _check(generated: np.ndarray, truth: np.ndarray, mask: np.ndarray | None) -> None:
    for name, image in (("generated", generated), ("truth", truth)):
        if image.dtype != np.uint8 or image.ndim < 3 or image.shape[-1] != 3:
            raise ValueError(f"{name} must be (..., h, w, 3) uint8, got {image.shape} {image.dtype}")
    if generated.shape != truth.shape:
        raise ValueError(f"generated and truth must have one shape, got {generated.shape} and {truth.shape}")
    if mask is not None and (mask.shape != truth.shape[:-1] or mask.dtype != bool):
        raise ValueError(f"mask must be {truth.shape[:-1]} bool, got {mask.shape} {mask.dtype}")


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
    """Mean distance of the keypoints from their targets in units of the target's height; NaN without targets.

    Keypoints with scores above `threshold` are visible; all scores (17,) are 0 when nobody was found.
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
