"""Ways to fill the place that a person leaves, and what lies beyond a reference's edges.

    python -m benchmarks.references.scene_filling [side=512]

Eight photographs of scikit-image with texture, of which the silhouette of a standing person or a border of a fifth of
each side is taken away. Prints PSNR and SSIM over what was filled, how much of its texture is left (the Laplacian's
standard deviation against the true one's), and seconds.
"""

from benchmarks.config import FillingConfig
from core.config import check_first

check_first(__name__, FillingConfig, __doc__)


import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import skimage
from skimage.restoration import inpaint_biharmonic

from benchmarks.calibration_accuracy import table
from core.config import load_config
from core.errors import run_command
from data.video.images import read_image
from evaluation.misaligned_clips import draw, read_manifest
from metrics.image import psnr, ssim
from tpc.warping import continued, remove_persons

PHOTOGRAPHS = (
    "brick.png", "grass.png", "gravel.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "chelsea.png",
    "hubble_deep_field.jpg",
)  # fmt: skip
Fill = Callable[[np.ndarray, np.ndarray], np.ndarray]  # image (h, w, 3) uint8, mask (h, w) bool -> image


def inpainted(method: int) -> Fill:
    return lambda image, mask: cv2.inpaint(image, mask.astype(np.uint8), 5, method)


def biharmonic(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """At a quarter of the size: at the whole it takes minutes and gigabytes."""
    small = cv2.resize(image, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    hole = cv2.resize(mask.astype(np.uint8) * 255, small.shape[1::-1], interpolation=cv2.INTER_AREA) > 0
    filled = (255 * inpaint_biharmonic(small, hole, channel_axis=-1)).clip(0, 255).astype(np.uint8)
    filled = cv2.resize(filled, image.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    return np.where(mask[..., None], filled, image)


def reflected(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What is inside, mirrored beyond its edges."""
    rows, columns = np.flatnonzero(~mask.all(1)), np.flatnonzero(~mask.all(0))
    (height, width), (top, left) = mask.shape, (rows[0], columns[0])
    inside = image[top : rows[-1] + 1, left : columns[-1] + 1]
    below, right = height - top - len(rows), width - left - len(columns)
    return cv2.copyMakeBorder(inside, top, below, left, right, cv2.BORDER_REFLECT)


FILLS: dict[str, dict[str, Fill]] = {
    "the place of a person": {
        "push-pull (ours)": remove_persons,
        "Telea (OpenCV)": inpainted(cv2.INPAINT_TELEA),
        "Navier-Stokes (OpenCV)": inpainted(cv2.INPAINT_NS),
        "biharmonic (scikit-image)": biharmonic,
    },
    "beyond the edges": {
        "continued (ours)": continued,
        "push-pull": remove_persons,
        "Telea (OpenCV)": inpainted(cv2.INPAINT_TELEA),
        "mirrored": reflected,
    },
}


def photograph(name: str, side: int) -> np.ndarray:
    """A square of (side, side, 3) uint8 from the middle."""
    image = read_image(Path(skimage.__file__).parent / "data" / name)
    size = min(image.shape[:2])
    top, left = ((length - size) // 2 for length in image.shape[:2])
    return cv2.resize(image[top : top + size, left : left + size], (side, side), interpolation=cv2.INTER_AREA)


def texture(image: np.ndarray, mask: np.ndarray) -> float:
    return float(cv2.Laplacian(image.astype(np.float32), cv2.CV_32F)[mask].std())


def main(arguments: list[str]) -> None:
    config = load_config(FillingConfig, arguments, about=__doc__)
    cv2.setNumThreads(1)
    side, manifest = config.side, replace(read_manifest("aligned", "development"), frames=1)
    people = [draw(manifest, spec).reference.masks[0] for spec in manifest.clips[:4]]
    border = np.ones((side, side), bool)
    border[side // 5 : side - side // 5, side // 5 : side - side // 5] = False
    rows = []
    for where, fills in FILLS.items():
        for name, fill in fills.items():
            values = []
            for number, photo in enumerate(PHOTOGRAPHS):
                image, mask = photograph(photo, side), border
                if where == "the place of a person":
                    mask = cv2.resize(people[number % 4].astype(np.uint8), (side, side)) > 0
                known = np.where(mask[..., None], np.uint8(0), image)
                begin = time.perf_counter()
                filled = fill(known, mask)
                seconds = time.perf_counter() - begin
                share = texture(filled, mask) / texture(image, mask)
                values.append((psnr(filled, image, mask), ssim(filled, image, mask), 100 * share, seconds))
            cells = "{:.1f} {:.2f} {:.0f}% {:.2f}".format(*np.mean(values, axis=0)).split()
            rows.append([where, name, *cells])
    print(table(["", "filled by", "dB", "SSIM", "texture left", "seconds"], rows))


if __name__ == "__main__":
    run_command(main)
