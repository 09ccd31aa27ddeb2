"""Images from files as RGB arrays: stills, folders of numbered frames, animated images."""

import io
import logging
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageCms, ImageOps, ImageSequence, UnidentifiedImageError

from core.errors import UserError
from core.files import existing_file

IMAGE_SUFFIXES = tuple(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .bmp .dib .tif .tiff .gif .avif .jp2 .j2k .ppm .pgm .pbm .pnm .tga "
    ".qoi".split()
)

logger = logging.getLogger(__name__)

_READ_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)


def read_image(path: str | Path, argument: str = "image") -> np.ndarray:
    """Read a still image, or an animated one's first frame, as (h, w, 3) uint8 sRGB, turned as the camera says (EXIF).

    A `UserError` for a file that is missing, not an image, or damaged names the `argument`.
    """
    with _open_image(path, argument) as image:
        return to_rgb(ImageOps.exif_transpose(next(_animation(image))), f"{argument}={path}")


def to_rgb(image: Image.Image, name: str) -> np.ndarray:
    """Convert a PIL image of any mode and ICC profile to (h, w, 3) uint8 sRGB, transparent parts over white."""
    profile = image.info.get("icc_profile")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it as an 8-bit or 16-bit image")
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion clips at 255
        values = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    elif image.mode not in ("CMYK", "LAB"):
        image = image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")
    if profile or image.mode == "LAB":
        image = _to_srgb(image, profile, name)
    image = image.convert("RGB")
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return np.asarray(image).copy()


def _to_srgb(image: Image.Image, profile: bytes | None, name: str) -> Image.Image:
    """The image in sRGB; as it is, with a warning, where the profile is broken or of other channels than its own."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile) if profile else ImageCms.createProfile("LAB"))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        if image.mode == "LAB":
            raise ValueError(f"its ICC profile cannot be used: {error}") from None
        logger.warning("%s: its ICC profile is left out, its colours taken for sRGB: %s", name, error)
        return image


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

    start, note = 0.0, None

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

    start, note = 0.0, None

    def __init__(self, path: str | Path, fps: float, argument: str):
        self._path, self._argument = Path(path), argument
        durations, sizes = [], set()
        with _open_image(path, argument) as image:
            # PIL takes the end of a truncated GIF for the end of the animation; a whole one ends with a semicolon.
            if image.format == "GIF" and not self._path.read_bytes().rstrip(b"\0").endswith(b";"):
                whole = getattr(image, "n_frames", 1)
                raise UserError(f"{argument}={path} is cut short: decoding stopped at frame {whole}")
            # An MPO file holds other views of a photograph, or a preview.
            self._still = not getattr(image, "is_animated", False) or image.format == "MPO"
            for frame in _animation(image):
                frame.load()  # only then does a WebP state the frame's duration
                sizes.add(frame.size)
                # Browsers show frames that state no duration for 100 ms.
                durations.append(float(frame.info.get("duration") or 100.0) / 1000)
                if self._still:
                    break
            self.size = image.size
        if self._still or len(sizes) > 1:  # a TIFF file may hold smaller copies of a photograph
            self._still, durations = True, [1 / fps]
            self.size = read_image(path, argument).shape[1::-1]
        self.times = np.concatenate([[0.0], np.cumsum(durations)[:-1]])
        self.duration = float(np.sum(durations))
        self.nominal_fps = len(durations) / self.duration

    def frames(self) -> Iterator[np.ndarray]:
        if self._still:
            yield read_image(self._path, self._argument)
            return
        with _open_image(self._path, self._argument) as image:
            for frame in _animation(image):
                yield to_rgb(frame, f"{self._argument}={self._path}")

    def pick(self, indices: np.ndarray) -> list[np.ndarray]:
        wanted = set(indices.tolist())
        # Later frames build on earlier ones, so all are decoded.
        found = {index: frame for index, frame in enumerate(self.frames()) if index in wanted}
        return [found[index] for index in indices.tolist()]


def _animation(image: Image.Image) -> Iterator[Image.Image]:
    """Frames in order; a PNG may store a picture before them for programs that show stills alone."""
    frames = ImageSequence.Iterator(image)
    if image.info.get("default_image"):
        next(frames)
    yield from frames


def is_animated_image(path: str | Path) -> bool:
    """True for an image file that `AnimatedImage` reads."""
    try:
        with Image.open(path, formats=("GIF", "WEBP", "PNG", "JPEG", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")):
            return True
    except (UnidentifiedImageError, *_READ_ERRORS):
        return False


def refuse_heic(path: str | Path, argument: str) -> None:
    """`UserError` for a HEIC photograph, which Pillow does not read, with the command that converts it."""
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
        command = f"heif-convert {path.name} {path.stem}.png"
        raise UserError(f"{argument}={path} is a HEIC image, which cannot be read; convert it, as with `{command}`")


@contextmanager
def _open_image(path: str | Path, argument: str) -> Iterator[Image.Image]:
    path = existing_file(path, argument)
    try:
        with Image.open(path) as image:
            yield image
    except UnidentifiedImageError:
        refuse_heic(path, argument)
        raise UserError(f"{argument}={path} is not an image") from None
    except _READ_ERRORS as error:
        raise UserError(f"{argument}={path} cannot be read as an image: {error}") from None


# Numbers of ITU-T H.273 that videos state. Linear light of its primaries -> BT.709's, which are sRGB's: BT.2087, and
# Display P3 (SMPTE EG 432-1).
BT2020, PQ, HLG = 9, 16, 18
_TO_BT709 = {
    BT2020: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    12: ((1.2249, -0.2247, 0.0), (-0.0421, 1.0421, 0.0), (-0.0196, -0.0786, 1.0979)),
}
_WHITE = 203.0  # cd/m2 of SDR white in HDR (BT.2408)
_KNEE = 0.8  # of SDR white: darker pixels keep their brightness
_LIGHT = np.linspace(0, 1, 2**16)
_SRGB = np.rint(255 * np.where(_LIGHT <= 0.0031308, 12.92 * _LIGHT, 1.055 * _LIGHT ** (1 / 2.4) - 0.055)).astype(
    np.uint8
)


def wide_colours(primaries: int, transfer: int) -> str | None:
    """What is done about a video's colours, in words, where `wide_to_srgb` converts them; None: nothing."""
    if transfer in (PQ, HLG):
        return f"HDR ({'PQ' if transfer == PQ else 'HLG'}) is tone-mapped to sRGB"
    return "its wide colours are converted to sRGB" if primaries in _TO_BT709 else None


