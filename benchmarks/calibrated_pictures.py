"""Calibrated images themselves against the truth, by transform: how well a person is carried over, without any model.

    python -m benchmarks.calibrated_pictures [split=test] [clips=0] [noise=0.02] [output=outputs/calibrated_pictures]

Clips of one person of the misalignment benchmark, exact masks, exact poses or poses with errors; with retargets= exact
ones brought to the reference's body too. Measured are the pixels of the person in the true frame, and the IoU of the
silhouettes.
"""

from benchmarks.config import PicturesConfig
from core.config import check_first

check_first(__name__, PicturesConfig, __doc__)


from collections.abc import Iterator

import cv2
import numpy as np
from tqdm import tqdm

from benchmarks.calibration_accuracy import table
from core.config import config_dict, load_config
from core.errors import run_command
from core.files import output_folder, write_json
from data.poses.person import box_iou
from data.transforms import fit_matrix
from evaluation.clips import EvaluationClip, with_pose_noise, with_retargeting
from evaluation.misaligned_clips import ALL_KINDS, MisalignedClips
from evaluation.report import format_number, interval_cell
from evaluation.statistics import mean_interval
from metrics.image import psnr, ssim
from tpc import Calibration, CalibrationConfig, SimilarityTransform, calibrate
from tpc.silhouettes import body_height, head_axis, keypoint_box, relative_angle
from tpc.warping import mask_iou

TRANSFORMS = ("linear", "affine", "procrustes", "articulated")
DRAWN = "exact, silhouettes drawn"  # a condition
MEASURES = ("psnr", "ssim", "iou")
# Of a frame -> edges of its bins: box IoU before calibration, relative angle in degrees, and how far the keypoints are
# on average from where one similarity of them all puts the reference's, in parts of the body height.
FACTS = {"box IoU": (0, 0.3, 0.5, 0.7, 1.01), "angle": (0, 30, 90, 180.1), "pose difference": (0, 0.02, 0.05, 0.1, 9)}


def run(clip: EvaluationClip, size: tuple[int, int], transform: str, silhouette: str = "mask") -> Calibration:
    reference, driving = clip.reference, clip.driving
    return calibrate(
        reference.image,
        reference.poses,
        driving.poses,
        size,
        CalibrationConfig(transform=transform, driving_silhouette=silhouette),
        reference_masks=reference.masks,
        driving_masks=driving.masks,
        frame_map=fit_matrix(driving.poses.size, size),
        reference_map=fit_matrix(reference.poses.size, size, "contain"),
    )


def measure(clip: EvaluationClip, found: Calibration) -> np.ndarray:
    """(frames, 3) of `MEASURES`; nan where the person is not calibrated."""
    truth, masks = clip.truth(found.size)
    rows = np.full((len(truth), len(MEASURES)), np.nan)
    for f, member in enumerate(found.member[:, 0]):
        if member >= 0 and masks[f].any():
            image, mask = found.images[member], found.masks[member]
            rows[f] = psnr(image, truth[f], masks[f]), ssim(image, truth[f], masks[f]), mask_iou(mask, masks[f])
    return rows


def facts(clip: EvaluationClip) -> np.ndarray:
    """(frames, 3) of `FACTS`, from exact poses."""
    source, rows = clip.reference.poses.keypoints[0, 0].astype(np.float64), []
    seen = clip.reference.poses.scores[0, 0] > 0
    for target, scores in zip(clip.driving.poses.keypoints[:, 0], clip.driving.poses.scores[:, 0], strict=True):
        both = seen & (scores > 0)
        angle = abs(np.degrees(relative_angle(head_axis(source, both), head_axis(target, both))))
        similarity = SimilarityTransform.from_estimate(source, target, both)
        offset = np.nan
        if similarity:
            offset = np.linalg.norm(similarity(source) - target, axis=1)[both].mean() / body_height(target, both)
        rows.append((box_iou(keypoint_box(source, both), keypoint_box(target, both)), angle, offset))
    return np.array(rows)


