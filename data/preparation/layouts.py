"""Data sets of other projects as lists of clips: videos, what belongs to them, and the part that is held out.

| layout | files |
|---|---|
| moore | `*_meta.json`: a list of {"video_path", "kps_path"} |
| musepose | the same in `meta/`, beside folders of videos and their `_dwpose` and `_dwpose_keypoints` folders |
| tiktok | `00001/images/0001.png`, with `masks/` and, from DisCo, `openpose_json/` |
| ted, ubc, splits | `train/*.mp4` and `test/*.mp4` (or `val`), at any depth |
| stableanimator | `rec/00001/images/frame_0.png`, `vec/...`, with `video_rec_path.txt`, `video_vec_path.txt` |
| frames | folders of images, one a clip |
| videos | video files at any depth; `name.npz` or `name.json` are poses, `name_masks/` masks |

Pose images and rendered pose videos are left alone: keypoints with confidences cannot be got back from them, so
poses are estimated again. Pickled keypoints (MusePose's .npy) are not read: unpickling runs whatever they hold.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from core.errors import UserError
from core.files import read_text
from data.video.images import list_images, natural_order

# Of files that are videos for certain; `is_video` also knows pictures that move.
VIDEO_SUFFIXES = tuple(
    ".mp4 .m4v .mov .qt .3gp .3g2 .f4v .mkv .webm .avi .divx .flv .wmv .asf .ts .mts .m2ts .m2t .mpg .mpeg .mpe .m1v "
    ".m2v .vob .ogv .ogg .ogm .mxf .nut .ivf .y4m .h264 .264 .avc .h265 .265 .hevc .mjpeg .mjpg .dv .rm .rmvb .amv "
    ".gif .apng".split()
)
MADE_SUFFIXES = (".npz", ".json", ".md", ".safetensors")  # of poses, records, reports and caches
_LISTED_BY_FOLDER = ("ted", "ubc", "splits", "videos")  # layouts whose clips are all the videos that lie in a folder
# Folders of what was made from videos, not of videos.
_DERIVED = ("_dwpose", "_dwpose_without_face", "_dwpose_keypoints", "_densepose", "_openpose", "_masks", "_mask")
_HELD_OUT = ("test", "val", "valid", "validation", "heldout")


@dataclass(frozen=True)
class SourceClip:
    """A clip as another project keeps it."""

    name: str  # unique within the data set; may contain "/"
    video: Path  # file or folder of frames; it need not exist: lists of other projects go out of date
    layout: str  # a key of `LAYOUTS`
    split: str | None = None  # "train" or "heldout" where the data set says so
    poses: Path | None = None  # keypoints that `data.poses.files` reads
    masks: Path | None = None  # folder of person masks, one or more a frame


def find_clips(source: str | Path, layout: str = "auto", argument: str = "source") -> list[SourceClip]:
    """Clips of a data set in natural order of their names; `UserError` for no such folder, unknown layout, no clip.

    The source is a folder, or a list of clips (.json) for moore and musepose; `argument` is what it was given as.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"{argument}={source} does not exist; give a folder of videos or of a known data set")
    if layout != "auto" and layout not in LAYOUTS:
        raise UserError(f"layout={layout} is not one of auto, {', '.join(LAYOUTS)}")
    chosen = detect_layout(source, argument) if layout == "auto" else layout
    clips = [replace(clip, layout=chosen) for clip in LAYOUTS[chosen](source)]
    if not clips:
        raise UserError(
            f"{argument}={source} holds no clip of layout={chosen}; `docs/data.md` shows what each looks like"
        )
    return sorted(
        _with_unique_names(clips), key=lambda clip: [natural_order(Path(part)) for part in clip.name.split("/")]
    )


def is_video(path: Path) -> bool:
    """True for a file whose name, or for WebP and PNG whose first bytes, say that it is a video."""
    suffix = path.suffix.lower()
    if suffix not in (".webp", ".png"):
        return suffix in VIDEO_SUFFIXES
    with path.open("rb") as file:
        head = file.read(256)
    return head[12:16] == b"VP8X" and bool(head[20] & 2) or b"acTL" in head


def video_named(name: str | Path) -> Path | None:
    """The video whose path without suffix is `name`; None: there is none."""
    suffixes = (form for suffix in VIDEO_SUFFIXES for form in (suffix, suffix.upper()))
    return next((path for suffix in suffixes if (path := Path(f"{name}{suffix}")).is_file()), None)


def other_files(source: Path, clips: list[SourceClip]) -> list[Path]:
    """Files of a folder of videos that are none of its clips, apart from what is made of clips."""
    if source.is_file() or clips[0].layout not in _LISTED_BY_FOLDER:
        return []
    videos = {clip.video for clip in clips}
    files = (folder / name for folder, inside in _folders(source) for name in sorted(inside))
    return [
        file
        for file in files
        if file not in videos and not file.name.startswith(".") and file.suffix.lower() not in MADE_SUFFIXES
    ]


def left_out_line(given: str, files: list[Path]) -> str:
    """One line that counts and names files that are no clips; `given` is the argument they were found by."""
    names = ", ".join(file.name for file in files[:5]) + (", ..." if len(files) > 5 else "")
    return f"{given}: {len(files)} that cannot be read as clips are left out: {names}"


