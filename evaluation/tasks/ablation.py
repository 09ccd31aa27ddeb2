"""`evaluate.py ablation`: what each part of the calibration is worth, in foreground and background (Table 2)."""

from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from core.errors import UserError
from core.processes import process_state
from evaluation.clips import ClipsConfig
from evaluation.filmed import open_clips
from evaluation.metric_suite import MetricSuite, ProtocolConfig, open_instruments
from evaluation.report import (
    Table,
    measure_label,
    measure_numbers,
    over_seeds,
    with_best,
    write_table,
)
from evaluation.summary import Number, measured_names
from evaluation.trials import WITHOUT, Condition, Trial, TrialsConfig, numbers_by_seed, run_task
from inference.animate import SamplingConfig
from metrics.protocols import MEASURES
from models.animators.registry import SHIPPED_MODEL, choose_device
from tpc import CalibrationConfig
from tpc.config import resolve

ABLATION_REGIONS = ("foreground", "background")


@dataclass
class AblationConfig(ClipsConfig, TrialsConfig, ProtocolConfig):
    """Every transform with every propagation and every choice of keypoints, and a run without TPC.

    output: folder for the results; model: pipeline folder.
    transforms: procrustes, affine, linear.
    propagations: "off" (each frame its own image), "hold" (the group's first), or the number of groups M of
        iterative propagation, 0 = groups of four frames.
    subsets: rules that choose keypoints: exhaustive, consensus, all, trunk, torso, face.
    attachments: add calibrated images to the reference, or replace it by them.
    tpc: everything else about the calibration.
    """

    output: str = "outputs/ablation"
    model: str = str(SHIPPED_MODEL)
    features: str = "stand-in"
    measures: list[str] | None = field(default_factory=lambda: ["psnr", "ssim", "flicker", "vgg_frechet_video"])
    transforms: list[str] = field(default_factory=lambda: ["linear", "affine", "procrustes"])
    propagations: list[str] = field(default_factory=lambda: ["off", "hold", "2", "4", "8"])
    subsets: list[str] = field(default_factory=lambda: ["exhaustive", "all"])
    attachments: list[str] = field(default_factory=lambda: ["add"])
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(steps=15, guidance_scale=1.0))
    tpc: CalibrationConfig = field(default_factory=CalibrationConfig)


def run(config: AblationConfig) -> None:
    """Write results.json, table.md and table.tex."""
    config.check()
    config.sampling.check()
    conditions = ablation_conditions(config)
    clips = open_clips(config)
    state = process_state(config.device)
    device, _ = choose_device(config.device, "float32", state.local_process_index)
    metric_suite = open_instruments(config, ABLATION_REGIONS, config.persons, device)

    def write(folders: dict[Trial, Path], output: Path) -> None:
        numbers = {
            label: numbers_by_seed(
                folders, metric_suite, config.seeds, lambda trial, c=condition: trial.condition == c
            )
            for label, condition in conditions.items()
        }
        _write(config, metric_suite, numbers, len(clips.names), output)

    chosen = list(conditions.values())
    run_task("ablation", config, chosen, clips.names, clips.clip, metric_suite, state, write, clips.stamps)


def ablation_conditions(config: AblationConfig) -> dict[str, Condition]:
    """Conditions by label; the first is without TPC.

    Raises:
        UserError: an unknown transform, propagation, rule or attachment.
    """
    found = {WITHOUT: Condition("without", config.model, None)}
    choices = product(config.transforms, config.subsets, config.propagations, config.attachments)
    for transform, subset, propagation, attach in choices:
        settings = {"propagation": propagation}
        if propagation not in ("off", "hold"):
            settings = {"propagation": "iterative", "groups": _groups(propagation)}
        tpc = resolve(replace(config.tpc, transform=transform, keypoints=subset, attach=attach, **settings))
        label = f"{transform}, {subset}, {_propagation_label(propagation)}"
        name = f"{transform}-{subset}-{propagation}"
        if attach != "add":
            label, name = f"{label}, {attach}", f"{name}-{attach}"
        found[label] = Condition(name, config.model, tpc)
    return found


def _groups(propagation: str) -> int:
    if not propagation.isdecimal():
        raise UserError(f"propagations: {propagation!r} is neither off, hold nor a number of groups")
    return int(propagation)


def _propagation_label(propagation: str) -> str:
    if propagation in ("off", "hold"):
        return f"IP {propagation}" if propagation == "off" else "held"
    return "IP, groups of 4" if propagation == "0" else f"IP, M = {propagation}"


def _write(
    config: AblationConfig,
    metric_suite: MetricSuite,
    numbers: dict[str, list[dict[str, Number]]],
    clips: int,
    output: Path,
) -> None:
    measured = measured_names(metric_suite)
    names = [name for name, _, _ in measured]
    cells = [[over_seeds([by_seed[name].value for by_seed in runs]) for name in names] for runs in numbers.values()]
    cells = with_best(cells, [MEASURES[measure].better for _, _, measure in measured])
    caption = f"Ablation of the calibration: {clips} clips, mean and deviation over {len(config.seeds)} seeds."
    table = Table(
        "calibration",
        tuple(measure_label(name) for name in names),
        tuple((label, tuple(row)) for label, row in zip(numbers, cells, strict=True)),
        caption,
    )
    results = {
        "counts": {"clips": clips, "seeds": len(config.seeds), "conditions": len(numbers)},
        "results": {label: measure_numbers(runs, config.seeds) for label, runs in numbers.items()},
    }
    warnings = ((name, number.warning) for runs in numbers.values() for run in runs for name, number in run.items())
    write_table(config, metric_suite, table, results, warnings, output)
