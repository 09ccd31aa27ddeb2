"""Inference: whole runs without TPC and with TPC for some numbers of persons, in turns."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.speed.measuring import Measured, counting, peak_memory, wait_for
from benchmarks.speed.scene import Scene, make_scene
from models.pipeline import AnimationPipeline
from tpc import Calibration, CalibrationConfig


@dataclass(frozen=True)
class RunSize:
    """A run: frames, denoised in one window where `window` is 0; side of the images in pixels; denoising steps, at
    least 2; guidance_scale, 1 for none."""

    frames: int
    side: int
    steps: int
    guidance_scale: float
    window: int = 0


class StepClock:
    """A pipeline callback that notes when every step ended, in seconds or in whatever else `now` counts."""

    def __init__(self, now: Callable[[], float]):
        self.now = now
        self.marks = [now()]

    def __call__(self, pipeline: Any, step: int, timestep: int, tensors: dict) -> dict:
        self.marks.append(self.now())
        return tensors

    def parts(self) -> dict[str, list[float]]:
        """Amounts by part of the run, up to now.

        Steps are those after the first one, during which kernels are chosen. What comes before the first step and is
        not as long as another one is encoding: of the reference, of calibrated images, of poses.
        """
        ends = [*self.marks, self.now()]
        taken = [after - before for before, after in zip(ends, ends[1:], strict=False)]
        steps = taken[1:-1]
        typical = sorted(steps)[len(steps) // 2]
        return {"encoding": [max(taken[0] - typical, 0.0)], "step": [typical], "decoding": [taken[-1]]}


def run_once(
    pipeline: AnimationPipeline, scene: Scene, calibration: Calibration | None, size: RunSize, clock: StepClock
) -> None:
    """One whole run."""
    pipeline(
        scene.reference,
        scene.images,
        calibration,
        num_inference_steps=size.steps,
        guidance_scale=size.guidance_scale,
        window_size=size.window or size.frames,
        window_overlap=(size.window or size.frames) // 6,  # as published: 4 of 24
        generator=torch.Generator().manual_seed(0),
        output_type="uint8",
        callback_on_step_end=clock,
        reference_mask=scene.reference_masks.any(axis=0),
    )


def measure_inference(
    pipeline: AnimationPipeline, size: RunSize, persons: list[int], preset: CalibrationConfig, repeats: int
) -> dict[str, Measured]:
    """Runs without TPC and with TPC for each of some numbers of persons, calibration included, in turns.

    Returns:
        By "without TPC" and "TPC, <n> persons".
    """
    scenes = {"without TPC": (make_scene(1, size.frames, size.side), False)}
    for number in persons:
        scenes[f"TPC, {number} person{'s' * (number > 1)}"] = make_scene(number, size.frames, size.side), True
    found = {name: Measured() for name in scenes}
    for repeat in range(repeats + 1):
        for name, (scene, calibrated) in scenes.items():
            measured, started = found[name], time.perf_counter()
            with peak_memory(pipeline.device) as peak:
                calibration = scene.calibration(preset) if calibrated else None
                calibrating = time.perf_counter() - started
                clock = StepClock(lambda: (wait_for(pipeline.device), time.perf_counter())[1])
                run_once(pipeline, scene, calibration, size, clock)
                parts = clock.parts()
                if repeat == 0:  # the first run also sets things up
                    continue
                measured.seconds.append(time.perf_counter() - started)
                measured.peak_bytes = max(measured.peak_bytes, peak())
            for part, values in {"calibration": [calibrating], **parts}.items():
                measured.parts.setdefault(part, []).extend(values)
    for name, (scene, calibrated) in scenes.items():
        count_run(pipeline, scene, scene.calibration(preset) if calibrated else None, size, found[name])
    return found


def count_run(
    pipeline: AnimationPipeline, scene: Scene, calibration: Calibration | None, size: RunSize, measured: Measured
) -> None:
    """Count the operations of a run and of its step."""
    with counting() as counted:
        clock = StepClock(counted)
        run_once(pipeline, scene, calibration, size, clock)
        measured.operations = counted()
        measured.facts["step_gflop"] = clock.parts()["step"][0] / 1e9
