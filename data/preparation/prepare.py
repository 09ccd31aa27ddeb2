"""Preparation of filmed clips: poses and person masks beside a record of where everything comes from.

A clip is done when its record says so, and the record is written last, so a run that is killed at any moment goes on
with the clip it was at. A record stays valid as long as the video, what is given with it and the settings are what
they were; then the clip is not made again.
"""

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from core.config import config_dict
from core.errors import UserError
from core.files import complete_folder, remove_partial
from data.config import PoseConfig, PrepareConfig
from data.poses.files import load_poses
from data.poses.person import Box, PersonEstimate, joint_box, mask_box
from data.poses.poses import PoseEstimator, Poses
from data.preparation.clips import MaskWriter, import_masks, mask_files, numbered_masks
from data.preparation.layouts import SourceClip
from data.preparation.manifest import Fingerprint, read_record, record_path, stored_path, write_record
from data.video.files import VideoReader
from data.video.images import read_image

OpenEstimator = Callable[[], PoseEstimator]
_ESTIMATED = "estimated: "


@dataclass
class PreparedClips:
    """Counts of a run: clips that were done before, clips prepared now, and name -> reason of unusable ones."""

    done_before: int = 0
    prepared: int = 0
    frames: int = 0  # of those prepared now
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Made:
    """Poses of a clip, the box around everybody's masks, and the folder of the masks."""

    poses: Poses
    box: Box | None
    masks: Path | None


def hold_out(clips: list[SourceClip], share: float) -> list[SourceClip]:
    """Clips with a share of those that have no part marked as held out, the same ones whatever else is there."""
    if not share:
        return clips
    drawn = {clip.name: int(hashlib.sha256(clip.name.encode()).hexdigest()[:8], 16) / 16**8 for clip in clips}
    return [replace(clip, split=clip.split or ("heldout" if drawn[clip.name] < share else "train")) for clip in clips]


def prepare_clips(
    clips: list[SourceClip], output: Path, config: PrepareConfig, open_estimator: OpenEstimator, position: int = 0
) -> PreparedClips:
    """Prepare clips that are not prepared yet; those that cannot be used are recorded with the reason.

    The estimator is opened once, and only when poses or masks must be estimated. `position` is the row of the progress
    bar, for several processes. `UserError` for an output that cannot be written; what is finished stays.
    """
    estimator = cache(open_estimator)
    counts = PreparedClips()
    bar = tqdm(clips, desc="preparing clips", unit="clip", position=position)
    for clip in bar:
        record = read_record(output, clip.name)
        clip = _wanted_inputs(clip, output, config, record)
        if record is not None and _is_current(record, clip, output, config):
            counts.done_before += 1
            if _refresh(record, clip, output, config):
                write_record(output, record)
        else:
            record = _prepare(clip, output, config, estimator)
            counts.prepared += 1
            counts.frames += record.get("frames", 0)
        if "left_out" in record:
            counts.left_out[clip.name] = record["left_out"]
        bar.set_postfix(left_out=len(counts.left_out))
    return counts


def _prepare(clip: SourceClip, output: Path, config: PrepareConfig, estimator: OpenEstimator) -> dict[str, Any]:
    record = _provenance(clip, output, config)
    # Opened here: that it cannot be is no fault of the clip's.
    needed = clip.poses is None or (clip.masks is None and config.masks == "estimate")
    opened = estimator() if needed else None
    poses_file = _poses_path(output, clip.name)
    try:
        for path in (poses_file, _masks_path(output, clip.name), record_path(output, clip.name)):
            remove_partial(path)
        # A started record tells the next run that pose files beside the video are its own, not given ones.
        write_record(output, {**record, "state": "started"})
        try:
            record["inputs"] = _input_fingerprints(clip)
            made = _make(clip, output, config, opened)
            record |= {
                "poses": stored_path(poses_file, output),
                "masks": stored_path(made.masks, output) if made.masks else None,
                "frames": made.poses.frames,
                "fps": made.poses.fps,
                "size": list(made.poses.size),
                "persons": made.poses.persons,
                "box": list(made.box) if made.box else None,
            }
        except UserError as error:
            record["left_out"] = " ".join(str(error).split())
        write_record(output, {**record, "state": "done"})
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"output={output} cannot be written ({reason}); the same command goes on from here") from None
    return record


