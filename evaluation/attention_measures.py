"""Attention of single animations: measured, kept until all are done, then grouped by rows of the table."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import rankdata
from torch import Tensor

from core.files import complete_file, write_json
from data.inputs import Reference
from data.transforms import apply_fit
from evaluation.attention.figures import point_maps, point_maps_row
from evaluation.attention.maps import (
    BACKGROUND,
    PERSON,
    SELF,
    BodyTruth,
    body_points,
    body_truth,
    chance,
    mean_over,
    pck,
    pointing,
    shares,
    token_coverage,
)
from evaluation.clips import EvaluationClip
from evaluation.statistics import Interval, statistic_interval
from evaluation.trials import WITH, WITHOUT, Sampler, Trial
from inference.animate import Animation, animate, framing
from inference.config import SamplingConfig
from models.attention.maps import RecordedAttention
from models.attention.recording import AttentionConfig, AttentionRecording
from models.pipeline import AnimationPipeline
from tpc import Calibration
from tpc.silhouettes import draw_silhouettes
from tpc.warping import Framing

ATTENTION_FILE, FIGURE_FILE = "attention.json", "looks.png"
CALIBRATED = "calibrated images"
# Measure -> header of its column. Shares are of all attention, the rest is about what reference and calibrated images
# get of it.
ATTENTION_MEASURES = {
    "strongest": "pointing accuracy, maximum ↑",
    "centroid": "pointing accuracy, centroid ↑",
    "near": "attention within radius ↑",
    "chance": "accuracy by chance",
    "entropy": "entropy (nats)",
    "drift": "drift a step (body heights) ↓",
    SELF: "share of self",
    PERSON: "share of reference person",
    BACKGROUND: "share of reference background",
    CALIBRATED: "share of calibrated images",
}
BY_DISTANCE = ("strongest", "centroid")
ATTENTION_SUBSETS = ("aligned", "misaligned")
FEWEST_POINTS = 3  # that a correlation is computed of
GAIN = "gain with TPC"


@dataclass(frozen=True)
class MeasuredAttention:
    """The attention of one animation; means over frames and keypoints."""

    layers: tuple[str, ...]
    steps: dict[str, np.ndarray]  # measure -> (layers, steps), NaN where there is nothing; drift is of the step after
    # "strongest" and "centroid" -> (radii,) share of the distances that are at most each radius, mean over layers
    pck: dict[str, np.ndarray]
    # Name -> pointing accuracy of the maximum, mean over layers, steps and frames; None: never visible
    keypoints: dict[str, float | None]

    def mean(self, measure: str) -> float | None:
        """Mean over layers and steps."""
        values = self.steps[measure]
        return None if np.isnan(values).all() else float(np.nanmean(values))

    def write(self, path: Path) -> None:
        def plain(values: np.ndarray) -> Any:
            return np.where(np.isnan(values), None, values.astype(object)).tolist()  # JSON has no NaN

        write_json(
            path,
            {
                "layers": list(self.layers),
                "steps": {name: plain(values) for name, values in self.steps.items()},
                "pck": {name: plain(values) for name, values in self.pck.items()},
                "keypoints": self.keypoints,
            },
        )

    @classmethod
    def read(cls, path: Path) -> "MeasuredAttention":
        content = json.loads(path.read_text(encoding="utf-8"))
        steps, curves = (
            {name: np.array(values, np.float64) for name, values in content[part].items()} for part in ("steps", "pck")
        )
        return cls(tuple(content["layers"]), steps, curves, content["keypoints"])


def attention_sampler(
    layers: Sequence[str] | None, radius: float, radii: Sequence[float], keypoints: Sequence[str], columns: int
) -> Sampler:
    """A sampler that also writes what the attention did.

    Args:
        radius, radii: of accuracy and of the PCK curve, body heights.
        keypoints: for the image; the first that is visible in frame and reference is shown.
        columns: steps in the image.
    """

    def sampler(
        pipeline: AnimationPipeline, clip: EvaluationClip, sampling: SamplingConfig, trial: Trial, folder: Path
    ) -> Animation:
        reference, driving, tpc = clip.reference, clip.driving, trial.variant.tpc
        frame = framing(pipeline, reference, driving, sampling)
        names, points = body_points(driving.poses, frame.frame_map, frame.size)
        with AttentionRecording(AttentionConfig(layers=layers, mean=["heads"]), points, names) as recording:
            animation = animate(pipeline, reference, driving, sampling, tpc, show_progress=False, attention=recording)
        recorded, calibration = recording.result, animation.calibration
        if calibration is not None:
            window = sampling.window_size, sampling.window_overlap
            calibration = pipeline.attended_calibration(calibration, *window, animation.cuts)
        truth = body_truth(recorded, reference.poses, calibration, frame.reference_map)
        mask = reference_person(reference, frame)
        measure_attention(recorded, truth, mask, radius, radii).write(folder / ATTENTION_FILE)
        row = _figure_row(recorded, truth, animation, calibration, keypoints, columns)
        if row is not None:
            with complete_file(folder / FIGURE_FILE) as path:
                Image.fromarray(row).save(path)
        return animation

    return sampler


def reference_person(reference: Reference, frame: Framing) -> np.ndarray:
    """(H, W) bool: the persons in the model's reference image."""
    masks = draw_silhouettes(reference.poses)[0] if reference.masks is None else reference.masks
    mask = masks.any(axis=0).astype(np.uint8) * 255
    return apply_fit(mask, frame.reference_map, frame.size, border="zero") >= 128


