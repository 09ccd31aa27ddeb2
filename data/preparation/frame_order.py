"""Whether the images of a folder are in the order of time, by the numbers in their names."""

import re
from pathlib import Path

import numpy as np

from data.video.images import list_images

Found = tuple[str, str, str, str]  # severity, kind, message, advice


def frame_order_findings(folder: Path) -> list[Found]:
    """What is wrong with the names of a folder of frames; empty when they are numbered without gaps.

    Frames are read in the order of the numbers, whatever their padding.
    """
    names = [file.name for file in list_images(folder)]
    numbers = [re.findall(r"\d+", Path(name).stem) for name in names]
    if not names or not all(numbers):
        unnumbered = sum(not found for found in numbers)
        message = f"{unnumbered} of {len(names)} frames have no number in their names; they are read by name"
        return [("warning", "order", message, "number the frames in the order of time")] if names else []
    last = np.array([int(found[-1]) for found in numbers])
    found: list[Found] = []
    values, counts = np.unique(last, return_counts=True)
    if (counts > 1).any():
        doubled = int(values[counts > 1][0])
        message = f"{int((counts > 1).sum())} numbers occur more than once, first {doubled}"
        found.append(("error", "order", message, "remove the copies, such as frame_1.jpg beside frame_1.png"))
    elif (np.diff(last) < 0).any():
        message = "the numbers do not grow in the order of the names"
        found.append(("error", "order", message, "give all frames one pattern of names, such as 000000.png"))
    steps = np.diff(values)
    usual = int(np.median(steps)) if len(steps) else 1
    gaps = np.flatnonzero(steps > usual)
    if len(gaps):
        before, after = int(values[gaps[0]]), int(values[gaps[0] + 1])
        message = f"{len(gaps)} gaps in the numbers, first between {before} and {after}: the motion jumps there"
        found.append(("warning", "gaps", message, "bring the missing frames back, or make two clips of it"))
    if sorted(names) != names:
        message = "the numbers are not padded; they are read by number here, but tools that sort by name mix them up"
        found.append(("note", "padding", message, "rename to frame_000000.png, ... before using other tools"))
    return found
