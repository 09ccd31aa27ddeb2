"""`report.png`: what a calibration did, at a glance."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from core.files import complete_file
from data.poses.drawing import draw_pose
from data.poses.person import COCO_MIRROR
from data.poses.poses import Poses
from tpc.bends.parts import NECK, PARTS
from tpc.export.segments import Segment
from tpc.procrustes import apply_matrix
from tpc.result import Calibration, PersonFrame
from tpc.silhouettes import visible

NUM_COLUMNS = 5  # driving frames that are shown
MOST_SEGMENTS = 6  # that a picture shows
GREY, GREEN, AMBER, RED = (150, 150, 150), (60, 180, 75), (245, 190, 40), (220, 50, 47)
BLUE = (60, 120, 230)
STATUS_COLOURS = {"calibrated": GREEN, "interpolated": AMBER, "uncalibrated": RED}
# Label of the axis -> two fields of `PersonFrame`, with their labels.
PLOTS = {
    "IoU": {"mask_iou": "calibrated", "box_iou": "boxes before calibration"},
    "scale": {"scale": "used", "torso_scale": "shoulders and hips alone"},
    "rotation, degrees": {"rotation_deg": "used", "relative_angle_deg": "pelvis to nose"},
}
PERSON_COLOURS = ("#1f77b4", "#e377c2", "#8c564b", "#17becf", "#7f7f7f")


def write_report(path: str | Path, report: np.ndarray) -> None:
    """Write what `draw_report` drew as a PNG."""
    with complete_file(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", report[..., ::-1])[1].tobytes())


def draw_report(
    calibration: Calibration,
    reference: np.ndarray,
    reference_poses: Poses,
    driving_poses: Poses,
    driving_frames: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """(h, w, 3) uint8: keypoints, common set, chosen subset, calibrated images, and everything over time.

    Images are the original ones, (h, w, 3) uint8; driving frames None = their skeletons on black.
    """
    shown = _frames_to_show(calibration)
    figure = Figure(figsize=(2.6 * (len(shown) + 1), 13), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(6, len(shown) + 1, height_ratios=[2.6, 2.6, 2.6, 1.3, 1.3, 1.3])
    figure.suptitle(_headline(calibration), fontsize=13)
    _show(
        figure.add_subplot(grid[0, 0]), _reference_image(calibration, reference, reference_poses, shown), "reference"
    )
    _legend(figure.add_subplot(grid[1:3, 0]), calibration)
    for column, frame in enumerate(shown, start=1):
        driving = _driving_image(calibration, frame, driving_poses, driving_frames)
        calibrated = calibration.frame_image(frame)
        _show(figure.add_subplot(grid[0, column]), driving, f"frame {frame}")
        _show(figure.add_subplot(grid[1, column]), calibrated, "calibrated", calibration.records[frame])
        _show(
            figure.add_subplot(grid[2, column]),
            _overlay(calibration, frame, driving_frames, reference_poses),
            "laid over the frame",
        )
    for row, (label, lines) in enumerate(PLOTS.items(), start=3):
        axes = figure.add_subplot(grid[row, :])
        _plot(axes, calibration, shown, label, lines)
    axes.set_xlabel(
        "driving frame, from 0 (amber: interpolated, red: uncalibrated, blue line: cut; grey lines: shown above)"
    )
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_segments_picture(
    path: str | Path,
    calibration: Calibration,
    segments: Sequence[Segment],
    references: Sequence[np.ndarray],
    plain: np.ndarray,
    reference_poses: Poses,
    driving_frames: Sequence[np.ndarray] | None = None,
) -> None:
    """Draw, for some segments, a driving frame, the reference without and with calibration, and the two laid over.

    References and `plain`, the uncalibrated one, are (h, w, 3) uint8 in the model's frame.
    """
    rows = np.unique(np.linspace(0, len(segments) - 1, MOST_SEGMENTS).round().astype(int))
    figure = Figure(figsize=(11, 2.9 * len(rows) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 4, squeeze=False)
    for row, number in zip(axes, rows, strict=True):
        segment = segments[number]
        frame = segment.frames.start if segment.frame is None else segment.frame
        driver = np.zeros_like(plain) if driving_frames is None else _framed(calibration, driving_frames[frame])
        span = f"frame {frame} of {segment.frames.start} to {segment.frames.stop - 1}"
        _show(row[0], driver, span)
        _show(row[1], plain, "reference as it is")
        _show(row[2], references[number], "calibrated reference")
        _show(row[3], _overlay(calibration, frame, driving_frames, reference_poses), "laid over the frame")
    with complete_file(path) as temporary:
        figure.savefig(temporary, dpi=100)


def _frames_to_show(calibration: Calibration) -> list[int]:
    """Evenly spaced frames; an uncalibrated one among them when there is any."""
    chosen = np.unique(np.linspace(0, calibration.frames - 1, NUM_COLUMNS).round().astype(int)).tolist()
    missing = np.flatnonzero((calibration.member < 0).any(1))
    if len(missing) and not set(missing) & set(chosen):
        middle = min(range(len(chosen)), key=lambda i: np.abs(missing - chosen[i]).min())
        chosen[middle] = int(missing[np.abs(missing - chosen[middle]).argmin()])
    return sorted(set(chosen))


def _headline(calibration: Calibration) -> str:
    summary, config = calibration.summary(), calibration.config
    counts = ", ".join(f"{summary[status]} {status}" for status in STATUS_COLOURS)
    cut = f", cuts before {', '.join(map(str, calibration.cuts))}" if calibration.cuts else ""
    iou = "" if summary["mean_mask_iou"] is None else f", mean IoU {summary['mean_mask_iou']:.2f}"
    return (
        f"{calibration.frames} frames, {calibration.persons} person(s): {counts}{iou}{cut}\n"
        f"preset {config.preset}: {config.transform}, keypoints {config.keypoints}, {config.visibility} visibility, "
        f"{config.propagation} propagation; {summary['seconds']:.1f} s"
    )


def _legend(axes, calibration: Calibration) -> None:
    axes.axis("off")
    lines = [("o", GREY, "keypoint seen"), ("o", AMBER, "seen in both images"), ("o", GREEN, "used in the transform")]
    lines += [("_", (255, 255, 255), "outline of the driving person"), ("_", GREEN, "of the calibrated person")]
    if calibration.config.transform == "articulated":
        lines += [("_", BLUE, "part by its own keypoints"), ("_", RED, "part that follows its parent")]
    outline = [withStroke(linewidth=5, foreground="0.5")]
    for row, (marker, colour, text) in enumerate(lines):
        size, effects = (9, []) if marker == "o" else (14, outline)
        sign = {"color": _unit(colour), "markersize": size, "markeredgewidth": 3 if marker == "_" else 1}
        axes.plot(0.05, 0.97 - 0.06 * row, marker, path_effects=effects, **sign)
        axes.text(0.14, 0.97 - 0.06 * row, text, va="center", fontsize=10)
    summary = calibration.summary()
    text = [f"{count} x {reason}" for reason, count in list(summary["reasons"].items())[:5]]
    text += [f"Note: {note}." for note in summary["notes"]]
    wrapped = "\n\n".join(fill(line, 34, break_long_words=False, break_on_hyphens=False) for line in text)
    axes.text(0.0, 0.92 - 0.06 * len(lines), wrapped, va="top", fontsize=9)
    axes.set(xlim=(0, 1), ylim=(0, 1))


def _show(axes, image: np.ndarray, title: str, records: Sequence[PersonFrame] = ()) -> None:
    axes.imshow(image)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)
    if records:
        worst = max(records, key=lambda r: list(STATUS_COLOURS).index(r.status))
        for spine in axes.spines.values():
            spine.set_color(_unit(STATUS_COLOURS[worst.status]))
            spine.set_linewidth(3)
        overlaps = ", ".join(f"{r.mask_iou:.2f}" for r in records if r.mask_iou is not None)
        words = [title if worst.status == "calibrated" else worst.status, f"IoU {overlaps}" if overlaps else ""]
        axes.set_title(", ".join(filter(None, words)), fontsize=10)


def _reference_image(
    calibration: Calibration, reference: np.ndarray, poses: Poses, shown: Sequence[int]
) -> np.ndarray:
    image = reference.copy()
    threshold = calibration.config.reference_score_threshold
    for person in range(calibration.persons):
        rows = (calibration.records[frame][person] for frame in shown)
        record = next((row for row in rows if row.keypoints), calibration.records[shown[0]][person])
        used, common = (
            {int(COCO_MIRROR[i]) if record.mirrored else i for i in numbers}
            for numbers in (record.keypoints, record.common)
        )
        seen = visible(poses.scores[0, person], poses.keypoints[0, person], threshold)
        _draw_points(image, poses.keypoints[0, person], seen, used, common)
    return image


def _driving_image(
    calibration: Calibration, frame: int, poses: Poses, frames: Sequence[np.ndarray] | None
) -> np.ndarray:
    if frames is None:
        image = draw_pose(poses.keypoints[frame], poses.scores[frame], poses.size)
    else:
        image = np.array(frames[frame])
    for slot in range(poses.persons):
        seen = visible(poses.scores[frame, slot], poses.keypoints[frame, slot], calibration.config.score_threshold)
        record = next((r for r in calibration.records[frame] if r.slot == slot), None)
        used, common = (set(), set()) if record is None else (set(record.keypoints), set(record.common))
        _draw_points(image, poses.keypoints[frame, slot], seen, used, common)
    return image


def _draw_points(image: np.ndarray, keypoints: np.ndarray, seen: np.ndarray, used: set[int], common: set[int]) -> None:
    radius = max(3, max(image.shape[:2]) // 80)
    for number in np.flatnonzero(seen):
        colour = GREEN if number in used else AMBER if number in common else GREY
        centre = tuple(int(v) for v in np.clip(np.round(keypoints[number]), -(2**15), 2**15))
        cv2.circle(image, centre, radius + 1, (0, 0, 0), -1, cv2.LINE_AA)
        cv2.circle(image, centre, radius, colour, -1, cv2.LINE_AA)


def _overlay(
    calibration: Calibration, frame: int, frames: Sequence[np.ndarray] | None, reference_poses: Poses
) -> np.ndarray:
    """The driving person's outline (white) and the calibrated person's (colour by status) over the driving frame.

    The bones of parts that have maps of their own lie where these take them.
    """
    size = calibration.size
    if frames is None:
        image = np.zeros((size[1], size[0], 3), np.uint8)
    else:
        image = _framed(calibration, frames[frame])
    width = max(2, max(size) // 200)
    for person, record in enumerate(calibration.records[frame]):
        member = calibration.member[frame, person]
        if member >= 0:
            mask = calibration.masks[member]
            image[mask] = (0.45 * image[mask] + 0.55 * calibration.images[member][mask]).astype(np.uint8)
            _outline(image, mask, STATUS_COLOURS[record.status], width)
        _outline(image, calibration.target_masks[frame, person], (255, 255, 255), width)
        if record.parts:
            _draw_parts(image, record, calibration, reference_poses.keypoints[0, person], width)
    return image


def _framed(calibration: Calibration, image: np.ndarray) -> np.ndarray:
    return cv2.warpAffine(np.asarray(image), calibration.frame_map[:2], calibration.size, flags=cv2.INTER_AREA)


def _draw_parts(
    image: np.ndarray, record: PersonFrame, calibration: Calibration, keypoints: np.ndarray, width: int
) -> None:
    """Lines between the keypoints (17, 2) of each part, and dots where hands and feet begin, after the part's map."""
    for (name, (_, points)), matrix in zip(PARTS.items(), record.parts.values(), strict=True):
        own = np.nan_to_num(keypoints[[i for i in points if i != NECK]].astype(np.float64))
        ends = np.clip(apply_matrix(calibration.frame_map @ np.array(matrix), own), -(2**15), 2**15)
        colour = RED if name in record.following else BLUE
        corners = np.round(ends[[0, 1, 3, 2]] if name == "torso" else ends).astype(np.int32)
        cv2.polylines(image, [corners], name == "torso", colour, width, cv2.LINE_AA)
        if len(corners) == 1:
            cv2.circle(image, tuple(corners[0].tolist()), 2 * width, colour, -1, cv2.LINE_AA)


