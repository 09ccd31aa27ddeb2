"""`evaluate.py ablation`: transforms, propagation and keypoint subsets compared, by region (Table 2)."""

from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from core.errors import UserError
from evaluation.clips import ClipsConfig, open_clips
from evaluation.measure import Number
from evaluation.metric_suite import MetricSuite, ProtocolConfig
from evaluation.report import Table, better, measure_label, measure_numbers, over_seeds, with_best, write_table
from evaluation.trials import WITHOUT, Trial, TrialsConfig, Variant, numbers_by_seed, run_task
from models.animators.registry import SHIPPED_MODEL
from tpc.config import resolve


@dataclass
class AblationConfig(ClipsConfig, TrialsConfig, ProtocolConfig):
    """Every transform with every propagation and every choice of keypoints, and a run without TPC.

    output: folder for the results; model: pipeline folder.
    transforms: procrustes, affine, linear.
    propagations: "off" (each frame its own image), "hold" (the group's first), or the number of groups M of
        iterative propagation, 0 = groups of four frames.
    subsets: rules that choose keypoints: exhaustive, consensus, all, trunk, torso, face.
    attachments: add calibrated images to the reference, or replace it by them.
    """

    output: str = "outputs/ablation"
    model: str = str(SHIPPED_MODEL)
    features: str = "stand-in"
    measures: list[str] | None = field(default_factory=lambda: ["psnr", "ssim", "flicker", "vgg_frechet_video"])
    transforms: list[str] = field(default_factory=lambda: ["linear", "affine", "procrustes"])
    propagations: list[str] = field(default_factory=lambda: ["off", "hold", "2", "4", "8"])
    subsets: list[str] = field(default_factory=lambda: ["exhaustive", "all"])
    attachments: list[str] = field(default_factory=lambda: ["add"])

    def check(self) -> None:
        for base in (ClipsConfig, TrialsConfig, ProtocolConfig):
            base.check(self)


def run(config: AblationConfig) -> None:
    """Write results.json, table.md and table.tex."""
    variants, clips = ablation_variants(config), open_clips(config)

    def write(folders: dict[Trial, Path], metric_suite: MetricSuite, output: Path) -> None:
        runs = {
            label: numbers_by_seed(folders, metric_suite, config.seeds, lambda trial, v=variant: trial.variant == v)
            for label, variant in variants.items()
        }
        _write(config, metric_suite, runs, len(clips.names), output)

    run_task("ablation", config, config, ("foreground", "background"), list(variants.values()), clips, write)


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


def _write(
    config: AblationConfig,
    metric_suite: MetricSuite,
    runs: dict[str, list[dict[str, Number]]],
    clips: int,
    output: Path,
) -> None:
    names = [name for name, _, _ in metric_suite.measured_names()]
    cells = [[over_seeds([run[name].value for run in by_seed]) for name in names] for by_seed in runs.values()]
    cells = with_best(cells, [better(name) for name in names])
    table = Table(
        "calibration",
        tuple(map(measure_label, names)),
        tuple((label, tuple(row)) for label, row in zip(runs, cells, strict=True)),
        f"Ablation of the calibration: {clips} clips, mean and deviation over {len(config.seeds)} seeds.",
    )
    results = {
        "counts": {"clips": clips, "seeds": len(config.seeds), "conditions": len(runs)},
        "results": {label: measure_numbers(by_seed, config.seeds) for label, by_seed in runs.items()},
    }
    warnings = ((name, number.warning) for by_seed in runs.values() for run in by_seed for name, number in run.items())
    write_table(config, metric_suite, table, results, warnings, output)
