"""Generated and true clips on disk, matched by name: videos, folders of frames, or one folder of numbered frames."""

import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import UserError
from core.files import existing_file
from data.preparation.layouts import MADE_SUFFIXES, is_video
from data.video.files import VideoReader
from data.video.images import list_images, natural_order, read_image

RESULT_NAME = "animation.mp4"  # what infer.py calls its result
MASKS_SUFFIX = "_masks"


def file_stamps(files: Iterable[Path]) -> list[list]:
    """Name, size in bytes and time of change of every file, which differ when the content does."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


@dataclass(frozen=True)
class ClipFiles:
    """One clip: a video file, or images in order."""

    name: str  # what it is matched by
    argument: str  # what the folder was given as, for error messages
    video: Path | None = None
    images: tuple[Path, ...] = ()  # where there is no video

    @property
    def path(self) -> Path:
        return self.video if self.video is not None else self.images[0].parent

    def count(self) -> int:
        if self.video is None:
            return len(self.images)
        with VideoReader(self.video, argument=self.argument) as reader:
            return len(reader)

    def frames(self) -> Iterator[np.ndarray]:
        """The frames (h, w, 3) uint8 RGB, one at a time."""
        if self.video is None:
            for image in self.images:
                yield read_image(image, argument=self.argument)
            return
        with VideoReader(self.video, argument=self.argument) as reader:
            yield from reader

    def stamps(self) -> list[list]:
        return file_stamps([self.video] if self.video is not None else self.images)


@dataclass(frozen=True)
class MaskFiles:
    """The masks of a clip: for every frame one image, or one for each person (000000_p0.png, 000000_p1.png)."""

    name: str
    images: tuple[tuple[Path, ...], ...]  # 8 bit, 255 = person
    argument: str = "masks"

    @property
    def path(self) -> Path:
        return self.images[0][0].parent

    def count(self) -> int:
        return len(self.images)

    def frames(self) -> Iterator[np.ndarray]:
        """Masks (h, w) bool, the union of the persons, one at a time."""
        for persons in self.images:
            masks = [read_image(image, argument=self.argument)[..., 0] >= 128 for image in persons]
            if any(mask.shape != masks[0].shape for mask in masks):
                raise UserError(f"{self.argument}: {persons[0]} and {persons[-1]} are of different sizes")
            yield np.logical_or.reduce(masks)

    def stamps(self) -> list[list]:
        return file_stamps(image for persons in self.images for image in persons)


@dataclass(frozen=True)
class ClipPair:
    """A generated clip, the true one and its person masks, each of `frames` frames."""

    name: str
    generated: ClipFiles
    truth: ClipFiles
    masks: MaskFiles | None
    frames: int

    def stamps(self) -> dict[str, Any]:
        """Facts that differ when a clip's files have changed."""
        sides = {"generated": self.generated, "truth": self.truth, "masks": self.masks}
        return {side: clip.stamps() for side, clip in sides.items() if clip is not None}


def pair_clips(generated: str | Path, truth: str | Path, masks: str | Path | None = None) -> list[ClipPair]:
    """Match generated and true clips by name; one clip each is a pair whatever the names."""
    ours, theirs = find_clips(generated, "generated"), find_clips(truth, "truth")
    # Masks may lie beside the true clips, as `prepare.py` and the training data have them.
    theirs = {name: clip for name, clip in theirs.items() if not name.endswith(MASKS_SUFFIX) or name in ours}
    mask_files = {} if masks is None else find_masks(masks)
    if len(ours) == len(theirs) == 1:
        ours = dict(zip(theirs, ours.values(), strict=True))
        if len(mask_files) == 1:
            mask_files = dict(zip(theirs, mask_files.values(), strict=True))
    _check_names(ours, theirs, f"truth={truth}", f"generated={generated}")
    _check_names(theirs, ours, f"generated={generated}", f"truth={truth}")
    if masks is not None:
        _check_names(ours, mask_files, f"masks={masks}", f"generated={generated}")
    return [_pair(name, ours[name], theirs[name], mask_files.get(name)) for name in theirs]


def _check_names(wanted: dict, present: dict, source: str, other: str) -> None:
    missing = [name for name in wanted if name not in present]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UserError(f"{source} lacks {len(missing)} clips that {other} has: {shown}")


def _pair(name: str, ours: ClipFiles, theirs: ClipFiles, masks: MaskFiles | None) -> ClipPair:
    count = theirs.count()
    for other in (ours, masks):
        if other is not None and other.count() != count:
            raise UserError(
                f"clip {name!r}: {other.argument} has {other.count()} frames ({other.path}), truth has {count} "
                f"({theirs.path})"
            )
    if ours.images and theirs.images:
        for a, b in zip(ours.images, theirs.images, strict=True):
            if a.stem != b.stem:
                raise UserError(f"clip {name!r}: generated has a frame {a.name} where truth has {b.name}")
    return ClipPair(name, ours, theirs, masks, count)


