"""Preparation of filmed clips: poses and person masks beside a record of where everything comes from.

A clip is done when its record says so, and the record is written last, so a run that is killed at any moment goes on
with the clip it was at. A clip is made again when its video, what is given with it, or the settings change.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from core.errors import UserError
from core.files import complete_folder, remove_partial
from data.crops import joint_box, mask_box, skeleton_box
from data.poses.files import load_poses
from data.poses.person import Box
from data.poses.poses import PoseConfig, PoseEstimator, Poses
from data.preparation.layouts import SourceClip
from data.preparation.manifest import read_record, record_path, stored_path, write_record
from data.preparation.masks import MaskWriter, import_masks, mask_files, numbered_masks
from data.preparation.provenance import (
    PrepareConfig,
    input_fingerprints,
    is_current,
    masks_path,
    poses_path,
    provenance,
    refresh,
    wanted_inputs,
)
from data.video.images import read_image
from data.video.reading import VideoReader

OpenEstimator = Callable[[], PoseEstimator]


@dataclass
class Progress:
    """What a run did: clips that were done before, clips prepared now, and name -> reason of unusable ones."""

    done_before: int = 0
    prepared: int = 0
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Made:
    """Poses of a clip, the box around everybody's masks, and the folder of the masks."""

    poses: Poses
    box: Box | None
    masks: Path | None


def prepare_clips(
    clips: list[SourceClip], output: Path, config: PrepareConfig, open_estimator: OpenEstimator, position: int = 0
) -> Progress:
    """Prepare clips that are not prepared yet; those that cannot be used are recorded with the reason.

    Args:
        open_estimator: called once, and only when poses or masks must be estimated.
        position: row of the progress bar, for several processes.

    Raises:
        UserError: the output cannot be written; what is finished stays.
    """
    opened: list[PoseEstimator] = []

    def estimator() -> PoseEstimator:
        if not opened:
            opened.append(open_estimator())
        return opened[0]

    progress = Progress()
    bar = tqdm(clips, desc="preparing clips", unit="clip", position=position)
    for clip in bar:
        record = read_record(output, clip.name)
        clip = wanted_inputs(clip, output, config, record)
        if record is not None and is_current(record, clip, output, config):
            progress.done_before += 1
            if refresh(record, clip, output, config):
                write_record(output, record)
        else:
            record = _prepare(clip, output, config, estimator)
            progress.prepared += 1
        if "left_out" in record:
            progress.left_out[clip.name] = record["left_out"]
        bar.set_postfix(left_out=len(progress.left_out))
    return progress


def _prepare(clip: SourceClip, output: Path, config: PrepareConfig, estimator: OpenEstimator) -> dict[str, Any]:
    """Make a clip's files and its record."""
    record = provenance(clip, output, config)
    # Opened here: that it cannot be is no fault of the clip's.
    needed = clip.poses is None or (clip.masks is None and config.masks == "estimate")
    opened = estimator() if needed else None
    try:
        for path in (poses_path(output, clip.name), masks_path(output, clip.name), record_path(output, clip.name)):
            remove_partial(path)
        # A started record tells the next run that pose files beside the video are its own, not given ones.
        write_record(output, {**record, "state": "started"})
        try:
            record["inputs"] = input_fingerprints(clip)
            made = _make(clip, output, config, opened)
            record |= {
                "poses": stored_path(poses_path(output, clip.name), output),
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
    target = masks_path(output, clip.name)
    with VideoReader(clip.video, config.frame_fps if clip.video.is_dir() else None, argument="clip") as reader:
        poses = _given_poses(clip.poses, reader) if clip.poses is not None else None
        masks, box = None, None
        if clip.masks is not None:
            masks = _given_masks(clip.masks, target, len(reader), reader.size)
            box = _box_of_masks(masks, len(reader), reader.size)
        want_masks = masks is None and (config.masks == "estimate" or config.masks == "auto" and poses is None)
        if poses is None or want_masks:
            made = _estimate(reader, target if want_masks else None, config.pose, estimator)
            poses = made.poses if poses is None else poses
            masks, box = masks or made.masks, box or made.box
        else:
            for _ in _shown(reader):
                pass
    if not poses.present().any():
        raise UserError(f"{clip.video}: nobody was found in any of {poses.frames} frames")
    if clip.poses != poses_path(output, clip.name):
        poses.save(poses_path(output, clip.name))
    skeletons = skeleton_box(poses, margin=0.0) if masks else skeleton_box(poses)
    return _Made(poses, joint_box([one for one in (box, skeletons) if one is not None], poses.size), masks)


def _estimate(reader: VideoReader, masks: Path | None, config: PoseConfig, estimator: PoseEstimator) -> _Made:
    """Poses and, when `masks` names a folder, person masks; one frame at a time, so long clips need no more memory."""
    if masks is None:
        poses, boxes = _follow(reader, None, config, estimator)
        return _Made(poses, joint_box(boxes, reader.size), None)
    with complete_folder(masks) as folder:
        writer = MaskWriter(folder, reader.size, config.max_persons)
        poses, boxes = _follow(reader, writer, config, estimator)
        writer.finish(len(reader))
    if writer.empty:  # not every estimator gives masks
        masks.rmdir()
    return _Made(poses, joint_box(boxes, reader.size), None if writer.empty else masks)


def _follow(
    reader: VideoReader, writer: MaskWriter | None, config: PoseConfig, estimator: PoseEstimator
) -> tuple[Poses, list[Box]]:
    """Poses of a clip, and the boxes of the masks that were written."""
    frames, slots = len(reader), config.max_persons
    keypoints, scores = np.zeros((frames, slots, 17, 2), np.float32), np.zeros((frames, slots, 17), np.float32)
    boxes: list[Box] = []
    for number, persons in enumerate(estimator.video(_shown(reader), slots)):
        for slot, person in enumerate(persons):
            if person is None:
                continue
            keypoints[number, slot], scores[number, slot] = person.keypoints, person.scores
            if writer is not None and person.mask is not None:
                writer.write(number, slot, person.mask)
                box = mask_box(person.mask)
                boxes.extend([] if box is None else [box])
    used = [slot for slot in range(slots) if (scores[:, slot] > 0).any()]
    poses = Poses(keypoints[:, used], scores[:, used], reader.size, reader.fps)
    return (poses.smoothed(config.smoothing) if config.smoothing else poses), boxes


def _shown(reader: VideoReader) -> tqdm:
    """The frames of a video under a progress bar of their own, on terminals."""
    return tqdm(reader, desc=reader.path.name, total=len(reader), unit="frame", leave=False, disable=None)


def _given_poses(path: Path, reader: VideoReader) -> Poses:
    poses = load_poses(path, size=reader.size, fps=reader.fps)
    if poses.frames != len(reader) or poses.size != reader.size:
        raise UserError(
            f"{path} has poses of {poses.frames} frames of {poses.size[0]}x{poses.size[1]}, the video has "
            f"{len(reader)} of {reader.size[0]}x{reader.size[1]}; use poses=estimate"
        )
    return replace(poses, fps=reader.fps)


def _given_masks(given: Path, target: Path, frames: int, size: tuple[int, int]) -> Path:
    """Given masks in our numbering; those that lie where ours would go are only looked at."""
    if given == target:
        numbered_masks(target, frames)
    else:
        import_masks(given, target, frames, size)
    return target


def _box_of_masks(masks: Path, frames: int, size: tuple[int, int]) -> Box | None:
    files = (file for frame in range(frames) for file in mask_files(masks, frame))
    boxes = [mask_box(read_image(file)[..., 0] >= 128) for file in files]
    return joint_box([box for box in boxes if box is not None], size)
