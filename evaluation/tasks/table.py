"""`evaluate.py table`: models without and with TPC on original and misaligned clips (Table 1)."""

from dataclasses import dataclass, field
from pathlib import Path

from core.errors import UserError
from core.processes import process_state
from evaluation.clips import ClipsConfig, ClipSet
from evaluation.filmed import open_clips
from evaluation.metric_suite import MetricSuite, ProtocolConfig, open_instruments
from evaluation.misalignment import ThresholdConfig, classify, misalignment
from evaluation.report import (
    Cell,
    Table,
    measure_label,
    measure_numbers,
    over_seeds,
    with_best,
    write_table,
)
from evaluation.summary import Number
from evaluation.trials import Condition, Trial, TrialsConfig, numbers_by_seed, run_task
from inference.animate import SamplingConfig
from metrics.protocols import MEASURES
from models.animators.registry import SHIPPED_MODEL, choose_device
from tpc import CalibrationConfig

SUBSETS = ("original", "misaligned")


@dataclass
class TableConfig(ClipsConfig, TrialsConfig, ProtocolConfig):
    """Which models are compared, on which clips, by which measures.

    output: folder for the results.
    models: pipeline folders; names: of them in the table, their folders' names without.
    thresholds: what makes a clip misaligned.
    """

    output: str = "outputs/table"
    models: list[str] = field(default_factory=lambda: [str(SHIPPED_MODEL)])
    names: list[str] | None = None
    features: str = "stand-in"
    seeds: list[int] = field(default_factory=lambda: list(range(10)))
    thresholds: ThresholdConfig = field(default_factory=ThresholdConfig)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(steps=15, guidance_scale=1.0))
    tpc: CalibrationConfig = field(default_factory=CalibrationConfig)


def run(config: TableConfig) -> None:
    """Write results.json, table.md and table.tex."""
    config.check()
    config.sampling.check()
    config.thresholds.check()
    conditions = table_conditions(config)
    clips = open_clips(config)
    state = process_state(config.device)
    device, _ = choose_device(config.device, "float32", state.local_process_index)
    metric_suite = open_instruments(config, persons=config.persons, device=device)

    def write(folders: dict[Trial, Path], output: Path) -> None:
        members = _members(config, clips)
        numbers = {
            label: {
                subset: numbers_by_seed(
                    folders,
                    metric_suite,
                    config.seeds,
                    lambda trial, c=condition, names=names: trial.condition == c and trial.clip in names,
                )
                for subset, names in members.items()
            }
            for label, condition in conditions.items()
        }
        _write(config, metric_suite, numbers, members, output)

    chosen = list(conditions.values())
    run_task("table", config, chosen, clips.names, clips.clip, metric_suite, state, write, clips.stamps)


def table_conditions(config: TableConfig) -> dict[str, Condition]:
    """Conditions by label: every model without and with TPC.

    Raises:
        UserError: no model, or names that do not fit them.
    """
    names = config.names or [Path(model).name for model in config.models]
    if not config.models or len(names) != len(config.models) or len(set(names)) < len(names):
        raise UserError(f"names={names} must be different names, one for each of models={config.models}")
    found = {}
    for number, (name, model) in enumerate(zip(names, config.models, strict=True)):
        found[name] = Condition(f"model{number}-without", model, None)
        found[f"{name} + TPC"] = Condition(f"model{number}-with", model, config.tpc)
    return found


def _members(config: TableConfig, clips: ClipSet) -> dict[str, tuple[str, ...]]:
    """Names of the clips of each subset."""
    found: dict[str, list[str]] = {subset: [] for subset in SUBSETS}
    for name in clips.names:
        split = classify(name, misalignment(*clips.poses(name), config.thresholds.score), config.thresholds)
        found[SUBSETS[split.misaligned]].append(name)
    return {subset: tuple(names) for subset, names in found.items()}


def _write(
    config: TableConfig,
    metric_suite: MetricSuite,
    numbers: dict[str, dict[str, list[dict[str, Number]]]],
    members: dict[str, tuple[str, ...]],
    output: Path,
) -> None:
    used = [subset for subset in SUBSETS if members[subset]]
    cells = [
        [_cell(by_subset[subset], measure) for subset in used for measure in metric_suite.measures]
        for by_subset in numbers.values()
    ]
    cells = with_best(cells, [MEASURES[measure].better for _ in used for measure in metric_suite.measures])
    counts = ", ".join(f"{len(members[subset])} {subset}" for subset in SUBSETS)
    caption = f"{counts} clips; mean and deviation over {len(config.seeds)} seeds."
    table = Table(
        "model",
        tuple(f"{subset}: {measure_label(measure)}" for subset in used for measure in metric_suite.measures),
        tuple((label, tuple(row)) for label, row in zip(numbers, cells, strict=True)),
        caption,
    )
    results = {
        "counts": {subset: len(names) for subset, names in members.items()} | {"seeds": len(config.seeds)},
        "subsets": {subset: list(names) for subset, names in members.items()},
        "results": {
            label: {subset: measure_numbers(runs, config.seeds) for subset, runs in by_subset.items()}
            for label, by_subset in numbers.items()
        },
    }
    warnings = (
        (f"{subset} {name}", number.warning)
        for by_subset in numbers.values()
        for subset in used
        for run in by_subset[subset]
        for name, number in run.items()
    )
    write_table(config, metric_suite, table, results, warnings, output)


def _cell(runs: list[dict[str, Number]], measure: str) -> Cell:
    return over_seeds([by_seed[measure].value if measure in by_seed else None for by_seed in runs])
