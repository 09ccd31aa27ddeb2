"""What recording reference attention costs: time of a run, and memory beside its estimate.

    python -m benchmarks.attention_recording [model=DIR] [frames=16] [steps=10] [repeats=3] [output=recording.json]

Runs without recording, with every query token of one layer (the finest), with the 17 keypoints of all layers, and with
every token of all layers take turns. On a CPU the processor's time is measured, which other work on the machine hardly
changes. Then one process each runs without recording and with everything of all layers and steps in memory; the
difference of their peaks is what the recording took.
"""

import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from core.config import load_config
from core.errors import run_command
from core.files import write_json
from models.animators.registry import SHIPPED_MODEL, choose_device, load_pipeline
from models.attention.recording import AttentionRecording
from models.attention.run import AttentionConfig
from models.pipeline import AnimationPipeline

KEYPOINTS = 17


@dataclass
class RecordingConfig:
    """model: pipeline folder; frames, steps: of a run; repeats: of every kind of run; threads: of a CPU, 0 = torch's
    choice; memory: measure it too; output: JSON file, null prints only."""

    model: str = str(SHIPPED_MODEL)
    frames: int = 16
    steps: int = 10
    repeats: int = 3
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 1
    memory: bool = True
    output: str | None = None


def opened(config: RecordingConfig) -> AnimationPipeline:
    """The pipeline on its device."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device, dtype = choose_device(config.device, config.dtype)
    pipeline = load_pipeline(config.model, dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def side_of(pipeline: AnimationPipeline) -> int:
    """Pixels of the side of the model's images."""
    return pipeline.denoising_unet.config.sample_size * pipeline.vae_scale_factor


def animate_noise(pipeline: AnimationPipeline, config: RecordingConfig, recording: AttentionRecording | None) -> None:
    """One run with images of noise, without decoding."""
    side, rng = side_of(pipeline), np.random.default_rng(0)
    images = rng.integers(0, 256, (1 + config.frames, side, side, 3), dtype=np.uint8)
    pipeline(
        images[0],
        images[1:],
        num_inference_steps=config.steps,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        attention=recording,
    )


def seconds(pipeline: AnimationPipeline, work: Callable[[], None]) -> float:
    """Time that some work takes: the processor's, or the wall clock's for other devices."""
    if pipeline.device.type == "cpu":
        started = time.process_time()
        work()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def measure_time(config: RecordingConfig) -> dict[str, dict[str, float]]:
    """Least time of every kind of run, and by how much it is longer than the one without recording."""
    pipeline = opened(config)
    side = side_of(pipeline)
    run = pipeline.attention_run(config.frames, (side, side), config.steps)
    finest = max(run.layers, key=lambda layer: run.layers[layer].tokens)
    points = np.random.default_rng(1).uniform(0, side - 1, (config.frames, KEYPOINTS, 2))
    kinds = {
        "without": None,
        f"every token of {finest}": lambda: AttentionRecording(AttentionConfig(layers=[finest], mean=["heads"])),
        "17 keypoints of all layers": lambda: AttentionRecording(AttentionConfig(mean=["heads"]), points),
        "every token of all layers": lambda: AttentionRecording(AttentionConfig(mean=["heads"])),
    }
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}

    def once(make: Callable[[], AttentionRecording] | None) -> None:
        if make is None:
            animate_noise(pipeline, config, None)
            return
        with make() as recording:
            animate_noise(pipeline, config, recording)

    once(None)  # the first run also sets things up
    for _ in range(config.repeats):
        for kind, make in kinds.items():
            taken[kind].append(seconds(pipeline, lambda make=make: once(make)))
    least = {kind: min(values) for kind, values in taken.items()}
    return {kind: {"seconds": value, "overhead": value / least["without"] - 1} for kind, value in least.items()}


def peak_bytes(config: RecordingConfig, record: bool) -> tuple[int, int]:
    """Peak of this process's memory, and what the recording was estimated to take of it."""
    pipeline = opened(config)
    if not record:
        animate_noise(pipeline, config, None)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, 0
    side = side_of(pipeline)
    with AttentionRecording(AttentionConfig(mean=["heads"])) as recording:
        estimate = recording.estimate(pipeline.attention_run(config.frames, (side, side), config.steps))
        animate_noise(pipeline, config, recording)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, estimate.memory_bytes


def measure_memory(config: RecordingConfig) -> dict[str, float]:
    """Growth of the peak by recording everything, and its estimate, in MiB."""
    context = multiprocessing.get_context("spawn")
    peaks = []
    for record in (False, True):
        with ProcessPoolExecutor(1, mp_context=context) as process:
            peaks.append(process.submit(peak_bytes, config, record).result())
    growth = peaks[1][0] - peaks[0][0]
    return {"growth_mib": growth / 2**20, "estimate_mib": peaks[1][1] / 2**20}


def main(arguments: list[str]) -> None:
    config = load_config(RecordingConfig, arguments)
    # Memory first: a process that a large one starts counts that one's size as its own peak.
    memory = measure_memory(config) if config.memory else None
    results = {"time": measure_time(config), "memory": memory}
    for kind, values in results["time"].items():
        print(f"{kind}: {values['seconds']:.2f} s ({values['overhead']:+.1%})")
    if results["memory"]:
        print("memory: {growth_mib:.0f} MiB, estimated {estimate_mib:.0f} MiB".format(**results["memory"]))
    if config.output:
        write_json(config.output, results)


if __name__ == "__main__":
    run_command(main)
