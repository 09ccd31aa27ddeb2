"""One calibrated reference for many frames: where its person stands against the driver, and what it loses.

    python -m benchmarks.references.segments [split=test] [clips=0] [output=outputs/segment_references]

Clips of one person of the misalignment benchmark, three times as long as its own, exact poses and masks. Of every
reference the person's height, angle (pelvis to nose) and feet are compared with the driver's, in the frame that it was
calibrated to and in all frames that it serves; and its pixels with the true frames'.
"""

from benchmarks.config import ONE_PERSON, SegmentsConfig
from core.config import check_first

check_first(__name__, SegmentsConfig, __doc__)


from collections import defaultdict
from dataclasses import replace

import cv2
import numpy as np
from tqdm import tqdm

from benchmarks.calibrated_pictures import run
from benchmarks.calibration_accuracy import table
from core.config import config_dict, load_config
from core.errors import run_command
from core.files import output_folder, write_json
from data.config import COCO_KEYPOINTS
from data.transforms import fit_matrix
from evaluation.clips import EvaluationClip
from evaluation.misaligned_clips import draw, read_manifest
from metrics.image import psnr, ssim
from tpc import Calibration
from tpc.bends.parts import keypoint_matrices
from tpc.export.segments import RULES, segment_references
from tpc.procrustes import apply_matrix
from tpc.silhouettes import body_height, head_axis, relative_angle
from tpc.warping import mask_iou

TRANSFORMS = ("procrustes", "articulated")
FEET = [COCO_KEYPOINTS.index(name) for name in ("left_ankle", "right_ankle")]


def geometry(placed: np.ndarray, driver: np.ndarray, seen: np.ndarray) -> tuple[float, float, float]:
    """Height as a ratio, angle in degrees, and the feet's distance in parts of the height; keypoints (17, 2)."""
    height = body_height(driver, seen)
    angle = relative_angle(head_axis(driver, seen), head_axis(placed, seen))
    feet = [foot for foot in FEET if seen[foot]]
    distance = np.linalg.norm(placed[feet] - driver[feet], axis=1).mean() / height if feet else np.nan
    return body_height(placed, seen) / height, float(np.degrees(angle)), distance


def placed_keypoints(clip: EvaluationClip, found: Calibration, frame: int) -> np.ndarray:
    """(17, 2) driving pixels: the reference's keypoints in a frame's calibrated image."""
    record = found.records[frame][0]
    parts = record.parts and {name: np.array(matrix) for name, matrix in record.parts.items()}
    matrices = keypoint_matrices(found.matrices[frame, 0], parts)
    return apply_matrix(matrices, clip.reference.poses.keypoints[0, 0].astype(np.float64)[:, None])[:, 0]


def measured(clip: EvaluationClip, config: SegmentsConfig) -> dict[tuple[str, str, str], list[tuple[float, ...]]]:
    """Of (transform, frames a reference, rule), for each frame: whether the reference is its own, geometry, pixels."""
    size = (config.size, config.size)
    (truth, masks), rows = clip.truth(size), defaultdict(list)
    reference, driving = clip.reference.poses, clip.driving.poses
    driver, seen = (
        driving.keypoints[:, 0].astype(np.float64),
        (driving.scores[:, 0] > 0) & (reference.scores[0, 0] > 0),
    )
    # As a model sees the reference that is not calibrated.
    to_driving = np.linalg.inv(fit_matrix(driving.size, size)) @ fit_matrix(reference.size, size, "contain")
    plain = apply_matrix(to_driving, reference.keypoints[0, 0].astype(np.float64))
    unknown = (np.nan,) * 3
    rows["uncalibrated", "", ""] = [
        (False, *geometry(plain, d, s), *unknown) for d, s in zip(driver, seen, strict=True)
    ]
    for transform in TRANSFORMS:
        found = run(clip, size, transform)
        for length, rules in ((1, RULES[:1]), (config.length, RULES), (None, RULES)):
            for rule in rules:
                key = transform, "all" if length is None else str(length), rule
                for segment in segment_references(found, length, rule=rule):
                    if segment.frame is None:
                        continue
                    image, mask = found.frame_image(segment.frame), found.masks[found.member[segment.frame, 0]]
                    placed = placed_keypoints(clip, found, segment.frame)
                    for f in segment.frames:
                        pixels = psnr(image, truth[f], masks[f]), ssim(image, truth[f], masks[f])
                        where = geometry(placed, driver[f], seen[f])
                        rows[key].append((f == segment.frame, *where, *pixels, mask_iou(mask, masks[f])))
    return rows


def row(values: np.ndarray) -> list[str]:
    """Cells of (n, 7) rows of `measured`: medians of the errors, own frames and all; means of the pixels' measures."""
    height, angle, feet = 100 * np.abs(values[:, 1] - 1), np.abs(values[:, 2]), 100 * values[:, 3]
    own = values[:, 0] > 0
    cells = []
    for chosen in (own, np.ones_like(own)):
        errors = [np.nanmedian(error[chosen]) if chosen.any() else np.nan for error in (height, angle, feet)]
        cells.append("" if np.isnan(errors[0]) else "{:.1f} % / {:.1f}° / {:.1f} %".format(*errors))
    known = np.isfinite(values[:, 4:]).any()
    return [*cells, "{:.1f} / {:.2f} / {:.2f}".format(*np.nanmean(values[:, 4:], axis=0)) if known else ""]


def main(arguments: list[str]) -> None:
    config = load_config(SegmentsConfig, arguments, about=__doc__)
    cv2.setNumThreads(1)
    output, rows = output_folder(config.output), defaultdict(list)
    for kind in ONE_PERSON:
        manifest = replace(read_manifest(kind, config.split), frames=config.frames)
        clips = manifest.clips[: config.clips or None]
        for spec in tqdm(clips, desc=kind):
            for key, values in measured(draw(manifest, spec), config).items():
                rows[key] += values
    head = ["", "frames a reference", "frame", "in its own frame: height / angle / feet", "in all its frames"]
    lines = [[*key, *row(np.array(values, np.float64))] for key, values in rows.items()]
    text = table([*head, "dB / SSIM / IoU"], lines)
    print(text)
    (output / "table.md").write_text(text + "\n", encoding="utf-8")
    write_json(output / "results.json", {"config": config_dict(config), "table": lines})


if __name__ == "__main__":
    run_command(main)
