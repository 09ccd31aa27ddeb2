"""Training curves from TensorBoard logs.

    python -m training.curves runs=[runs/vae,runs/stage1,runs/stage2] output=curve.png

One panel a run: its loss, smoothed, over optimiser steps; the wall-clock time is in the title.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.config import load_config
from core.errors import UserError, run_command
from core.files import complete_file


@dataclass
class CurvesConfig:
    """runs: output folders of training runs; output: image; scalar: what is plotted; smoothing: points averaged."""

    runs: list[str] = field(default_factory=list)
    output: str = "curve.png"
    scalar: str = "loss"
    smoothing: int = 9


def read_scalar(run: str | Path, scalar: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Steps, values, and minutes from the first to the last value of one run's logs."""
    logs = Path(run) / "logs"
    if not logs.is_dir():
        raise UserError(f"runs={run} has no logs; give output folders of train.py or training/vae.py")
    events = EventAccumulator(str(logs))
    events.Reload()
    if scalar not in events.Tags()["scalars"]:
        raise UserError(f"scalar={scalar} is not in {logs}; there are {', '.join(events.Tags()['scalars'])}")
    points = events.Scalars(scalar)
    minutes = (points[-1].wall_time - points[0].wall_time) / 60
    return np.array([p.step for p in points]), np.array([p.value for p in points]), minutes


def main(arguments: list[str]) -> None:
    config = load_config(CurvesConfig, arguments)
    if not config.runs:
        raise UserError("runs= is required: output folders of training runs")
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
