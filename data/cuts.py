"""Cuts of a clip: frames at which its pictures, or everybody's poses, jump further than motion explains."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import cv2
import numpy as np

from core.errors import UserError

LEAST_CHANGE = 1.2  # of pictures, that may be a cut: see `_Picture.change`
SURE_CHANGE = 3.0  # from which on a change need only differ from those right beside it
LEAST_JUMP = 0.15  # of poses, in parts of a person's size: a runner moves by 0.1 a frame
TIMES = 3.0  # what is usual around it, a jump is
AROUND = 12  # frames on either side that a jump is compared with
LATE = 3  # frames after a cut within which an estimator finds people again
FLATNESS = 16.0  # squared grey levels: flat images do not differ
SEEN = 0.3  # score above which a keypoint shows where somebody is


def shots(frames: int, cuts: Sequence[int]) -> list[slice]:
    """The stretches of a clip between its cuts, which are the first frames of shots after the first."""
    return [slice(*pair) for pair in pairwise([0, *cuts, frames])]


def checked_cuts(cuts: Sequence[int], frames: int) -> tuple[int, ...]:
    if list(cuts) != sorted(set(cuts)) or not all(0 < cut < frames for cut in cuts):
        raise UserError(f"cuts={list(cuts)} must be frames in order, above 0 and below the clip's {frames}")
    return tuple(cuts)


class PictureChanges:
    """How much the pictures of a clip change, of which it keeps the last two, small."""

    def __init__(self) -> None:
        self._changes: list[tuple[float, float]] = []  # from the picture before, and from the one before that
        self._last: list[_Picture] = []

    def watch(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The frames (h, w, 3) uint8, as they are."""
        for frame in frames:
            seen = _Picture.of(frame)
            near, far = ([seen.change(other) for other in reversed(self._last)] + [0.0, 0.0])[:2]
            self._changes.append((near, far))
            self._last = [*self._last[-1:], seen]
            yield frame

    def over(self, frames: Iterable[np.ndarray]) -> Self:
        """These changes, after all of the frames."""
        deque(self.watch(frames), maxlen=0)
        return self

    def cuts(self, pose_jumps: Sequence[int] = ()) -> list[int]:
        """First frames of the shots after the first; where poses jump as well, smaller changes of the picture do."""
        near, far = np.array(self._changes).reshape(-1, 2).T
        sure, likely = (
            jumps(near, far, *limits).tolist() for limits in ((LEAST_CHANGE, TIMES, SURE_CHANGE), (0.0, 2.0))
        )
        return sorted({*sure, *(t for t in likely if any(t <= jump <= t + LATE for jump in pose_jumps))})


def pose_jumps(keypoints: np.ndarray, scores: np.ndarray) -> list[int]:
    """Frames at which everybody jumps: keypoints (frames, persons, 17, 2) pixels, scores (frames, persons, 17)."""
    frames = np.flatnonzero((scores > SEEN).any((1, 2)))
    near, far = (_least_step(keypoints[frames], scores[frames] > SEEN, back) for back in (1, 2))
    return frames[jumps(near, far, LEAST_JUMP, TIMES, elapsed=np.diff(frames, prepend=frames[:1]))].tolist()


def jumps(
    near: np.ndarray, far: np.ndarray, least: float, times: float, sure: float = np.inf, elapsed: np.ndarray | int = 1
) -> np.ndarray:
    """Frames at which a clip jumps, from differences (n,) to the frame before and to the one before that.

    A jump is at least `least`, stays (a flash does not), and is `times` what the differences around it let expect, or,
    from `sure` on, those right beside it.
    `elapsed` (n,): frames since the frame before, where some are missing.
    """
    if len(near) < 6:
        return np.zeros(0, int)  # nothing to compare with
    elapsed = np.maximum(elapsed, 1)
    speed = near / elapsed
    beside = np.lib.stride_tricks.sliding_window_view(np.pad(speed, 2), 5)[:, [0, 1, 3, 4]].max(1)
    span = min(2 * AROUND + 1, len(near))
    frames = np.arange(len(near))
    around = np.clip(frames - AROUND, 0, len(near) - span)[:, None] + np.arange(span)
    others = np.where(around == frames[:, None], 0, speed[around])
    # Beside it, or often enough in its neighbourhood: clips of few different frames stand still in between.
    usual = np.maximum(beside, np.minimum(np.sort(others, 1)[:, -3], sure / times))
    strength = np.minimum(np.minimum(near, far), np.append(far[1:], np.inf))
    found = (strength > least * (1 + elapsed) / 2) & (strength > times * usual * elapsed)
    return 3 + np.flatnonzero(found[3:-2])  # a shot has three frames at least


@dataclass(frozen=True)
class _Picture:
    """A picture, small: what it shows by place, in whatever light, and its colours, wherever they are."""

    scene: np.ndarray  # (n, 3) float32, each channel less its mean
    colours: np.ndarray  # (n, 3) float32, each channel in order

    @classmethod
    def of(cls, frame: np.ndarray) -> Self:
        small = cv2.resize(frame, (32, 32), interpolation=cv2.INTER_AREA).reshape(-1, 3).astype(np.float32)
        small -= small.mean(0)
        return cls(small, np.sort(small, axis=0))

    def change(self, other: Self) -> float:
        """Geometric mean of two differences: light changes colours, motion changes places, and another shot both.

        In roots of grey levels: below 1 in most motion, 3 to 13 between unrelated pictures.
        """
        light = np.clip(np.std(self.scene) / max(np.std(other.scene), 1), 0.25, 4)
        a, b = self.scene, other.scene * light
        variance = (np.mean(a**2) + np.mean(b**2)) / 2
        places = max(0.0, variance - np.mean(a * b)) / (variance + FLATNESS)  # about 1 where nothing is alike
        return float(np.sqrt(places * np.abs(self.colours - other.colours * light).mean()))


def _least_step(keypoints: np.ndarray, seen: np.ndarray, back: int) -> np.ndarray:
    """(n,) by which whoever moved least moved in `back` frames, in parts of their size; 0 where that is unknown."""
    common = seen[:-back, :, None] & seen[back:, None]  # (n - back, persons before, persons after, 17)
    moved = np.linalg.norm(keypoints[:-back, :, None] - keypoints[back:, None], axis=-1)
    low = np.where(seen[..., None], keypoints, np.inf).min(2)
    high = np.where(seen[..., None], keypoints, -np.inf).max(2)
    size = np.linalg.norm(np.where(np.isfinite(low), high - low, 0), axis=-1)  # diagonals of boxes
    size = np.maximum(np.maximum(size[:-back, :, None], size[back:, None]), 1)
    count = common.sum(-1)
    steps = np.where(count > 0, (moved * common).sum(-1) / np.maximum(count, 1) / size, np.inf)
    least = steps.min((1, 2), initial=np.inf)
    return np.concatenate([np.zeros(min(back, len(keypoints))), np.where(np.isfinite(least), least, 0)])
