"""Measures of a generated image against the true one, pixel by pixel.

Images are uint8 RGB arrays (..., h, w, 3) of one shape; masks (..., h, w) bool choose the pixels that count, all
without one. A measure over no pixel at all is NaN.
"""

import cv2
import numpy as np
from skimage.metrics import structural_similarity

IDENTICAL_PSNR = 100.0  # dB given to identical images, whose PSNR is infinite, as the published code does
SSIM_VARIANTS = ("grey-uniform", "rgb-gaussian")
_SSIM_SETTINGS = {
    "grey-uniform": {"win_size": 7},
    "rgb-gaussian": {
        "win_size": 11,
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "channel_axis": -1,
    },
}


def mean_absolute_error(generated: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> float:
    """L1: mean absolute difference over pixels and channels, in grey levels of 0 to 255."""
    _check(generated, truth, mask)
    return _mean(np.abs(generated.astype(np.int16) - truth.astype(np.int16)), mask)


def flicker(
    generated: tuple[np.ndarray, np.ndarray], truth: tuple[np.ndarray, np.ndarray], mask: np.ndarray | None = None
) -> float:
    """Mean absolute difference between what changes from one frame to the next and what truly changes, 0 to 255.

    A constant error, such as a wrong colour, costs nothing; one that comes and goes does.

    Args:
        generated, truth: the frame before and the frame.
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
    """Structural similarity of two images (h, w, 3), by scikit-image.

    Args:
        mask: (h, w) bool; the mean is taken over the similarity at these pixels, whose windows reach a little beyond.
        variant: "grey-uniform", a 7 x 7 uniform window on the grey image (DisCo); "rgb-gaussian", a Gaussian
            window of 1.5 pixels on each channel (Wang et al. 2004).
    """
    _check(generated, truth, mask)
    if variant not in SSIM_VARIANTS:
        raise ValueError(f"variant must be one of {SSIM_VARIANTS}, got {variant!r}")
    if generated.ndim != 3:
        raise ValueError(f"ssim takes single images (h, w, 3), got {generated.shape}")
    settings = _SSIM_SETTINGS[variant]
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
