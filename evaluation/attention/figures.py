"""Images of recorded attention: maps over the images they are of, and rows through denoising (Figure 2).

Shapes use k = attended images, h, w = a layer's grid, H, W = image size. Coordinates are (x, y) pixels. Steps,
frames and layers are numbered from 0 in every image, as in files and arguments.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from matplotlib import colormaps

from core.errors import UserError
from evaluation.attention.maps import BodyTruth
from inference.comparison import labelled_row, text_line
from models.attention.maps import RecordedAttention
from tpc import Calibration

COLOURS = "turbo"
GREY = 128
TRUE_COORDS, STRONGEST = (255, 255, 255), (255, 0, 160)
CELL = 192  # pixels of an image's height
LEGEND_HEIGHT = 26  # pixels


@dataclass(frozen=True)
class PointMap:
    """Attention of one point at one step to one image."""

    image: np.ndarray  # (H, W, 3) uint8, the reference or a calibrated image
    density: np.ndarray  # (H, W)
    truth: np.ndarray  # (2,), the point's coordinates in the image, or NaN
    name: str  # of the image
    share: float  # part of all attention that the image gets


def layer_mean(
    recorded: RecordedAttention,
    point: int | str | tuple[float, float],
    step: int | None = None,
    frame: int | None = None,
    head: int | None = None,
    layers: Sequence[str] | None = None,
) -> np.ndarray:
    """(k, H, W) attention of one query, see `RecordedAttention.query_map`, the mean over layers; sums to 1 - `own`."""
    width, height = recorded.selection.size
    total = np.zeros((recorded.selection.images, height, width), np.float32)
    layers = recorded.layers if layers is None else layers
    for layer in layers:
        maps = recorded.query_map(layer, point, step, frame, head).maps
        rows, columns = recorded.grid(layer)
        per_pixel = rows * columns / (height * width)
        for image, attention in enumerate(maps):
            total[image] += upsampled(attention, (width, height)) * per_pixel
    return total / len(layers)


def upsampled(attention: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (h, w) at an image's size (width, height), linearly between the tokens' centres."""
    return cv2.resize(np.ascontiguousarray(attention, np.float32), size, interpolation=cv2.INTER_LINEAR)


def overlay(image: np.ndarray, density: np.ndarray, peak: float | None = None, strength: float = 0.8) -> np.ndarray:
    """An image (H, W, 3) uint8 under the colours of a map (h, w) of any size, the strongest at `peak`; else grey."""
    density = upsampled(density, image.shape[1::-1])
    peak = float(density.max()) if peak is None else peak
    weight = np.clip(density / max(peak, 1e-12), 0, 1)
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB).astype(np.float32)
    colour = colormaps[COLOURS](weight)[..., :3] * 255
    alpha = (strength * np.sqrt(weight))[..., None]
    return (grey * (1 - alpha) + colour * alpha).round().astype(np.uint8)


def mark(image: np.ndarray, coords: np.ndarray, scale: float, colour: tuple[int, int, int], cross: bool) -> np.ndarray:
    """An image with a circle or a cross at coordinates before it was enlarged by `scale`; none for NaN.

    Both are open in the middle, so that the colours at the coordinates stay visible.
    """
    if np.isnan(coords).any():
        return image
    image = image.copy()
    centre = np.round((np.asarray(coords) + 0.5) * scale - 0.5).astype(int)
    size = max(5, image.shape[0] // 16)
    for ink, thickness in (((0, 0, 0), 3), (colour, 1)):
        if not cross:
            cv2.circle(image, centre.tolist(), size, ink, thickness, cv2.LINE_AA)
            continue
        for direction in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            inner, outer = (centre + np.array(direction) * round(size * part) for part in (0.5, 1.1))
            cv2.line(image, inner.tolist(), outer.tolist(), ink, thickness, cv2.LINE_AA)
    return image


def at_height(image: np.ndarray, height: int) -> np.ndarray:
    """An image (H, W, 3) uint8, smoothly resized to a height."""
    width = max(1, round(image.shape[1] * height / image.shape[0]))
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)


