"""`evaluate.py attention`: where keypoints attend in the reference, aligned and misaligned, without and with TPC."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from core.files import complete_file
from data.config import COCO_KEYPOINTS
from evaluation.attention.figures import stacked
from evaluation.attention_measures import (
    ATTENTION_FILE,
    ATTENTION_MEASURES,
    ATTENTION_SUBSETS,
    BY_DISTANCE,
    FIGURE_FILE,
    Group,
    MeasuredAttention,
    Outcome,
    attention_sampler,
    correlations,
)
from evaluation.clips import PosedClipSet, open_clips
from evaluation.config import AttentionTaskConfig, ProtocolConfig
from evaluation.measure import clip_means
from evaluation.metric_suite import MetricSuite
from evaluation.misalignment import UNSEEN, split_clips
from evaluation.plots import Curve, Panel, draw_panels, draw_scatter
from evaluation.report import DIFFERENCES_NOTE, Table, interval_cell, over_seeds, write_table
from evaluation.trials import PERSON_PSNR, PERSON_PSNR_LABEL, VARIANT_NAMES, Trial, run_task, without_and_with
from inference.comparison import labelled_row
from models.animators.registry import supervised_attention, supervision_words


def run(config: AttentionTaskConfig) -> None:
    """Write results.json, table.md, table.tex, trials.csv, looks.png, and pck, denoising, correlation (.png, .pdf)."""
    variants, clips = without_and_with(config), open_clips(config)
    # The person's PSNR is what pointing is compared with.
    protocol = ProtocolConfig(protocol="native", features="none", measures=["psnr"])
    sampler = attention_sampler(config.layers, config.radius, config.radii, config.keypoints, config.columns)

    def write(folders: dict[Trial, Path], metric_suite: MetricSuite, output: Path) -> None:
        groups = _groups(config, clips, folders)
        _draw(config, groups, folders, output)
        _write(config, metric_suite, groups, len(clips.names), output)

    run_task("attention", config, protocol, ("foreground", "background"), variants, clips, write, sampler=sampler)


def _groups(config: AttentionTaskConfig, clips: PosedClipSet, folders: dict[Trial, Path]) -> list[Group]:
    split = split_clips(clips, config.thresholds)
    order = sorted(clips.names, key=lambda name: split[name].angle_deg or 0.0)
    outcomes = {
        trial: Outcome(MeasuredAttention.read(folder / ATTENTION_FILE), clip_means(folder)[PERSON_PSNR])
        for trial, folder in folders.items()
    }
    found = []
    for misaligned, subset in enumerate(ATTENTION_SUBSETS):
        for label, variant in VARIANT_NAMES.items():
            members = {
                (trial.clip, trial.seed): outcome
                for trial, outcome in outcomes.items()
                if split[trial.clip].misaligned is bool(misaligned) and trial.variant.name == variant
            }
            if members:
                names = [name for name in order if any(clip == name for clip, _ in members)]
                # The subject of a group shows best in the clip that is the most of its kind.
                found.append(Group(subset, label, members, names[-1 if misaligned else 0]))
    return found


def _draw(config: AttentionTaskConfig, groups: list[Group], folders: dict[Trial, Path], output: Path) -> None:
    def panel(x: Sequence[float], value: Callable[[Outcome], np.ndarray], *about) -> Panel:
        return Panel([_curve(config, group, x, value) for group in groups], *about)

    pck = [
        panel(
            config.radii,
            lambda outcome, name=name: outcome.attention.pck[name],
            f"radius (body heights), {'maximum' if name == 'strongest' else 'centroid'}",
            "keypoints within the radius",
            {config.radius: ""},
        )
        for name in BY_DISTANCE
    ]
    draw_panels(output / "pck.png", pck)

    layers = next(iter(groups[0].outcomes.values())).attention.layers
    steps = np.arange(config.sampling.steps)
    step_ticks = np.unique(np.linspace(0, len(steps) - 1, 5).round()).tolist()
    layer_ticks = list(range(len(layers)))
    denoising = [
        panel(steps, lambda outcome: _accuracy(outcome, 0), "denoising step", "pointing accuracy", {}, step_ticks),
        panel(layer_ticks, lambda outcome: _accuracy(outcome, 1), "layer", "pointing accuracy", {}, layer_ticks),
    ]
    draw_panels(output / "denoising.png", denoising)

    all_clips = correlations(groups)["all"]
    pearson = all_clips.pearson.value
    note = "" if pearson is None else f"Pearson {pearson:.2f}, {all_clips.points} points"
    points = {group.label: tuple(zip(*group.points().values(), strict=True)) or ((), ()) for group in groups}
    draw_scatter(output / "correlation.png", points, "pointing accuracy", PERSON_PSNR_LABEL, note)
    rows = _figure_rows(groups, folders)
    if rows:
        with complete_file(output / FIGURE_FILE) as path:
            Image.fromarray(stacked(rows)).save(path)


def _accuracy(outcome: Outcome, axis: int) -> np.ndarray:
    """Pointing accuracy of the maximum, mean over layers (axis 0) or steps (axis 1)."""
    return np.ma.masked_invalid(outcome.attention.steps["strongest"]).mean(axis=axis).filled(np.nan)


def _curve(
    config: AttentionTaskConfig, group: Group, x: Sequence[float], value: Callable[[Outcome], np.ndarray]
) -> Curve:
    """Mean and deviation over seeds."""
    runs = np.array([run for run in group.by_seed(config.seeds, value) if run is not None])
    deviation = runs.std(axis=0, ddof=1) if len(runs) > 1 else None
    return Curve(group.label, np.asarray(x, np.float64), runs.mean(axis=0), deviation)


def _figure_rows(groups: list[Group], folders: dict[Trial, Path]) -> list[np.ndarray]:
    """Rows of Figure 2: the example of each subset with the first seed, without and with TPC."""
    by_key = {(trial.clip, trial.variant.name, trial.seed): folder for trial, folder in folders.items()}
    rows = []
    for group in groups:
        seed = next(seed for clip, seed in group.outcomes if clip == group.example)
        path = by_key[group.example, VARIANT_NAMES[group.condition], seed] / FIGURE_FILE
        if path.is_file():
            row = np.asarray(Image.open(path))
            rows.append(labelled_row([row], [group.label], len(row)))
    return rows


def _write(
    config: AttentionTaskConfig, metric_suite: MetricSuite, groups: list[Group], clips: int, output: Path
) -> None:
    values: dict[str, Callable[[Outcome], float | None]] = {
        name: lambda outcome, name=name: outcome.attention.mean(name) for name in ATTENTION_MEASURES
    }
    values[PERSON_PSNR] = lambda outcome: outcome.person_psnr
    rows, numbers = [], {}
    for group in groups:
        runs = {name: group.by_seed(config.seeds, value) for name, value in values.items()}
        cells = {name: over_seeds(of_seeds) for name, of_seeds in runs.items()}
        rows.append((group.label, tuple(cells.values())))
        by_seed = {name: [v if v is None else float(v) for v in of_seeds] for name, of_seeds in runs.items()}
        numbers[group.label] = {
            name: cell.plain() | {"by_seed": dict(zip(map(str, config.seeds), by_seed[name], strict=True))}
            for name, cell in cells.items()
        }
    counts = {s: len({clip for g in groups if g.subset == s for clip, _ in g.outcomes}) for s in ATTENTION_SUBSETS}
    counts[UNSEEN] = clips - sum(counts.values())
    shown = ", ".join(f"{count} {subset}" for subset, count in counts.items() if count or subset != UNSEEN)
    supervised = supervised_attention(config.model)
    caption = (
        f"{shown} clips of {config.frames} frames, radius {config.radius:g} body heights; mean and deviation over "
        f"{len(config.seeds)} seeds. Attention supervised in training: {supervision_words(supervised)}."
    )
    table = Table("reference", (*ATTENTION_MEASURES.values(), "person PSNR (dB) ↑"), tuple(rows), caption)
    found = correlations(groups)
    results = {
        "counts": counts | {"seeds": len(config.seeds), "frames": config.frames},
        "results": numbers,
        "correlation of pointing accuracy with person PSNR": {name: of.plain() for name, of in found.items()},
        "attention supervised": supervised,
        "layers": list(next(iter(groups[0].outcomes.values())).attention.layers),
        "keypoints": {group.label: _keypoints(group) for group in groups},
    }
    warning = None
    if found["all"].pearson.value is None:
        warning = f"{found['all'].points} points are too few or too much alike for a correlation"
    correlated = [
        (f"{name} ({of.pearson.n} clips, {of.points} points)", (interval_cell(of.pearson), interval_cell(of.spearman)))
        for name, of in found.items()
    ]
    corner = "correlation of pointing accuracy, maximum, with person PSNR"
    compared = Table(corner, ("Pearson", "Spearman"), tuple(correlated), DIFFERENCES_NOTE)
    with complete_file(output / "trials.csv") as path:
        path.write_text(_trials_csv(groups), encoding="utf-8")
    write_table(config, metric_suite, table, results, [("correlation", warning)], output, compared)


def _keypoints(group: Group) -> dict[str, float | None]:
    """Pointing accuracy of every keypoint, mean over clips and seeds."""
    of_outcomes = [outcome.attention.keypoints for outcome in group.outcomes.values()]
    known = {name: [k[name] for k in of_outcomes if k.get(name) is not None] for name in COCO_KEYPOINTS}
    return {name: float(np.mean(values)) if values else None for name, values in known.items()}


def _trials_csv(groups: list[Group]) -> str:
    """Every trial in a row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["clip", "reference", "condition", "seed", *ATTENTION_MEASURES, "person_psnr_db"])
    for group in groups:
        for (clip, seed), outcome in group.outcomes.items():
            values = [outcome.attention.mean(name) for name in ATTENTION_MEASURES] + [outcome.person_psnr]
            shown = ["" if value is None else f"{value:.6g}" for value in values]
            writer.writerow([clip, group.subset, group.condition, seed, *shown])
    return text.getvalue()
