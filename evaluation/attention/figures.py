"""Images of recorded attention: maps over the images they are of, and rows through denoising (Figure 2).

Shapes use k = images that may be looked at, h, w = a layer's grid, H, W = image size. Places are (x, y) pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from matplotlib import colormaps

from core.errors import UserError
from evaluation.attention.maps import BodyTruth
from inference.comparison import labelled_row
from models.attention.record import RecordedAttention
from tpc import Calibration

COLOURS = "turbo"
GREY = 128
TRUE_PLACE, STRONGEST = (255, 255, 255), (255, 0, 160)
CELL = 192  # pixels of an image's height


@dataclass(frozen=True)
class Look:
    """Where one point looks at one step.

    Attributes:
        image: (H, W, 3) uint8, the reference or a calibrated image.
        density: (H, W), attention over it.
        truth: (2,) where the point is in it, or NaN.
        name: of the image.
        share: part of all attention that the image gets.
    """

    image: np.ndarray
    density: np.ndarray
    truth: np.ndarray
    name: str
    share: float


def layer_mean(
    recorded: RecordedAttention,
    point: int | str | tuple[float, float],
    step: int | None = None,
    frame: int | None = None,
    head: int | None = None,
    layers: Sequence[str] | None = None,
) -> np.ndarray:
    """(k, H, W) attention of one query over all images, the mean over layers, upsampled to the images' size.

    Its sum is what the query does not give to its own frame. Arguments as in `RecordedAttention.query_map`.
    """
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
    """An image (H, W, 3) uint8 under the colours of a map.

    Args:
        density: (h, w) of any size.
        peak: attention that gets the strongest colour; None: the largest there is.
        strength: opacity of the strongest colour; where there is no attention, the image shows in grey.
    """
    density = upsampled(density, image.shape[1::-1])
    peak = float(density.max()) if peak is None else peak
    weight = np.clip(density / max(peak, 1e-12), 0, 1)
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB).astype(np.float32)
    colour = colormaps[COLOURS](weight)[..., :3] * 255
    alpha = (strength * np.sqrt(weight))[..., None]
    return (grey * (1 - alpha) + colour * alpha).round().astype(np.uint8)


def mark(image: np.ndarray, place: np.ndarray, scale: float, colour: tuple[int, int, int], cross: bool) -> np.ndarray:
    """An image with a circle or a cross at a place of the image before it was enlarged by `scale`; none for NaN."""
    if np.isnan(place).any():
        return image
    image = image.copy()
    centre = tuple(int(round(v)) for v in (np.asarray(place) + 0.5) * scale - 0.5)
    size = max(4, image.shape[0] // 24)
    for ink, thickness in (((0, 0, 0), 4), (colour, 2)):
        if cross:
            cv2.drawMarker(image, centre, ink, cv2.MARKER_TILTED_CROSS, 2 * size, thickness, cv2.LINE_AA)
        else:
            cv2.circle(image, centre, size, ink, thickness, cv2.LINE_AA)
    return image


def marked_overlay(look: Look, height: int = CELL) -> np.ndarray:
    """A look as an image: a circle where the point truly is, a cross where most attention falls."""
    scale = height / look.image.shape[0]
    size = (max(1, round(look.image.shape[1] * scale)), height)
    shown = overlay(cv2.resize(look.image, size, interpolation=cv2.INTER_CUBIC), look.density)
    row, column = np.unravel_index(int(look.density.argmax()), look.density.shape)
    shown = mark(shown, np.array([column, row], np.float64), scale, STRONGEST, cross=True)
    return mark(shown, look.truth, scale, TRUE_PLACE, cross=False)


def looks(
    recorded: RecordedAttention,
    truth: BodyTruth,
    reference: np.ndarray,
    calibration: Calibration | None,
    point: int | str,
    frame: int,
    steps: Sequence[int],
    layers: Sequence[str] | None = None,
    image: int | None = None,
) -> list[Look]:
    """Where a point of one frame looks at some steps, the mean over layers.

    Args:
        reference: (H, W, 3) uint8, as the model gets it.
        calibration: what the run was given.
        image: number of the image that is shown, 0 the reference; None: the one that gets most at each step.

    Raises:
        UserError: a point that is not visible, or a step or frame that was not recorded.
    """
    if recorded.selection.mean and set(recorded.selection.mean) != {"heads"}:
        raise UserError("mean: images through denoising need steps and frames apart")
    number = recorded.query_number(recorded.layers[0], point)
    found = []
    for step in steps:
        density = layer_mean(recorded, point, step, frame, layers=layers)
        given = density.sum((1, 2))
        seen = int(given.argmax()) if image is None else image
        place = recorded.selection.place("steps", step), recorded.selection.place("frames", frame), number, seen
        shown = images_seen(reference, calibration, step, frame)[seen]
        name = "reference" if seen == 0 else "calibrated"
        found.append(Look(shown, density[seen], truth.places[place].numpy(), name, float(given[seen])))
    return found


def images_seen(reference: np.ndarray, calibration: Calibration | None, step: int, frame: int) -> list[np.ndarray]:
    """The k images that a frame could look at in a step, (H, W, 3) uint8; grey for an uncalibrated person."""
    images = [reference]
    for image in () if calibration is None else calibration.index(step)[frame]:
        images.append(np.full_like(reference, GREY) if image < 0 else calibration.images[int(image)])
    return images


def looks_row(
    found: Sequence[Look], frame: np.ndarray, point: np.ndarray, label: str, steps: Sequence[int], height: int = CELL
) -> np.ndarray:
    """One row of Figure 2: the frame with the point, then where it looks, step by step.

    Args:
        frame: (H, W, 3) uint8; point: (2,) in its pixels.
    """
    scale = height / frame.shape[0]
    size = (max(1, round(frame.shape[1] * scale)), height)
    asked = mark(cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC), point, scale, TRUE_PLACE, cross=False)
    labels = [label] + [
        f"step {step + 1}: {look.name} {look.share:.0%}" for step, look in zip(steps, found, strict=True)
    ]
    return labelled_row([asked, *(marked_overlay(look, height) for look in found)], labels, height)


def stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows (h, w, 3) under each other, the shorter ones filled up with white."""
    width = max(row.shape[1] for row in rows)
    return np.concatenate(
        [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    )
