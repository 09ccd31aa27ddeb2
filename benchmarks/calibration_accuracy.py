"""Errors of each choice of keypoints and each transform against the true change of the camera.

    python -m benchmarks.calibration_accuracy [pairs=300] [clips=12] [output=outputs/calibration_accuracy]

Prints the tables of docs/calibration.md and writes them, with the numbers, to `output`. The error of a transform is
its mean distance from the true one at the corners of the person's box, in pixels of a 512 x 512 frame.
"""

from benchmarks.config import AccuracyConfig
from core.config import check_first

check_first(__name__, AccuracyConfig, __doc__)


from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from benchmarks.calibration_pairs import SIZE, Pair, rendered_clip, rendered_pairs
from core.config import config_dict, load_config
from core.errors import run_command
from core.files import complete_file, output_folder, write_json
from data.people.renderer import Rendered
from evaluation.clips import estimated_mask
from evaluation.config import MASKS
from tpc.config import CalibrationConfig, best
from tpc.estimation import Estimate, ReferencePerson, drawn_silhouette, estimate
from tpc.procrustes import apply_matrix
from tpc.silhouettes import BITMAP_SIDE, body_height, silhouette_from_mask, visible
from tpc.trajectory import follow
from tpc.warping import mask_pyramid, warp_mask

# Nothing is gated, so that every estimate counts.
BASE = replace(best(), transform="procrustes", min_iou=0.0)
RULES = ("face", "torso", "trunk", "all", "consensus", "exhaustive")
SCALES = ((0.4, 0.7), (0.7, 1.4), (1.4, 2.5))
ROTATIONS = ((0, 30), (30, 90), (90, 150), (150, 180))  # degrees
SMOOTHING = (0.0, 1.0, 2.0, 3.0, 5.0)


@dataclass(frozen=True)
class Condition:
    """Which driving image of a pair, and how far its keypoints and the reference's are off."""

    same_pose: bool
    pixels: float = 0.0  # standard deviation
    share: float = 0.0  # the same, in parts of the person's standing height

    def deviation(self, view: Rendered) -> float:
        return self.pixels + self.share * body_height(view.keypoints, view.scores > 0)


@dataclass(frozen=True)
class Method:
    """A row of a table: choices of TPC, and what masks it is given, one of `MASKS`."""

    config: CalibrationConfig
    masks: str = "exact"


def methods() -> tuple[dict[str, Method], dict[str, Method]]:
    """Rules for the keypoints of a similarity, and transforms, by the names of their rows."""
    rules = {rule: Method(replace(BASE, keypoints=rule)) for rule in RULES}
    rules["face"] = Method(replace(BASE, keypoints="face", min_keypoints=2))
    exhaustive = rules.pop("exhaustive").config
    rules |= {f"exhaustive, {masks} masks": Method(exhaustive, masks) for masks in MASKS}
    untold = replace(exhaustive, drawn_tolerance=0.0)
    rules["exhaustive, drawn masks, drawn_tolerance=0"] = Method(untold, "drawn")
    transforms = {
        f"{transform}, {keypoints}": Method(replace(BASE, transform=transform, keypoints=keypoints))
        for transform in ("linear", "affine", "procrustes")
        for keypoints in ("all", "exhaustive")
    }
    return rules, transforms


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

    def cell(self, chosen: np.ndarray | slice = slice(None)) -> str:
        row = self.row(chosen)
        failed = f"; {100 * row['failed']:.0f} % failed" if row["failed"] >= 0.005 else ""
        return f"{row['median']:.{1 if row['median'] >= 9.95 else 2}f} / {row['iou']:.2f}{failed}"


def estimate_pair(
    pair: Pair, driving: Rendered, method: Method, condition: Condition, rng: np.random.Generator
) -> tuple[ReferencePerson, Estimate]:
    """The estimate from keypoints and masks with errors; the keypoints' errors are drawn first, masks or not."""
    views, config = (pair.reference, driving), method.config
    points = [view.keypoints + condition.deviation(view) * rng.standard_normal((17, 2)) for view in views]
    masks = [estimated_mask(v.mask, rng) if method.masks == "estimated" else v.mask for v in views]
    if method.masks == "drawn":
        masks[0] = None
        outline = drawn_silhouette(points[1], visible(driving.scores, points[1], config.score_threshold), SIZE)
    else:
        outline = silhouette_from_mask(masks[1], max_side=BITMAP_SIDE)
    threshold = config.reference_score_threshold
    reference = ReferencePerson.of(points[0], pair.reference.scores, SIZE, masks[0], threshold)
    return reference, estimate(reference, points[1], driving.scores, outline, SIZE, config)


def corner_offsets(matrix: np.ndarray, pair: Pair) -> np.ndarray:
    """(4, 2) pixels."""
    return apply_matrix(matrix, pair.box) - apply_matrix(pair.truth, pair.box)


def mask_iou(matrix: np.ndarray, pair: Pair, driving: Rendered) -> float:
    """Of the pixels of the warped and the driving mask, the true ones; `Estimate.iou`, of samples, is higher."""
    warped = warp_mask(mask_pyramid(pair.reference.mask), matrix, SIZE)
    return np.count_nonzero(warped & driving.mask) / np.count_nonzero(warped | driving.mask)