def measured_clips(config: PicturesConfig) -> Iterator[tuple[str, np.ndarray, dict[str, dict[str, np.ndarray]]]]:
    """Kind, facts, and measures by condition and transform of every clip."""
    clips, size = MisalignedClips(config.kinds, config.clips, config.split), (config.size, config.size)
    for kind, names in clips.by_kind.items():
        for index, name in enumerate(tqdm(names, desc=kind)):
            clip = clips.clip(name)
            conditions = {"exact": (clip, TRANSFORMS)}
            if config.drawn:
                conditions[DRAWN] = clip, TRANSFORMS[2:]
            if config.noise > 0:
                rng = np.random.default_rng([config.seed, ALL_KINDS.index(kind), index])
                conditions["noisy"] = with_pose_noise(clip, config.noise, rng), TRANSFORMS[2:]
            for mode in config.retargets:
                conditions[f"retargeted ({mode})"] = with_retargeting(clip, clip, mode), TRANSFORMS[2:]
            yield (
                kind,
                facts(clip),
                {
                    condition: {
                        t: measure(given, run(given, size, t, "drawn" if condition == DRAWN else "mask"))
                        for t in transforms
                    }
                    for condition, (given, transforms) in conditions.items()
                },
            )


def cell(values: np.ndarray) -> str:
    """PSNR / SSIM / IoU of (n, 3), without those that are not known."""
    means = np.nanmean(values, axis=0) if np.isfinite(values).any() else np.full(3, np.nan)
    return f"{means[0]:.1f} / {means[1]:.2f} / {means[2]:.2f}"


def main(arguments: list[str]) -> None:
    config = load_config(PicturesConfig, arguments, about=__doc__)
    cv2.setNumThreads(1)
    output = output_folder(config.output)
    found = list(measured_clips(config))
    lines = []
    for condition, measured in found[0][2].items():
        names = tuple(measured)
        of_clips = {t: np.array([np.nanmean(m[condition][t], axis=0) for _, _, m in found]) for t in names}
        kinds = np.array([kind for kind, _, _ in found])
        rows = [[kind, *(cell(of_clips[t][kinds == kind]) for t in names)] for kind in config.kinds]
        means = {t: np.array([np.nanmean(of_clips[t][kinds == kind], axis=0) for kind in config.kinds]) for t in names}
        rows.append(["mean of the kinds", *(cell(means[t]) for t in names)])
        lines.append(table([f"poses {condition}: dB / SSIM / IoU", *names], rows) + "\n")
        gain = of_clips["articulated"][:, 0] - of_clips["procrustes"][:, 0]
        lines.append(f"articulated against procrustes, {condition}: worst clip {np.nanmin(gain):+.2f} dB, ")
        lines[-1] += f"better in {np.count_nonzero(gain > 0)} of {len(gain)} clips\n"
        if condition not in ("exact", "noisy"):
            exact = np.array([np.nanmean(m["exact"]["articulated"][:, 0]) for _, _, m in found])
            gains = [of_clips["articulated"][kinds == kind, 0] - exact[kinds == kind] for kind in config.kinds]
            gained = {kind: mean_interval(of_kind) for kind, of_kind in zip(config.kinds, gains, strict=True)}
            shown = [[kind, format_number(interval_cell(interval), "")] for kind, interval in gained.items()]
            shown.append(["mean of the kinds", format_number(interval_cell(mean_interval(*gains)), "")])
            lines.append(table(["articulated, dB against poses exact", f"poses {condition}"], shown) + "\n")
    values = np.concatenate([fact for _, fact, _ in found])
    of_frames = {t: np.concatenate([m["exact"][t] for _, _, m in found]) for t in TRANSFORMS}
    for column, (name, edges) in enumerate(FACTS.items()):
        bins = [(low, high) for low, high in zip(edges[:-1], edges[1:], strict=True)]
        chosen = {
            f"{low:g} to {high:g}": (values[:, column] >= low) & (values[:, column] < high) for low, high in bins
        }
        rows = [
            [label, str(mask.sum()), *(cell(of_frames[t][mask]) for t in TRANSFORMS)] for label, mask in chosen.items()
        ]
        lines.append(table([name, "frames", *TRANSFORMS], rows) + "\n")
    text = "\n".join(lines)
    print(text)
    (output / "table.md").write_text(text, encoding="utf-8")
    results = [
        {
            "kind": kind,
            "measures": {c: {t: np.nanmean(v, 0).tolist() for t, v in m.items()} for c, m in measures.items()},
        }
        for kind, _, measures in found
    ]
    write_json(output / "results.json", {"config": config_dict(config), "clips": results})


if __name__ == "__main__":
    run_command(main)
