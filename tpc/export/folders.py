"""A folder for each segment: its calibrated reference, and the driving video cut alike."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from core.files import write_json
from data.poses.drawing import draw_pose
from data.transforms import apply_fit
from data.video.files import VideoReader, write_video
from tpc.export.segments import Segment, plain_reference, segment_reference
from tpc.export.tools import COLOURS, Tool
from tpc.report import write_segments_picture
from tpc.result import Calibration

if TYPE_CHECKING:
    from data.inputs import Driving, Reference

LOSSLESS = 0  # quality of mask videos, whose colours are read as labels


def write_segments(
    folder: Path,
    calibration: Calibration,
    segments: list[Segment],
    reference: Reference,
    driving: Driving,
    tool: Tool,
    videos: bool = False,
) -> None:
    """Write the files of every segment, into a folder of its own where there are several.

    Beside them `segments.json` says which frames they are, and `segments.png` shows some. `videos`: also
    `driving.mp4`, where the tool has no name for it, and `poses.mp4`, the poses drawn.
    """
    folder.mkdir()
    poses = driving.poses.mapped(calibration.frame_map, calibration.size)
    entries, references = [], []
    for number, segment in enumerate(segments):
        target = folder if len(segments) == 1 else folder / f"{number:03d}"
        target.mkdir(exist_ok=True)
        image, masks = segment_reference(calibration, segment, reference.image, reference.masks)
        references.append(image)
        mask = masks.any(0).astype(np.uint8) * 255
        _write_image(target / tool.reference, image)
        _write_image(target / "mask.png", mask)
        _write_image(target / "person.png", np.dstack([image, mask]))
        cut = poses[segment.frames.start : segment.frames.stop]
        cut.save(target / "poses.npz")
        if tool.reference_mask:
            _write_image(target / tool.reference_mask, _labels(masks, 255, calibration.size))
        if tool.driving_mask:
            labels = (_labels(calibration.target_masks[frame], 0, calibration.size) for frame in segment.frames)
            write_video(target / tool.driving_mask, labels, calibration.fps, crf=LOSSLESS)
        part = None if driving.sound is None else driving.sound.part(segment.frames.start, segment.frames.stop)
        if name := tool.driving or ("driving.mp4" if videos and part else None):
            _write_driving(target / name, part, calibration)
        if tool.driving_copy:
            shutil.copyfile(target / name, target / tool.driving_copy)
        if videos:
            drawn = (draw_pose(*frame, calibration.size) for frame in zip(cut.keypoints, cut.scores, strict=True))
            write_video(target / "poses.mp4", drawn, calibration.fps, sound=part)
        entries.append(_entry(segment, target, folder))
    plain = plain_reference(calibration, reference.image)
    picture = folder / "segments.png"
    write_segments_picture(picture, calibration, segments, references, plain, reference.poses, driving.frames)
    write_json(folder / "segments.json", {"size": list(calibration.size), "fps": calibration.fps, "segments": entries})


def _entry(segment: Segment, target: Path, folder: Path) -> dict[str, Any]:
    return {
        "folder": target.relative_to(folder).as_posix(),
        "first_frame": segment.frames.start,
        "frames": len(segment.frames),
        "reference_frame": segment.frame,  # the frame whose calibrated image it is; null: nobody is calibrated
    }


def _write_driving(path: Path, video: VideoReader, calibration: Calibration) -> None:
    """The driving frames as the calibration frames them, as a video, or as images where the name numbers them."""
    frames: Iterator[np.ndarray] = (apply_fit(each, calibration.frame_map, calibration.size, "zero") for each in video)
    if "{}" not in path.name:
        write_video(path, frames, calibration.fps, sound=video)
        return
    path.parent.mkdir()
    for number, frame in enumerate(frames):
        _write_image(path.with_name(path.name.format(number)), frame)


def _labels(masks: np.ndarray, background: int, size: tuple[int, int]) -> np.ndarray:
    """(h, w, 3) uint8: masks (persons, h, w), each in a colour of its own, the later over the earlier."""
    labels = np.full((size[1], size[0], 3), background, np.uint8)
    for person, mask in enumerate(masks):
        labels[mask] = COLOURS[person % len(COLOURS)]
    return labels


def _write_image(path: Path, image: np.ndarray) -> None:
    """RGB, RGBA or grey (h, w[, c]) uint8 as a PNG."""
    codes = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}
    pixels = image if image.ndim == 2 else cv2.cvtColor(image, codes[image.shape[2]])
    path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