def find_clips(path: str | Path, argument: str) -> dict[str, ClipFiles]:
    """The clips of a file or folder by name, in natural order.

    A video is one clip. A folder holds either clips (videos, folders of images, folders of `infer.py` results), or
    images: those whose names agree up to the last number are one clip, such as `dance_0001.png` of `dance`.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{argument}={path} does not exist")
    if path.is_file():
        return {path.stem: ClipFiles(path.stem, argument, video=path)}
    if (path / RESULT_NAME).is_file():
        return {path.name: ClipFiles(path.name, argument, video=path / RESULT_NAME)}
    clips: dict[str, ClipFiles] = {}
    for entry in sorted(path.iterdir(), key=natural_order):
        clip = None if entry.name.startswith(".") else _clip_at(entry, argument)
        if clip is None:
            continue
        if clip.name in clips:
            raise UserError(f"{argument}={path} holds the clip {clip.name!r} twice: {clips[clip.name].path}, {entry}")
        clips[clip.name] = clip
    return clips or _numbered_images(path, argument)


def other_entries(path: str | Path, argument: str) -> list[Path]:
    """Files and folders of a folder of clips that are none of them, apart from what is made of clips."""
    path, clips = Path(path), find_clips(path, argument)
    if path.is_file() or (path / RESULT_NAME).is_file():
        return []
    used = {file for clip in clips.values() for file in (clip.path, *clip.images)}
    used |= {clip.video.parent for clip in clips.values() if clip.video is not None}
    entries = (entry for entry in sorted(path.iterdir(), key=natural_order) if not entry.name.startswith("."))
    return [entry for entry in entries if entry not in used and entry.suffix.lower() not in MADE_SUFFIXES]


def _clip_at(entry: Path, argument: str) -> ClipFiles | None:
    if entry.is_file():
        return ClipFiles(entry.stem, argument, video=entry) if is_video(entry) else None
    if (entry / RESULT_NAME).is_file():
        return ClipFiles(entry.name, argument, video=entry / RESULT_NAME)
    images = tuple(list_images(entry))
    return ClipFiles(entry.name, argument, images=images) if images else None


def _numbered_images(folder: Path, argument: str) -> dict[str, ClipFiles]:
    groups: dict[str, list[Path]] = {}
    for image in list_images(folder):
        groups.setdefault(re.sub(r"[-_. ]*\d*$", "", image.stem) or folder.name, []).append(image)
    if not groups:
        raise UserError(f"{argument}={folder} holds no videos, no folders of frames and no images")
    return {name: ClipFiles(name, argument, images=tuple(images)) for name, images in groups.items()}


def find_poses(path: str | Path, pairs: Iterable[ClipPair], argument: str) -> dict[str, Path]:
    """The pose file or folder of every clip: name.npz, name.json or name/ in a folder; of one clip also a file."""
    path, names = Path(path), [pair.name for pair in pairs]
    if not path.exists():
        raise UserError(f"{argument}={path} does not exist")
    if path.is_file() and len(names) == 1:
        return {names[0]: path}
    if path.is_file():
        raise UserError(f"{argument}={path} is a file, but there are {len(names)} clips; give a folder of pose files")
    found = {}
    for name in names:
        files = [file for suffix in (".npz", ".json", "") if (file := path / f"{name}{suffix}").exists()]
        if not files:
            raise UserError(f"{argument}={path} holds neither {name}.npz nor {name}.json nor a folder {name}")
        found[name] = files[0]
    return found


def read_features(path: str | Path, names: list[str], argument: str) -> dict[str, np.ndarray]:
    """Feature vectors (windows, dimension) of every clip, from .npz with an array each or .npy (clips, dimension)."""
    path = existing_file(path, argument)
    try:
        content = np.load(path, allow_pickle=False)
        arrays = {name: content[name] for name in content.files} if path.suffix == ".npz" else content
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise UserError(f"{argument}={path} is not a file of features (.npy or .npz): {error}") from None
    if isinstance(arrays, np.ndarray):
        if arrays.ndim != 2 or len(arrays) != len(names):
            raise UserError(f"{argument}={path} is {arrays.shape}; {len(names)} clips need ({len(names)}, dimension)")
        arrays = dict(zip(names, arrays, strict=True))
    _check_names({name: None for name in names}, arrays, f"{argument}={path}", "truth")
    arrays = {name: np.atleast_2d(arrays[name]) for name in names}
    dimension = arrays[names[0]].shape[-1]
    for name, array in arrays.items():
        if array.ndim != 2 or not array.size or array.shape[1] != dimension or array.dtype.kind not in "fiu":
            raise UserError(
                f"{argument}={path}: clip {name!r} has an array {array.shape} of {array.dtype}, "
                f"not numbers (windows, {dimension})"
            )
        if not np.isfinite(array).all():
            raise UserError(f"{argument}={path}: features of clip {name!r} are not finite")
    return arrays


def find_masks(path: str | Path) -> dict[str, MaskFiles]:
    """The masks below a folder by the name of their clip: folders `name` or `name_masks`, or images of one clip."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"masks={path} is not a folder")
    masks = {}
    for folder in [*(entry for entry in sorted(path.iterdir(), key=natural_order) if entry.is_dir()), path]:
        frames: dict[str, list[Path]] = {}  # frame -> the images of its persons
        for image in list_images(folder):
            frames.setdefault(re.sub(r"_p\d+$", "", image.stem), []).append(image)
        if frames:
            name = folder.name.removesuffix(MASKS_SUFFIX)
            masks[name] = MaskFiles(name, tuple(tuple(persons) for persons in frames.values()))
    if not masks:
        raise UserError(f"masks={path} holds no images and no folders of images")
    return masks