def measure_attention(
    recorded: RecordedAttention, truth: BodyTruth, mask: np.ndarray, radius: float, radii: Sequence[float]
) -> MeasuredAttention:
    """Every measure of every layer.

    Args:
        mask: (H, W) bool, the persons in the model's reference image.
    """
    steps: dict[str, list[list[float]]] = {name: [] for name in ATTENTION_MEASURES}
    curves: dict[str, list[np.ndarray]] = {name: [] for name in BY_DISTANCE}
    accuracies = []
    for layer in recorded.layers:
        found = pointing(recorded, truth, layer, radius)
        accuracy = found.accuracy(radius)
        accuracies.append(accuracy[:, :, 0])
        by_chance = chance(recorded, truth, layer, token_coverage(mask, recorded.grid(layer)), radius)[:, :, None]
        parts = shares(recorded, layer, mask)
        calibrated = [value for name, value in parts.items() if name not in (SELF, PERSON, BACKGROUND)]
        drift = found.drift()
        values: dict[str, Tensor] = {
            "strongest": accuracy,
            "centroid": found.accuracy(radius, by="centroid"),
            "near": found.near,
            "chance": torch.where(found.near.isnan(), torch.nan, by_chance.to(found.near)),
            "entropy": found.entropy,
            "drift": torch.cat([drift, drift.new_full((1, *drift.shape[1:]), torch.nan)]),  # no step after the last
            **{name: parts[name] for name in (SELF, PERSON, BACKGROUND)},
            CALIBRATED: torch.stack(calibrated).sum(0) if calibrated else torch.full_like(parts[SELF], torch.nan),
        }
        for name, value in values.items():
            means = [mean_over(at_step) for at_step in value]
            steps[name].append([np.nan if mean is None else mean for mean in means])
        for name in BY_DISTANCE:
            curves[name].append(pck(getattr(found, name), radii))
    by_layer = torch.stack(accuracies)  # (layers, s, f, p)
    return MeasuredAttention(
        recorded.layers,
        {name: np.array(values, np.float64) for name, values in steps.items()},
        {name: np.mean(values, axis=0) for name, values in curves.items()},
        {name: mean_over(by_layer[..., index]) for index, name in enumerate(recorded.names)},
    )


def _figure_row(
    recorded: RecordedAttention,
    truth: BodyTruth,
    animation: Animation,
    calibration: Calibration | None,
    keypoints: Sequence[str],
    columns: int,
) -> np.ndarray | None:
    """A row of Figure 2 from the middle frame; None when no keypoint is visible there and in the reference."""
    frame = len(animation.poses) // 2
    for name in keypoints:
        index = recorded.names.index(name)
        point = recorded.points[frame, index]
        if np.isnan(point).any() or truth.coords[0, frame, index, 0].isnan().any():
            continue
        chosen = np.unique(np.linspace(0, len(recorded.selection.steps) - 1, columns).round().astype(int)).tolist()
        # On the outline much attention goes to the reference's background; the question is where on the body.
        image = int(calibration is not None and calibration.index(0)[frame, 0] >= 0)
        found = point_maps(recorded, truth, animation.reference, calibration, name, frame, chosen, image=image)
        return point_maps_row(found, animation.result[frame], point, name.replace("_", " "), chosen)
    return None


@dataclass(frozen=True)
class Outcome:
    """One trial: its attention, and how well the person came out."""

    attention: MeasuredAttention
    person_psnr: float | None


