"""`evaluate.py ablation`: transforms, propagation and keypoint subsets compared, by region (Table 2)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from core.errors import UserError
from evaluation.clips import open_clips
from evaluation.config import AblationConfig
from evaluation.metric_suite import MetricSuite
from evaluation.report import Table, best_table, comparison_table, measure_numbers, over_seeds, write_table
from evaluation.statistics import Values
from evaluation.trials import WITHOUT, Trial, Variant, numbers_by_seed, run_task, values_by_trial
from tpc.config import resolve

ALL = "all"  # the one kind of clips


def run(config: AblationConfig) -> None:
    """Write results.json, table.md and table.tex."""
    variants, clips = ablation_variants(config), open_clips(config)

    def write(folders: dict[Trial, Path], metric_suite: MetricSuite, output: Path) -> None:
        runs = {
            label: numbers_by_seed(folders, metric_suite, config.seeds, lambda trial, v=variant: trial.variant == v)
            for label, variant in variants.items()
        }
        names = [name for name, _, _ in metric_suite.measured_names()]
        cells = [[over_seeds([run[name].value for run in by_seed]) for name in names] for by_seed in runs.values()]
        counted = f"{len(clips.names)} clips, mean and deviation over {len(config.seeds)} seeds"
        caption = f"Ablation of the calibration: {counted}."
        table = best_table("calibration", [("", name) for name in names], runs, cells, caption)
        results = {
            "counts": {"clips": len(clips.names), "seeds": len(config.seeds), "conditions": len(runs)},
            "results": {label: measure_numbers(by_seed, config.seeds) for label, by_seed in runs.items()},
        }
        numbers = (numbers for by_seed in runs.values() for numbers in by_seed)
        warnings = ((name, number.warning) for run in numbers for name, number in run.items())
        values = Values(values_by_trial(folders), {ALL: clips.names}, {}, config.seeds)
        differences = differences_table(values, variants, metric_suite.names_by_clip())
        results["differences"] = differences.plain()
        write_table(config, metric_suite, table, results, warnings, output, differences)

    run_task("ablation", config, config, ("foreground", "background"), list(variants.values()), clips, write)


def differences_table(values: Values, variants: Mapping[str, Variant], names: Sequence[str]) -> Table:
    """Every condition with TPC compared with the one without, and with the first that has it."""
    with_tpc = [label for label in variants if label != WITHOUT]
    compared = [(label, WITHOUT) for label in with_tpc] + [(label, with_tpc[0]) for label in with_tpc[1:]]
    pairs = [(f"{a} minus {b}", variants[a].name, variants[b].name) for a, b in compared]
    return comparison_table("differences", [("", [ALL], name) for name in names], pairs, values)


def ablation_variants(config: AblationConfig) -> dict[str, Variant]:
    """Variants by label; the first is without TPC."""
    found = {WITHOUT: Variant("without", config.model, None)}
    choices = product(config.transforms, config.subsets, config.propagations, config.attachments)
    for transform, subset, propagation, attach in choices:
        settings, propagated = _propagation(propagation)
        tpc = resolve(replace(config.tpc, transform=transform, keypoints=subset, attach=attach, **settings))
        label = f"{transform}, {subset}, {propagated}"
        name = f"{transform}-{subset}-{propagation}"
        if attach != "add":
            label, name = f"{label}, {attach}", f"{name}-{attach}"
        found[label] = Variant(name, config.model, tpc)
    return found


def _propagation(propagation: str) -> tuple[dict[str, str | int], str]:
    """Settings of TPC and label of one of `propagations`."""
    if propagation in ("off", "hold"):
        return {"propagation": propagation}, "IP off" if propagation == "off" else "held"
    if not propagation.isdecimal():
        raise UserError(f"propagations: {propagation!r} is neither off, hold nor a number of groups")
    label = "IP, groups of 4" if propagation == "0" else f"IP, M = {propagation}"
    return {"propagation": "iterative", "groups": int(propagation)}, label
