"""Time and memory of calibration, and what the exhaustive search gives up for its speed.

    python -m benchmarks.calibration_speed [pairs=40] [frames=93] [long_frames=2000] [video_seconds=60]

Everything runs on one core. Times are process times, of searches the best of three. A 0 leaves a part out.
"""

from benchmarks.config import CalibrationSpeedConfig
from core.config import check_first

check_first(__name__, CalibrationSpeedConfig, __doc__)


import resource
import subprocess
import sys
import tempfile
import time

import cv2
import numpy as np

from benchmarks.calibration_pairs import SIZE, rendered_pairs
from benchmarks.speed.peers.driver_protocol import resident_peak
from core.config import load_config
from core.errors import run_command
from data.config import SAMPLES
from data.poses.poses import Poses
from data.video.files import read_video, write_video
from tpc import CalibrationConfig, calibrate
from tpc.procrustes import SimilarityTransform
from tpc.silhouettes import BITMAP_SIDE, NUM_SAMPLES, ReferenceSilhouette, silhouette_from_mask, silhouette_iou
from tpc.subsets import SearchLimits, select_exhaustive

REPEATS = 3
SUBSETS = 130_918  # of 17 keypoints, with at least three each


def search_times(config: CalibrationSpeedConfig) -> None:
    """Time a frame of the search, its loss against scoring every subset, and a plain numpy search."""
    quick, every, losses, naive = [], [], [], []
    for index, pair in enumerate(rendered_pairs(config.pairs, config.seed)):
        reference = ReferenceSilhouette.of(silhouette_from_mask(pair.reference.mask, NUM_SAMPLES))
        source, target = pair.reference.keypoints, pair.other_pose.keypoints
        outline = silhouette_from_mask(pair.other_pose.mask, max_side=BITMAP_SIDE)
        search = source, target, np.ones(17), reference, outline, SIZE
        found = {}
        for outright, times in ((False, quick), (True, every)):
            seconds = []
            for _ in range(REPEATS):
                start = time.process_time()
                found[outright] = select_exhaustive(*search, limits=SearchLimits(), outright=outright)
                seconds.append(time.process_time() - start)
            times.append(1e3 * min(seconds))
        losses.append(found[True].iou - found[False].iou)
        if index < 3:
            # A plain loop over a part of the subsets, extrapolated to all.
            weights = (np.random.default_rng(0).random((400, 17)) < 0.5).astype(float)
            weights = weights[weights.sum(1) >= 3]
            start = time.process_time()
            for matrix in SimilarityTransform.from_estimate(source, target, weights).matrix:
                silhouette_iou(matrix, reference, outline, SIZE)
            naive.append((time.process_time() - start) / len(weights) * SUBSETS)
    print(f"search over {SUBSETS} subsets of 17 keypoints, {len(quick)} pairs at {SIZE[0]} x {SIZE[1]}")
    print(f"  by pieces first: median {np.median(quick):.1f} ms, 90 % {np.quantile(quick, 0.9):.1f} ms")
    print(f"  every subset scored: median {np.median(every):.0f} ms; plain numpy about {np.mean(naive):.1f} s")
    given = f"mean {np.mean(losses):.5f}, 90 % {np.quantile(losses, 0.9):.5f}, most {np.max(losses):.5f}"
    print(
        f"  IoU of samples given up: {given}; nothing in {100 * (np.array(losses) < 1e-9).mean():.0f} % of the pairs"
    )


def clip_times(config: CalibrationSpeedConfig) -> None:
    """Time and memory of whole clips, poses and masks given."""
    pair = next(rendered_pairs(1, config.seed))
    reference = Poses(pair.reference.keypoints[None, None], pair.reference.scores[None, None], SIZE, 30.0)
    few, many = config.frames, config.long_frames
    for frames, rule, transform in (
        (1, "trunk", "articulated"),  # compiles, or reads what was compiled
        (few, "exhaustive", "procrustes"),
        (few, "trunk", "procrustes"),
        (few, "trunk", "articulated"),
        (many, "trunk", "procrustes"),
    ):
        moved = pair.other_pose.keypoints + np.random.default_rng(0).normal(0, 2, (frames, 1, 17, 2))
        driving = Poses(moved.astype(np.float32), np.tile(pair.other_pose.scores, (frames, 1, 1)), SIZE, 30.0)
        masks = {"reference_masks": pair.reference.mask[None], "driving_masks": [pair.other_pose.mask[None]] * frames}
        start, before = time.process_time(), resident_peak()
        inputs = pair.reference.image, reference, driving, SIZE
        found = calibrate(*inputs, CalibrationConfig(keypoints=rule, transform=transform), **masks)
        estimated = time.process_time() - start
        for member in found.member[: config.frames, 0]:
            if member >= 0:
                found.images[member]  # painted when it is asked for
        painted, grown = time.process_time() - start - estimated, (resident_peak() - before) / 2**20
        print(
            f"clip of {frames} frames, {transform}, {rule}: {estimated:.2f} s, its first {config.frames} calibrated "
            f"images {painted:.2f} s; memory + {grown:.0f} MiB"
        )


def command_cost(seconds: int) -> None:
    """Time and memory of `python -m tpc` on a long video, poses and masks estimated."""
    dance = read_video(SAMPLES / "dance.mp4").frames
    order = [*range(len(dance)), *range(len(dance) - 2, 0, -1)]  # there and back

    def frame(number: int) -> np.ndarray:
        left = int(420 + 200 * np.sin(number / 40))  # a person of two thirds of the height who drifts to and fro
        person = cv2.resize(dance[order[number // 3 % len(order)]], (1080, 1080), interpolation=cv2.INTER_CUBIC)
        return cv2.copyMakeBorder(person, 0, 0, left, 840 - left, cv2.BORDER_CONSTANT, value=(120, 120, 120))

    with tempfile.TemporaryDirectory() as folder:
        write_video(f"{folder}/long.mp4", (frame(number) for number in range(30 * seconds)), 30.0, crf=20)
        inputs = [f"reference={SAMPLES / 'photo.jpg'}", f"driving={folder}/long.mp4", f"output={folder}/out"]
        subprocess.run([sys.executable, "-m", "tpc", *inputs], check=True, capture_output=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"python -m tpc, {seconds} s of 1920 x 1080 pixels: {used.ru_utime + used.ru_stime:.0f} s, "
        f"memory {used.ru_maxrss / 2**10:.0f} MiB"
    )


def main(arguments: list[str]) -> None:
    config = load_config(CalibrationSpeedConfig, arguments, about=__doc__)
    cv2.setNumThreads(1)
    if config.pairs:
        search_times(config)
    if config.frames:
        clip_times(config)
    if config.video_seconds:
        command_cost(config.video_seconds)


if __name__ == "__main__":
    run_command(main)