@dataclass(frozen=True)
class Group:
    """A row of the table: the trials of one subset, without or with TPC, by clip and seed."""

    subset: str  # of `ATTENTION_SUBSETS`
    condition: str  # label of the variant
    outcomes: dict[tuple[str, int], Outcome]
    # The clip that images show: of misaligned clips the one whose reference is turned most, of aligned ones that whose
    # is turned least
    example: str

    @property
    def label(self) -> str:
        return f"{self.subset}, {self.condition}"

    def by_seed(self, seeds: Sequence[int], value: Callable[[Outcome], Any]) -> list[Any]:
        """The mean over clips of `value(outcome)`, for every seed; None where no clip has it."""
        means = []
        for seed in seeds:
            known = [value(outcome) for (_, s), outcome in self.outcomes.items() if s == seed]
            known = [number for number in known if number is not None]
            means.append(np.nanmean(known, axis=0) if known else None)
        return means

    def clip_means(self, value: Callable[[Outcome], float | None]) -> dict[str, float]:
        """The mean over seeds of `value(outcome)`, by clip."""
        found: dict[str, list[float]] = {}
        for (clip, _), outcome in self.outcomes.items():
            if (number := value(outcome)) is not None:
                found.setdefault(clip, []).append(number)
        return {clip: float(np.mean(numbers)) for clip, numbers in found.items()}

    def points(self) -> dict[str, tuple[float, float]]:
        """Clip -> pointing accuracy and PSNR, where both are known."""
        accuracy = self.clip_means(lambda outcome: outcome.attention.mean("strongest"))
        psnr = self.clip_means(lambda outcome: outcome.person_psnr)
        return {clip: (accuracy[clip], psnr[clip]) for clip in sorted(accuracy.keys() & psnr.keys())}


def correlations(groups: list[Group]) -> "dict[str, Correlation]":
    """Correlations over clips of pointing accuracy with the person's PSNR.

    "all", "aligned" and "misaligned" take clips both without and with TPC, "gain with TPC", of all clips and within
    each subset, the differences that TPC makes to a clip, the rest one row of the table each.
    """
    points = {group.label: group.points() for group in groups}
    found: dict[str, list[np.ndarray]] = {"all": []}  # (conditions, 2) of every clip
    gains: dict[str, list[np.ndarray]] = {GAIN: []}
    for subset in ATTENTION_SUBSETS:
        conditions = [points[group.label] for group in groups if group.subset == subset]
        if conditions:
            whole = sorted(set.intersection(*(set(of_condition) for of_condition in conditions)))
            found[subset] = [np.array([of_condition[clip] for of_condition in conditions]) for clip in whole]
            found["all"] += found[subset]
            if {f"{subset}, {condition}" for condition in (WITHOUT, WITH)} <= points.keys():
                before, after = (points[f"{subset}, {condition}"] for condition in (WITHOUT, WITH))
                gains[f"{GAIN}, {subset}"] = [np.subtract([after[clip]], [before[clip]]) for clip in whole]
                gains[GAIN] += gains[f"{GAIN}, {subset}"]
    found |= gains
    found |= {label: [np.array([pair]) for pair in pairs.values()] for label, pairs in points.items()}
    return {name: Correlation.of(rows) for name, rows in found.items()}


@dataclass(frozen=True)
class Correlation:
    """Of points, several of which a clip may have; None where they are too few, or all are alike."""

    pearson: Interval
    spearman: Interval
    points: int

    @classmethod
    def of(cls, clips: Sequence[np.ndarray]) -> "Correlation":
        """Of each clip's points (m, 2), with as many for every clip; bootstrapped over clips."""
        rows = np.array(clips, np.float64)
        points = rows.reshape(-1, 2)
        if len(points) < FEWEST_POINTS or (np.ptp(points, axis=0) == 0).any():
            nothing = Interval(None, None, None, len(clips))
            return cls(nothing, nothing, len(points))

        def pearson(drawn: np.ndarray) -> np.ndarray:
            return _pearson(drawn.reshape(*drawn.shape[:-2], -1, 2))

        def spearman(drawn: np.ndarray) -> np.ndarray:
            return _pearson(rankdata(drawn.reshape(*drawn.shape[:-2], -1, 2), axis=-2))

        by_clip = rows.reshape(len(rows), -1)
        return cls(statistic_interval(pearson, by_clip), statistic_interval(spearman, by_clip), len(points))

    def plain(self) -> dict[str, Any]:
        return {"pearson": self.pearson.plain(), "spearman": self.spearman.plain(), "points": self.points}


def _pearson(points: np.ndarray) -> np.ndarray:
    """(...) of points (..., n, 2); 0, no correlation, where a resample does not vary."""
    apart = points - points.mean(axis=-2, keepdims=True)
    spread = np.sqrt((apart**2).sum(axis=-2).prod(axis=-1))
    return apart.prod(axis=-1).sum(axis=-1) / np.where(spread > 0, spread, np.inf)
