"""Pose files of other tools, read as `Poses`: OpenPose, DWPose and COCO.

| file | content |
|---|---|
| .npz with keypoints, scores, size, fps | `Poses.save` |
| .npz with keypoints (frames, persons, k, 2 or 3) | arrays of DWPose / RTMPose: k = 17, 26 or 133 |
| folder of .json, one a frame | OpenPose `--write_json`: BODY_25 or COCO-18 |
| .json | one such frame, or a list of frames (also with canvas_width, canvas_height as ControlNet tools write) |
| .json | DWPose: a frame, or a list, of {"bodies": {"candidate", "subset", "score"}}; a subset may hold the scores |
| .json | MMPose predictions: a list of frames of {"instances": [{"keypoints", "keypoint_scores"}]} |
| .json | COCO keypoint results, or COCO annotations with "images" |

Tools write pixels, parts of the picture in [0, 1], or [-1, 1] from edge to edge, and no format says which; it is told
from all keypoints of a clip. Text may begin with a byte order mark.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import UserError
from core.files import read_text, write_json
from data.poses.drawing import BODY_FROM_COCO, body_joints
from data.poses.person import PersonEstimate, assign_slots, by_prominence
from data.poses.poses import Poses
from data.video.images import natural_order

_DEFAULT_FPS = 25.0
# Index of each COCO keypoint in the other orders.
_COCO_FROM_COCO18 = [0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10]
_COCO_ORDERS = {
    17: list(range(17)),
    18: _COCO_FROM_COCO18,
    25: [0, 16, 15, 18, 17, 5, 2, 6, 3, 7, 4, 12, 9, 13, 10, 14, 11],  # BODY_25
    26: list(range(17)),  # Halpe-26
    133: list(range(17)),  # COCO-WholeBody
}

_SMALLEST_PERSON = 6.0  # pixels; nobody draws or calibrates by less
_WANTED = "coordinates must be pixels of this picture, or parts of it in [0, 1] or [-1, 1]"


class _BadFile(Exception):
    """Fault of a file, in words for the one line of the `UserError`."""


_FAULTS = (_BadFile, ValueError, TypeError, KeyError, IndexError, AttributeError)


@dataclass
class _Frames:
    """Persons per frame as (17, 3) arrays of x, y, score."""

    frames: list[list[np.ndarray]] = field(default_factory=list)
    size: tuple[int, int] | None = None  # of the image, where the file states it


def load_poses(
    path: str | Path, size: tuple[int, int] | None = None, fps: float | None = None, argument: str = "poses"
) -> Poses:
    """Poses from any of the formats above, recognised by content; `UserError` for others.

    `size` and `fps` (default 25) are for formats that do not state them.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{argument}={path} does not exist")
    try:
        if path.is_dir():
            read = _read_folder(path)
        elif path.suffix.lower() == ".npz":
            return _read_npz(path, size, fps, argument)
        elif path.suffix.lower() == ".json":
            read = _read_json(_parsed(path))
        else:
            raise _BadFile("give .npz, .json or a folder of OpenPose .json files")
        return _poses(read, size, fps)
    except _FAULTS as error:
        raise UserError(f"{argument}={path} cannot be read as poses: {_reason(error)}") from None