def detect_layout(source: Path, argument: str = "source") -> str:
    """Layout of a folder or file; `UserError` for none that is known."""
    if source.is_file():
        if source.suffix.lower() == ".json":
            return "moore"
        raise UserError(f"{argument}={source} is a file; give a folder, or a list of clips (*_meta.json)")
    if any((source / part).is_dir() and _numbered_folders(source / part) for part in ("rec", "vec")):
        return "stableanimator"
    if _meta_files(source / "meta"):
        return "musepose"
    if _meta_files(source):
        return "moore"
    if _numbered_folders(source):
        return "tiktok"
    first = next(videos_below(source), None)
    if first is not None:
        splits = {path.name.lower() for path in source.iterdir() if path.is_dir()}
        return "splits" if splits & {"train", *_HELD_OUT} else "videos"
    if next(_frame_folders(source), None) is not None:
        return "frames"
    raise UserError(f"{argument}={source} holds neither videos nor folders of images; give layout= if it should")


def _moore(source: Path) -> Iterator[SourceClip]:
    files = [source] if source.is_file() else _meta_files(source) or _meta_files(source / "meta")
    if not files:
        raise UserError(f"source={source} holds no list of clips, *_meta.json")
    for file in files:
        try:
            entries = json.loads(read_text(file))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} is not JSON: {error}") from None
        if not isinstance(entries, list):
            raise UserError(f"{file} is not a list of {{'video_path', 'kps_path'}}")
        for index, entry in enumerate(entries):
            video = entry.get("video_path") if isinstance(entry, dict) else None
            if not isinstance(video, str):
                raise UserError(f"{file}: entry {index} has no 'video_path'")
            path = _resolve(video, file)
            yield SourceClip(f"{path.parent.name}/{path.stem}" if path.parent.name else path.stem, path, "moore")


def _tiktok(source: Path) -> Iterator[SourceClip]:
    for folder in _numbered_folders(source):
        masks, poses = folder / "masks", folder / "openpose_json"
        masks = masks if masks.is_dir() and list_images(masks) else None
        poses = poses if poses.is_dir() else None
        yield SourceClip(folder.name, folder / "images", "tiktok", poses=poses, masks=masks)


def _splits(source: Path) -> Iterator[SourceClip]:
    for clip in _plain(source):
        parts = {part.lower() for part in Path(clip.name).parts[:-1]}
        split = "heldout" if parts & set(_HELD_OUT) else "train" if "train" in parts else None
        yield replace(clip, split=split)


def _stableanimator(source: Path) -> Iterator[SourceClip]:
    for part in ("rec", "vec"):
        if not (source / part).is_dir():
            continue
        listed = source / f"video_{part}_path.txt"
        folders = _numbered_folders(source / part)
        if listed.is_file():
            lines = read_text(listed).splitlines()
            folders = [_resolve(line.strip(), listed) for line in lines if line.strip()]
        for folder in folders:
            yield SourceClip(f"{part}/{folder.name}", folder / "images", "stableanimator")


def _frames(source: Path) -> Iterator[SourceClip]:
    for folder in _frame_folders(source):
        name = folder.relative_to(source).as_posix()
        masks = folder.with_name(f"{folder.name}_masks")
        name = source.resolve().name if name == "." else name
        yield SourceClip(name, folder, "frames", masks=masks if masks.is_dir() else None)


def _plain(source: Path) -> Iterator[SourceClip]:
    for video in videos_below(source):
        name = video.relative_to(source).with_suffix("").as_posix()
        poses = next((file for ext in (".npz", ".json") if (file := video.with_suffix(ext)).is_file()), None)
        masks = video.with_name(f"{video.stem}_masks")
        yield SourceClip(name, video, "videos", poses=poses, masks=masks if masks.is_dir() else None)


LAYOUTS: dict[str, Callable[[Path], Iterator[SourceClip]]] = {
    "moore": _moore,
    "musepose": _moore,
    "tiktok": _tiktok,
    "ted": _splits,
    "ubc": _splits,
    "splits": _splits,
    "stableanimator": _stableanimator,
    "frames": _frames,
    "videos": _plain,
}


def _resolve(path: str, listed_in: Path) -> Path:
    """Path of a list's entry: as it stands, or below one of the folders above the list, where such lists are made."""
    given = Path(path)
    if given.is_absolute() or given.exists():
        return given
    found = (parent / given for parent in listed_in.resolve().parents if (parent / given).exists())
    return next(found, listed_in.parent / given)


def _meta_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*meta.json")) if folder.is_dir() else []


def _numbered_folders(root: Path) -> list[Path]:
    """Folders directly below `root`, or one level further down, that have a folder `images`."""
    for pattern in ("*/images", "*/*/images"):
        found = [path.parent for path in root.glob(pattern) if path.is_dir() and not path.parent.name.startswith(".")]
        if found:
            return sorted(found, key=natural_order)
    return []


def _folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders at any depth with their file names; hidden and derived ones are left out, links are followed once."""
    visited: set[str] = set()
    for folder, inside, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        inside[:] = sorted(name for name in inside if not name.startswith(".") and not name.endswith(_DERIVED))
        if real in visited:
            inside.clear()
            continue
        visited.add(real)
        yield Path(folder), files


def videos_below(root: Path) -> Iterator[Path]:
    for folder, files in _folders(root):
        for name in sorted(files):
            if not name.startswith(".") and is_video(folder / name):
                yield folder / name


def _frame_folders(root: Path) -> Iterator[Path]:
    return (folder for folder, _ in _folders(root) if list_images(folder))


def _with_unique_names(clips: list[SourceClip]) -> list[SourceClip]:
    """Clips with names of their own: those that share one get the video's suffix or a number behind it."""
    taken = Counter(clip.name for clip in clips)
    used: set[str] = set()
    result = []
    for clip in clips:
        name = clip.name
        if taken[name] > 1 and clip.video.suffix:
            name = f"{name}_{clip.video.suffix[1:]}"
        number = 2
        while name in used:
            name, number = f"{clip.name}_{number}", number + 1
        used.add(name)
        result.append(replace(clip, name=name))
    return result
