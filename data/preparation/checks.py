"""Checks of filmed clips for `python prepare.py check`: faults, and advice about them."""

import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from core.config import check_config
from core.errors import UserError
from core.terminal import ignore_interrupts
from data.config import COCO_KEYPOINTS, CheckConfig
from data.poses.files import load_poses
from data.poses.poses import Poses
from data.preparation.clips import mask_files
from data.preparation.layouts import SourceClip, find_clips
from data.preparation.manifest import Clip, has_manifest, read_manifest
from data.preparation.report import ClipFacts, Finding, Report
from data.transforms import crop_matrix
from data.video.files import VideoReader
from data.video.images import list_images, read_image

Item = TypeVar("Item")
VISIBLE = 0.3  # score above which a joint counts as visible


def check_dataset(config: CheckConfig) -> Report:
    """Check every clip of a data set; `UserError` for no such data set, or settings that cannot work."""
    check_config(config)
    if has_manifest(config.dataset):
        manifest = read_manifest(config.dataset)
        facts = _each(check_prepared, manifest.clips, config)
        for name, reason in manifest.left_out.items():
            advice = "put right what the message says and run the same preparation again"
            facts.append(ClipFacts(name, "", findings=[Finding("error", "left out", reason, advice)]))
        _compare_contents(facts, manifest.clips)
        layout, found = manifest.layout, manifest.found
    else:
        sources = find_clips(config.dataset, config.layout, "dataset")
        facts = _each(check_source, sources, config)
        layout, found = sources[0].layout, len(sources)
    _compare_rates(facts)
    return Report(str(config.dataset), layout, found, facts)


def _each(check: Callable[[Item, CheckConfig], ClipFacts], clips: list[Item], config: CheckConfig) -> list[ClipFacts]:
    """Check every clip, in `config.workers` processes."""
    several = config.workers > 1
    with ProcessPoolExecutor(config.workers, initializer=ignore_interrupts) if several else nullcontext() as pool:
        found = (pool.map if pool else map)(check, clips, repeat(config))
        return list(tqdm(found, total=len(clips), desc="checking clips", unit="clip"))


def check_source(source: SourceClip, config: CheckConfig) -> ClipFacts:
    """Check a clip that has not been prepared: its video, and poses that come with it."""
    facts = ClipFacts(source.name, str(source.video), source.split)
    if not source.video.exists():
        advice = "correct the path in the data set's list, or remove the entry"
        facts.add("error", "missing", f"{source.video} does not exist", advice)
        return facts
    _check_video(facts, source.video, config)
    if source.poses is not None and facts.frames is not None:
        try:
            _check_poses(facts, load_poses(source.poses, facts.size, facts.fps))
        except UserError as error:
            facts.add("error", "poses", str(error), "prepare with poses=estimate")
    _check_length(facts, config)
    return facts


def check_prepared(clip: Clip, config: CheckConfig) -> ClipFacts:
    facts = ClipFacts(clip.name, str(clip.video), clip.split)
    again = "run the same preparation again"
    if not clip.video.exists():
        facts.add("error", "missing", f"{clip.video} does not exist any more", f"bring it back, or {again}")
        return facts
    if not clip.fingerprint.matches(clip.video):
        facts.add("error", "changed", "the video has changed since its poses were made", again)
    _check_video(facts, clip.video, replace(config, frame_fps=clip.fps))
    try:
        _check_poses(facts, Poses.load(clip.poses))
    except UserError as error:
        facts.add("error", "poses", str(error), again)
    _check_masks(facts, clip, again)
    _check_length(facts, config)
    if config.size is not None and facts.size is not None:
        _check_frame(facts, clip, (config.size[0], config.size[1]), config.crop)
    return facts


def _check_video(facts: ClipFacts, video: Path, config: CheckConfig) -> None:
    try:
        with VideoReader(video, config.frame_fps if video.is_dir() else None, argument="video") as reader:
            facts.frames, facts.fps, facts.size = len(reader), round(reader.fps, 3), reader.size
            if not reader.constant_rate:
                message = "frames have different durations; it is read at its mean rate, repeating and dropping frames"
                advice = "re-encode it at a constant rate if motion looks jerky"
                facts.add("warning", "variable rate", message, advice)
            if reader.note:
                facts.add(
                    "note", "colours", reader.note, "nothing; export it in BT.709 to choose the colours yourself"
                )
            if config.decode:
                for _ in reader:
                    pass
    except UserError as error:
        advice = "fetch or export the file again; what is before the damage can be cut out and kept"
        facts.add("error", "damaged", str(error), advice)
    if facts.fps is not None and not 12 <= facts.fps <= 65:
        advice = "use another data.stride for such clips, or re-encode them at 24 to 30"
        facts.add("warning", "frame rate", f"{facts.fps:g} frames per second", advice)
    if video.is_dir():
        facts.findings += frame_order_findings(video)


