"""Comparison images and videos: labelled columns of frames."""

from collections.abc import Iterator, Mapping, Sequence

import cv2
import numpy as np

LABEL_HEIGHT = 22
MARGIN = 4
BACKGROUND = 255
CELL_HEIGHT = 256


def labelled_row(images: Sequence[np.ndarray], labels: Sequence[str] | None, height: int = CELL_HEIGHT) -> np.ndarray:
    """Images (h, w, 3) uint8 of any size side by side, scaled to one height, with a label above each."""
    cells = []
    for index, image in enumerate(images):
        width = max(1, round(image.shape[1] * height / image.shape[0]))
        shrinks = image.shape[0] > height
        cell = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
        if labels is not None:
            cell = np.concatenate([text_line(labels[index], LABEL_HEIGHT, width), cell])
        cells.append(np.pad(cell, ((0, MARGIN), (0, MARGIN), (0, 0)), constant_values=BACKGROUND))
    return np.concatenate(cells, axis=1)


def labelled_sheet(rows: Sequence[Mapping[str, np.ndarray]], height: int = CELL_HEIGHT) -> np.ndarray:
    """Rows of images by label under each other; the labels, the same in every row, stand above the first."""
    sheet = [labelled_row(list(row.values()), None if index else list(row), height) for index, row in enumerate(rows)]
    return np.concatenate(sheet)


def comparison_strip(columns: Mapping[str, Sequence[np.ndarray]], rows: int = 4, caption: str = "") -> np.ndarray:
    """A sheet with one labelled column a sequence and one row for each of `rows` frames spread over the clip.

    The last line names these frames, after the caption.
    """
    length = max(len(frames) for frames in columns.values())
    chosen = np.unique(np.linspace(0, length - 1, min(rows, length)).round().astype(int))
    sheet = labelled_sheet([_at_frame(columns, frame) for frame in chosen])
    named = f"frames {', '.join(map(str, chosen))} of {length}, from 0"
    return np.concatenate([sheet, text_line("; ".join(filter(None, (caption, named))), LABEL_HEIGHT, sheet.shape[1])])


def comparison_frames(columns: Mapping[str, Sequence[np.ndarray]]) -> Iterator[np.ndarray]:
    """The frames of a comparison video, one labelled row each."""
    for frame in range(max(len(frames) for frames in columns.values())):
        yield labelled_sheet([_at_frame(columns, frame)])


def _at_frame(columns: Mapping[str, Sequence[np.ndarray]], frame: int) -> dict[str, np.ndarray]:
    """One image of every sequence; those of one image stand still."""
    return {name: frames[min(frame, len(frames) - 1)] for name, frames in columns.items()}


def text_line(text: str, height: int = LABEL_HEIGHT, width: int | None = None) -> np.ndarray:
    """Text in black on white, (height, w, 3) uint8: as wide as it needs, or shrunk to fit a width."""
    scale = 0.45
    (text_width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    if width is None:
        width = text_width + 16
    scale *= min(1.0, (width - 4) / max(text_width, 1))
    strip = np.full((height, width, 3), BACKGROUND, np.uint8)
    cv2.putText(strip, text, (2, height // 2 + 4), cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 1, cv2.LINE_AA)
    return strip
