"""Poses of one or several persons over the frames of a clip, and their estimation from images and videos."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from core.errors import UserError
from core.files import complete_file, existing_file
from data.poses.blazepose import BlazePose
from data.poses.dwpose import DWPose
from data.poses.person import COCO_KEYPOINTS, COCO_MIRROR, Box, PersonEstimate, person_box, scores_inside

__all__ = [
    "COCO_KEYPOINTS",
    "COCO_MIRROR",
    "Box",
    "PersonEstimate",
    "PoseConfig",
    "PoseEstimate",
    "PoseEstimator",
    "Poses",
    "estimate_image",
    "estimate_poses",
    "open_estimator",
    "person_box",
]

_NAMES = ("keypoints", "scores", "size", "fps")


@dataclass(frozen=True)
class Poses:
    """Keypoints of the persons in a clip; an image is a clip of one frame.

    Attributes:
        keypoints: (frames, persons, 17, 2) float32, pixels (x, y) of a frame, y down, pixel centres at integers,
            in COCO order. Zero for a person who is missing in a frame.
        scores: (frames, persons, 17) float32 in [0, 1]; 0 means not visible.
        size: (width, height) of a frame in pixels.
        fps: frames per second.
    """

    keypoints: np.ndarray
    scores: np.ndarray
    size: tuple[int, int]
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
        for name, value in zip(_NAMES, (keypoints, scores, size, fps), strict=True):
            object.__setattr__(self, name, value)

    @property
    def frames(self) -> int:
        return self.keypoints.shape[0]

    @property
    def persons(self) -> int:
        return self.keypoints.shape[1]

    def __len__(self) -> int:
        return self.frames

    def __getitem__(self, frames: int | slice | np.ndarray) -> Poses:
        """The poses of some frames: a slice, an index array, or one frame, which is kept as a clip of one frame."""
        index = np.arange(self.frames)[frames].reshape(-1)
        return Poses(self.keypoints[index], self.scores[index], self.size, self.fps)

    def person(self, index: int) -> Poses:
        """The poses of one person alone."""
        chosen = [np.arange(self.persons)[index]]
        return Poses(self.keypoints[:, chosen], self.scores[:, chosen], self.size, self.fps)

    def present(self, threshold: float = 0.0) -> np.ndarray:
        """(frames, persons) bool: whether any keypoint of the person is above `threshold`."""
        return (self.scores > threshold).any(axis=-1)

    def mapped(self, matrix: np.ndarray, size: tuple[int, int]) -> Poses:
        """The poses after an affine map of the image.

        Args:
            matrix: (2, 3) or (3, 3), from pixels of this image to pixels of the new one, (x, y), centres at
                integers.
            size: (width, height) of the new image. Keypoints that fall outside of it stay as they are; see
                `clipped`.
        """
        matrix = np.asarray(matrix, np.float64)[:2]
        keypoints = self.keypoints @ matrix[:, :2].T + matrix[:, 2]
        keypoints = np.where(self.present()[..., None, None], keypoints, 0.0)
        return Poses(keypoints, self.scores, size, self.fps)

    def resized(self, size: tuple[int, int]) -> Poses:
        """The poses after the image was resized to (width, height); edges map to edges."""
        scale = np.asarray(size, np.float64) / np.asarray(self.size)
        return self.mapped(np.column_stack([np.diag(scale), (scale - 1) / 2]), size)

    def clipped(self) -> Poses:
        """The poses with score 0 for every keypoint outside the image."""
        return Poses(self.keypoints, scores_inside(self.keypoints, self.scores, self.size), self.size, self.fps)

    def smoothed(self, frames: float) -> Poses:
        """The poses with every keypoint averaged over time by a Gaussian; scores stay.

        Only frames in which the keypoint is visible take part, weighted by its score, so nothing is pulled towards
        a missing one. The average looks both ways in time: fast motion is flattened but does not lag.

        Args:
            frames: standard deviation of the Gaussian, in frames.
        """
        offsets = np.arange(self.frames)
        kernel = np.exp(-(((offsets[:, None] - offsets) / max(frames, 1e-6)) ** 2) / 2)
        weights = np.einsum("ts,spk->tpk", kernel, self.scores)
        sums = np.einsum("ts,spk,spkc->tpkc", kernel, self.scores, self.keypoints)
        averages = sums / np.maximum(weights, 1e-12)[..., None]
        return Poses(np.where(self.scores[..., None] > 0, averages, self.keypoints), self.scores, self.size, self.fps)

    def save(self, path: str | Path) -> None:
        """Write an .npz with the arrays `keypoints`, `scores`, `size` and `fps`."""
        with complete_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **{name: np.asarray(getattr(self, name)) for name in _NAMES})

    @classmethod
    def load(cls, path: str | Path, argument: str = "poses") -> Poses:
        """Read what `save` wrote. `argument` is named in the `UserError` for a file that is something else."""
        path = existing_file(path, argument)
        try:
            with np.load(path, allow_pickle=False) as archive:
                missing = [name for name in _NAMES if name not in archive.files]
                if missing:
                    raise UserError(
                        f"{argument}={path} has no array {missing[0]!r}; a pose file holds {', '.join(_NAMES)}"
                    )
                return cls(**{name: archive[name] for name in _NAMES})
        except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
            raise UserError(f"{argument}={path} is not a pose file: {error}") from None


@dataclass
class PoseConfig:
    """How poses are estimated.

    Attributes:
        backend: "blazepose" (files: `python -m data.poses.weights`) or "dwpose" (your own ONNX files).
        weights: for dwpose "detector.onnx,pose.onnx".
        heavy: for blazepose the heavy landmark network, about three times slower and less noisy.
        max_persons: how many persons to look for.
        smoothing: standard deviation in frames of a Gaussian over time that keypoints are smoothed with; 0 is off.
        threads: CPU threads of the networks.
    """

    backend: str = "blazepose"
    weights: str | None = None
    heavy: bool = False
    max_persons: int = 1
    smoothing: float = 0.0
    threads: int = 2


@dataclass(frozen=True)
class PoseEstimate:
    """Estimated poses and, where the estimator gives them, person masks.

    Attributes:
        poses: keypoints and scores; `poses.persons` is 0 when nobody was found in any frame.
        masks: (frames, persons, h, w) bool, True on the person, or None.
    """

    poses: Poses
    masks: np.ndarray | None

    def require_person(self, argument: str) -> PoseEstimate:
        """This estimate, or a `UserError` that names the argument when it holds nobody."""
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
    """The pose estimator that the configuration names.

    Raises:
        UserError: an unknown backend, missing model files, settings that contradict each other.
    """
    if config.max_persons < 1:
        raise UserError(f"pose.max_persons={config.max_persons} must be at least 1")
    if not config.smoothing >= 0:
        raise UserError(f"pose.smoothing={config.smoothing} must be 0 or more frames")
    if config.backend == "blazepose":
        if config.weights is not None:
            raise UserError("pose.weights= belongs to pose.backend=dwpose; blazepose has its own files")
        return BlazePose(heavy=config.heavy, threads=config.threads)
    if config.backend == "dwpose":
        return DWPose.from_weights(config.weights, threads=config.threads)
    raise UserError(f"pose.backend={config.backend} must be blazepose or dwpose")


def estimate_image(image: np.ndarray, estimator: PoseEstimator, max_persons: int = 1) -> PoseEstimate:
    """Poses and masks of the persons in a still (h, w, 3) uint8 RGB, the most prominent first; a clip of one frame."""
    persons = estimator.image(image, max_persons)
    return _collect([list(persons)], image.shape[1::-1], fps=1.0)


def estimate_poses(
    frames: Iterable[np.ndarray],
    fps: float,
    estimator: PoseEstimator,
    max_persons: int = 1,
    smoothing: float = 0.0,
) -> PoseEstimate:
    """Poses and masks of the persons in a video; person k is the same person in all frames.

    Persons come in the order in which they appear, the most prominent first; slots that nobody takes are left out.

    Args:
        frames: (h, w, 3) uint8 RGB each; read once and one at a time, for example a `VideoReader`.
        smoothing: see `PoseConfig`; masks are not smoothed.
    """
    size: tuple[int, int] | None = None

    def sized_frames() -> Iterator[np.ndarray]:
        nonlocal size
        for frame in frames:
            size = frame.shape[1::-1]
            yield frame

    slots = list(estimator.video(sized_frames(), max_persons))
    if size is None:
        raise ValueError("frames must hold at least one frame, got none")
    used = [k for k in range(max_persons) if any(persons[k] is not None for persons in slots)]
    estimate = _collect([[persons[k] for k in used] for persons in slots], size, fps)
    return PoseEstimate(estimate.poses.smoothed(smoothing), estimate.masks) if smoothing else estimate


def _collect(slots: list[list[PersonEstimate | None]], size: tuple[int, int], fps: float) -> PoseEstimate:
    shape = (len(slots), len(slots[0]))
    keypoints, scores = np.zeros((*shape, 17, 2), np.float32), np.zeros((*shape, 17), np.float32)
    masked = any(person is not None and person.mask is not None for persons in slots for person in persons)
    masks = np.zeros((*shape, size[1], size[0]), bool) if masked else None
    for frame, persons in enumerate(slots):
        for slot, person in enumerate(persons):
            if person is not None:
                keypoints[frame, slot], scores[frame, slot] = person.keypoints, person.scores
                if person.mask is not None:
                    masks[frame, slot] = person.mask
    return PoseEstimate(Poses(keypoints, scores, size, fps), masks)


def _real_array(name: str, value: np.ndarray) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} must hold real numbers, got {array.dtype}")
    return array.astype(np.float32)