def _check_poses(facts: ClipFacts, poses: Poses) -> None:
    visible = poses.scores > VISIBLE  # (frames, persons, 17)
    present = visible.any(axis=-1)  # (frames, persons)
    facts.persons = poses.persons
    facts.absent_frames = round(float(1 - present.any(axis=1).mean()), 4)
    facts.missing_joints = round(float(1 - visible[present].mean()), 4) if present.any() else 1.0
    if facts.frames is not None and (poses.frames != facts.frames or poses.size != facts.size):
        message = f"poses are of {poses.frames} frames of {poses.size}, the video has {facts.frames} of {facts.size}"
        facts.add("error", "poses", message, "prepare it again with poses=estimate")
        return
    if not present.any():
        facts.add("error", "nobody", "no joint is seen in any frame", "leave the clip out, or try pose.heavy=true")
        return
    if facts.absent_frames > 0.1:
        message = f"nobody is seen in {facts.absent_frames:.0%} of the frames"
        advice = "training keeps away from these frames; if somebody is there, try pose.heavy=true"
        facts.add("warning", "absent", message, advice)
    if facts.missing_joints > 0.4:
        rare = np.argsort(visible[present].mean(axis=0), kind="stable")[:3]
        names = ", ".join(COCO_KEYPOINTS[joint] for joint in rare)
        message = f"{facts.missing_joints:.0%} of the joints are missing, most of all {names}"
        advice = "fine for close-ups; otherwise try pose.heavy=true or another estimator"
        facts.add("warning", "missing joints", message, advice)
    if poses.persons > 1:
        message = f"{poses.persons} persons; the keypoints of the first are used, all are drawn"
        facts.add("note", "persons", message, "prepare with pose.max_persons=1 for the first alone")
    jumps = pose_jumps(poses)
    if len(jumps):
        message = f"the person jumps at {len(jumps)} places, first at frame {jumps[0]}"
        advice = "cut the video there if the scene changes; otherwise look whether the poses follow one person"
        facts.add("warning", "jump", message, advice)


def pose_jumps(poses: Poses) -> np.ndarray:
    """Frames at which the first person is more than half their height away from their position a frame before."""
    visible = poses.scores[:, 0] > VISIBLE
    points = np.where(visible[..., None], poses.keypoints[:, 0], np.nan)
    enough = visible.sum(axis=1) >= 3  # joints for a centre and a height
    centres, heights = np.full((poses.frames, 2), np.nan), np.full(poses.frames, np.nan)
    centres[enough] = np.nanmedian(points[enough], axis=1)  # (frames, 2)
    heights[enough] = [np.ptp(p[s], axis=0).max() for p, s in zip(points[enough], visible[enough], strict=True)]
    moved = np.linalg.norm(np.diff(centres, axis=0), axis=1)
    return np.flatnonzero(moved > 0.5 * np.maximum(heights[1:], heights[:-1])) + 1


def _check_masks(facts: ClipFacts, clip: Clip, again: str) -> None:
    if clip.masks is None:
        message = "no person masks: every pixel counts as the person's"
        facts.add("note", "no masks", message, "prepare with pose.backend=blazepose masks=estimate")
        return
    missing = [frame for frame in range(clip.frames) if not mask_files(clip.masks, frame)]
    if missing:
        message = f"{len(missing)} of {clip.frames} frames have no mask, first frame {missing[0]}"
        facts.add("error", "masks", message, again)
        return
    checked = np.unique(np.linspace(0, clip.frames - 1, min(clip.frames, 8)).astype(int)).tolist()
    empty = 0
    for frame in checked:
        masks = [read_image(file)[..., 0] for file in mask_files(clip.masks, frame)]
        if any(mask.shape != clip.size[::-1] for mask in masks):
            facts.add("error", "masks", f"the mask of frame {frame} is not of the video's size", again)
            return
        empty += not any((mask > 127).any() for mask in masks)
    if empty > len(checked) / 2:
        message = f"{empty} of {len(checked)} masks looked at are empty"
        facts.add("warning", "masks", message, "look at them; prepare with masks=estimate")


