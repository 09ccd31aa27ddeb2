"""Errors of each choice of keypoints and each transform against the true change of the camera.

    python -m benchmarks.calibration_accuracy [pairs=300] [noise=2.0] [output=outputs/calibration_accuracy]

Prints the tables of docs/calibration.md and writes them, with the numbers, to `output`. The error of a transform is
its mean distance from the true one at the corners of the person's box, in pixels of a 512 x 512 frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from benchmarks.calibration_pairs import SIZE, Pair, rendered_clip, rendered_pairs
from core.config import config_dict, load_config
from core.errors import run_command
from core.files import complete_file, output_folder, write_json
from data.people.renderer import Rendered
from tpc.config import CalibrationConfig, best
from tpc.estimation import Estimate, ReferencePerson, estimate
from tpc.procrustes import apply_matrix
from tpc.silhouettes import BITMAP_SIDE, silhouette_from_mask
from tpc.trajectory import follow
from tpc.warping import mask_pyramid, warp_mask

RULES = ("face", "torso", "trunk", "all", "consensus", "exhaustive")
TRANSFORMS = ("linear", "affine", "procrustes")
SCALES = ((0.4, 0.7), (0.7, 1.4), (1.4, 2.5))
SMOOTHING = (0.0, 1.0, 2.0, 3.0, 5.0)
ROTATIONS = ((0, 30), (30, 90), (90, 150), (150, 180))  # degrees


@dataclass
class BenchmarkConfig:
    pairs: int = 300
    clips: int = 12  # of 30 frames
    noise: float = 2.0  # pixels of standard deviation, on all keypoints
    seed: int = 0
    output: str = "outputs/calibration_accuracy"


@dataclass(frozen=True)
class Measured:
    """Corner errors (pairs,) in pixels and IoUs of the masks' pixels (pairs,); NaN where nothing was estimated."""

    errors: np.ndarray
    ious: np.ndarray

    def row(self, chosen: np.ndarray | slice = slice(None)) -> dict[str, float]:
        errors, ious = self.errors[chosen], self.ious[chosen]
        done = np.isfinite(errors)
        if not done.any():
            return {"median": float("inf"), "p90": float("inf"), "iou": 0.0, "failed": 1.0}
        return {
            "median": float(np.median(errors[done])),
            "p90": float(np.quantile(errors[done], 0.9)),
            "iou": float(ious[done].mean()),
            "failed": float(1 - done.mean()),
        }


def estimate_pair(
    pair: Pair, driving: Rendered, config: CalibrationConfig, noise: float, rng: np.random.Generator
) -> tuple[ReferencePerson, Estimate]:
    moved = [view.keypoints + noise * rng.standard_normal((17, 2)) for view in (pair.reference, driving)]
    threshold = config.reference_score_threshold
    reference = ReferencePerson.of(moved[0], pair.reference.scores, SIZE, pair.reference.mask, threshold)
    outline = silhouette_from_mask(driving.mask, max_side=BITMAP_SIDE)
    return reference, estimate(reference, moved[1], driving.scores, outline, SIZE, config)


def corner_offsets(matrix: np.ndarray, pair: Pair) -> np.ndarray:
    """(4, 2) pixels."""
    return apply_matrix(matrix, pair.box) - apply_matrix(pair.truth, pair.box)


def mask_iou(matrix: np.ndarray, pair: Pair, driving: Rendered) -> float:
    """Of the pixels of the warped and the driving mask; `Estimate.iou`, of samples, is higher when maximised."""
    warped = warp_mask(mask_pyramid(pair.reference.mask), matrix, SIZE)
    return np.count_nonzero(warped & driving.mask) / np.count_nonzero(warped | driving.mask)


def measure(pairs: Sequence[Pair], config: CalibrationConfig, same_pose: bool, noise: float, seed: int) -> Measured:
    rng, errors, ious = np.random.default_rng(seed), [], []
    for pair in pairs:
        driving = pair.same_pose if same_pose else pair.other_pose
        matrix = estimate_pair(pair, driving, config, noise, rng)[1].matrix
        errors.append(np.nan if matrix is None else np.linalg.norm(corner_offsets(matrix, pair), axis=-1).mean())
        ious.append(np.nan if matrix is None else mask_iou(matrix, pair, driving))
    return Measured(np.array(errors), np.array(ious))


