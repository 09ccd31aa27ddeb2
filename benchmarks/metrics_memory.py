"""Memory that an evaluation needs beside its networks, for any number of frames.

    python -m benchmarks.metrics_memory [frames=10000] [side=64] [output=memory.json]

Clips of noise, with random projections in place of the networks. Prints the growth of the process's peak.
"""

from benchmarks.config import MemoryConfig
from core.config import check_first

check_first(__name__, MemoryConfig, __doc__)


import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed.peers.driver_protocol import resident_peak
from core.config import load_config
from core.errors import run_command
from core.files import write_json
from core.processes import process_state
from evaluation.measure import FramePair, measure_clip, summarise
from evaluation.metric_suite import MetricSuite
from evaluation.report import run_parts
from metrics.features import FeatureExtractor, image_tensor
from metrics.protocols import PROTOCOLS

DIMENSIONS = {"fid": 2048, "fid_vid": 2048, "fvd": 400}
MIB = 2**20


def projection(dimension: int, windows: bool) -> FeatureExtractor:
    """A random linear map of small images, of frames or of the mean of a window."""
    matrix = torch.randn(3 * 16 * 16, dimension, generator=torch.Generator().manual_seed(dimension)) / 28

    def prepare(frames: np.ndarray) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(image_tensor(frames), 16).flatten(1) / 255

    def extract(rows: Tensor) -> Tensor:
        return (rows.mean(dim=1) if windows else rows) @ matrix

    return FeatureExtractor("random projection", dimension, "", prepare, extract)


def noise_pairs(count: int, side: int, seed: int) -> Iterator[FramePair]:
    """A clip of noise and the same with more noise."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        truth = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        yield FramePair(truth ^ rng.integers(0, 64, truth.shape, dtype=np.uint8), truth)


def main(arguments: list[str]) -> None:
    config = load_config(MemoryConfig, arguments, about=__doc__)
    extractors = {name: projection(dimension, name != "fid") for name, dimension in DIMENSIONS.items()}
    measures = ("mae", "psnr", "ssim", *DIMENSIONS)
    suite = MetricSuite(PROTOCOLS["native"], measures, ("",), extractors=extractors, batch_size=16)
    frames_of_clip = config.frames // config.clips
    before, started = resident_peak(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:

        def work(name: str, part: Path) -> None:
            measure_clip(noise_pairs(frames_of_clip, config.side, int(name)), suite, part)

        folders = run_parts([str(k) for k in range(config.clips)], work, Path(folder), process_state("cpu"), "clips")
        measuring = resident_peak()
        numbers = summarise(folders, suite)
        stored = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    results = {
        "frames": frames_of_clip * config.clips,
        "growth_while_measuring_mib": round((measuring - before) / MIB),
        "growth_in_all_mib": round((resident_peak() - before) / MIB),
        "parts_on_disk_mib": round(stored / MIB),
        "seconds": round(time.perf_counter() - started),
        "samples": {name: number.samples for name, number in numbers.items()},
    }
    for name, value in results.items():
        print(f"{name}: {value}")
    if config.output:
        write_json(config.output, results)


if __name__ == "__main__":
    run_command(main)