def wide_to_srgb(image: np.ndarray, primaries: int, transfer: int) -> np.ndarray:
    """(h, w, 3) uint8 sRGB of a video frame (h, w, 3) uint16 RGB of other primaries or of HDR (SMPTE ST 2084, HLG).

    HDR is tone-mapped by the curve of Khronos' PBR Neutral: colours below `_KNEE` of SDR white stay as they are,
    brighter ones approach white along a hyperbola. What sRGB has no colour for is cut off.
    """
    light = _linear_light(transfer)[image]
    if transfer == HLG:  # BT.2100's system gamma at 1000 cd/m2, in scene light
        luminance = np.maximum(cv2.transform(light, np.float32([[0.2627, 0.6780, 0.0593]])), 1e-9)
        light *= np.float32(1000 / _WHITE) * cv2.pow(luminance, 0.2)[..., None]
    light = np.maximum(cv2.transform(light, np.float32(_TO_BT709.get(primaries, _TO_BT709[BT2020]))), 0)
    if transfer in (PQ, HLG):
        peak = cv2.max(cv2.max(light[..., 0], light[..., 1]), light[..., 2])
        bright = peak > _KNEE
        pixels, peak = light[bright], peak[bright, None]  # (n, 3), (n, 1)
        mapped = 1 - (1 - _KNEE) ** 2 / (peak + 1 - 2 * _KNEE)
        white = 1 - 1 / (0.15 * (peak - mapped) + 1)
        light[bright] = pixels * (mapped / peak * (1 - white)) + mapped * white
    return _SRGB[(np.minimum(light, 1) * np.float32(2**16 - 1) + np.float32(0.5)).astype(np.uint16)]


@cache
def _linear_light(transfer: int) -> np.ndarray:
    """(65536,) float32: light of each 16-bit value; 1 is SDR white, of HLG the brightest in the scene."""
    signal = np.linspace(0, 1, 2**16)
    if transfer == PQ:
        root = signal ** (32 / 2523)
        nits = 10000 * (np.maximum(root - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * root)) ** (16384 / 2610)
        return np.float32(nits / _WHITE)
    if transfer == HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        return np.float32(np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12))
    return np.float32(np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4))
