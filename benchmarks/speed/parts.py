"""The parts of the measurement and their settings; each part is a function that a process of its own runs."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.config import SpeedConfig
from benchmarks.speed.inference import RunSize, measure_growth, measure_inference, measure_processes
from benchmarks.speed.measuring import Measured, chosen_dtype, matrix_rate
from benchmarks.speed.sizes import SpeedSizes, chosen_sizes, open_pipeline
from benchmarks.speed.training import (
    TrainingStep,
    measure_loading,
    measure_rendering,
    measure_training,
    noise_batch,
)
from core.processes import choose_device
from training.config import TrainConfig


def sizes_of(config: SpeedConfig) -> SpeedSizes:
    given = {name: getattr(config, name) for name in ("frames", "side", "steps", "batch", "clip_frames")}
    return chosen_sizes(config.size, **given)


def run_size_of(config: SpeedConfig) -> RunSize:
    sizes = sizes_of(config)
    return RunSize(sizes.frames, (sizes.side, sizes.side), sizes.steps, config.guidance_scale)


def pipeline_of(config: SpeedConfig, dtype: str):
    device = torch.device(choose_device(config.device, dtype)[0])
    return open_pipeline(config.model, sizes_of(config), device, chosen_dtype(dtype))


def machine(config: SpeedConfig) -> dict[str, Measured]:
    device = torch.device(choose_device(config.device, "float32")[0])
    rates = {name: matrix_rate(device, chosen_dtype(name)) for name in config.dtypes}
    return {name: Measured([1.0], facts={"gflop_per_second": rate / 1e9}) for name, rate in rates.items()}


def inference(config: SpeedConfig, dtype: str) -> dict[str, Measured]:
    return measure_inference(
        pipeline_of(config, dtype), run_size_of(config), config.persons, config.tpc, config.repeats
    )


def training(config: SpeedConfig, stage: str, dtype: str) -> dict[str, Measured]:
    sizes = sizes_of(config)
    clips, frames = (sizes.batch, 1) if stage == "image" else (1, sizes.clip_frames)
    pipeline = pipeline_of(config, "float32")
    batch = noise_batch(clips, frames, (sizes.side, sizes.side), pipeline.device)
    step = TrainingStep(pipeline, TrainConfig(stage, output=""), batch)
    half = torch.bfloat16 if dtype == "bfloat16" else None
    return {f"stage={stage}": measure_training(step, half, config.repeats)}


def loading(config: SpeedConfig) -> dict[str, Measured]:
    found = {"drawing people": measure_rendering(128, 20)}
    return found | measure_loading(config.vae, config.workers, config.batch_size, config.loading_steps)


def growth(config: SpeedConfig, dtype: str) -> dict[str, Measured]:
    return measure_growth(pipeline_of(config, dtype), run_size_of(config), config.tpc)


def works(config: SpeedConfig) -> dict[str, tuple]:
    """Function and arguments of each part that is measured, by name."""
    sizes = sizes_of(config)
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