def _make(clip: SourceClip, output: Path, config: PrepareConfig, estimator: PoseEstimator | None) -> _Made:
    """Read every frame of a clip, so that damage shows now and not in training; estimate what is not given."""
    target = _masks_path(output, clip.name)
    with VideoReader(clip.video, config.frame_fps if clip.video.is_dir() else None, argument="clip") as reader:
        poses = _given_poses(clip.poses, reader) if clip.poses is not None else None
        masks, box = None, None
        if clip.masks is not None:
            if clip.masks == target:
                numbered_masks(target, len(reader))  # one for each frame
            else:
                import_masks(clip.masks, target, len(reader), reader.size)
            masks = target
            files = (file for frame in range(len(reader)) for file in mask_files(masks, frame))
            boxes = [mask_box(read_image(file)[..., 0] >= 128) for file in files]
            box = joint_box([one for one in boxes if one is not None], reader.size)
        want_masks = masks is None and (config.masks == "estimate" or config.masks == "auto" and poses is None)
        if poses is None or want_masks:
            made = _estimate(reader, target if want_masks else None, config.pose, estimator)
            poses = made.poses if poses is None else poses
            masks, box = masks or made.masks, box or made.box
        else:
            for _ in _with_bar(reader):
                pass
    if not poses.present().any():
        raise UserError(f"{clip.video}: nobody was found in any of {poses.frames} frames")
    if clip.poses != _poses_path(output, clip.name):
        poses.save(_poses_path(output, clip.name))
    skeletons = poses.box(margin=0.0) if masks else poses.box()
    return _Made(poses, joint_box([one for one in (box, skeletons) if one is not None], poses.size), masks)


def _estimate(reader: VideoReader, masks: Path | None, config: PoseConfig, estimator: PoseEstimator) -> _Made:
    """Poses and, when `masks` names a folder, person masks; one frame at a time, so long clips need no more memory."""
    tracks: list[list[PersonEstimate | None]] = []
    boxes: list[Box | None] = []  # of the masks
    with complete_folder(masks) if masks else nullcontext() as folder:
        writer = MaskWriter(folder, reader.size) if masks else None
        for index, persons in enumerate(estimator.video(_with_bar(reader), config.max_persons)):
            for slot, person in enumerate(persons):
                if writer and person is not None and person.mask is not None:
                    writer.write(index, slot, person.mask)
                    boxes.append(mask_box(person.mask))
            tracks.append([person and replace(person, mask=None) for person in persons])
        if writer:
            writer.finish(len(reader))
    if masks and writer.empty:  # not every estimator gives masks
        masks.rmdir()
        masks = None
    poses = Poses.of_persons(tracks, reader.size, reader.fps)
    used = poses.present().any(axis=0)
    poses = Poses(poses.keypoints[:, used], poses.scores[:, used], reader.size, reader.fps)
    poses = poses.smoothed(config.smoothing)
    return _Made(poses, joint_box([box for box in boxes if box is not None], reader.size), masks)


def _with_bar(reader: VideoReader) -> tqdm:
    """Frames of a video under a progress bar of their own, on terminals."""
    return tqdm(reader, desc=reader.path.name, total=len(reader), unit="frame", leave=False, disable=None)


def _given_poses(path: Path, reader: VideoReader) -> Poses:
    poses = load_poses(path, size=reader.size, fps=reader.fps)
    if poses.frames != len(reader) or poses.size != reader.size:
        raise UserError(
            f"{path} has poses of {poses.frames} frames of {poses.size[0]}x{poses.size[1]}, the video has "
            f"{len(reader)} of {reader.size[0]}x{reader.size[1]}; use poses=estimate"
        )
    return replace(poses, fps=reader.fps)


