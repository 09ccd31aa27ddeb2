"""Clips of a folder of filmed people: prepared ones of its manifest, or videos with pose files; frames and masks.

Masks are 8-bit images of the video's size, 255 = person, numbered as the video's frames: `000000.png` for one person,
`000000_p0.png`, `000000_p1.png` for several.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from core.errors import UserError
from core.files import complete_folder
from data.poses.poses import Poses
from data.preparation.layouts import videos_below
from data.preparation.manifest import Clip, has_manifest, read_manifest
from data.transforms import crop_matrix
from data.video.files import VideoReader
from data.video.images import list_images, read_image


@dataclass(frozen=True)
class UsableClip:
    """A clip that fits the model's frame."""

    clip: Clip
    matrix: np.ndarray  # (3, 3), from its pixels to the frame


def usable_clips(
    root: Path, size: tuple[int, int], crop: str, split: str | None = None
) -> tuple[list[UsableClip], dict[str, str]]:
    """Clips of a folder that can be cut to the model's frame, and name -> reason of the others; see `list_clips`."""
    clips, left_out = list_clips(root)
    heldout = [clip for clip in clips if clip.split == "heldout"]
    if split == "train":
        clips = [clip for clip in clips if clip.split != "heldout"]
    elif split == "heldout" and heldout:
        clips = heldout
    usable = []
    for clip in clips:
        matrix = crop_matrix(clip.size, size, clip.box, crop)
        if matrix is None:
            left_out[clip.name] = f"does not fit: people would be cut at {size[0]}x{size[1]}"
        else:
            usable.append(UsableClip(clip, matrix))
    return usable, left_out


def list_clips(root: Path) -> tuple[list[Clip], dict[str, str]]:
    """Clips of a prepared folder, or of a folder of videos with pose files; and name -> reason of those left out."""
    if has_manifest(root):
        manifest = read_manifest(root, "root")
        left_out = {name: f"not prepared: {reason}" for name, reason in manifest.left_out.items()}
        clips = []
        for clip in manifest.clips:
            if clip.fingerprint.matches(clip.video):
                clips.append(clip)
            else:
                state = "has changed since it was prepared" if clip.video.exists() else "is missing"
                left_out[clip.name] = f"video {state}: {clip.video}"
        return clips, left_out
    if not root.is_dir():
        raise UserError(f"root={root} is not a folder; give one that holds videos and their pose files")
    videos = {video: video.with_suffix(".npz") for video in videos_below(root)}
    found = sorted((poses, video) for video, poses in videos.items() if poses.is_file())
    if not found:
        raise UserError(
            f"root={root} holds no video with a pose file: name.mp4 needs name.npz beside it; "
            f"`python prepare.py source={root} output=...` makes them"
        )
    clips = []
    left_out = {
        video.relative_to(root).as_posix(): f"without poses: {poses.name} is missing"
        for video, poses in videos.items()
        if not poses.is_file()
    }
    for path, video in found:
        name = path.relative_to(root).with_suffix("").as_posix()
        if clips and clips[-1].poses == path:
            left_out[video.relative_to(root).as_posix()] = f"of the name of another clip: {clips[-1].video.name}"
            continue
        masks = path.with_name(f"{path.stem}_masks")
        masks = masks if masks.is_dir() else None
        try:
            poses = Poses.load(path)
        except UserError as error:
            left_out[name] = f"poses cannot be read: {error}"
            continue
        clips.append(Clip(name, video, path, masks, poses.frames, poses.fps, poses.size, poses.box(), None, None))
    return clips, left_out


def read_frames(clip: Clip, frames: list[int]) -> np.ndarray:
    """Frames (n, h, w, 3) uint8 of a clip; `UserError` for another video than its poses were made from."""
    if not frames:
        return np.zeros((0, *clip.size[::-1], 3), np.uint8)
    with VideoReader(clip.video, clip.fps if clip.video.is_dir() else None) as reader:
        if len(reader) != clip.frames or reader.size != clip.size:
            raise UserError(
                f"{clip.video} has {len(reader)} frames of {reader.size}, but its pose file has {clip.frames} of "
                f"{clip.size}; estimate its poses again"
            )
        return reader.get(frames)


def summarize(left_out: dict[str, str], clips: int) -> str:
    """One line that counts the clips that are left out by reason, the most frequent first, with a few names."""
    names: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        names.setdefault(reason.split(":")[0], []).append(name)
    parts = []
    for reason, found in sorted(names.items(), key=lambda item: -len(item[1])):
        parts.append(f"{len(found)} {reason} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})")
    return f"{len(left_out)} of {clips} clips are left out: {'; '.join(parts)}"


class MaskWriter:
    """Writer of the masks of a clip's persons as they are found, into a folder that is not yet complete."""

    def __init__(self, folder: Path, size: tuple[int, int]):
        self._folder, self._size = folder, size
        self._written: set[tuple[int, int]] = set()

    def write(self, frame: int, slot: int, mask: np.ndarray) -> None:
        _save_mask(self._path(frame, slot), mask)
        self._written.add((frame, slot))

    @property
    def empty(self) -> bool:
        return not self._written

    def finish(self, frames: int) -> None:
        """Number the taken slots without gaps; frames in which a person is missing get an empty mask."""
        # Only now it is known which of the estimator's slots are taken.
        used = sorted({slot for _, slot in self._written})
        nobody = np.zeros(self._size[::-1], bool)
        for person, slot in enumerate(used):
            for frame in range(frames):
                name = _mask_name(frame, person, len(used))
                if (frame, slot) in self._written:
                    self._path(frame, slot).rename(self._folder / name)
                else:
                    _save_mask(self._folder / name, nobody)

    def _path(self, frame: int, slot: int) -> Path:
        return self._folder / f"{frame:06d}_slot{slot}.png"


def mask_files(folder: Path, frame: int) -> list[Path]:
    single = folder / f"{frame:06d}.png"
    return [single] if single.is_file() else sorted(folder.glob(f"{frame:06d}_p*.png"))


def read_union(folder: Path | None, frame: int, size: tuple[int, int]) -> np.ndarray:
    """Mask of all persons of a frame, (h, w) uint8; without a folder every pixel counts as theirs."""
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
    """Copy a folder of masks into our numbering; half and more of the brightness counts as person."""
    files = numbered_masks(source, frames)
    with complete_folder(target) as folder:
        for frame, found in enumerate(files):
            for person, file in enumerate(found):
                mask = read_image(file)[..., 0]
                if mask.shape != size[::-1]:
                    raise UserError(f"{file} is {mask.shape[1]}x{mask.shape[0]}, the clip is {size[0]}x{size[1]}")
                _save_mask(folder / _mask_name(frame, person, len(found)), mask >= 128)


def _mask_name(frame: int, person: int, persons: int) -> str:
    return f"{frame:06d}.png" if persons == 1 else f"{frame:06d}_p{person}.png"


def _save_mask(path: Path, mask: np.ndarray) -> None:
    Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(path, compress_level=3)
