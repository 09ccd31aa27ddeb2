"""Poses of one or several persons over the frames of a clip, and their estimation from images and videos."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
from scipy.ndimage import correlate1d

from core.config import check_config
from core.errors import UserError
from core.files import complete_file, existing_file
from data.config import PoseConfig
from data.cuts import shots
from data.poses.person import Box, PackedMasks, PersonEstimate, joint_box, person_box, scores_inside
from data.transforms import map_points, resize_matrix

_ARRAYS = ("keypoints", "scores", "size", "fps")  # of a pose file
MAX_GAP = 8  # frames: longest miss of an estimator that is bridged, as of transforms (`tpc.max_gap`)
STEADYING = 0.04  # seconds, see docs/calibration.md


@dataclass(frozen=True)
class Poses:
    """Keypoints of the persons in a clip; an image is a clip of one frame."""

    keypoints: np.ndarray  # (frames, persons, 17, 2) float32 pixels (x, y), COCO order; zero for a missing person
    scores: np.ndarray  # (frames, persons, 17) float32 in [0, 1]; 0 means not visible
    size: tuple[int, int]  # (width, height) of a frame
    fps: float

    def __post_init__(self) -> None:
        keypoints = _real_array("keypoints", self.keypoints)
        scores = _real_array("scores", self.scores)
        if keypoints.ndim != 4 or keypoints.shape[2:] != (17, 2):
            raise ValueError(f"keypoints must have the shape (frames, persons, 17, 2), got {keypoints.shape}")
        if scores.shape != keypoints.shape[:3]:
            raise ValueError(f"scores must have the shape {keypoints.shape[:3]} of the keypoints, got {scores.shape}")
        if not (np.isfinite(keypoints).all() and np.isfinite(scores).all()):
            raise ValueError("keypoints and scores must be finite")
        if scores.size and not (scores.min() >= 0 and scores.max() <= 1):
            raise ValueError(f"scores must lie in [0, 1], got {scores.min():g} to {scores.max():g}")
        size = tuple(int(value) for value in np.asarray(self.size).reshape(-1))
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be a positive (width, height), got {self.size}")
        fps = float(np.asarray(self.fps).reshape(()))
        if not (np.isfinite(fps) and fps > 0):
            raise ValueError(f"fps must be a positive number, got {fps}")
        for name, value in zip(_ARRAYS, (keypoints, scores, size, fps), strict=True):
            object.__setattr__(self, name, value)

    @classmethod
    def of_persons(cls, slots: list[list[PersonEstimate | None]], size: tuple[int, int], fps: float) -> Poses:
        """Poses of persons by frame and slot, with as many slots in each frame; None for a missing person."""
        shape = (len(slots), len(slots[0]) if slots else 0)
        keypoints, scores = np.zeros((*shape, 17, 2), np.float32), np.zeros((*shape, 17), np.float32)
        for frame, persons in enumerate(slots):
            for slot, person in enumerate(persons):
                if person is not None:
                    keypoints[frame, slot], scores[frame, slot] = person.keypoints, person.scores
        return cls(keypoints, scores, size, fps)

    @property
    def frames(self) -> int:
        return self.keypoints.shape[0]

    @property
    def persons(self) -> int:
        return self.keypoints.shape[1]

    def __len__(self) -> int:
        return self.frames

    def __getitem__(self, frames: int | slice | np.ndarray) -> Poses:
        """Poses of some frames: a slice, an index array, or one frame, which is kept as a clip of one frame."""
        index = np.arange(self.frames)[frames].reshape(-1)
        return Poses(self.keypoints[index], self.scores[index], self.size, self.fps)

    def person(self, index: int) -> Poses:
        chosen = [np.arange(self.persons)[index]]
        return Poses(self.keypoints[:, chosen], self.scores[:, chosen], self.size, self.fps)

    def present(self, threshold: float = 0.0) -> np.ndarray:
        """(frames, persons) bool: any keypoint of the person is above `threshold`."""
        return (self.scores > threshold).any(axis=-1)

    def box(self, margin: float = 0.1) -> Box | None:
        """Box around the visible keypoints of all persons and frames, cut to the image; see `person_box`."""
        keypoints, scores = self.keypoints.reshape(-1, 17, 2), self.scores.reshape(-1, 17)
        boxes = [person_box(*person, margin=margin) for person in zip(keypoints, scores, strict=True)]
        return joint_box([box for box in boxes if box is not None], self.size)

    def mapped(self, matrix: np.ndarray, size: tuple[int, int]) -> Poses:
        """Poses mapped by (2, 3) or (3, 3) to an image of (width, height); points outside stay, see `clipped`."""
        keypoints = map_points(self.keypoints, np.asarray(matrix, np.float64))
        keypoints = np.where(self.present()[..., None, None], keypoints, 0.0)
        return Poses(keypoints, self.scores, size, self.fps)

    def resized(self, size: tuple[int, int]) -> Poses:
        """Poses after the image was resized to (width, height); edges map to edges."""
        return self.mapped(resize_matrix(self.size, size), size)

    def clipped(self) -> Poses:
        """Poses with score 0 for every keypoint outside the image."""
        return Poses(self.keypoints, scores_inside(self.keypoints, self.scores, self.size), self.size, self.fps)

    def smoothed(self, frames: float | None, cuts: Sequence[int] = ()) -> Poses:
        """Poses whose keypoints follow `local_lines` of `frames` deviation, shot by shot; scores stay, and weigh.

        None takes `STEADYING`, which quiets an estimator's jitter and hardly flattens fast motion.
        """
        sigma = STEADYING * self.fps if frames is None else frames
        if sigma == 0:
            return self
        parts = [local_lines(self.keypoints[s], self.scores[s, ..., None], sigma) for s in shots(self.frames, cuts)]
        return replace(self, keypoints=np.concatenate(parts))

    def bridged(self, cuts: Sequence[int] = ()) -> Poses:
        """Poses in which persons who are missing for at most `MAX_GAP` frames of a shot move on in a line."""
        keypoints, scores = self.keypoints.copy(), self.scores.copy()
        for shot in shots(self.frames, cuts):
            for person, known in enumerate(self.present()[shot].T):
                keypoints[shot, person], _ = interpolate(keypoints[shot, person], known, MAX_GAP)
                scores[shot, person], _ = interpolate(scores[shot, person], known, MAX_GAP)
        return Poses(keypoints, scores, self.size, self.fps)

    def save(self, path: str | Path) -> None:
        """Write an .npz with the arrays `keypoints`, `scores`, `size` and `fps`."""
        with complete_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **{name: np.asarray(getattr(self, name)) for name in _ARRAYS})

    @classmethod
    def load(cls, path: str | Path, argument: str = "poses") -> Poses:
        """Read what `save` wrote; UserError, naming the argument, for a file that is something else."""
        path = existing_file(path, argument)
        try:
            with np.load(path, allow_pickle=False) as archive:
                missing = [name for name in _ARRAYS if name not in archive.files]
                if missing:
                    raise UserError(
                        f"{argument}={path} has no array {missing[0]!r}; a pose file holds {', '.join(_ARRAYS)}"
                    )
                return cls(**{name: archive[name] for name in _ARRAYS})
        except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
            raise UserError(f"{argument}={path} is not a pose file: {error}") from None


@dataclass(frozen=True)
class PoseEstimate:
    """Estimated poses and, where the estimator gives them, person masks (frames, persons, h, w)."""

    poses: Poses  # of no persons when nobody was found in any frame
    masks: PackedMasks | None

    def require_person(self, argument: str) -> PoseEstimate:
        """This estimate; UserError that names the argument when it holds nobody."""
        if self.poses.persons == 0:
            raise UserError(f"{argument}: no person was found; give an image that shows one clearly, or a pose file")
        return self


class PoseEstimator(Protocol):
    """Finds persons in stills and follows them through videos."""

    def image(self, image: np.ndarray, max_persons: int = 1) -> list[PersonEstimate]:
        """Persons in a still (h, w, 3) uint8 RGB, the most prominent first."""

    def video(self, frames: Iterable[np.ndarray], max_persons: int = 1) -> Iterator[list[PersonEstimate | None]]:
        """Per frame a list of `max_persons` slots, each one person throughout; None where they are missing."""


def open_estimator(config: PoseConfig) -> PoseEstimator:
    """Pose estimator that the configuration names; `UserError` for missing model files."""
    check_config(config, "pose")
    # Imported here: most programs need poses, few need an estimator, and none needs both.
    if config.backend == "dwpose":
        from data.poses.dwpose import DWPose

        return DWPose.from_weights(config.weights, threads=config.threads)
    from data.poses.blazepose import BlazePose

    return BlazePose(heavy=config.heavy, threads=config.threads)


def estimate_image(image: np.ndarray, estimator: PoseEstimator, max_persons: int = 1) -> PoseEstimate:
    """Poses and masks of the persons in a still (h, w, 3) uint8 RGB, the most prominent first; a clip of one frame."""
    persons = estimator.image(image, max_persons)
    return _collect([persons], image.shape[1::-1], fps=1.0)


def estimate_poses(
    frames: Iterable[np.ndarray],
    fps: float,
    estimator: PoseEstimator,
    max_persons: int = 1,
) -> PoseEstimate:
    """Poses and masks of the persons in frames (h, w, 3) uint8 RGB; person k is the same person in all frames.

    Persons come as they appear, the most prominent first, without empty slots. One frame is held at a time.
    """
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError("frames must hold at least one frame, got none")
    return _collect(estimator.video(chain([first], frames), max_persons), first.shape[1::-1], fps)


def interpolate(values: np.ndarray, known: np.ndarray, max_gap: int) -> tuple[np.ndarray, np.ndarray]:
    """Values (frames, ...) with gaps of at most `max_gap` frames filled linearly, and (frames,) bool, those filled."""
    result, filled = values.copy(), np.zeros(len(known), bool)
    frames = np.flatnonzero(known)
    for before, after in zip(frames[:-1], frames[1:], strict=True):
        if 1 < after - before <= max_gap + 1:
            share = np.arange(1, after - before).reshape(-1, *[1] * (values.ndim - 1)) / (after - before)
            result[before + 1 : after] = (1 - share) * values[before] + share * values[after]
            filled[before + 1 : after] = True
    return result, filled


def local_lines(values: np.ndarray, weights: np.ndarray, sigma: float) -> np.ndarray:
    """Values (frames, ...) float64 of lines fitted around each frame, by weights (frames, ...) and a Gaussian in time.

    Of `sigma` frames. Unlike a plain average, which both ends of a clip pull inwards, a line follows steady motion.
    """
    offsets = np.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    near = np.exp(-0.5 * (offsets / max(sigma, 1e-6)) ** 2)

    def moment(part: np.ndarray, power: int) -> np.ndarray:
        return correlate1d(part, near * offsets**power, axis=0, mode="constant")

    weights = np.broadcast_to(weights, values.shape).astype(np.float64)
    w0, w1, w2 = (moment(weights, power) for power in range(3))
    v0, v1 = (moment(weights * values, power) for power in range(2))
    mean = np.divide(v0, w0, out=values.astype(np.float64), where=weights > 0)
    spread = w0 * w2 - w1**2
    return np.divide(w2 * v0 - w1 * v1, spread, out=mean, where=(weights > 0) & (spread > 1e-9 * w0**2))


def _collect(frames: Iterable[list[PersonEstimate | None]], size: tuple[int, int], fps: float) -> PoseEstimate:
    """Persons of each frame and slot as arrays, without slots that are empty throughout."""
    tracks, rows, masked = [], [], False
    for persons in frames:
        rows.append(PackedMasks.zeros((len(persons),), size))
        for slot, person in enumerate(persons):
            if person is not None and person.mask is not None:
                rows[-1][slot], masked = person.mask, True
        tracks.append([person and replace(person, mask=None) for person in persons])
    used = [k for k in range(len(tracks[0])) if any(persons[k] for persons in tracks)]
    poses = Poses.of_persons([[persons[k] for k in used] for persons in tracks], size, fps)
    return PoseEstimate(poses, PackedMasks.stack(rows).select((slice(None), used)) if masked else None)


def _real_array(name: str, value: np.ndarray) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} must hold real numbers, got {array.dtype}")
    return array.astype(np.float32)
