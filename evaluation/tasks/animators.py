"""Table 1 of the TPC paper on the clips of the misalignment benchmark: animators without and with TPC.

    python evaluate.py animators [models=[FOLDER,FOLDER,...]] [names=[A,B,...]] [output=outputs/animators]
        [kinds=[aligned,rotation]] [clips=4] [seeds=[0,1]] [attachments=[add,replace]] [sampling.steps=10]
        [key=value ...]
    accelerate launch evaluate.py animators ...                    # clips divided among processes

Every clip of the frozen manifests (see `evaluate.py misalignment`) is animated by every model without TPC and with
each attachment, from the same noise. "original" are the clips whose reference is aligned, "misaligned" the mean over
the other kinds. Writes results.json, table.md, table.tex and strips.png. A run that was stopped goes on with the same
command; more seeds or clips can be added.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from core.config import save_config
from core.errors import UserError
from core.files import complete_file
from core.processes import process_state
from evaluation.animators_report import COLUMNS, animators_table, kinds_table, subsets_of
from evaluation.benchmark_clips import BenchmarkClips
from evaluation.benchmark_measures import MeasuresConfig, open_measures
from evaluation.benchmark_report import Values, read_values, table_numbers, trial_numbers
from evaluation.metric_suite import MetricSuite
from evaluation.misaligned_clips import KINDS
from evaluation.report import common_facts, heading, latex, markdown, write_results
from evaluation.trials import Condition, Trial, run_task
from inference.animate import SamplingConfig, animate
from inference.comparison import labelled_row
from models.animators.registry import PIPELINES, SMALL_ANIMATORS, choose_device, load_pipeline, read_index
from tpc import CalibrationConfig
from tpc.config import ATTACHMENTS

LABELS = {"add": "TPC", "replace": "TPC (replace)"}


@dataclass
class AnimatorsConfig(MeasuresConfig):
    """Which models are compared on what.

    output: folder for the results.
    models: pipeline folders; without, the four small ones that are shipped.
    names: of the models in the table; without, those of their classes.
    attachments: how TPC is attached: "add" gives calibrated tokens beside the reference's, "replace" in their place.
    kinds: of clips; clips: of each kind, the first ones, 0: all.
    strips: whether strips.png shows the last frame of the first clip of each kind.
    """

    output: str = "outputs/animators"
    models: list[str] = field(default_factory=lambda: [str(folder) for folder in SMALL_ANIMATORS])
    names: list[str] | None = None
    attachments: list[str] = field(default_factory=lambda: ["add", "replace"])
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    clips: int = 0
    seeds: list[int] = field(default_factory=lambda: list(range(5)))
    strips: bool = True
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(steps=15, guidance_scale=1.0))
    tpc: CalibrationConfig = field(default_factory=CalibrationConfig)


def model_names(config: AnimatorsConfig) -> list[str]:
    """Names of the models in the table.

    Raises:
        UserError: no model, a folder that is no pipeline, or names that do not tell the models apart.
    """
    names = config.names or [PIPELINES[kind].animator_cls.__name__ for kind in map(pipeline_class, config.models)]
    if not config.models or len(names) != len(config.models) or max(Counter(names).values()) > 1:
        raise UserError(f"names={names} must be different names, one for each of models={config.models}")
    return names


def pipeline_class(model: str) -> str:
    """Name of the pipeline class in a folder."""
    kind = read_index(Path(model)).get("_class_name")
    if kind not in PIPELINES:
        raise UserError(f"models={model} is a {kind}; the pipelines known here are {', '.join(PIPELINES)}")
    return kind


def conditions_of(config: AnimatorsConfig) -> dict[str, Condition]:
    """Conditions by label: every model without TPC, and with each attachment.

    Raises:
        UserError: see `model_names`; an attachment that is not known, or named twice.
    """
    attachments = config.attachments
    if len(set(attachments)) < len(attachments) or not set(attachments) <= set(ATTACHMENTS):
        raise UserError(f"attachments={attachments} must be different ones of {', '.join(ATTACHMENTS)}")
    found = {}
    for number, (name, model) in enumerate(zip(model_names(config), config.models, strict=True)):
        found[name] = Condition(f"model{number}-without", model, None)
        for attach in attachments:
            tpc = replace(config.tpc, attach=attach)
            found[f"{name} + {LABELS[attach]}"] = Condition(f"model{number}-{attach}", model, tpc)
    return found


def run(config: AnimatorsConfig) -> None:
    config.sampling.check()
    conditions = conditions_of(config)
    clips = BenchmarkClips(config.kinds, config.clips)
    state = process_state(config.device)
    device, _ = choose_device(config.device, "float32", state.local_process_index)
    metric_suite = open_measures(config, device)

    def write(folders: dict[Trial, Path], output: Path) -> None:
        kinds = {kind: [name for name in clips.names if clips.kind_of[name] == kind] for kind in config.kinds}
        values = read_values(folders, kinds, clips.fitting, config.seeds)
        _write(config, metric_suite, values, {label: c.name for label, c in conditions.items()}, output)
        if config.strips:
            _draw_strips(config, clips, [names[0] for names in kinds.values()], conditions, output)

    chosen = list(conditions.values())
    run_task("animators", config, chosen, clips.names, clips.clip, metric_suite, state, write, clips.stamps)


def _write(
    config: AnimatorsConfig, metric_suite: MetricSuite, values: Values, conditions: dict[str, str], output: Path
) -> None:
    each = len(next(iter(values.kinds.values())))
    counts = {subset: each * len(kinds) for subset, kinds in subsets_of(config.kinds).items()}
    counted = ", ".join(f"{count} {subset}" for subset, count in counts.items())
    caption = f"{counted} clips; mean and deviation over {len(config.seeds)} seeds"
    table = animators_table(values, conditions, caption)
    by_kind = {measure: kinds_table(values, conditions, measure) for measure in COLUMNS}
    text = heading(metric_suite, caption) + "\n".join(map(markdown, [table, *by_kind.values()]))
    results = common_facts(config, metric_suite) | {
        "counts": counts | {"seeds": len(config.seeds)},
        "results": table_numbers(table),
        "kinds": {measure: table_numbers(table) for measure, table in by_kind.items()},
        "trials": trial_numbers(values),
    }
    save_config(config, output / "config.yaml")
    write_results(output, results, {"table.md": text, "table.tex": latex(table)})
    print(text, end="")


def _draw_strips(
    config: AnimatorsConfig,
    clips: BenchmarkClips,
    names: list[str],
    conditions: dict[str, Condition],
    output: Path,
) -> None:
    """The last frame of some clips: a row a clip, a column a condition."""
    settings = replace(config.sampling, seed=config.seeds[0], compare=False)
    rows: dict[str, dict[str, np.ndarray]] = {name: {} for name in names}
    place, kind = choose_device(config.device, config.dtype)
    for model in config.models:
        pipeline = load_pipeline(model, kind).to(place)
        pipeline.set_progress_bar_config(disable=True)
        for name in names:
            clip = clips.clip(name)
            for label, condition in conditions.items():
                if condition.model == model:
                    tpc = condition.tpc
                    shown = animate(pipeline, clip.reference, clip.driving, settings, tpc, show_progress=False)
                    truth, _ = clip.truth(shown.result.shape[2:0:-1])
                    rows[name] |= {"reference": shown.reference, "truth": truth[-1]} if not rows[name] else {}
                    rows[name][label] = shown.result[-1]
    strips = [
        labelled_row(list(row.values()), list(row) if number == 0 else None, 192)
        for number, row in enumerate(rows.values())
    ]
    with complete_file(output / "strips.png") as path:
        Image.fromarray(np.concatenate(strips)).save(path)