def _check_length(facts: ClipFacts, config: CheckConfig) -> None:
    needed = (config.num_frames - 1) * config.stride + 1
    if facts.frames is not None and facts.frames < needed:
        setting = f"num_frames={config.num_frames} stride={config.stride}"
        message = f"{facts.frames} frames, {needed} are needed for {setting}"
        advice = "use fewer frames or a smaller stride; training leaves the clip out"
        facts.add("error", "too short", message, advice)


def _check_frame(facts: ClipFacts, clip: Clip, size: tuple[int, int], crop: str) -> None:
    matrix = crop_matrix(clip.size, size, clip.box, crop)
    if matrix is None:
        box = f"{clip.box.width:.0f}x{clip.box.height:.0f} of {clip.size[0]}x{clip.size[1]}"
        message = f"people fill {box} pixels over the whole clip, more than a frame of {size[0]}x{size[1]} shows"
        advice = "use crop=pad, or a size of the video's shape; training with crop=person leaves the clip out"
        facts.add("error", "crop", message, advice)
    elif matrix[0, 0] > 1.5:
        message = f"{clip.size[0]}x{clip.size[1]} pixels would be enlarged {matrix[0, 0]:.1f} times"
        facts.add("warning", "small", message, "find a larger version, or train at a smaller size")


def _compare_rates(clips: list[ClipFacts]) -> None:
    rates = [clip.fps for clip in clips if clip.fps is not None]
    middle = float(np.median(rates)) if rates else 0.0
    for clip in clips:
        if clip.fps is not None and abs(clip.fps / middle - 1) > 0.2:
            message = f"{clip.fps:g} frames per second, most clips have {middle:g}: a stride spans another time"
            clip.add("warning", "other rate", message, f"re-encode it at {middle:g}")


def _compare_contents(facts: list[ClipFacts], clips: list[Clip]) -> None:
    by_content: dict[str, list[Clip]] = {}
    for clip in clips:
        by_content.setdefault(clip.fingerprint.sha256, []).append(clip)
    for fact, clip in zip(facts, clips, strict=False):
        same = [other for other in by_content[clip.fingerprint.sha256] if other is not clip]
        if same:
            leaks = any(other.split != clip.split for other in same)
            message = f"the same video as {same[0].name}" + (", which is in the other part" if leaks else "")
            fact.add("error" if leaks else "warning", "duplicate", message, "remove one of the two")


def frame_order_findings(folder: Path) -> list[Finding]:
    """Faults of the names of a folder's frames, which are read in the order of the numbers, whatever their padding."""
    names = [file.name for file in list_images(folder)]
    numbers = [re.findall(r"\d+", Path(name).stem) for name in names]
    if not names or not all(numbers):
        unnumbered = sum(not found for found in numbers)
        message = f"{unnumbered} of {len(names)} frames have no number in their names; they are read by name"
        return [Finding("warning", "order", message, "number the frames in the order of time")] if names else []
    last = np.array([int(found[-1]) for found in numbers])
    findings = []
    values, counts = np.unique(last, return_counts=True)
    if (counts > 1).any():
        doubled = int(values[counts > 1][0])
        message = f"{int((counts > 1).sum())} numbers occur more than once, first {doubled}"
        advice = "remove the copies, such as frame_1.jpg beside frame_1.png"
        findings.append(Finding("error", "order", message, advice))
    elif (np.diff(last) < 0).any():
        message = "the numbers do not grow in the order of the names"
        findings.append(Finding("error", "order", message, "give all frames one pattern of names, such as 000000.png"))
    steps = np.diff(values)
    usual = int(np.median(steps)) if len(steps) else 1
    gaps = np.flatnonzero(steps > usual)
    if len(gaps):
        before, after = int(values[gaps[0]]), int(values[gaps[0] + 1])
        message = f"{len(gaps)} gaps in the numbers, first between {before} and {after}: the motion jumps there"
        findings.append(Finding("warning", "gaps", message, "bring the missing frames back, or make two clips of it"))
    if sorted(names) != names:
        message = "the numbers are not padded; they are read by number here, but tools that sort by name mix them up"
        advice = "rename to frame_000000.png, ... before using other tools"
        findings.append(Finding("note", "padding", message, advice))
    return findings