def marked_overlay(found: PointMap, height: int = CELL) -> np.ndarray:
    """An image under a point's attention: a circle at the true coordinates, a cross at the strongest attention."""
    scale = height / found.image.shape[0]
    shown = overlay(at_height(found.image, height), found.density)
    row, column = np.unravel_index(int(found.density.argmax()), found.density.shape)
    shown = mark(shown, np.array([column, row], np.float64), scale, STRONGEST, cross=True)
    return mark(shown, found.truth, scale, TRUE_COORDS, cross=False)


def point_maps(
    recorded: RecordedAttention,
    truth: BodyTruth,
    reference: np.ndarray,  # (H, W, 3) uint8, as the model gets it
    calibration: Calibration | None,
    point: int | str,
    frame: int,
    steps: Sequence[int],
    layers: Sequence[str] | None = None,
    image: int | None = None,  # index, 0 the reference; None: the one that gets most at each step
) -> list[PointMap]:
    """Attention of a point of one frame at some steps, the mean over layers."""
    if recorded.selection.mean and set(recorded.selection.mean) != {"heads"}:
        raise UserError("mean: images through denoising need steps and frames, not their mean")
    selection, query = recorded.selection, recorded.query_index(recorded.layers[0], point)
    found = []
    for step in steps:
        density = layer_mean(recorded, point, step, frame, layers=layers)
        given = density.sum((1, 2))
        attended = int(given.argmax()) if image is None else image
        at = selection.position("steps", step), selection.position("frames", frame), query, attended
        shown = attended_images(reference, calibration, step, frame)[attended]
        name = "reference" if attended == 0 else "calibrated"
        found.append(PointMap(shown, density[attended], truth.coords[at].numpy(), name, float(given[attended])))
    return found


def attended_images(reference: np.ndarray, calibration: Calibration | None, step: int, frame: int) -> list[np.ndarray]:
    """The k images (H, W, 3) uint8 that a frame can attend to; grey for an uncalibrated person."""
    images = [reference]
    for image in () if calibration is None else calibration.index(step)[frame]:
        images.append(np.full_like(reference, GREY) if image < 0 else calibration.images[int(image)])
    return images


def point_maps_row(
    found: Sequence[PointMap],
    frame: np.ndarray,  # (H, W, 3) uint8
    point: np.ndarray,  # (2,)
    label: str,
    steps: Sequence[int],
    height: int = CELL,
) -> np.ndarray:
    """One row of Figure 2: a frame with the point, then the attended images, step by step."""
    query = mark(at_height(frame, height), point, height / frame.shape[0], TRUE_COORDS, cross=False)
    labels = [f"step {step}: {shown.name} {shown.share:.0%}" for step, shown in zip(steps, found, strict=True)]
    return labelled_row([query, *(marked_overlay(shown, height) for shown in found)], [label, *labels], height)


def stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows (h, w, 3) of `point_maps_row` under each other, the shorter ones filled up with white, and a legend."""
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    return np.concatenate([*padded, legend(width)])


def legend(width: int) -> np.ndarray:
    """What circle, cross and colours mean, (h, width, 3) uint8; in as many lines as the width asks for."""
    signs = {
        "the point, its true place": (TRUE_COORDS, False),
        "strongest attention": (STRONGEST, True),
        "attention, none to most": None,
    }
    entries = []
    for text, sign in signs.items():
        if sign is None:
            ramp = np.tile(np.linspace(0, 1, 60), (LEGEND_HEIGHT - 8, 1))
            cell = np.full((LEGEND_HEIGHT, 64, 3), 255, np.uint8)
            cell[4:-4, :60] = overlay(np.full((*ramp.shape, 3), GREY, np.uint8), ramp, 1.0)
        else:
            middle = np.full(2, LEGEND_HEIGHT // 2)
            cell = mark(np.full((LEGEND_HEIGHT, LEGEND_HEIGHT, 3), GREY, np.uint8), middle, 1.0, *sign)
        entries.append(np.concatenate([cell, text_line(text, LEGEND_HEIGHT)], axis=1))
    lines = entries[:1]
    for entry in entries[1:]:
        if lines[-1].shape[1] + entry.shape[1] > width:
            lines.append(entry)
        else:
            lines[-1] = np.concatenate([lines[-1], entry], axis=1)
    fitted = [
        np.pad(line[:, :width], ((2, 2), (0, max(0, width - line.shape[1])), (0, 0)), constant_values=255)
        for line in lines
    ]
    return np.concatenate(fitted)