def measure_smoothing(config: BenchmarkConfig) -> str:
    """Table of errors on clips whose camera moves steadily."""
    rng, base = np.random.default_rng(config.seed), replace(best(), min_iou=0.0)
    errors, jumps = ({sigma: [] for sigma in SMOOTHING} for _ in range(2))
    for clip_index in tqdm(range(config.clips), desc="clips"):
        clip = rendered_clip(1000 + config.seed + clip_index)
        found = [estimate_pair(pair, pair.other_pose, base, config.noise, rng) for pair in clip]
        for sigma in SMOOTHING:
            track = follow([f.matrix for _, f in found], found[0][0].centre, replace(base, smoothing=sigma))
            offsets = [corner_offsets(matrix, pair) for matrix, pair in zip(track.matrices, clip, strict=True)]
            errors[sigma] += np.linalg.norm(offsets, axis=-1).mean(-1).tolist()
            jumps[sigma] += np.linalg.norm(np.diff(offsets, axis=0), axis=-1).mean(-1).tolist()
    rows = [[f"{s:g}", f"{np.median(errors[s]):.1f}", f"{np.median(jumps[s]):.1f}"] for s in SMOOTHING]
    return table(["smoothing, frames", "median error, px", "median change of the error from frame to frame, px"], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def overview(names: Sequence[str], results: dict[str, dict[str, Measured]]) -> str:
    """One row a name; for every condition the median error, the 90 % quantile, the mean IoU and what failed."""
    rows = []
    for name in names:
        cells = []
        for measured in results.values():
            row = measured[name].row()
            failed = f"; {100 * row['failed']:.0f} % failed" if row["failed"] else ""
            cells.append(f"{row['median']:.2f} / {row['p90']:.1f}; {row['iou']:.2f}{failed}")
        rows.append([name, *cells])
    return table(["median / 90 % error, px; IoU", *results], rows)


def by_bins(measured: dict[str, Measured], values: np.ndarray, bins: Sequence[tuple], label: str) -> str:
    """Median error, px / mean IoU of every rule and of two transforms, by a property of the pairs."""
    rows = []
    for name in (*RULES, "linear", "affine"):
        cells = [measured[name].row((values >= low) & (values < high)) for low, high in bins]
        rows.append([name, *(f"{cell['median']:.1f} / {cell['iou']:.2f}" for cell in cells)])
    return table(["", *(label.format(low, high) for low, high in bins)], rows)


def main(arguments: list[str]) -> None:
    config = load_config(BenchmarkConfig, arguments)
    pairs = list(tqdm(rendered_pairs(config.pairs, config.seed), total=config.pairs, desc="rendering"))
    noisy = f"{config.noise:g} px noise"
    conditions = {
        "same pose, exact": (True, 0.0),
        f"same pose, {noisy}": (True, config.noise),
        "other pose, exact": (False, 0.0),
        f"other pose, {noisy}": (False, config.noise),
    }
    # Nothing is gated, so that every estimate counts.
    base = replace(best(), min_iou=0.0, min_keypoints=2)
    choices = {rule: replace(base, keypoints=rule, min_keypoints=2 if rule == "face" else 3) for rule in RULES}
    choices |= {name: replace(base, transform=name, keypoints="all", min_keypoints=3) for name in TRANSFORMS}
    results: dict[str, dict[str, Measured]] = {}
    for condition, (same, noise) in conditions.items():
        works = tqdm(choices.items(), desc=condition)
        results[condition] = {name: measure(pairs, choice, same, noise, config.seed + 1) for name, choice in works}
    hardest = results[f"other pose, {noisy}"]
    both = np.isfinite(hardest["face"].errors) & np.isfinite(hardest["exhaustive"].errors)
    ratio = np.median(hardest["exhaustive"].errors[both]) / np.median(hardest["face"].errors[both])
    scales, rotations = np.array([p.scale for p in pairs]), np.abs([p.rotation for p in pairs])
    parts = [
        f"{config.pairs} pairs. Keypoints (transform: procrustes):",
        overview(RULES, results),
        "Transform (keypoints: all):",
        overview(TRANSFORMS, results),
        f"By scale, other pose, {noisy} (median error, px / mean IoU):",
        by_bins(hardest, scales, SCALES, "scale {:g} to {:g}"),
        f"By rotation, other pose, {noisy}:",
        by_bins(hardest, rotations, ROTATIONS, "{:g} to {:g} degrees"),
        f"Temporal smoothing, {config.clips} clips of 30 frames, {noisy}, keypoints exhaustive:",
        measure_smoothing(config),
        f"Where both face and exhaustive give a transform, the median error of exhaustive is {ratio:.2f} of face's.",
    ]
    text, output = "\n\n".join(parts), output_folder(config.output)
    print(text)
    with complete_file(output / "table.md") as part:
        part.write_text(text + "\n", encoding="utf-8")
    numbers = {condition: {name: m.row() for name, m in found.items()} for condition, found in results.items()}
    write_json(output / "results.json", {"config": config_dict(config), "results": numbers, "ratio_to_face": ratio})


if __name__ == "__main__":
    run_command(main)
