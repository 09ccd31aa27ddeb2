"""Comparison images and videos: labelled columns of frames."""

from collections.abc import Iterator, Sequence

import cv2
import numpy as np

LABEL_HEIGHT = 22
MARGIN = 4
BACKGROUND = 255
CELL_HEIGHT = 256


def labelled_row(images: Sequence[np.ndarray], labels: Sequence[str] | None, height: int = CELL_HEIGHT) -> np.ndarray:
    """Images side by side, scaled to one height, with a label above each.

    Args:
        images: (h, w, 3) uint8, of any size.
        labels: one each, or None for a row without labels.
        height: of every image in the row, in pixels.

    Returns:
        (h, w, 3) uint8.
    """
    cells = []
    for number, image in enumerate(images):
        width = max(1, round(image.shape[1] * height / image.shape[0]))
        shrinks = image.shape[0] > height
        cell = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
        if labels is not None:
            cell = np.concatenate([_label(labels[number], width), cell])
        cells.append(np.pad(cell, ((0, MARGIN), (0, MARGIN), (0, 0)), constant_values=BACKGROUND))
    return np.concatenate(cells, axis=1)


def comparison_strip(columns: dict[str, Sequence[np.ndarray]], rows: int = 4) -> np.ndarray:
    """A sheet with one labelled column a sequence and one row for each of `rows` frames spread over the clip."""
    length = max(len(frames) for frames in columns.values())
    chosen = np.unique(np.linspace(0, length - 1, min(rows, length)).round().astype(int))
    sheet = []
    for place, frame in enumerate(chosen):
        images = [frames[min(frame, len(frames) - 1)] for frames in columns.values()]
        sheet.append(labelled_row(images, list(columns) if place == 0 else None))
    return np.concatenate(sheet)


def comparison_frames(columns: dict[str, Sequence[np.ndarray]]) -> Iterator[np.ndarray]:
    """The frames of a comparison video, one labelled row each; sequences of one image stand still."""
    length = max(len(frames) for frames in columns.values())
    for frame in range(length):
        yield labelled_row([frames[min(frame, len(frames) - 1)] for frames in columns.values()], list(columns))


def _label(text: str, width: int) -> np.ndarray:
    """Text in black on white, shrunk where the column is narrow."""
    strip = np.full((LABEL_HEIGHT, width, 3), BACKGROUND, np.uint8)
    scale = 0.45
    (text_width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    scale *= min(1.0, (width - 4) / max(text_width, 1))
    cv2.putText(strip, text, (2, LABEL_HEIGHT - 7), cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 1, cv2.LINE_AA)
    return strip
