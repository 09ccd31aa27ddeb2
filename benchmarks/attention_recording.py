"""Time that recording reference attention adds to a run, and its memory beside the estimate.

    python -m benchmarks.attention_recording [model=DIR] [frames=16] [steps=10] [repeats=3] [output=recording.json]

Runs with and without recording take turns. Memory is the difference of the peaks of two processes, one without
recording and one with everything of all layers and steps.
"""

from benchmarks.config import RecordingConfig
from core.config import check_first

check_first(__name__, RecordingConfig, __doc__)


import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from benchmarks.speed.measuring import in_turns, timed
from benchmarks.speed.peers.driver_protocol import resident_peak
from core.config import load_config
from core.errors import run_command
from core.files import write_json
from core.processes import choose_device
from models.animators.registry import load_pipeline
from models.attention.recording import AttentionConfig, AttentionRecording
from models.pipeline import AnimationPipeline

KEYPOINTS = 17


def opened(config: RecordingConfig) -> tuple[AnimationPipeline, int]:
    """Pipeline on its device, and the side of its images in pixels."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device, dtype = choose_device(config.device, config.dtype)
    pipeline = load_pipeline(config.model, dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, pipeline.denoising_unet.config.sample_size * pipeline.vae_scale_factor


def animate_noise(pipeline: AnimationPipeline, config: RecordingConfig, recording: AttentionRecording | None) -> None:
    side = pipeline.denoising_unet.config.sample_size * pipeline.vae_scale_factor
    images = np.random.default_rng(0).integers(0, 256, (1 + config.frames, side, side, 3), dtype=np.uint8)
    pipeline(
        images[0],
        images[1:],
        num_inference_steps=config.steps,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        attention=recording,
    )


def measure_time(config: RecordingConfig) -> dict[str, dict[str, float]]:
    """Least time of every kind of run, and by how much it is longer than the one without recording."""
    pipeline, side = opened(config)
    run = pipeline.attention_run(config.frames, (side, side), config.steps)
    finest = max(run.layers, key=lambda layer: run.layers[layer].tokens)
    points = np.random.default_rng(1).uniform(0, side - 1, (config.frames, KEYPOINTS, 2))
    everything = AttentionConfig(mean=["heads"])

    def seconds(make: Callable[[], AttentionRecording] | None) -> float:
        def once() -> None:
            if make is None:
                return animate_noise(pipeline, config, None)
            with make() as recording:
                animate_noise(pipeline, config, recording)

        started = time.process_time()  # which other work on the machine hardly changes
        wall = timed(once, pipeline.device)
        return time.process_time() - started if pipeline.device.type == "cpu" else wall

    kinds = {
        "without": None,
        f"every token of {finest}": lambda: AttentionRecording(AttentionConfig(layers=[finest], mean=["heads"])),
        "17 keypoints of all layers": lambda: AttentionRecording(everything, points),
        "every token of all layers": lambda: AttentionRecording(everything),
    }
    seconds(None)  # the first run also sets things up
    taken = in_turns({kind: lambda make=make: seconds(make) for kind, make in kinds.items()}, config.repeats)
    least = {kind: min(values) for kind, values in taken.items()}
    return {kind: {"seconds": value, "overhead": value / least["without"] - 1} for kind, value in least.items()}


def peak_bytes(config: RecordingConfig, record: bool) -> tuple[int, int]:
    """Peak of this process's memory, and the estimate of what the recording took of it."""
    pipeline, side = opened(config)
    if not record:
        animate_noise(pipeline, config, None)
        return resident_peak(), 0
    with AttentionRecording(AttentionConfig(mean=["heads"])) as recording:
        estimate = recording.estimate(pipeline.attention_run(config.frames, (side, side), config.steps))
        animate_noise(pipeline, config, recording)
    return resident_peak(), estimate.memory_bytes


def measure_memory(config: RecordingConfig) -> dict[str, float]:
    """Growth of the peak by recording everything, and its estimate, in MiB."""
    peaks = []
    for record in (False, True):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            peaks.append(process.submit(peak_bytes, config, record).result())
    return {"growth_mib": (peaks[1][0] - peaks[0][0]) / 2**20, "estimate_mib": peaks[1][1] / 2**20}


def main(arguments: list[str]) -> None:
    config = load_config(RecordingConfig, arguments, about=__doc__)
    # Memory first: a process that a large one starts counts that one's size as its own peak.
    memory = measure_memory(config) if config.memory else None
    results = {"time": measure_time(config), "memory": memory}
    for kind, values in results["time"].items():
        print(f"{kind}: {values['seconds']:.2f} s ({values['overhead']:+.1%})")
    if memory:
        print("memory: {growth_mib:.0f} MiB, estimated {estimate_mib:.0f} MiB".format(**memory))
    if config.output:
        write_json(config.output, results)


if __name__ == "__main__":
    run_command(main)
