"""Lines of a training run in TensorBoard, and curves drawn from them.

    python -m training.logs runs=[runs/vae,runs/stage1,runs/stage2] output=curve.png

One panel a run: its loss, smoothed, over optimiser steps; the wall-clock time is in the title. The lines:

loss                      weighted, the mean over all samples since the last line
loss_by_timestep/000-099  mean squared error without weight, by noise level
learning_rate, grad_norm (before clipping), samples_per_second (without validation and saving), skipped_steps
broken_clips              clips that turned out to be damaged and were left out, by the main process's loaders
peak_memory_gib           of the main process: on its GPU, or its resident set without one
reference/...             how references lie to their targets: relative angle and box IoU, means and histograms
"""

from pathlib import Path

import numpy as np

from core.config import load_config
from core.errors import UserError, run_command
from core.files import complete_file
from training.config import CurvesConfig


def read_scalar(run: str | Path, scalar: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Steps, values, and minutes from the first to the last value of one run's logs."""
    # Here, not above: training itself neither reads logs nor draws.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = Path(run) / "logs"
    if not logs.is_dir():
        raise UserError(f"runs={run} has no logs; give output folders of train.py or training/vae.py")
    events = EventAccumulator(str(logs))
    events.Reload()
    if scalar not in events.Tags()["scalars"]:
        known = ", ".join(events.Tags()["scalars"]) or "none yet"
        raise UserError(f"scalar={scalar} is not in {logs}; there are {known}")
    points = events.Scalars(scalar)
    minutes = (points[-1].wall_time - points[0].wall_time) / 60
    return np.array([p.step for p in points]), np.array([p.value for p in points]), minutes


def main(arguments: list[str]) -> None:
    config = load_config(CurvesConfig, arguments, about=__doc__)
    if not config.runs:
        raise UserError("runs= is required: output folders of training runs")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(config.runs), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, run in zip(np.atleast_1d(figure.subplots(1, len(config.runs))), config.runs, strict=True):
        steps, values, minutes = read_scalar(run, config.scalar)
        width = min(config.smoothing, len(values))
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(steps, values, color="0.8", linewidth=0.8)
        axes.plot(steps[width - 1 :], smooth, color="tab:blue")
        axes.set(title=f"{Path(run).name}: {minutes:.0f} minutes", xlabel="step", ylabel=config.scalar, yscale="log")
    with complete_file(config.output) as path:
        figure.savefig(path, dpi=100)


if __name__ == "__main__":
    run_command(main)
