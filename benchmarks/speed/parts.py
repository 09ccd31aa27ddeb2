"""The parts of the measurement and their settings; each part is a function that a process of its own runs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.speed.inference import RunSize, measure_growth, measure_inference, measure_processes
from benchmarks.speed.measuring import Measured, chosen_dtype, matrix_rate
from benchmarks.speed.sizes import SpeedSizes, chosen_sizes, open_pipeline
from benchmarks.speed.training import StepSize, measure_loading, measure_rendering, measure_training
from core.errors import UserError
from core.processes import choose_device
from models.animators.registry import SHIPPED_MODEL
from tpc import CalibrationConfig

PARTS = ("machine", "inference", "training", "loading", "growth", "processes")


@dataclass
class SpeedConfig:
    """What is measured, and how often.

    size: of networks with random weights; model: pipeline folder to measure in their place.
    parts: some of `PARTS`; dtypes: of inference; in training bfloat16 is autocast.
    frames, side, steps, batch, clip_frames: in place of those of `size`.
    persons: of runs with TPC; guidance_scale: 1 halves the time.
    vae, batch_size, workers, loading_steps: of the training that loads rendered people, one run a number of workers.
    clips: animated in every number of `processes`.
    threads: of a CPU, 0: torch's choice.
    """

    size: str = "tiny"
    model: str | None = None
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"])
    frames: int | None = None
    side: int | None = None
    steps: int | None = None
    batch: int | None = None
    clip_frames: int | None = None
    persons: list[int] = field(default_factory=lambda: [1, 2])
    guidance_scale: float = 3.5
    vae: str = str(SHIPPED_MODEL / "vae")
    batch_size: int = 16
    workers: list[int] = field(default_factory=lambda: [0, 1])
    loading_steps: int = 10
    clips: int = 6
    processes: list[int] = field(default_factory=lambda: [1, 2])
    threads: int = 0
    repeats: int = 3
    device: str = "auto"
    output: str = "outputs/speed"
    tpc: CalibrationConfig = field(default_factory=CalibrationConfig)

    def check(self) -> None:
        """Refuse what cannot be measured, naming it."""
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise UserError(f"parts={self.parts} must be some of {', '.join(PARTS)}")
        for name in self.dtypes:
            chosen_dtype(name)
        for name in ("frames", "side", "steps", "batch", "clip_frames", "repeats", "clips", "loading_steps"):
            value = getattr(self, name)
            if value is not None and value < (2 if name in ("steps", "clip_frames") else 1):
                raise UserError(f"{name}={value} is too small")
        if "processes" in self.parts and self.clips <= max(self.processes):
            raise UserError(f"clips={self.clips} must be more than processes={self.processes}")
        self.sizes()

    def sizes(self) -> SpeedSizes:
        """The sizes, with what was given in their place."""
        given = {name: getattr(self, name) for name in ("frames", "side", "steps", "batch", "clip_frames")}
        return chosen_sizes(self.size, **given)

    def run_size(self) -> RunSize:
        """The run of inference."""
        sizes = self.sizes()
        return RunSize(sizes.frames, sizes.side, sizes.steps, self.guidance_scale)


def pipeline_of(config: SpeedConfig, dtype: str):
    """The pipeline that is measured, of a dtype, on the device."""
    device = torch.device(choose_device(config.device, dtype)[0])
    return open_pipeline(config.model, config.sizes(), device, chosen_dtype(dtype))


def machine(config: SpeedConfig) -> dict[str, Measured]:
    device = torch.device(choose_device(config.device, "float32")[0])
    rates = {name: matrix_rate(device, chosen_dtype(name)) for name in config.dtypes}
    return {name: Measured([1.0], facts={"gflop_per_second": rate / 1e9}) for name, rate in rates.items()}


def inference(config: SpeedConfig, dtype: str) -> dict[str, Measured]:
    return measure_inference(pipeline_of(config, dtype), config.run_size(), config.persons, config.tpc, config.repeats)


def training(config: SpeedConfig, stage: str, dtype: str) -> dict[str, Measured]:
    sizes = config.sizes()
    clips, frames = (sizes.batch, 1) if stage == "image" else (1, sizes.clip_frames)
    size = StepSize(stage, clips, frames, sizes.side, mixed=dtype == "bfloat16")
    return {f"stage={stage}": measure_training(pipeline_of(config, "float32"), size, config.repeats)}


def loading(config: SpeedConfig) -> dict[str, Measured]:
    found = {"drawing people": measure_rendering(128, 20)}
    return found | measure_loading(config.vae, config.workers, config.batch_size, config.loading_steps)


def growth(config: SpeedConfig, dtype: str) -> dict[str, Measured]:
    return measure_growth(pipeline_of(config, dtype), config.run_size(), config.tpc, 1)


def works(config: SpeedConfig) -> dict[str, tuple]:
    """Function and arguments of each part that is measured, by name."""
    sizes = config.sizes()
    found: dict[str, tuple] = {"machine": (machine, config)}
    for dtype in config.dtypes:
        found[f"inference {dtype}"] = inference, config, dtype
        for stage in ("image", "motion"):
            found[f"training {stage} {dtype}"] = training, config, stage, dtype
    found["loading"] = loading, config
    found[f"growth {config.dtypes[-1]}"] = growth, config, config.dtypes[-1]
    found["processes"] = measure_processes, config.processes, config.clips, sizes.steps
    return {name: work for name, work in found.items() if name.split()[0] in config.parts}


def run_part(threads: int, function: Callable[..., dict[str, Measured]], *arguments: Any) -> dict[str, dict[str, Any]]:
    """The numbers of a part, measured with so many threads; 0: as many as torch chooses."""
    if threads:
        torch.set_num_threads(threads)
    return {name: measured.numbers() for name, measured in function(*arguments).items()}
