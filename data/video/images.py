"""Images from files as RGB arrays: stills, folders of numbered frames, animated images."""

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from core.errors import UserError
from core.files import existing_file

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")

_READ_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)


def read_image(path: str | Path, argument: str = "image") -> np.ndarray:
    """Read a still image, or an animated one's first frame, as (h, w, 3) uint8 RGB, turned as the camera says (EXIF).

    A `UserError` for a file that is missing, not an image, or damaged names the `argument`.
    """
    with _open_image(path, argument) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> np.ndarray:
    """Convert a PIL image of any mode to (h, w, 3) uint8 RGB, transparent parts over white."""
    if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion clips at 255
        values = np.asarray(image).astype(np.float64) / 257
        grey = np.clip(np.rint(values), 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it as an 8-bit or 16-bit image")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return np.asarray(image.convert("RGB")).copy()


def list_images(folder: str | Path) -> list[Path]:
    """Image files of a folder in natural order (2.png before 10.png), without hidden ones."""
    files = [
        file
        for file in Path(folder).iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
    ]
    return sorted(files, key=natural_order)


def natural_order(file: Path) -> list[int | str]:
    """Sort key that orders numbers in names by value."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)]


class FolderOfFrames:
    """Images of a folder, all of one size, as the frames of a clip in natural order."""

    def __init__(self, folder: str | Path, fps: float, argument: str):
        self._argument = argument
        self._files = list_images(folder)
        if not self._files:
            raise UserError(f"{argument}={folder} is a folder without images ({', '.join(IMAGE_SUFFIXES)})")
        self.times = np.arange(len(self._files)) / fps  # seconds at which each frame begins
        self.duration = len(self._files) / fps
        self.nominal_fps = fps
        self.size = read_image(self._files[0], argument).shape[1::-1]  # (width, height)

    def frames(self) -> Iterator[np.ndarray]:
        for file in self._files:
            yield self._read(file)

    def pick(self, indices: np.ndarray) -> list[np.ndarray]:
        return [self._read(self._files[index]) for index in indices]

    def close(self) -> None:
        """Nothing is kept open."""

    def _read(self, file: Path) -> np.ndarray:
        frame = read_image(file, self._argument)
        if frame.shape[1::-1] != self.size:
            raise UserError(
                f"{self._argument}={file} has size {frame.shape[1]}x{frame.shape[0]}, "
                f"the first frame {self.size[0]}x{self.size[1]}; all frames of a folder must have one size"
            )
        return frame


class AnimatedImage:
    """Frames of an animated GIF, WebP or PNG at their own times; a still image has one. As `FolderOfFrames`."""

    def __init__(self, path: str | Path, fps: float, argument: str):
        self._path, self._argument = Path(path), argument
        durations = []
        with _open_image(path, argument) as image:
            # PIL takes the end of a truncated GIF for the end of the animation; a whole one ends with a semicolon.
            if image.format == "GIF" and not self._path.read_bytes().rstrip(b"\0").endswith(b";"):
                whole = getattr(image, "n_frames", 1)
                raise UserError(f"{argument}={path} is cut short: decoding stopped at frame {whole}")
            self._still = not getattr(image, "is_animated", False)
            for frame in ImageSequence.Iterator(image):
                frame.load()  # only then does a WebP state the frame's duration
                # Browsers show frames that state no duration for 100 ms.
                durations.append(float(frame.info.get("duration") or 100.0) / 1000)
                if self._still:
                    break
            self.size = to_rgb(ImageOps.exif_transpose(image) if self._still else image).shape[1::-1]
        if self._still:
            durations = [1 / fps]
        self.times = np.concatenate([[0.0], np.cumsum(durations)[:-1]])
        self.duration = float(np.sum(durations))
        self.nominal_fps = len(durations) / self.duration

    def frames(self) -> Iterator[np.ndarray]:
        if self._still:
            yield read_image(self._path, self._argument)
            return
        with _open_image(self._path, self._argument) as image:
            for frame in ImageSequence.Iterator(image):
                yield to_rgb(frame)

    def pick(self, indices: np.ndarray) -> list[np.ndarray]:
        wanted = set(indices.tolist())
        # Later frames build on earlier ones, so all are decoded.
        found = {index: frame for index, frame in enumerate(self.frames()) if index in wanted}
        return [found[index] for index in indices.tolist()]

    def close(self) -> None:
        """Nothing is kept open."""


def is_animated_image(path: str | Path) -> bool:
    """True for an image file that `AnimatedImage` reads."""
    try:
        with Image.open(path, formats=("GIF", "WEBP", "PNG", "JPEG", "BMP", "TIFF")):
            return True
    except (UnidentifiedImageError, *_READ_ERRORS):
        return False


@contextmanager
def _open_image(path: str | Path, argument: str) -> Iterator[Image.Image]:
    path = existing_file(path, argument)
    try:
        with Image.open(path) as image:
            yield image
    except UnidentifiedImageError:
        raise UserError(f"{argument}={path} is not an image") from None
    except _READ_ERRORS as error:
        raise UserError(f"{argument}={path} cannot be read as an image: {error}") from None
