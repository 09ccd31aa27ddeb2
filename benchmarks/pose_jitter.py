"""What steadying estimated poses over time is worth: rendered people's exact keypoints with an estimator's noise.

    python -m benchmarks.pose_jitter [clips=6] [frames=90]

Images are 512 x 512 pixels. Error is the root mean square distance from the exact keypoints, jitter that of the second
difference over time, at rest in a clip of one pose; lag is how many frames the result is late, fitted to the exact
motion. The One-Euro filter (Casiez, Roussel, Vogel, 2012) runs forwards, as it must while a video is recorded.
"""

from benchmarks.config import JitterConfig
from core.config import check_first

check_first(__name__, JitterConfig, __doc__)


from collections.abc import Callable

import numpy as np

from core.config import load_config
from core.errors import run_command
from data.clips.rendered import RenderedPeople
from data.poses.poses import Poses

SIDE, DRAWN, FPS = 512, 96, 24.0
NOISES = (1.5, 3.5)  # pixels of standard deviation
STRIDES = (1, 3)
SPEED_SHARE, CUTOFF_PER_SPEED, CUTOFF = 0.2, 20.0, 0.7  # of the One-Euro filter; radians a frame, speed in sides


def one_euro(points: np.ndarray) -> np.ndarray:
    """(f, 17, 2) pixels, low-passed the less the faster they move."""
    result, speed = points.copy(), np.zeros(points.shape[1:])
    for t in range(1, len(points)):
        speed += SPEED_SHARE * ((points[t] - points[t - 1]) / SIDE - speed)
        cutoff = CUTOFF + CUTOFF_PER_SPEED * np.linalg.norm(speed, axis=-1, keepdims=True)
        result[t] = result[t - 1] + cutoff / (1 + cutoff) * (points[t] - result[t - 1])
    return result


def smoothed(frames: float | None, fps: float) -> Callable[[np.ndarray], np.ndarray]:
    def run(points: np.ndarray) -> np.ndarray:
        shape = (len(points), 1, 17)
        poses = Poses(points[:, None], np.ones(shape), (SIDE, SIDE), fps).smoothed(frames)
        return poses.keypoints[:, 0].astype(np.float64)

    return run


def rms(values: list[np.ndarray]) -> float:
    """Of distances: vectors (..., 2)."""
    return float(np.sqrt(np.mean([(2 * np.square(value)).mean() for value in values])))


def measure(clips: np.ndarray, noise: float, method: Callable[[np.ndarray], np.ndarray]) -> str:
    rng = np.random.default_rng(0)
    offsets, rest, late = [], [], []
    for exact in clips:
        offset = method(exact + rng.normal(0, noise, exact.shape)) - exact
        motion = np.gradient(exact, axis=0)
        late.append(-(offset * motion).sum() / np.square(motion).sum())
        still = np.broadcast_to(exact[:1], exact.shape)
        rest.append(np.diff(method(still + rng.normal(0, noise, exact.shape)), 2, axis=0))
        offsets.append(offset)
    jitter = rms([np.diff(offset, 2, axis=0) for offset in offsets])
    return f"{rms(offsets):.1f} | {jitter:.1f} | {rms(rest):.1f} | {np.mean(late):+.2f} |"


def main(arguments: list[str]) -> None:
    config = load_config(JitterConfig, arguments, about=__doc__)
    size = (DRAWN, DRAWN)
    people = RenderedPeople(
        size=size, num_frames=config.frames, stride=1, split="heldout", seed=config.seed, length=config.clips
    )
    clips = np.stack([people[k]["keypoints"][..., :2].numpy() for k in range(config.clips)]) * SIDE / DRAWN
    print("| frames a second, noise in px | filter | error, px | jitter, px | at rest, px | lag, frames |")
    print("|---|---|---|---|---|---|")
    for stride in STRIDES:
        fps = FPS / stride
        methods = {
            "none": smoothed(0.0, fps),
            "pose.smoothing=null": smoothed(None, fps),
            "pose.smoothing=2": smoothed(2.0, fps),
            "One-Euro": one_euro,
        }
        for noise in NOISES:
            for name, method in methods.items():
                print(f"| {fps:g}, {noise:g} | {name} | {measure(clips[:, ::stride], noise, method)}")


if __name__ == "__main__":
    run_command(main)