def parse_poses(
    content: Any, size: tuple[int, int] | None = None, fps: float | None = None, argument: str = "poses"
) -> Poses:
    """Poses from what any of the .json files above holds, such as the POSE_KEYPOINT of ComfyUI; see `load_poses`."""
    try:
        return _poses(_read_json(content), size, fps)
    except _FAULTS as error:
        raise UserError(f"{argument} cannot be read as poses: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, _BadFile) else f"unexpected content ({type(error).__name__}: {error})"


def save_openpose(poses: Poses, path: str | Path) -> None:
    """Write a list of frames as OpenPose does, COCO-18 with the neck between the shoulders, canvas sizes beside.

    Persons who are missing in a frame are left out, as there.
    """
    frames = []
    for keypoints, scores in zip(poses.keypoints, poses.scores, strict=True):
        joints, _ = body_joints(keypoints, scores, 0.0)
        both = np.concatenate([scores, scores[:, 5:7].min(1, keepdims=True)], 1)[:, BODY_FROM_COCO]
        people = np.concatenate([joints, both[..., None]], -1).reshape(len(scores), -1).round(3).tolist()
        found = zip(people, scores.any(1), strict=True)
        frame = {"people": [{"pose_keypoints_2d": person} for person, present in found if present]}
        frames.append(frame | {"canvas_width": poses.size[0], "canvas_height": poses.size[1]})
    write_json(path, frames)


def _read_npz(path: Path, size: tuple[int, int] | None, fps: float | None, argument: str) -> Poses:
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = set(archive.files)
            if {"keypoints", "scores", "size", "fps"} <= names and archive["keypoints"].shape[2:] == (17, 2):
                poses = Poses.load(path, argument)
                return replace(poses, keypoints=_in_pixels(poses.keypoints, poses.scores, poses.size))
            if "keypoints" not in names:
                raise _BadFile(f"it has no array 'keypoints', only {', '.join(sorted(names)) or 'none'}")
            keypoints = np.asarray(archive["keypoints"], np.float32)
            scores = next((archive[name] for name in ("scores", "keypoint_scores") if name in names), None)
            size = tuple(archive["size"].tolist()) if "size" in names else size
            fps = float(archive["fps"]) if "fps" in names else fps
    except (OSError, EOFError, zipfile.BadZipFile):
        raise _BadFile("it is not an .npz file") from None
    if keypoints.ndim != 4 or keypoints.shape[2] not in _COCO_ORDERS or keypoints.shape[3] not in (2, 3):
        raise _BadFile(f"keypoints must be (frames, persons, 17 or 26 or 133, 2 or 3), got {keypoints.shape}")
    if scores is None and keypoints.shape[3] == 2:
        raise _BadFile("it has no array 'scores'")
    if size is None:
        raise _BadFile("it has no array 'size'; give it, or the video or image too")
    scores = keypoints[..., 2] if scores is None else np.asarray(scores, np.float32)
    order = _COCO_ORDERS[keypoints.shape[2]]
    scores = np.clip(np.nan_to_num(scores[:, :, order]), 0, 1)
    points = np.where(scores[..., None] > 0, _in_pixels(keypoints[:, :, order, :2], scores, size), 0)
    return Poses(points, scores, size, fps or _DEFAULT_FPS)


def _read_folder(folder: Path) -> _Frames:
    files = sorted(folder.glob("*.json"), key=natural_order)
    if not files:
        raise _BadFile("it is a folder without .json files")
    frames = [_parsed(file) for file in files]
    for file, frame in zip(files, frames, strict=True):
        if not isinstance(frame, dict) or "people" not in frame:
            raise _BadFile(f"{file.name} is not an OpenPose frame (no 'people')")
    return _openpose(frames)


def _read_json(content: Any) -> _Frames:
    if isinstance(content, dict) and "annotations" in content:
        return _coco_annotations(content)
    if isinstance(content, dict) and "instance_info" in content:
        content = content["instance_info"]
    records = content if isinstance(content, list) else [content]
    if not records or not all(isinstance(record, dict) for record in records):
        raise _BadFile("unknown layout of JSON")
    keys = records[0].keys()
    if "people" in keys:
        return _openpose(records)
    if "bodies" in keys:
        return _Frames([_dwpose_persons(record["bodies"]) for record in records])
    if "instances" in keys:
        return _Frames([[_mmpose_person(instance) for instance in record["instances"]] for record in records])
    if {"keypoints", "image_id"} <= keys:
        return _coco_results(records)
    raise _BadFile(f"unknown layout of JSON with the keys {', '.join(sorted(keys)[:5])}")


def _openpose(frames: list[dict]) -> _Frames:
    # Tools that look for hands and faces alone list people without a body.
    persons = [
        [_triplets(person["pose_keypoints_2d"]) for person in frame["people"] if person["pose_keypoints_2d"]]
        for frame in frames
    ]
    first = frames[0]
    canvas = (int(first["canvas_width"]), int(first["canvas_height"])) if "canvas_width" in first else None
    return _Frames(persons, canvas)


def _dwpose_persons(bodies: dict) -> list[np.ndarray]:
    if not np.size(bodies["subset"]):
        return []
    candidate = np.asarray(bodies["candidate"], np.float64)
    candidate = candidate.reshape(-1, candidate.shape[-1])[:, :2]
    subset = np.atleast_2d(np.asarray(bodies["subset"], np.float64))[:, :18]
    found = subset >= 0
    # Indices of candidates are whole numbers, each once; else the subset holds scores, and candidates come in order.
    indices = np.where(found, subset, 0).astype(int)
    if (subset != np.rint(subset)).any() or np.unique(subset[found]).size < found.sum():
        indices = np.arange(subset.size).reshape(subset.shape)
        scores = subset
    else:
        scores = np.atleast_2d(np.asarray(bodies.get("score", found.astype(float)), np.float64))[:, :18]
    persons = np.dstack([candidate[indices], np.where(found, scores, 0)])
    return list(persons[:, _COCO_FROM_COCO18])


def _mmpose_person(instance: dict) -> np.ndarray:
    points = np.asarray(instance["keypoints"], np.float64)[:, :2]
    person = np.column_stack([points, np.asarray(instance["keypoint_scores"], np.float64)])
    return _triplets(person.reshape(-1))


def _coco_results(records: list[dict]) -> _Frames:
    by_image: dict[Any, list[np.ndarray]] = {}
    for record in records:
        by_image.setdefault(record["image_id"], []).append(_triplets(record["keypoints"]))
    ids = sorted(by_image, key=lambda image: natural_order(Path(str(image))))
    if all(isinstance(image, int) for image in ids) and ids[-1] - ids[0] < 2 * len(ids):
        ids = range(ids[0], ids[-1] + 1)  # a clip; images in which nobody was found are not listed
    return _Frames([by_image.get(image, []) for image in ids])


def _coco_annotations(content: dict) -> _Frames:
    images = sorted(content["images"], key=lambda image: natural_order(Path(str(image.get("file_name", image["id"])))))
    sizes = {(int(image["width"]), int(image["height"])) for image in images}
    if len(sizes) != 1:
        raise _BadFile(f"its images have {len(sizes)} different sizes; a clip has one")
    by_image: dict[Any, list[np.ndarray]] = {image["id"]: [] for image in images}
    for annotation in content["annotations"]:
        if annotation.get("keypoints"):
            by_image[annotation["image_id"]].append(_triplets(annotation["keypoints"]))
    return _Frames(list(by_image.values()), sizes.pop())


def _triplets(values: Any) -> np.ndarray:
    """(17, 3) in COCO order from a flat list of x, y, score in any known order; visibility flags become 1."""
    flat = np.asarray(values, np.float64).reshape(-1)  # x, y, score of each keypoint in turn
    if len(flat) % 3 or len(flat) // 3 not in _COCO_ORDERS:
        known = ", ".join(str(count) for count in _COCO_ORDERS)
        raise _BadFile(f"a person has {len(flat)} numbers; known are x, y, score of {known} keypoints")
    if not np.isfinite(flat).all():
        raise _BadFile("a keypoint is not a finite number")
    return flat.reshape(-1, 3)[_COCO_ORDERS[len(flat) // 3]]


def _poses(read: _Frames, size: tuple[int, int] | None, fps: float | None) -> Poses:
    size = read.size or size
    if size is None:
        raise _BadFile("the file does not state the size of the image; give its video or image too")
    slots = max((len(persons) for persons in read.frames), default=0)
    together = np.reshape([person for persons in read.frames for person in persons], (-1, 17, 3))
    scores = np.clip(together[..., 2], 0, 1).astype(np.float32)
    points = np.where(scores[..., None] > 0, _in_pixels(together[..., :2], scores, size), 0).astype(np.float32)
    estimates = iter(
        PersonEstimate(*person, None, float(person[1].mean())) for person in zip(points, scores, strict=True)
    )
    # Formats list persons in no order, so they are followed from frame to frame.
    last_seen: list[PersonEstimate | None] = [None] * slots
    tracks = []
    for persons in read.frames:
        tracks.append(assign_slots(last_seen, by_prominence(list(islice(estimates, len(persons))), size)))
        last_seen = [now or before for now, before in zip(tracks[-1], last_seen, strict=True)]
    return Poses.of_persons(tracks, size, fps or _DEFAULT_FPS)


def _in_pixels(points: np.ndarray, scores: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Points (..., 17, 2) of a clip in pixels, told from those with a score (..., 17); `_BadFile` if it cannot be.

    Half of all numbers below 1.5 are no pixels. In [0, 1] few joints are negative, those outside the picture; in
    [-1, 1] all above or left of its middle are.
    """
    visible = scores > 0
    seen = points[visible]  # (n, 2)
    if not len(seen):
        return points
    picture = f"the picture of {size[0]}x{size[1]}"
    if np.median(np.abs(seen)) <= 1.5:
        negative = (seen < 0).any(axis=-1).mean()
        if 0.1 < negative < 0.4:
            raise _BadFile("its coordinates may be in [0, 1] or in [-1, 1] of the picture; write them in pixels")
        points = np.where(visible[..., None], (points + 1) / 2 * size if negative > 0.25 else points * size, 0)
    persons = zip(points.reshape(-1, 17, 2), visible.reshape(-1, 17), strict=True)
    sides = [
        np.ptp(np.quantile(person[found], (0.1, 0.9), axis=0), axis=0).max()
        for person, found in persons
        if found.sum() > 4
    ]
    if sides and np.median(sides) < _SMALLEST_PERSON:
        raise _BadFile(f"its people are {np.median(sides):.1f} pixels large in {picture}; {_WANTED}")
    inside = ((points >= -0.5) & (points <= np.asarray(size) - 0.5)).all(axis=-1)[visible].mean()
    if inside < 0.25:
        raise _BadFile(f"{1 - inside:.0%} of its keypoints lie outside {picture}; {_WANTED}")
    return points


def _parsed(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _BadFile(f"{path.name} is not JSON ({error})") from None
