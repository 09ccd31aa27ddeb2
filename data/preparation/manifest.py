"""Prepared data sets on disk: one record a clip, and the manifest of all of them that training reads.

A prepared folder holds, for each clip, `name.npz` (poses), `name_masks/` (person masks, where there are any) and
`name.clip.json`, its record; `manifest.json` gathers the records. Videos stay where they are: a record names them
relative to the folder when they lie inside of it, and by their full path otherwise.

    {"version": 1, "source": ..., "layout": ..., "found": 3, "clips": [record, ...], "left_out": [record, ...]}
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import write_json
from data.poses.person import Box
from data.video.images import list_images

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class Fingerprint:
    """Content of a video or pose file, or of a folder of frames, masks or .json files, to notice changes."""

    stamp: str  # size and time of the last change; cheap, and enough where it agrees
    sha256: str  # decides when the stamp differs, as after a copy; of a folder, over its files' names and contents

    @classmethod
    def of(cls, path: str | Path) -> "Fingerprint":
        """Present fingerprint; reads all of the content. `UserError` when the path is missing or unreadable."""
        files = _files(Path(path))
        try:
            return cls(_stamp(files), _content(files))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None

    def is_fresh(self, path: str | Path) -> bool:
        """True for the noted size and time; nothing is read."""
        try:
            return _stamp(_files(Path(path))) == self.stamp
        except (OSError, UserError):
            return False

    def matches(self, path: str | Path) -> bool:
        """True for the noted content, which is read only where size or time differ."""
        if self.is_fresh(path):
            return True
        try:
            return _content(_files(Path(path))) == self.sha256
        except (OSError, UserError):
            return False


@dataclass(frozen=True)
class Clip:
    """A clip that training may read; frames have (width, height) `size`, the box is in their pixels."""

    name: str  # unique within the data set
    video: Path  # file, or folder of frames
    poses: Path  # of `data.poses.poses.Poses`, one pose a frame
    masks: Path | None  # folder, see `data.preparation.clips`; None: every pixel counts as the person's
    frames: int
    fps: float
    size: tuple[int, int]
    box: Box | None  # around everybody over the whole clip; None when nobody is known to be in it
    split: str | None  # "train", "heldout", or None where nothing is said
    fingerprint: Fingerprint | None  # of the video when the poses were made; None when nobody noted it

    @classmethod
    def from_record(cls, record: dict[str, Any], root: Path) -> "Clip":
        return cls(
            name=record["name"],
            video=root / record["video"],
            poses=root / record["poses"],
            masks=root / record["masks"] if record["masks"] else None,
            frames=int(record["frames"]),
            fps=float(record["fps"]),
            size=(int(record["size"][0]), int(record["size"][1])),
            box=Box(*record["box"]) if record["box"] else None,
            split=record["split"],
            fingerprint=Fingerprint(**record["inputs"]["video"]),
        )


@dataclass(frozen=True)
class Manifest:
    root: Path
    layout: str
    source: str
    found: int  # clips of the source, prepared or not
    clips: list[Clip]  # that can be used
    left_out: dict[str, str]  # name -> reason of those that cannot
    records: list[dict[str, Any]]  # of the usable clips, for reports

    @property
    def missing(self) -> int:
        """Number of clips that are neither prepared nor left out: preparation has not finished."""
        return self.found - len(self.clips) - len(self.left_out)


def has_manifest(path: str | Path) -> bool:
    path = Path(path)
    return path.name == MANIFEST and path.is_file() or (path / MANIFEST).is_file()


def read_manifest(path: str | Path, argument: str = "dataset") -> Manifest:
    """Manifest of a prepared folder, or one given by its own path; `UserError` when it cannot be read."""
    path = Path(path)
    file = path / MANIFEST if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{argument}={path} holds no {MANIFEST}; make one with `python prepare.py source=... output=...`"
        )
    root = file.parent
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise UserError(
                f"{argument}={path} has version {content['version']}, known is {VERSION}; prepare it again"
            )
        return Manifest(
            root=root,
            layout=content["layout"],
            source=content["source"],
            found=int(content["found"]),
            clips=[Clip.from_record(record, root) for record in content["clips"]],
            left_out={record["name"]: record["left_out"] for record in content["left_out"]},
            records=content["clips"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{argument}={file} is not a manifest that can be read ({error!r}); prepare it again"
        ) from None


def record_path(root: Path, name: str) -> Path:
    return root / f"{name}.clip.json"


def read_record(root: Path, name: str) -> dict[str, Any] | None:
    """Record of a clip, or None when there is none that can be read."""
    try:
        record = json.loads(record_path(root, name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("version") == VERSION else None


def write_record(root: Path, record: dict[str, Any]) -> None:
    """Write a record under its `record["name"]`."""
    write_json(record_path(root, record["name"]), {"version": VERSION, **record})


def stored_path(path: Path, root: Path) -> str:
    """Path as records keep it: relative inside the data set's folder, absolute elsewhere."""
    path, root = Path(path).absolute(), root.absolute()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def write_manifest(root: Path, names: list[str], layout: str, source: str) -> Manifest:
    """Gather the finished records of these clips into `manifest.json`."""
    records: list[dict[str, Any]] | None = None
    # Several processes may do so at their ends: each reads again after it has written, so the last manifest holds
    # every record whatever the order.
    while True:
        read = (read_record(root, name) for name in names)
        present = [record for record in read if record is not None and record.get("state") == "done"]
        if present == records:
            return read_manifest(root)
        records = present
        content = {
            "version": VERSION,
            "source": source,
            "layout": layout,
            "found": len(names),
            "clips": [record for record in records if "left_out" not in record],
            "left_out": [record for record in records if "left_out" in record],
        }
        write_json(root / MANIFEST, content)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return list_images(path) or sorted(path.glob("*.json"))
    if not path.exists():
        raise UserError(f"{path} does not exist")
    return [path]


def _stamp(files: list[Path]) -> str:
    if len(files) == 1:
        status = files[0].stat()
        return f"{status.st_size}:{status.st_mtime_ns}"
    lines = (f"{file.name}:{status.st_size}:{status.st_mtime_ns}" for file in files for status in [file.stat()])
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _content(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        if len(files) > 1:
            digest.update(f"\n{file.name}:{file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