def _poses_path(output: Path, name: str) -> Path:
    return output / f"{name}.npz"


def _masks_path(output: Path, name: str) -> Path:
    return output / f"{name}_masks"


def _wanted_inputs(clip: SourceClip, output: Path, config: PrepareConfig, record: dict[str, Any] | None) -> SourceClip:
    """Clip with the given poses and masks that are to be used; `UserError` before files of others are overwritten.

    Files that an earlier run of this command put beside the video are not given by anybody.
    """
    poses = None if config.poses == "estimate" else clip.poses
    masks = clip.masks if config.masks == "auto" else None
    poses_target, masks_target = _poses_path(output, clip.name), _masks_path(output, clip.name)
    if record is None:
        targets = [(poses, poses_target)] + [(masks, masks_target)] * (config.masks != "none")
        for given, target in targets:
            if target.exists() and given != target:
                raise UserError(f"{target} was not made by prepare.py and would be overwritten; give another output=")
        return replace(clip, poses=poses, masks=masks)
    own_poses = poses == poses_target and record.get("keypoints") != stored_path(poses, output)
    own_masks = masks == masks_target and record.get("given_masks") is None
    return replace(clip, poses=None if own_poses else poses, masks=None if own_masks else masks)


def _provenance(clip: SourceClip, output: Path, config: PrepareConfig) -> dict[str, Any]:
    """Fields of a record that are known before anything is made."""
    estimator = f"{_ESTIMATED}{config.pose.backend}{' heavy' if config.pose.heavy else ''}"
    return {
        "name": clip.name,
        "video": stored_path(clip.video, output),
        "layout": clip.layout,
        "origin": config.origin,
        "split": clip.split,
        "keypoints": stored_path(clip.poses, output) if clip.poses else estimator,
        "given_masks": stored_path(clip.masks, output) if clip.masks else None,
        "settings": _settings(config),
    }


def _settings(config: PrepareConfig) -> dict[str, Any]:
    settings = config_dict(config)
    pose = {name: value for name, value in settings["pose"].items() if name != "threads"}
    return {"pose": pose, "masks": settings["masks"], "frame_fps": settings["frame_fps"]}


def _input_paths(clip: SourceClip) -> dict[str, Path]:
    paths = {"video": clip.video, "poses": clip.poses, "masks": clip.masks}
    return {name: path for name, path in paths.items() if path is not None}


def _input_fingerprints(clip: SourceClip) -> dict[str, dict[str, str]]:
    return {name: asdict(Fingerprint.of(path)) for name, path in _input_paths(clip).items()}


def _is_current(record: dict[str, Any], clip: SourceClip, output: Path, config: PrepareConfig) -> bool:
    """True for a finished record of the same settings whose inputs have the same content, wherever they are now."""
    if record.get("state") != "done" or record.get("settings") != _settings(config):
        return False
    prints, paths = record.get("inputs"), _input_paths(clip)
    if prints is None:  # the video could not be read at all
        return not clip.video.exists()
    if record["keypoints"].startswith(_ESTIMATED) != (clip.poses is None) or prints.keys() != paths.keys():
        return False
    if not all(Fingerprint(**prints[name]).matches(path) for name, path in paths.items()):
        return False
    return "left_out" in record or (output / record["poses"]).is_file()


def _refresh(record: dict[str, Any], clip: SourceClip, output: Path, config: PrepareConfig) -> bool:
    """Bring a current record up to date where words, paths or times of change differ; True when it has changed."""
    before = dict(record)
    record |= _provenance(clip, output, config)
    paths = _input_paths(clip)
    if not all(Fingerprint(**stored).is_fresh(paths[name]) for name, stored in record.get("inputs", {}).items()):
        record["inputs"] = _input_fingerprints(clip)
    return record != before
