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

import math
import resource
import sys
import time
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from core.config import load_config
from core.errors import UserError, run_command
from core.files import complete_file
from tpc.augmentation import misalignment
from training.objective import StepLoss

BUCKETS = 10
MISALIGNMENT = ("reference/relative_angle_deg", "reference/box_iou")
POINTING = ("attention/loss", "attention/pointing_accuracy")


@dataclass
class StepLog:
    """Values since the last line of the log, on one process."""

    timesteps: int  # of the noise schedule
    losses: list[Tensor] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    misaligned: list[Tensor] = field(default_factory=list)
    pointing: list[Tensor] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    seconds: float = 0.0  # spent on training since the last line
    started: float = field(default_factory=time.perf_counter)

    def resume_clock(self) -> None:
        self.started = time.perf_counter()

    def stop_clock(self) -> None:
        self.seconds += time.perf_counter() - self.started

    def add(self, result: StepLoss, batch: dict[str, Tensor]) -> None:
        self.losses.append(result.loss.detach().float())
        self.samples.append(torch.stack([result.timesteps.float(), result.errors.float()], dim=1))
        if result.pointing is not None:
            self.pointing.append(result.pointing[None].float())
        measures = misalignment(batch)
        columns = [measures["relative_angle_deg"].flatten(), measures["box_iou"].flatten()]
        self.misaligned.append(torch.stack(columns, dim=1).float())

    def write(self, accelerator: Accelerator, step: int, clips: int, values: dict[str, float]) -> float:
        """Mean loss, nan when no step was finite, of the line written to the log; every process must call it.

        `clips` counts those of all processes since the last line; `values` are further scalars.
        """
        losses, samples, misaligned, pointing = (
            accelerator.gather(torch.cat(part)) if part else None
            for part in ([loss[None] for loss in self.losses], self.samples, self.misaligned, self.pointing)
        )
        mean = math.nan if losses is None else losses.mean().item()
        scalars = {"loss": mean, "peak_memory_gib": peak_memory() / 2**30, **values}
        if self.seconds > 0:
            scalars["samples_per_second"] = clips / self.seconds
        if self.norms:
            scalars["grad_norm"] = float(np.mean(self.norms))
        if pointing is not None:
            scalars |= dict(zip(POINTING, pointing.nanmean(dim=0).tolist(), strict=True))
        if samples is not None:
            scalars |= loss_by_timestep(samples[:, 0], samples[:, 1], self.timesteps)
            # Angles and IoUs that cannot be measured are nan and do not count.
            scalars |= dict(zip(MISALIGNMENT, misaligned.nanmean(dim=0).tolist(), strict=True))
            if accelerator.is_main_process:
                add_histograms(accelerator.get_tracker("tensorboard").writer, misaligned, step)
        accelerator.log({name: value for name, value in scalars.items() if math.isfinite(value)}, step=step)
        for part in (self.losses, self.samples, self.misaligned, self.pointing, self.norms):
            part.clear()
        self.seconds = 0.0
        self.resume_clock()
        return mean


def loss_by_timestep(timesteps: Tensor, errors: Tensor, count: int, buckets: int = BUCKETS) -> dict[str, float]:
    """Mean error of each range of timesteps that occurs; `count` is the schedule's length, inputs are (n,)."""
    bucket = (timesteps.long() * buckets) // count
    width = len(str(count - 1))
    found = {}
    for index in bucket.unique().tolist():
        first, last = math.ceil(index * count / buckets), math.ceil((index + 1) * count / buckets) - 1
        found[f"loss_by_timestep/{first:0{width}d}-{last:0{width}d}"] = errors[bucket == index].mean().item()
    return found


def add_histograms(writer: SummaryWriter, misaligned: Tensor, step: int) -> None:
    """Distributions of relative angle and box IoU, (n, 2)."""
    for name, column in zip(("relative_angle_deg", "box_iou"), misaligned.T, strict=True):
        known = column[torch.isfinite(column)]
        if len(known):
            writer.add_histogram(f"reference/{name}_distribution", known.cpu(), step)


def add_clip(writer: SummaryWriter, tag: str, frames: list[np.ndarray], fps: float, step: int) -> None:
    """Log a clip of (h, w, 3) uint8 frames as a GIF, which TensorBoard plays."""
    # The writer's own `add_video` needs a package that nothing else here does.
    height, width = frames[0].shape[:2]
    images = [Image.fromarray(frame) for frame in frames]
    encoded = BytesIO()
    images[0].save(
        encoded, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0, optimize=False
    )
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded.getvalue())
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def peak_memory() -> int:
    """Greatest memory of this process in bytes: allocated on its GPU, or resident without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class CurvesConfig:
    """`python -m training.logs`."""

    runs: list[str] = field(default_factory=list)  # output folders of training runs
    output: str = "curve.png"
    scalar: str = "loss"  # what is plotted
    smoothing: int = 9  # points averaged


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
        raise UserError(f"scalar={scalar} is not in {logs}; there are {', '.join(events.Tags()['scalars'])}")
    points = events.Scalars(scalar)
    minutes = (points[-1].wall_time - points[0].wall_time) / 60
    return np.array([p.step for p in points]), np.array([p.value for p in points]), minutes


def main(arguments: list[str]) -> None:
    config = load_config(CurvesConfig, arguments)
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
