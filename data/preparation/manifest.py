"""What a prepared data set consists of: one record a clip, and the manifest of all of them that training reads.

A prepared folder holds, for each clip, `name.npz` (poses), `name_masks/` (person masks, where there are any) and
`name.clip.json`, its record; `manifest.json` gathers the records. Videos stay where they are: a record names them
relative to the folder when they lie inside of it, and by their full path otherwise.

    {"version": 1, "source": ..., "layout": ..., "found": 3, "clips": [record, ...], "left_out": [record, ...]}
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import write_json
from data.poses.person import Box
from data.preparation.fingerprint import Fingerprint

MANIFEST = "manifest.json"
VERSION = 1
RECORD_SUFFIX = ".clip.json"


@dataclass(frozen=True)
class Clip:
    """A clip that training may read.

    Attributes:
        name: unique within the data set.
        video: a video file or a folder of frames.
        poses: `data.poses.poses.Poses`, one pose a frame.
        masks: folder of person masks, see `data.masks`; None: every pixel counts as the person's.
        frames, fps: length, and frames per second.
        size: (width, height) in pixels.
        box: around everybody over the whole clip, in pixels; None when nobody is known to be in it.
        split: "train", "heldout", or None where nothing is said.
        fingerprint: what the video held when the poses were made; None when nobody noted it.
    """

    name: str
    video: Path
    poses: Path
    masks: Path | None
    frames: int
    fps: float
    size: tuple[int, int]
    box: Box | None
    split: str | None
    fingerprint: Fingerprint | None

    @classmethod
    def from_record(cls, record: dict[str, Any], root: Path) -> "Clip":
        """The clip of a record; paths are joined with the data set's folder."""
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
    """A prepared data set.

    Attributes:
        root: its folder.
        layout, source: what it was made from.
        found: clips of the source, prepared or not.
        clips: those that can be used.
        left_out: name -> reason of those that cannot.
        records: everything that is known of each usable clip, for reports.
    """

    root: Path
    layout: str
    source: str
    found: int
    clips: list[Clip]
    left_out: dict[str, str]
    records: list[dict[str, Any]]

    @property
    def missing(self) -> int:
        """Clips that are neither prepared nor left out: preparation has not finished."""
        return self.found - len(self.clips) - len(self.left_out)


def has_manifest(path: str | Path) -> bool:
    """Whether a path is a manifest or a folder with one."""
    path = Path(path)
    return path.name == MANIFEST and path.is_file() or (path / MANIFEST).is_file()


def read_manifest(path: str | Path, argument: str = "dataset") -> Manifest:
    """Read the manifest of a prepared folder, or a manifest given by its own path.

    Raises:
        UserError: there is none, or it cannot be read.
    """
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
    """Where the record of a clip lies."""
    return root / f"{name}{RECORD_SUFFIX}"


def read_record(root: Path, name: str) -> dict[str, Any] | None:
    """The record of a clip, or None when there is none that can be read."""
    try:
        record = json.loads(record_path(root, name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("version") == VERSION else None


def write_record(root: Path, record: dict[str, Any]) -> None:
    """Write a record; `record["name"]` says where."""
    write_json(record_path(root, record["name"]), {"version": VERSION, **record})


def stored_path(path: Path, root: Path) -> str:
    """A path as records keep it: relative inside the data set's folder, absolute elsewhere."""
    path, root = Path(path).absolute(), root.absolute()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def write_manifest(root: Path, names: list[str], layout: str, source: str) -> Manifest:
    """Gather the finished records of these clips into `manifest.json`.

    Several processes may do so at their ends: each looks again after it has written, so the last manifest holds every
    record whatever the order.
    """
    records: list[dict[str, Any]] | None = None
    while records != (present := _finished(root, names)):
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
    return read_manifest(root)


def _finished(root: Path, names: list[str]) -> list[dict[str, Any]]:
    records = (read_record(root, name) for name in names)
    return [record for record in records if record is not None and record.get("state") == "done"]
