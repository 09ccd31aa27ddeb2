"""What accelerations that change the result cost in quality, and what they save, on the misalignment benchmark.

    python -m benchmarks.accelerations [clips=5] [seeds=[0]] [kinds=[aligned,rotation]] [output=outputs/accelerations]
        [families=[guidance,broadcast,merging,ddim,dpm++,unipc]] [few_steps=[4,6,10]] [model=FOLDER] [key=value ...]
    accelerate launch -m benchmarks.accelerations ...                # clips divided among processes

Every clip is animated with TPC as `sampling` and `tpc` say, and again with one acceleration at a time, from the same
noise. Writes results.json, table.md, tradeoff.png (and .pdf) and strips.png. A run that was stopped goes on with the
same command; more seeds, clips, kinds, families or numbers of steps can be added. Seconds are medians over clips and
mean little on a machine that does other things as well; operations are counted, for the first clip.
"""

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.accelerations.cost import Cost, costs_by_condition, count_operations
from benchmarks.accelerations.report import kinds_table, summary_table, trade_offs
from benchmarks.accelerations.settings import FAMILIES, Setting, settings_of
from core.config import load_config, save_config
from core.errors import UserError, run_command
from core.files import complete_file
from core.processes import process_state
from evaluation.benchmark_clips import BenchmarkClips
from evaluation.benchmark_measures import MeasuresConfig, open_measures
from evaluation.benchmark_report import Values, read_values, table_numbers, trial_numbers
from evaluation.clips import EvaluationClip
from evaluation.metric_suite import MetricSuite
from evaluation.plots import draw_scatter
from evaluation.report import common_facts, heading, markdown, write_results
from evaluation.trials import Condition, Trial, run_task
from inference.animate import Animation, SamplingConfig, Stopwatch, animate
from inference.comparison import labelled_row
from models.acceleration import AccelerationConfig
from models.animators.registry import SHIPPED_MODEL, choose_device
from models.pipeline import AnimationPipeline
from tpc import CalibrationConfig

LAST_FRAME = "last.png"
STRIP_COLUMNS, CELL = 6, 160


@dataclass
class AccelerationsConfig(MeasuresConfig):
    """What is measured.

    output: folder for the results; model: pipeline folder.
    kinds: of clips; clips: of each kind, the first ones, 0: all.
    families: of accelerations; few_steps: numbers of steps that each solver is tried with.
    lpips: also ST-LPIPS, which `python -m metrics.weights` fetches.
    """

    output: str = "outputs/accelerations"
    model: str = str(SHIPPED_MODEL)
    kinds: list[str] = field(default_factory=lambda: ["aligned", "rotation"])
    clips: int = 5
    seeds: list[int] = field(default_factory=lambda: [0])
    families: list[str] = field(default_factory=lambda: list(FAMILIES))
    few_steps: list[int] = field(default_factory=lambda: [4, 6, 10])
    lpips: bool = True
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    tpc: CalibrationConfig = field(default_factory=CalibrationConfig)


def sampler(
    settings: dict[str, Setting],
    counted: tuple[str, int],
    pipeline: AnimationPipeline,
    clip: EvaluationClip,
    sampling: SamplingConfig,
    trial: Trial,
    folder: Path,
) -> Animation:
    """Animate as the trial's setting says, with its cost and its last frame beside the measurements.

    Args:
        settings: by the names of conditions.
        counted: clip and seed whose operations are counted, in a run of its own that takes no part in the seconds.
    """
    setting, watch = settings[trial.condition.name], Stopwatch()
    wanted = replace(sampling, steps=setting.steps, acceleration=setting.acceleration)
    run = partial(animate, pipeline, clip.reference, clip.driving, wanted, trial.condition.tpc, show_progress=False)
    # Counted first: what a process does once is not in the seconds then.
    operations = count_operations(run) if (trial.clip, trial.seed) == counted else None
    animation = run(watch=watch)
    Cost(watch.seconds["sampling with TPC"], operations, animation.attention_cache_bytes).write(folder)
    Image.fromarray(animation.result[-1]).save(folder / LAST_FRAME)
    return animation