def measure(pairs: Sequence[Pair], method: Method, condition: Condition, seed: int) -> Measured:
    """Every method meets the same errors."""
    errors, ious = np.full((2, len(pairs)), np.nan)
    for index, pair in enumerate(pairs):
        driving = pair.same_pose if condition.same_pose else pair.other_pose
        rng = np.random.default_rng([seed, index])
        matrix = estimate_pair(pair, driving, method, condition, rng)[1].matrix
        if matrix is not None:
            errors[index] = np.linalg.norm(corner_offsets(matrix, pair), axis=-1).mean()
            ious[index] = mask_iou(matrix, pair, driving)
    return Measured(errors, ious)


def measure_smoothing(config: AccuracyConfig) -> str:
    """Table of errors on clips whose camera moves steadily."""
    kinds, condition = ("exact", "drawn"), Condition(False, pixels=config.noise)
    errors, jumps = ({(kind, sigma): [] for kind in kinds for sigma in SMOOTHING} for _ in range(2))
    for clip_index in tqdm(range(config.clips), desc="clips"):
        clip = rendered_clip(1000 + config.seed + clip_index)
        for kind in kinds:
            rng, method = np.random.default_rng([config.seed, clip_index]), Method(BASE, kind)
            found = [estimate_pair(pair, pair.other_pose, method, condition, rng) for pair in clip]
            for sigma in SMOOTHING:
                track = follow([f.matrix for _, f in found], found[0][0].centre, replace(BASE, smoothing=sigma))
                offsets = [corner_offsets(matrix, pair) for matrix, pair in zip(track.matrices, clip, strict=True)]
                errors[kind, sigma] += np.linalg.norm(offsets, axis=-1).mean(-1).tolist()
                jumps[kind, sigma] += np.linalg.norm(np.diff(offsets, axis=0), axis=-1).mean(-1).tolist()
    rows = [
        [f"{s:g}", *(f"{np.median(errors[k, s]):.1f}, {np.median(jumps[k, s]):.1f}" for k in kinds)] for s in SMOOTHING
    ]
    return table(["smoothing, frames", *(f"{kind} masks" for kind in kinds)], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def overview(names: Sequence[str], results: dict[str, dict[str, Measured]]) -> str:
    """One row a name, one column a condition."""
    return table(["", *results], [[name, *(found[name].cell() for found in results.values())] for name in names])


def by_bins(measured: dict[str, Measured], pairs: Sequence[Pair]) -> str:
    """One row a name, by the scale and the rotation of the pairs."""
    scales, rotations = np.array([p.scale for p in pairs]), np.abs([p.rotation for p in pairs])
    bins = {f"scale {low:g} to {high:g}": (scales >= low) & (scales < high) for low, high in SCALES}
    bins |= {f"{low:g} to {high:g} degrees": (rotations >= low) & (rotations < high) for low, high in ROTATIONS}
    rows = [[name, *(found.cell(chosen) for chosen in bins.values())] for name, found in measured.items()]
    return table(["", *bins], rows)


def main(arguments: list[str]) -> None:
    config = load_config(AccuracyConfig, arguments, about=__doc__)
    pairs = list(tqdm(rendered_pairs(config.pairs, config.seed), total=config.pairs, desc="rendering"))
    noises = {"exact": {}, f"{config.noise:g} px": {"pixels": config.noise}}
    noises[f"{100 * config.pose_noise:g} %"] = {"share": config.pose_noise}
    conditions = {
        f"{pose} pose, {noise}": Condition(pose == "same", **off)
        for pose in ("same", "other")
        for noise, off in noises.items()
    }
    rules, transforms = methods()
    results: dict[str, dict[str, Measured]] = {}
    for condition, about in conditions.items():
        works = tqdm((rules | transforms).items(), desc=condition)
        results[condition] = {name: measure(pairs, method, about, config.seed + 1) for name, method in works}
    middle = f"other pose, {config.noise:g} px"
    parts = [
        f"{config.pairs} pairs; median error in px / mean IoU. Keypoints (transform: procrustes):",
        overview(list(rules), results),
        "Transforms, exact masks:",
        overview(list(transforms), results),
        f"By scale and by rotation, {middle}:",
        by_bins({name: results[middle][name] for name in rules}, pairs),
        f"Temporal smoothing, {config.clips} clips of 30 frames, {middle}, keypoints exhaustive: median error, and "
        "median change of the error from frame to frame, px:",
        measure_smoothing(config),
    ]
    text, output = "\n\n".join(parts), output_folder(config.output)
    print(text)
    with complete_file(output / "table.md") as part:
        part.write_text(text + "\n", encoding="utf-8")
    numbers = {condition: {name: m.row() for name, m in found.items()} for condition, found in results.items()}
    write_json(output / "results.json", {"config": config_dict(config), "results": numbers})


if __name__ == "__main__":
    run_command(main)
