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
from models.config import SHIPPED_MODEL
from tpc import CalibrationConfig

PARTS = ("machine", "inference", "training", "loading", "growth", "processes")


@dataclass
class SpeedConfig:
    size: str = "tiny"  # of networks with random weights
    model: str | None = None  # pipeline folder to measure in their place
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"])  # in training bfloat16 is autocast
    # In place of those of `size`:
    frames: int | None = None
    side: int | None = None
    steps: int | None = None
    batch: int | None = None
    clip_frames: int | None = None
    persons: list[int] = field(default_factory=lambda: [1, 2])  # of runs with TPC
    guidance_scale: float = 3.5
    # Of training that loads rendered people:
    vae: str = str(SHIPPED_MODEL / "vae")
    batch_size: int = 16
    workers: list[int] = field(default_factory=lambda: [0, 1])
    loading_steps: int = 10
    clips: int = 6  # animated in every number of `processes`
    processes: list[int] = field(default_factory=lambda: [1, 2])
    threads: int = 0  # of a CPU; 0: torch's choice
    repeats: int = 3
    device: str = "auto"
    output: str = "outputs/speed"
    tpc: CalibrationConfig = field(default_factory=CalibrationConfig)

    def check(self) -> None:
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
        given = {name: getattr(self, name) for name in ("frames", "side", "steps", "batch", "clip_frames")}
        return chosen_sizes(self.size, **given)

    def run_size(self) -> RunSize:
        sizes = self.sizes()
        return RunSize(sizes.frames, sizes.side, sizes.steps, self.guidance_scale)


def pipeline_of(config: SpeedConfig, dtype: str):
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
    return measure_growth(pipeline_of(config, dtype), config.run_size(), config.tpc)


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
    if threads:
        torch.set_num_threads(threads)
    return {name: measured.numbers() for name, measured in function(*arguments).items()}