def _outline(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], width: int) -> None:
    contours = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    cv2.drawContours(image, contours, -1, colour, width, cv2.LINE_AA)


def _plot(axes, calibration: Calibration, shown: Sequence[int], label: str, lines: dict[str, str]) -> None:
    """Draw two fields of `PersonFrame` over time for every person, the second dotted, with their labels."""
    for person in range(calibration.persons):
        colour = PERSON_COLOURS[person % len(PERSON_COLOURS)]
        prefixes = {"-": f"person {person}, ", ":": ""}
        for (style, prefix), (name, text) in zip(prefixes.items(), lines.items(), strict=True):
            values = [getattr(row[person], name) for row in calibration.records]
            values = np.array([np.nan if value is None else value for value in values], np.float64)
            axes.plot(values, color=colour, ls=style, label=prefix + text)
    if label == "IoU":
        axes.set_ylim(0, 1)
    axes.set_ylabel(label)
    axes.set_xlim(-0.5, calibration.frames - 0.5)
    axes.grid(alpha=0.3)
    status = calibration.status
    for name in ("interpolated", "uncalibrated"):
        for frame in np.flatnonzero((status == name).any(1)):
            axes.axvspan(frame - 0.5, frame + 0.5, color=_unit(STATUS_COLOURS[name]), alpha=0.25, lw=0)
    for frame in shown:
        axes.axvline(frame, color="black", lw=0.6, alpha=0.4)
    for cut in calibration.cuts:
        axes.axvline(cut - 0.5, color="blue", ls="--", lw=1.2)
    if calibration.persons:
        axes.legend(fontsize=8, ncols=2 * calibration.persons, loc="best")


def _unit(colour: tuple[int, int, int]) -> tuple[float, ...]:
    return tuple(value / 255 for value in colour)
