"""Person masks of a clip on disk: `000000.png` for one person, `000000_p0.png`, `000000_p1.png` for several.

8-bit images of the video's size, 255 = person, numbered as the video's frames.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from core.errors import UserError
from core.files import complete_folder
from data.video.images import list_images, read_image


class MaskWriter:
    """Writer of the masks of a clip's persons as they are found, into a folder that is not yet complete."""

    def __init__(self, folder: Path, size: tuple[int, int]):
        self._folder, self._size = folder, size
        self._written: set[tuple[int, int]] = set()

    def write(self, frame: int, slot: int, mask: np.ndarray) -> None:
        """Keep the mask (h, w) bool of the person in a slot."""
        _save(self._path(frame, slot), mask)
        self._written.add((frame, slot))

    @property
    def empty(self) -> bool:
        """True when no mask was written."""
        return not self._written

    def finish(self, frames: int) -> None:
        """Number the taken slots without gaps; frames in which a person is missing get an empty mask."""
        # Only now it is known which of the estimator's slots are taken.
        used = sorted({slot for _, slot in self._written})
        nobody = np.zeros(self._size[::-1], bool)
        for person, slot in enumerate(used):
            for frame in range(frames):
                name = f"{frame:06d}.png" if len(used) == 1 else f"{frame:06d}_p{person}.png"
                if (frame, slot) in self._written:
                    self._path(frame, slot).rename(self._folder / name)
                else:
                    _save(self._folder / name, nobody)

    def _path(self, frame: int, slot: int) -> Path:
        return self._folder / f"{frame:06d}_slot{slot}.png"


def mask_files(folder: Path, frame: int) -> list[Path]:
    """Mask files of a frame, one a person."""
    single = folder / f"{frame:06d}.png"
    return [single] if single.is_file() else sorted(folder.glob(f"{frame:06d}_p*.png"))


def read_union(folder: Path | None, frame: int, size: tuple[int, int]) -> np.ndarray:
    """Mask of all persons of a frame, (h, w) uint8; without a folder every pixel counts as theirs.

    Raises:
        UserError: no mask of that frame, or not of the video's (width, height).
    """
    if folder is None:
        return np.full(size[::-1], 255, np.uint8)
    files = mask_files(folder, frame)
    if not files:
        raise UserError(f"{folder} holds no mask of frame {frame}: {frame:06d}.png")
    masks = [read_image(file)[..., 0] for file in files]
    if any(mask.shape != size[::-1] for mask in masks):
        raise UserError(f"{files[0]} is not of its video's size {size[0]} x {size[1]}")
    return np.max(masks, axis=0)


def numbered_masks(source: Path, frames: int) -> list[list[Path]]:
    """Mask files of every frame of a folder in any tool's numbering; `UserError` when some are missing."""
    if mask_files(source, 0):
        files = [mask_files(source, frame) for frame in range(frames)]
        missing = [index for index, found in enumerate(files) if not found]
        if missing:
            raise UserError(f"{source} holds no mask of frame {missing[0]}; {len(missing)} of {frames} are missing")
        return files
    listed = list_images(source)
    if len(listed) != frames:
        raise UserError(f"{source} holds {len(listed)} masks, but the clip has {frames} frames")
    return [[file] for file in listed]


def import_masks(source: Path, target: Path, frames: int, size: tuple[int, int]) -> None:
    """Copy a folder of masks into our numbering; half and more of the brightness counts as person.

    Raises:
        UserError: not as many masks as frames, or masks of another size.
    """
    files = numbered_masks(source, frames)
    with complete_folder(target) as folder:
        for frame, found in enumerate(files):
            for person, file in enumerate(found):
                mask = read_image(file)[..., 0]
                if mask.shape != size[::-1]:
                    raise UserError(f"{file} is {mask.shape[1]}x{mask.shape[0]}, the clip is {size[0]}x{size[1]}")
                name = f"{frame:06d}.png" if len(found) == 1 else f"{frame:06d}_p{person}.png"
                _save(folder / name, mask >= 128)


def _save(path: Path, mask: np.ndarray) -> None:
    Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(path, compress_level=3)
