"""`evaluate.py attention`: where keypoints look in the reference, aligned and misaligned, without and with TPC."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from core.errors import UserError
from core.files import complete_file
from core.processes import process_state
from data.poses.person import COCO_KEYPOINTS
from evaluation.attention.figures import stacked
from evaluation.attention_groups import SUBSETS, Group, Outcome, correlations, paired, psnr_of
from evaluation.attention_trial import (
    ATTENTION_FILE,
    BY_DISTANCE,
    LOOKS_FILE,
    MEASURES,
    MeasuredAttention,
    attention_sampler,
)
from evaluation.clips import ClipsConfig, ClipSet
from evaluation.filmed import open_clips
from evaluation.metric_suite import MetricSuite, ProtocolConfig, open_instruments
from evaluation.misalignment import ThresholdConfig, classify, misalignment
from evaluation.plots import Curve, Panel, draw_panels, draw_scatter
from evaluation.report import Cell, Table, over_seeds, write_table
from evaluation.summary import clip_means
from evaluation.trials import PERSON_PSNR, PERSON_PSNR_LABEL, WITH, WITHOUT, Condition, Trial, TrialsConfig, run_task
from inference.animate import SamplingConfig
from inference.comparison import labelled_row
from models.animators.registry import SHIPPED_MODEL
from tpc import CalibrationConfig


@dataclass
class AttentionTaskConfig(ClipsConfig, TrialsConfig):
    """Where attention points while clips are animated without and with TPC.

    output: folder for the results; model: pipeline folder.
    layers: that are measured, null: all that read the reference.
    radius: within which attention counts as right, in body heights of the person in the image looked at.
    radii: of the PCK curve.
    keypoints: for the image of Figure 2: the first of them that is visible.
    columns: denoising steps in that image.
    thresholds: what makes a clip misaligned.
    """

    output: str = "outputs/attention"
    model: str = str(SHIPPED_MODEL)
    clips: int = 12
    frames: int = 4
    stride: int = 6
    layers: list[str] | None = None
    radius: float = 0.15
    radii: list[float] = field(default_factory=lambda: [0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5])
    keypoints: list[str] = field(default_factory=lambda: ["right_elbow", "left_elbow", "right_knee", "left_knee"])
    columns: int = 5
    thresholds: ThresholdConfig = field(default_factory=ThresholdConfig)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(steps=15, guidance_scale=1.0))
    tpc: CalibrationConfig = field(default_factory=CalibrationConfig)

    def check(self) -> None:
        """Refuse values that cannot work, naming them."""
        super().check()
        self.sampling.check()
        self.thresholds.check()
        if not self.radius > 0 or not self.radii or min(self.radii) < 0:
            raise UserError(f"radius={self.radius} must be positive and radii={self.radii} not negative")
        if self.columns < 1:
            raise UserError(f"columns={self.columns} must be at least 1")
        for name in self.keypoints:
            if name not in COCO_KEYPOINTS:
                raise UserError(f"keypoints: {name!r} is none of {', '.join(COCO_KEYPOINTS)}")


def run(config: AttentionTaskConfig) -> None:
    """Write results.json, table.md, table.tex, trials.csv, looks.png, and pck, denoising, correlation (.png, .pdf)."""
    config.check()
    conditions = [Condition("without", config.model, None), Condition("with", config.model, config.tpc)]
    clips = open_clips(config)
    state = process_state(config.device)
    # The person's PSNR is what pointing is compared with.
    measured = ProtocolConfig(protocol="native", features="none", measures=["psnr"])
    metric_suite = open_instruments(measured, ("foreground", "background"))
    sampler = attention_sampler(config.layers, config.radius, config.radii, config.keypoints, config.columns)

    def write(folders: dict[Trial, Path], output: Path) -> None:
        groups = _groups(config, clips, folders)
        _draw(config, groups, folders, output)
        _write(config, metric_suite, groups, output)

    run_task(
        "attention",
        config,
        conditions,
        clips.names,
        clips.clip,
        metric_suite,
        state,
        write,
        clips.stamps,
        sampler=sampler,
    )


def _groups(config: AttentionTaskConfig, clips: ClipSet, folders: dict[Trial, Path]) -> list[Group]:
    split = {
        name: classify(name, misalignment(*clips.poses(name), config.thresholds.score), config.thresholds)
        for name in clips.names
    }
    # What a group is about shows best in the clip that is the most of its kind.
    order = sorted(clips.names, key=lambda name: split[name].angle_deg or 0.0)
    outcomes = {
        trial: Outcome(MeasuredAttention.read(folder / ATTENTION_FILE), clip_means(folder)[PERSON_PSNR])
        for trial, folder in folders.items()
    }
    found = []
    for subset in SUBSETS:
        for label, condition in ((WITHOUT, "without"), (WITH, "with")):
            members = {
                (trial.clip, trial.seed): outcome
                for trial, outcome in outcomes.items()
                if SUBSETS[split[trial.clip].misaligned] == subset and trial.condition.name == condition
            }
            names = [name for name in order if any(clip == name for clip, _ in members)]
            example = names[-1 if subset == "misaligned" else 0] if names else ""
            found += [Group(subset, label, members, example)] if members else []
    return found


def _draw(config: AttentionTaskConfig, groups: list[Group], folders: dict[Trial, Path], output: Path) -> None:
    draw_panels(
        output / "pck.png",
        [
            Panel(
                [_curve(config, group, config.radii, lambda o, name=name: o.attention.pck[name]) for group in groups],
                f"radius (body heights), {'maximum' if name == 'strongest' else 'centroid'}",
                "keypoints within the radius",
                {config.radius: ""},
            )
            for name in BY_DISTANCE
        ],
    )
    layers = next(iter(groups[0].outcomes.values())).attention.layers
    steps = np.arange(1, config.sampling.steps + 1)
    draw_panels(
        output / "denoising.png",
        [
            Panel([_curve(config, group, x, value) for group in groups], label, "pointing accuracy", {}, ticks)
            for x, value, label, ticks in (
                (steps, _over_layers, "denoising step", np.unique(np.linspace(1, len(steps), 5).round()).tolist()),
                (np.arange(len(layers)), _over_steps, "layer", list(range(len(layers)))),
            )
        ],
    )
    all_clips = correlations(groups)["all"]
    note = "" if all_clips["pearson"] is None else f"Pearson {all_clips['pearson']:.2f}, {all_clips['points']} points"
    points = {group.label: tuple(zip(*paired(group).values(), strict=True)) or ((), ()) for group in groups}
    draw_scatter(output / "correlation.png", points, "pointing accuracy", PERSON_PSNR_LABEL, note)
    rows = _looks(groups, folders)
    if rows:
        with complete_file(output / LOOKS_FILE) as path:
            Image.fromarray(stacked(rows)).save(path)


def _over_layers(outcome: Outcome) -> np.ndarray:
    return _mean(outcome.attention.steps["strongest"], axis=0)


def _over_steps(outcome: Outcome) -> np.ndarray:
    return _mean(outcome.attention.steps["strongest"], axis=1)


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    return np.ma.masked_invalid(values).mean(axis=axis).filled(np.nan)


def _curve(
    config: AttentionTaskConfig, group: Group, x: Sequence[float], value: Callable[[Outcome], np.ndarray]
) -> Curve:
    """Mean and deviation over seeds."""
    runs = np.array([run for run in group.by_seed(config.seeds, value) if run is not None])
    deviation = runs.std(axis=0, ddof=1) if len(runs) > 1 else None
    return Curve(group.label, np.asarray(x, np.float64), runs.mean(axis=0), deviation)


def _looks(groups: list[Group], folders: dict[Trial, Path]) -> list[np.ndarray]:
    """Rows of Figure 2: the example of each subset with the first seed, without and with TPC."""
    by_place = {(trial.clip, trial.condition.name, trial.seed): folder for trial, folder in folders.items()}
    rows = []
    for group in groups:
        seed = next(seed for clip, seed in group.outcomes if clip == group.example)
        path = by_place[group.example, group.condition.split()[0], seed] / LOOKS_FILE
        if path.is_file():
            row = np.asarray(Image.open(path))
            rows.append(labelled_row([row], [group.label], len(row)))
    return rows


def _write(config: AttentionTaskConfig, metric_suite: MetricSuite, groups: list[Group], output: Path) -> None:
    rows, numbers = [], {}
    for group in groups:
        runs = {name: group.by_seed(config.seeds, lambda o, name=name: o.attention.mean(name)) for name in MEASURES}
        runs[PERSON_PSNR] = group.by_seed(config.seeds, psnr_of)
        cells = {name: over_seeds(values) for name, values in runs.items()}
        rows.append((group.label, tuple(cells.values())))
        numbers[group.label] = {name: _plain(cell, runs[name], config.seeds) for name, cell in cells.items()}
    counts = {subset: len({c for g in groups if g.subset == subset for c, _ in g.outcomes}) for subset in SUBSETS}
    shown = ", ".join(f"{count} {subset}" for subset, count in counts.items())
    caption = (
        f"{shown} clips of {config.frames} frames, radius {config.radius:g} body heights; mean and deviation over "
        f"{len(config.seeds)} seeds."
    )
    table = Table("reference", (*MEASURES.values(), "person PSNR (dB) ↑"), tuple(rows), caption)
    found = correlations(groups)
    results = {
        "counts": counts | {"seeds": len(config.seeds), "frames": config.frames},
        "results": numbers,
        "correlation of pointing accuracy with person PSNR": found,
        "layers": list(next(iter(groups[0].outcomes.values())).attention.layers),
        "keypoints": {group.label: _keypoints(group) for group in groups},
    }
    with complete_file(output / "trials.csv") as path:
        path.write_text(_trials_csv(groups), encoding="utf-8")
    write_table(config, metric_suite, table, results, _warnings(found), output)


def _plain(cell: Cell, runs: list[Any], seeds: list[int]) -> dict[str, Any]:
    by_seed = {str(seed): None if run is None else float(run) for seed, run in zip(seeds, runs, strict=True)}
    return {"mean": cell.mean, "deviation": cell.deviation, "by_seed": by_seed}


def _keypoints(group: Group) -> dict[str, float | None]:
    """Pointing accuracy of every keypoint, mean over clips and seeds."""
    known = {name: [] for name in COCO_KEYPOINTS}
    for outcome in group.outcomes.values():
        for name, value in outcome.attention.keypoints.items():
            known[name] += [] if value is None else [value]
    return {name: float(np.mean(values)) if values else None for name, values in known.items()}


def _warnings(found: dict[str, Any]) -> list[tuple[str, str | None]]:
    few = found["all"]["points"]
    text = f"{few} points are too few or too much alike for a correlation" if found["all"]["pearson"] is None else None
    return [("correlation", text)]


def _trials_csv(groups: list[Group]) -> str:
    """Every trial in a row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["clip", "reference", "condition", "seed", *MEASURES, "person_psnr_db"])
    for group in groups:
        for (clip, seed), outcome in group.outcomes.items():
            values = [outcome.attention.mean(name) for name in MEASURES] + [outcome.person_psnr]
            shown = ["" if value is None else f"{value:.6g}" for value in values]
            writer.writerow([clip, group.subset, group.condition, seed, *shown])
    return text.getvalue()