def main(arguments: list[str]) -> None:
    config = load_config(AccelerationsConfig, arguments)
    config.sampling.check()
    if config.sampling.acceleration != AccelerationConfig():
        raise UserError("sampling.acceleration is what this benchmark chooses itself; give families=")
    settings = settings_of(config.sampling.steps, config.few_steps, config.families)
    conditions = [Condition(setting.name, config.model, config.tpc) for setting in settings]
    clips = BenchmarkClips(config.kinds, config.clips)
    state = process_state(config.device)
    device, _ = choose_device(config.device, "float32", state.local_process_index)
    metric_suite = open_measures(config, device)
    counted = clips.names[0], next(iter(config.seeds), 0)

    def write(folders: dict[Trial, Path], output: Path) -> None:
        kinds = {kind: [name for name in clips.names if clips.kind_of[name] == kind] for kind in config.kinds}
        values, costs = read_values(folders, kinds, clips.fitting, config.seeds), costs_by_condition(folders)
        _write(config, metric_suite, values, settings, costs, output)
        _draw_strips(clips, [names[0] for names in kinds.values()], settings, folders, config.seeds[0], output)

    run_task(
        "accelerations",
        config,
        conditions,
        clips.names,
        clips.clip,
        metric_suite,
        state,
        write,
        clips.stamps,
        sampler=partial(sampler, {setting.name: setting for setting in settings}, counted),
    )


def _write(
    config: AccelerationsConfig,
    metric_suite: MetricSuite,
    values: Values,
    settings: list[Setting],
    costs: dict[str, Cost],
    output: Path,
) -> None:
    count = len(next(iter(values.kinds.values())))
    caption = (
        f"{count} clips of each kind ({', '.join(values.kinds)}); mean over them, mean and deviation over "
        f"{len(config.seeds)} seeds; the first row is absolute, the others are changes against it"
    )
    tables = summary_table(values, settings, costs, caption), kinds_table(values, settings)
    text = heading(metric_suite, caption) + "\n".join(map(markdown, tables))
    results = common_facts(config, metric_suite) | {
        "counts": {kind: len(names) for kind, names in values.kinds.items()} | {"seeds": len(config.seeds)},
        "settings": {setting.label: asdict(setting) for setting in settings},
        "results": table_numbers(tables[0]),
        "kinds": table_numbers(tables[1]),
        "trials": trial_numbers(values),
    }
    save_config(config, output / "config.yaml")
    points = trade_offs(values, settings, costs)
    if points:
        axes = "operations (% of the run without acceleration)", "change of PSNR (dB)"
        draw_scatter(output / "tradeoff.png", points, *axes, note="PSNR of the person")
    write_results(output, results, {"table.md": text})
    print(text, end="")


def _draw_strips(
    clips: BenchmarkClips,
    names: list[str],
    settings: list[Setting],
    folders: dict[Trial, Path],
    seed: int,
    output: Path,
) -> None:
    """The last frame of some clips with every setting, beside the reference and the truth."""
    places = {(trial.clip, trial.condition.name): folder for trial, folder in folders.items() if trial.seed == seed}
    rows = []
    for name in names:
        shown = {s.label: np.asarray(Image.open(places[name, s.name] / LAST_FRAME)) for s in settings}
        clip = clips.clip(name)
        truth, _ = clip.truth(next(iter(shown.values())).shape[1::-1])
        cells = list(({"reference": clip.reference.image, "truth": truth[-1]} | shown).items())
        for start in range(0, len(cells), STRIP_COLUMNS):
            part = cells[start : start + STRIP_COLUMNS]
            rows.append(labelled_row([image for _, image in part], [label for label, _ in part], CELL))
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    with complete_file(output / "strips.png") as path:
        Image.fromarray(np.concatenate(padded)).save(path)


if __name__ == "__main__":
    run_command(main)
