"""Inference: whole runs without TPC and with TPC for some numbers of persons, in turns; and how their cost grows."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.speed.measuring import Measured, counting, peak_memory, wait_for
from benchmarks.speed.scene import Scene, make_scene
from core.errors import UserError
from data.config import SAMPLES
from models.pipeline import AnimationPipeline
from tpc import Calibration, CalibrationConfig

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class RunSize:
    """A run of frames, denoised in one window where `window` is 0."""

    frames: int
    size: tuple[int, int]  # (width, height) in pixels
    steps: int  # at least 2
    guidance_scale: float  # 1 for none
    window: int = 0
    times: int = 1  # see `make_scene`
    passes: int = 1  # at a time


class StepClock:
    """A pipeline callback that notes when every step ended, in seconds or in whatever else `now` counts."""

    def __init__(self, now: Callable[[], float]):
        self.now = now
        self.marks = [now()]

    def __call__(self, pipeline: Any, step: int, timestep: int, tensors: dict) -> dict:
        self.marks.append(self.now())
        return tensors

    def parts(self) -> dict[str, list[float]]:
        """Amounts by part of the run, up to now."""
        ends = [*self.marks, self.now()]
        taken = [after - before for before, after in zip(ends, ends[1:], strict=False)]
        steps = taken[1:-1]  # without the first one, during which kernels are chosen
        typical = sorted(steps)[len(steps) // 2]
        # The first mark ends encoding (of reference, calibrated images, poses) and a step as long as another one.
        return {"encoding": [max(taken[0] - typical, 0.0)], "step": [typical], "decoding": [taken[-1]]}


def run_once(
    pipeline: AnimationPipeline,
    scene: Scene,
    calibration: Calibration | None,
    size: RunSize,
    clock: StepClock | None,
    output_type: str = "uint8",
) -> Any:
    """Frames of a run in the form of `output_type`."""
    return pipeline(
        scene.reference,
        scene.images,
        calibration,
        num_inference_steps=size.steps,
        guidance_scale=size.guidance_scale,
        window_size=size.window or size.frames,
        window_overlap=(size.window or size.frames) // 6,  # as published: 4 of 24
        generator=torch.Generator().manual_seed(0),
        output_type=output_type,
        callback_on_step_end=clock,
        reference_mask=scene.reference_masks.any(axis=0),
        passes_at_a_time=size.passes,
    ).frames


def measure_inference(
    pipeline: AnimationPipeline, size: RunSize, persons: list[int], preset: CalibrationConfig, repeats: int
) -> dict[str, Measured]:
    """Runs "without TPC" and with "TPC, <n> persons", calibration included, in turns."""

    def scene_of(persons: int) -> Scene:
        return make_scene(persons, size.frames, size.size, size.times)

    scenes = {"without TPC": (scene_of(1), False)}
    for number in persons:
        scenes[f"TPC, {number} person{'s' * (number > 1)}"] = scene_of(number), True
    calibrations: dict[str, Calibration | None] = {}
    found = {name: Measured() for name in scenes}
    for repeat in range(repeats + 1):
        for name, (scene, calibrated) in scenes.items():
            measured, started = found[name], time.perf_counter()
            with peak_memory(pipeline.device) as peak:
                calibration = calibrations[name] = scene.calibration(preset) if calibrated else None
                calibrating = time.perf_counter() - started
                held: list[int] = []  # at most, up to each mark of the clock

                def now(held: list[int] = held, peak: Callable[[], int] = peak) -> float:
                    wait_for(pipeline.device)
                    held.append(peak())
                    return time.perf_counter()

                clock = StepClock(now)
                run_once(pipeline, scene, calibration, size, clock)
                parts = clock.parts()
                measured.facts["step_peak_mib"] = held[-2] >> 20  # the last mark is after decoding
                if repeat == 0:  # the first run also sets things up
                    continue
                measured.seconds.append(time.perf_counter() - started)
                measured.peak_bytes = max(measured.peak_bytes, peak())
            for part, values in {"calibration": [calibrating], **parts}.items():
                measured.parts.setdefault(part, []).extend(values)
    for name, (scene, _) in scenes.items():
        with counting() as counted:
            clock = StepClock(counted)
            run_once(pipeline, scene, calibrations[name], size, clock)
            found[name].operations = counted()
            found[name].facts["step_gflop"] = clock.parts()["step"][0] / 1e9
    return found


def measure_growth(pipeline: AnimationPipeline, size: RunSize, preset: CalibrationConfig) -> dict[str, Measured]:
    """Runs with TPC of one person at several numbers of frames and resolutions, and of up to four persons."""
    found = {}
    width, height = size.size
    # More frames than a window are denoised in windows of `size.frames`.
    runs = {f"frames {size.frames * n}": replace(size, frames=size.frames * n) for n in (1, 2, 4)}
    for share in (2, 4, 6):
        runs[f"side {width * share // 4}"] = replace(size, size=(width * share // 4, height * share // 4))
    for name, run in runs.items():
        taken = measure_inference(pipeline, replace(run, window=size.frames), [1], preset, 1)
        found[name] = taken["TPC, 1 person"]
    for name, measured in measure_inference(pipeline, size, [1, 2, 3, 4], preset, 1).items():
        found[f"persons {name.split()[1] if name.startswith('TPC') else 0}"] = measured
    return found


def measure_processes(processes: list[int], clips: int, steps: int) -> dict[str, Measured]:
    """A list of clips animated by `infer.py` in each number of processes of one thread each."""
    return {f"{number} processes": _animate_list(number, clips, steps) for number in processes}


def _animate_list(processes: int, clips: int, steps: int) -> Measured:
    with TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs.jsonl"
        names = {"reference": str(SAMPLES / "rendered.png"), "driving": str(SAMPLES / "dance.mp4")}
        lines = [json.dumps(names | {"output": f"{folder}/{clip}"}) for clip in range(clips)]
        pairs.write_text("\n".join(lines))
        # accelerate calls several processes of one machine "multi_gpu", on CPUs too.
        kind = ["--multi_gpu"] if processes > 1 else ["--cpu"]
        command = [str(Path(sys.executable).parent / "accelerate"), "launch", *kind, "--num_processes", str(processes)]
        command += ["infer.py", f"pairs={pairs}", f"output={folder}", f"steps={steps}"]
        command += ["num_frames=8", "compare=false"]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=one_thread)
        taken = time.perf_counter() - started
        if done.returncode:
            raise UserError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
        written = sorted((Path(folder) / str(clip) / "result.json").stat().st_mtime_ns / 1e9 for clip in range(clips))
    # Clips that follow the first round of the processes are free of start-up.
    later = written[-1] - written[processes - 1]
    measured = Measured([taken])
    measured.facts["clips_per_minute"] = 60 * (clips - processes) / later
    measured.facts["clips_per_minute_with_start"] = 60 * clips / taken
    return measured
