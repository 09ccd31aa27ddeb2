"""What misaligned references cost an animator, and what TPC wins back of it.

    python evaluate.py misalignment [model=FOLDER] [output=outputs/misalignment] [kinds=[aligned,rotation]]
        [clips=4] [seeds=[0,1]] [presets=[best]] [sampling.steps=10]
        [variants=["visibility=exclusive","propagation=iterative groups=2"]] [key=value ...]
    accelerate launch evaluate.py misalignment ...                 # clips divided among processes

Every clip of the frozen manifests is animated without TPC and with each preset; and, without TPC, as it would be with
a fitting reference, against which the cost of misalignment is measured. Poses and masks are exact. Writes
results.json, table.md, psnr.png (and .pdf) and strips.png. A run that was stopped goes on with the same command; more
seeds or clips can be added.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from core.config import load_config, save_config
from core.errors import UserError
from core.files import complete_file
from core.processes import process_state
from evaluation.benchmark_clips import BenchmarkClips
from evaluation.benchmark_measures import MeasuresConfig, open_measures
from evaluation.benchmark_report import (
    Values,
    bars,
    measure_table,
    read_values,
    recovered_table,
    table_numbers,
    trial_numbers,
)
from evaluation.metric_suite import MetricSuite
from evaluation.misaligned_clips import KINDS
from evaluation.plots import draw_bars
from evaluation.report import common_facts, heading, markdown, write_results
from evaluation.trials import PERSON_PSNR, PERSON_PSNR_LABEL, WITHOUT, Condition, Trial, all_trials, run_task
from inference.animate import SamplingConfig, animate
from inference.comparison import labelled_row
from models.animators.registry import SHIPPED_MODEL, choose_device, load_pipeline
from tpc import CalibrationConfig
from tpc.config import PRESETS, resolve


@dataclass
class BenchmarkConfig(MeasuresConfig):
    """What is measured.

    output: folder for the results; model: pipeline folder.
    kinds: of clips; clips: of each kind, the first ones, 0: all.
    presets: of TPC, in the order of the tables.
    variants: of TPC beside the presets, each some settings of it such as "propagation=iterative groups=2"; what is not
        said is as in `tpc`.
    strips: clips of each kind that strips.png shows; 0: no image.
    """

    output: str = "outputs/misalignment"
    model: str = str(SHIPPED_MODEL)
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    clips: int = 0
    seeds: list[int] = field(default_factory=lambda: list(range(5)))
    presets: list[str] = field(default_factory=lambda: ["best", "paper", "release"])
    variants: list[str] = field(default_factory=list)
    strips: int = 1
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(steps=15, guidance_scale=1.0))
    tpc: CalibrationConfig = field(default_factory=CalibrationConfig)


def conditions_of(config: BenchmarkConfig) -> dict[str, Condition]:
    """Conditions by label. Settings in `tpc` beside the preset hold for all presets.

    Raises:
        UserError: a preset that is not known, settings that cannot work, or something named twice.
    """
    if len(set(config.presets)) < len(config.presets) or any(preset not in PRESETS for preset in config.presets):
        raise UserError(f"presets={config.presets} must be different ones of {', '.join(PRESETS)}")
    found = {WITHOUT: Condition("without", config.model, None)}
    for preset in config.presets:
        found[f"TPC {preset}"] = Condition(f"tpc-{preset}", config.model, replace(config.tpc, preset=preset))
    if len(set(config.variants)) < len(config.variants):
        raise UserError(f"variants={config.variants} must be different ones")
    for variant in config.variants:
        found[variant] = Condition("variant-" + variant.replace(" ", ","), config.model, _varied(config.tpc, variant))
    return found


def _varied(tpc: CalibrationConfig, variant: str) -> CalibrationConfig:
    """`tpc` with settings like "smoothing=0 min_iou=0.3"."""
    if not (words := variant.split()) or any(word.startswith("-") for word in words):
        raise UserError(f"variants: {variant!r} must be settings of tpc, such as 'smoothing=0 min_iou=0.3'")
    try:
        given = load_config(CalibrationConfig, words)
        varied = replace(tpc, **{name: getattr(given, name) for name, _, _ in (word.partition("=") for word in words)})
        resolve(varied)
    except UserError as error:
        raise UserError(f"variants: {variant!r}: {error}") from None
    return varied


def run(config: BenchmarkConfig) -> None:
    config.sampling.check()
    if config.strips < 0:
        raise UserError(f"strips={config.strips} must not be negative")
    clips = BenchmarkClips(config.kinds, config.clips)
    conditions = conditions_of(config)
    state = process_state(config.device)
    device, _ = choose_device(config.device, "float32", state.local_process_index)
    metric_suite = open_measures(config, device)
    counterparts = [name for clip in clips.names for name in clips.fitting[clip] if name != clip]
    further = all_trials(counterparts, [conditions[WITHOUT]], config.seeds) if counterparts else []

    def write(folders: dict[Trial, Path], output: Path) -> None:
        kinds = {kind: [name for name in clips.names if clips.kind_of[name] == kind] for kind in config.kinds}
        values = read_values(folders, kinds, clips.fitting, config.seeds)
        _write(config, metric_suite, values, {label: c.name for label, c in conditions.items()}, output)
        if config.strips:
            _draw_strips(config, clips, kinds, output)

    every = list(conditions.values())
    run_task("misalignment", config, every, clips.names, clips.clip, metric_suite, state, write, clips.stamps, further)


def _write(
    config: BenchmarkConfig, metric_suite: MetricSuite, values: Values, conditions: dict[str, str], output: Path
) -> None:
    count = len(next(iter(values.kinds.values())))
    caption = f"{count} clips of each kind; mean and deviation over {len(config.seeds)} seeds"
    first = next(iter(values.by_trial.values()))
    tables = [recovered_table(values, conditions, PERSON_PSNR)]
    tables += [measure_table(values, conditions, name, caption) for name in first]
    text = heading(metric_suite, caption) + "\n".join(markdown(table) for table in tables)
    results = common_facts(config, metric_suite) | {
        "counts": {kind: len(names) for kind, names in values.kinds.items()} | {"seeds": len(config.seeds)},
        "tables": {table.corner + " / " + table.caption: table_numbers(table) for table in tables},
        "trials": trial_numbers(values),
    }
    save_config(config, output / "config.yaml")
    groups = [kind.replace("_", "\n") for kind in values.kinds]
    shown = {label: name for label, name in conditions.items() if label not in config.variants}
    draw_bars(output / "psnr.png", groups, bars(values, shown, PERSON_PSNR), PERSON_PSNR_LABEL)
    write_results(output, results, {"table.md": text})
    print(text, end="")


def _draw_strips(config: BenchmarkConfig, clips: BenchmarkClips, kinds: dict[str, list[str]], output: Path) -> None:
    """The last frame of the first clips of each kind, without and with TPC."""
    pipeline = load_pipeline(config.model)
    pipeline.set_progress_bar_config(disable=True)
    settings = replace(config.sampling, seed=config.seeds[0], compare=True)
    tpc = replace(config.tpc, preset=config.presets[0]) if config.presets else None
    rows = []
    for names in kinds.values():
        for name in names[: config.strips]:
            clip = clips.clip(name)
            animation = animate(pipeline, clip.reference, clip.driving, settings, tpc, show_progress=False)
            columns = animation.columns()
            columns["truth"], _ = clip.truth(animation.result.shape[2:0:-1])
            images = [frames[-1] for frames in columns.values()]
            rows.append(labelled_row(images, list(columns) if not rows else None, 192))
    with complete_file(output / "strips.png") as path:
        Image.fromarray(np.concatenate(rows)).save(path)
