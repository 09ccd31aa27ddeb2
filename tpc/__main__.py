"""Calibrate a reference image to a driving clip, without any diffusion model.

    python -m tpc reference=photo.png driving=dance.mp4 output=outputs/calibrated [key=value ...]

Poses and masks are estimated unless they are given (`reference_poses=`, `driving_poses=`, `reference_mask=`,
`driving_masks=`); with given driving poses `driving=` may be left out. Writes to `output`:

    calibration.json    transforms, keypoints, reasons, frame by frame      calibrated.mp4    the calibrated images
    calibrated/         000000_p0.png and 000000_p0_mask.png                report.png        everything at a glance
    calibration.npz     masks and transforms, for `Calibration.load`        config.yaml       the configuration

For models that take one reference for many frames, `segments=clip` or `segments=77` writes one for each segment to
`segments/`, with the person's mask, its poses and, with `segment_videos=true`, its part of the driving video; and
`tool=wan_animate` to `wan_animate/`, with the sizes and names of that tool: docs/other_models.md.
"""

from __future__ import annotations

import os
import shutil
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from core.config import config_dict, load_config, save_config
from core.errors import UserError, run_command
from core.files import check_paths, output_folder, partial_folder
from tpc.config import CommandConfig, resolve

if TYPE_CHECKING:
    from data.inputs import Driving, Reference
    from tpc.result import Calibration


def main(arguments: list[str]) -> None:
    config = load_config(CommandConfig, arguments, about=__doc__)
    paths = ("reference", "driving", "reference_poses", "driving_poses", "reference_mask", "driving_masks")
    check_paths({name: getattr(config, name) for name in paths})
    if config.driving is None and config.driving_poses is None:
        raise UserError("driving= or driving_poses= is required")
    if config.driving is None and (config.tool is not None or config.fps is not None):
        given = f"fps={config.fps:g}" if config.tool is None else f"tool={config.tool}"
        raise UserError(f"{given} is about the driving video; give driving= too")
    # These take seconds to import, which wrong arguments need not wait for: so in every function below.
    from tqdm import tqdm

    from data.transforms import crop_matrix, fit_matrix
    from tpc.calibration import calibrate
    from tpc.export.folders import write_segments
    from tpc.export.segments import segment_config, segment_notes, segment_references, split
    from tpc.export.tools import TOOLS, Tool
    from tpc.retargeting import retargeted

    tool = TOOLS.get(config.tool, Tool())
    config.fps = tool.fps if config.fps is None else config.fps
    if config.segment_overlap is None:
        config.segment_overlap = tool.overlap
    segmented = config.segments is not None or config.tool is not None
    # Whose errors need not wait for the poses.
    split(1, config.segment_length(), config.segment_overlap)
    resolve(config.tpc)
    output = output_folder(config.output)
    reference, driving = read_inputs(config)
    driving, notes = retargeted(reference, driving, config.pose, config.tpc)
    if segmented:
        length, frames, persons = config.segment_length(), driving.poses.frames, reference.poses.persons
        config.tpc = segment_config(config.tpc, length, frames, persons)
    config.tpc = resolve(config.tpc, masked=reference.masks is not None)
    for note in filter(None, (driving.note(config.stride, config.max_frames), *notes)):
        print(f"note: {note}")
    shape, frame_map, reference_map = driving.poses.size, None, None
    size = frame_size(shape, config.max_side)
    if config.tool is not None:
        size = tool.size(shape, config.max_side)
        frame_map = crop_matrix(shape, size, driving.poses.box(), "pad")
    if segmented:
        # The reference's scene is shown for long: without borders.
        reference_map = fit_matrix(reference.image.shape[1::-1], size, "cover")
    frames = f"{driving.poses.frames} frames of {size[0]} x {size[1]} pixels"
    print(f"{frames}, transform {config.tpc.transform}, preset {config.tpc.preset}; results in {output}", flush=True)
    calibration = calibrate(
        reference.image,
        reference.poses,
        driving.poses,
        size,
        config.tpc,
        reference_masks=reference.masks,
        driving_masks=driving.masks,
        frame_map=frame_map,
        reference_map=reference_map,
        cuts=driving.cuts,
        progress=lambda frames: tqdm(frames, desc="calibrating"),
    )
    segments = []
    if segmented:
        segments = segment_references(calibration, config.segment_length(), config.segment_overlap)
    # Nothing appears in the folder before everything is written.
    with partial_folder(output / "results") as folder:
        write_results(folder, config, calibration, reference, driving)
        if segments:
            name = config.tool or "segments"
            write_segments(folder / name, calibration, segments, reference, driving, tool, config.segment_videos)
        move_into(folder, output)
    print(f"{calibration.outcome()}; see {output / 'report.png'} and {output / 'calibrated.mp4'}")
    print(f"images in {output / 'calibrated'}, transforms in {output / 'calibration.json'}")
    if segments:
        what = "calibrated reference" if len(segments) == 1 else f"calibrated references of {len(segments)} segments"
        print(f"{what} in {output / (config.tool or 'segments')}")
    for note in [*calibration.notes(), *segment_notes(segments, calibration.cuts)]:
        print(f"note: {note}")


def read_inputs(config: CommandConfig) -> tuple[Reference, Driving]:
    """Images, poses and masks; the estimator is opened when one of the two needs it."""
    from tqdm import tqdm

    from data.inputs import load_driving, load_reference
    from data.poses.poses import open_estimator

    estimator = cache(lambda: open_estimator(config.pose))
    persons = config.pose.max_persons
    reference = load_reference(config.reference, config.reference_poses, config.reference_mask, estimator, persons)
    driving = load_driving(
        config.driving,
        config.driving_poses,
        config.driving_masks,
        estimator,
        persons,
        config.max_frames,
        config.stride,
        config.pose.smoothing,
        cuts=config.cuts,
        fps=config.fps,
        progress=partial(tqdm, desc="estimating poses", unit="frame"),
    )
    return reference, driving


def frame_size(driving_size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """(width, height) of the calibrated images: the driving frame's, or resized to a longer side of `max_side`."""
    if max_side == 0:
        return driving_size
    scale = max_side / max(driving_size)
    return max(1, round(driving_size[0] * scale)), max(1, round(driving_size[1] * scale))


def write_results(
    folder: Path, config: CommandConfig, calibration: Calibration, reference: Reference, driving: Driving
) -> None:
    import numpy as np

    from data.video.files import write_video
    from tpc.report import draw_report, write_report

    calibration.write(folder)
    save_config(config, folder / "config.yaml")
    metadata = {"description": "calibrated reference images, not generated", "config": config_dict(config)}
    # The persons side by side; grey where one is uncalibrated.
    grey = np.full((calibration.size[1], calibration.size[0], 3), 128, np.uint8)
    images = (np.hstack([calibration.images[m] if m >= 0 else grey for m in row]) for row in calibration.member)
    write_video(folder / "calibrated.mp4", images, calibration.fps, metadata, sound=driving.sound)
    report = draw_report(calibration, reference.image, reference.poses, driving.poses, driving.frames)
    write_report(folder / "report.png", report)


def move_into(source: Path, folder: Path) -> None:
    """Move the entries of `source` into `folder`, in place of entries of the same names."""
    for entry in source.iterdir():
        target = folder / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(entry, target)


if __name__ == "__main__":
    run_command(main)
