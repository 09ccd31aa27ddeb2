"""How the cost of a run grows with frames, persons, resolution and processes."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.speed.inference import RunSize, measure_inference
from benchmarks.speed.measuring import Measured
from core.errors import UserError
from data.inputs import SAMPLES
from models.pipeline import AnimationPipeline
from tpc import CalibrationConfig

ROOT = Path(__file__).parents[2]


def measure_growth(
    pipeline: AnimationPipeline, size: RunSize, preset: CalibrationConfig, repeats: int
) -> dict[str, dict[str, Measured]]:
    """Runs with TPC of one person, at one, two and four times the frames and three resolutions, and of up to four
    persons. More frames than a window are denoised in windows of `size.frames`."""
    sizes = {
        "frames": {f"{size.frames * times}": replace(size, frames=size.frames * times) for times in (1, 2, 4)},
        "side": {f"{size.side * share // 4}": replace(size, side=size.side * share // 4) for share in (2, 4, 6)},
    }
    found = {
        what: {
            name: measure_inference(pipeline, replace(run, window=size.frames), [1], preset, repeats)["TPC, 1 person"]
            for name, run in runs.items()
        }
        for what, runs in sizes.items()
    }
    persons = measure_inference(pipeline, size, [1, 2, 3, 4], preset, repeats)
    found["persons"] = {name.split()[1] if name.startswith("TPC") else "0": value for name, value in persons.items()}
    return found


def measure_processes(processes: list[int], clips: int, steps: int) -> dict[str, Measured]:
    """A list of clips animated by `infer.py` in one and in several processes of one thread each.

    Returns:
        By "<n> processes"; facts: clips_per_minute, while clips are animated and with everything that starting takes.
    """
    return {f"{number} processes": _animate_list(number, clips, steps) for number in processes}


def _animate_list(processes: int, clips: int, steps: int) -> Measured:
    with TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs.jsonl"
        names = {"reference": str(SAMPLES / "rendered.png"), "driving": str(SAMPLES / "dance.mp4")}
        lines = [json.dumps(names | {"output": f"{folder}/{number}"}) for number in range(clips)]
        pairs.write_text("\n".join(lines))
        # accelerate calls several processes of one machine "multi_gpu", on CPUs too.
        kind = ["--multi_gpu"] if processes > 1 else ["--cpu"]
        command = [str(Path(sys.executable).parent / "accelerate"), "launch", *kind, "--num_processes", str(processes)]
        command += [
            "infer.py",
            f"pairs={pairs}",
            f"output={folder}",
            f"steps={steps}",
            "num_frames=8",
            "compare=false",
        ]
        started = time.perf_counter()
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        taken = time.perf_counter() - started
        if done.returncode:
            raise UserError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
        written = [(Path(folder) / str(number) / "result.json").stat().st_mtime_ns / 1e9 for number in range(clips)]
    # Clips that follow the first round of the processes are free of start-up.
    written.sort()
    later = written[-1] - written[processes - 1]
    measured = Measured([taken])
    measured.facts["clips_per_minute"] = 60 * (clips - processes) / later
    measured.facts["clips_per_minute_with_start"] = 60 * clips / taken
    return measured
