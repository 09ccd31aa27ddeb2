"""What needs no animator: calibration, rendering of people, and metrics."""

import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.speed.measuring import Measured, peak_memory
from benchmarks.speed.scene import make_scene
from data.clips.rendered import RenderedPeople
from evaluation.measure import FramePair, measure_clip
from evaluation.metric_suite import MetricSuite
from metrics.protocols import PROTOCOLS
from tpc import CalibrationConfig

CPU = torch.device("cpu")


def measure_calibration(frames: int, side: int, repeats: int) -> dict[str, Measured]:
    """Calibration of a clip with poses and masks given, images painted, by preset and number of persons."""
    found = {}
    for persons in (1, 2):
        scene = make_scene(persons, frames, side)
        for name, config in (
            ("best", CalibrationConfig()),
            ("trunk keypoints", CalibrationConfig(keypoints="trunk")),
            ("paper", CalibrationConfig(preset="paper")),
        ):
            measured = Measured()
            with peak_memory(CPU) as peak:
                for _ in range(repeats):
                    started = time.perf_counter()
                    calibration = scene.calibration(config)
                    for member in np.unique(calibration.member[calibration.member >= 0]):
                        calibration.images[member]  # painted when it is asked for
                    measured.seconds.append(time.perf_counter() - started)
                measured.peak_bytes = peak()
            measured.facts["frames_per_second"] = frames / measured.typical
            found[f"{name}, {persons} person{'s' * (persons > 1)}"] = measured
    return found


def measure_rendering(side: int, clips: int) -> Measured:
    """Training clips of two images (reference and frame), with poses and masks, drawn by this process alone."""
    dataset = RenderedPeople(size=(side, side), num_frames=1, stride=1, seed=0, split="train", length=clips + 1)
    dataset[clips]
    measured = Measured()
    for clip in range(clips):
        started = time.perf_counter()
        dataset[clip]
        measured.seconds.append(time.perf_counter() - started)
    measured.facts["images_per_second"] = 2 / measured.typical
    return measured


def measure_metrics(frames: int, side: int) -> dict[str, Measured]:
    """Each measure without networks on a clip of noise, its files written."""
    suite = MetricSuite(PROTOCOLS["native"], ("mae", "psnr", "ssim"), ("",))
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 256, (frames, side, side, 3), dtype=np.uint8)
    noisy = truth ^ rng.integers(0, 64, truth.shape, dtype=np.uint8)
    found = {}
    for name in suite.measures:
        measured = Measured()
        with TemporaryDirectory() as folder, peak_memory(CPU) as peak:
            started = time.perf_counter()
            pairs = (FramePair(*pair) for pair in zip(noisy, truth, strict=True))
            measure_clip(pairs, replace(suite, measures=(name,)), Path(folder))
            measured.seconds, measured.peak_bytes = [time.perf_counter() - started], peak()
        measured.facts["frames_per_second"] = frames / measured.typical
        found[name] = measured
    return found
