"""Clips of a folder of filmed people: prepared ones of its manifest, or videos with pose files beside them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.errors import UserError
from data.poses.poses import Poses
from data.preparation.layouts import VIDEO_SUFFIXES
from data.preparation.manifest import Clip, has_manifest, read_manifest
from data.transforms import crop_matrix
from data.video.reading import VideoReader

_SHOWN_NAMES = 3


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
    """Clips of a prepared folder, or of a folder of videos with pose files; and name -> reason of those left out.

    Raises:
        UserError: no such folder, or there are neither a manifest nor pose files in it.
    """
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
    found = [(path, video) for path in sorted(root.rglob("*.npz")) if (video := video_of(path)) is not None]
    if not found:
        raise UserError(
            f"root={root} holds no video with a pose file: name.mp4 needs name.npz beside it; "
            f"`python prepare.py source={root} output=...` makes them"
        )
    clips, left_out = [], {}
    for path, video in found:
        name = path.relative_to(root).with_suffix("").as_posix()
        try:
            clips.append(_unlisted_clip(name, video, path))
        except UserError as error:
            left_out[name] = f"poses cannot be read: {error}"
    return clips, left_out


def video_of(pose_file: Path) -> Path | None:
    """Video beside a pose file, or None."""
    return next((path for ext in VIDEO_SUFFIXES if (path := pose_file.with_suffix(ext)).is_file()), None)


def read_frames(clip: Clip, frames: list[int]) -> np.ndarray:
    """Frames (n, h, w, 3) uint8 of a clip.

    Raises:
        UserError: damaged, or not the video that its poses were made from.
    """
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
        more = ", ..." if len(found) > _SHOWN_NAMES else ""
        parts.append(f"{len(found)} {reason} ({', '.join(found[:_SHOWN_NAMES])}{more})")
    return f"{len(left_out)} of {clips} clips are left out: {'; '.join(parts)}"


def _unlisted_clip(name: str, video: Path, path: Path) -> Clip:
    poses = Poses.load(path)
    masks = path.with_name(f"{path.stem}_masks")
    return Clip(
        name=name,
        video=video,
        poses=path,
        masks=masks if masks.is_dir() else None,
        frames=poses.frames,
        fps=poses.fps,
        size=poses.size,
        box=poses.box(),
        split=None,
        fingerprint=None,
    )
