"""Calibrations over time: gaps, smoothing, propagation.

A similarity is described by log scale, angle, and where it puts the middle of the reference person: interpolating
the translation of the image's corner instead would swing the person around it. An affine map is described by its
four coefficients and the same point.

Iterative propagation (paper) divides the frames into consecutive groups. At each denoising step one member of a group
is drawn uniformly at random, and the frames of the group attend to its calibrated image: neighbours agree at every
step, and over the steps every member is heard.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.cuts import shots
from data.poses.poses import interpolate, local_lines
from tpc.config import CalibrationConfig


@dataclass(frozen=True)
class Track:
    """One person's transforms over the clip."""

    matrices: np.ndarray  # (frames, 3, 3), identity where neither flag is set
    calibrated: np.ndarray  # (frames,) bool
    interpolated: np.ndarray  # (frames,) bool

    @property
    def available(self) -> np.ndarray:
        return self.calibrated | self.interpolated


def follow(
    matrices: list[np.ndarray | None], centre: np.ndarray, config: CalibrationConfig, cuts: Sequence[int] = ()
) -> Track:
    """Bridge short gaps and filter noise in one person's transforms (3, 3), None where there is none, shot by shot.

    `centre` (2,) is the middle of the reference person; `config` is resolved; `cuts` are the first frames of shots.
    """
    parts = [_follow_shot(matrices[shot], centre, config) for shot in shots(len(matrices), cuts)]
    return Track(*(np.concatenate(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


def _follow_shot(matrices: list[np.ndarray | None], centre: np.ndarray, config: CalibrationConfig) -> Track:
    similar = config.transform != "affine"
    calibrated = np.array([matrix is not None for matrix in matrices], bool)
    result = np.array([np.eye(3) if matrix is None else matrix for matrix in matrices]).reshape(-1, 3, 3)
    parameters = unwrap(to_parameters(result, centre, similar), calibrated)
    parameters, filled = interpolate(parameters, calibrated, config.max_gap)
    available = calibrated | filled
    if filled.any() or config.smoothing > 0:
        parameters = smooth(parameters, available, config.smoothing)
        result = np.where(available[:, None, None], to_matrices(parameters, centre, similar), result)
    return Track(result, calibrated, filled)


def partway(track: Track, start: np.ndarray, centre: np.ndarray, config: CalibrationConfig) -> Track:
    """The track, gone by `config.strength` of the way from a `start` (3, 3) in its own pixels; see `to_parameters`.

    Similarities go evenly in the logarithm of their scale, and turn the shorter way.
    """
    if config.strength == 1:
        return track
    similar = config.transform != "affine"
    end = to_parameters(track.matrices, centre, similar)
    way = end - to_parameters(start[None], centre, similar)
    if similar:
        way[:, 1] = np.pi - (np.pi - way[:, 1]) % (2 * np.pi)
    matrices = to_matrices(end - (1 - config.strength) * way, centre, similar)
    return replace(track, matrices=np.where(track.available[:, None, None], matrices, track.matrices))


def to_parameters(matrices: np.ndarray, centre: np.ndarray, similar: bool) -> np.ndarray:
    """Describe matrices (frames, 3, 3) by where they put a point (2,) and how they turn and resize about it.

    Returns (frames, 4) log scale, angle, x, y for similarities, (frames, 6) coefficients, x, y otherwise.
    """
    place = matrices[:, :2, :2] @ centre + matrices[:, :2, 2]
    if not similar:
        return np.concatenate([matrices[:, :2, :2].reshape(-1, 4), place], 1)
    a, b = matrices[:, 0, 0], matrices[:, 1, 0]
    return np.stack([np.log(np.hypot(a, b)), np.arctan2(b, a), place[:, 0], place[:, 1]], 1)


def to_matrices(parameters: np.ndarray, centre: np.ndarray, similar: bool) -> np.ndarray:
    """The inverse of `to_parameters`."""
    matrices = np.tile(np.eye(3), (len(parameters), 1, 1))
    if similar:
        scale, angle = np.exp(parameters[:, 0]), parameters[:, 1]
        a, b = scale * np.cos(angle), scale * np.sin(angle)
        matrices[:, 0, 0], matrices[:, 0, 1], matrices[:, 1, 0], matrices[:, 1, 1] = a, -b, b, a
    else:
        matrices[:, :2, :2] = parameters[:, :4].reshape(-1, 2, 2)
    matrices[:, :2, 2] = parameters[:, -2:] - matrices[:, :2, :2] @ centre
    return matrices


def unwrap(parameters: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Angles (column 1 of similarities) continued over the known frames (frames,) bool, each by the shorter way."""
    result = parameters.copy()
    if parameters.shape[1] == 4:
        result[known, 1] = np.unwrap(parameters[known, 1])
    return result


def smooth(parameters: np.ndarray, known: np.ndarray, sigma: float) -> np.ndarray:
    """Parameters (frames, n) that follow `local_lines` within each run of known frames (frames,) bool."""
    result = parameters.copy()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], known, [False]]).astype(int)))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        result[start:stop] = local_lines(parameters[start:stop], np.ones(1), sigma)
    return result


def to_turns(matrices: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """(frames, 6) of maps (frames, 3, 3): turn, three of the stretch before it, and where the middle (2,) goes."""
    linear = matrices[:, :2, :2]
    angle = np.arctan2(linear[:, 1, 0] - linear[:, 0, 1], linear[:, 0, 0] + linear[:, 1, 1])
    stretch = rotations(np.exp(-1j * angle)) @ linear
    place = linear @ middle + matrices[:, :2, 2]
    return np.stack([angle, stretch[:, 0, 0], stretch[:, 0, 1], stretch[:, 1, 1], place[:, 0], place[:, 1]], 1)


def from_turns(parameters: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """The inverse of `to_turns`."""
    angle, a, b, d = parameters[:, :4].T
    stretch = np.stack([np.stack([a, b], -1), np.stack([b, d], -1)], -2)
    return put(rotations(np.exp(1j * angle)) @ stretch, middle, parameters[:, 4:])


def filter_jitter(values: np.ndarray, ends: np.ndarray, known: np.ndarray, sigma: float) -> np.ndarray:
    """Local linear regression of values (frames, k) over time, as `smooth`, among the known frames that are alike.

    Frames whose `ends` (frames, n) lie apart by more than about 1 do not count: a bilateral filter, which takes away
    jitter and leaves quick motion alone.
    """
    reach, frames = min(int(np.ceil(3 * sigma)), len(values) - 1), np.arange(len(values))
    # Weighted sums of 1, the offset and its square, and of the values and their products with the offset.
    ones, first, second = np.zeros((3, len(values), 1))
    total, product = np.zeros((2, *values.shape))
    for offset in range(-reach, reach + 1):
        other = np.clip(frames + offset, 0, len(values) - 1)
        apart = ((ends[other] - ends) ** 2).sum(1)
        weight = np.exp(-0.5 * ((offset / max(sigma, 1e-9)) ** 2 + apart)) * (
            known[other] & (other == frames + offset)
        )
        weight = weight[:, None]
        ones, first, second = ones + weight, first + weight * offset, second + weight * offset**2
        total, product = total + weight * values[other], product + weight * offset * values[other]
    spread = ones * second - first**2
    flat = spread <= 1e-6 * np.maximum(ones, 1e-300) ** 2
    line = (second * total - first * product) / np.where(flat, 1, spread)
    return np.where(known[:, None], np.where(flat, total / np.maximum(ones, 1e-300), line), values)


def rotations(turn: np.ndarray) -> np.ndarray:
    """(..., 2, 2) of complex numbers (...)."""
    result = np.empty((*turn.shape, 2, 2))
    result[..., 0, 0], result[..., 0, 1], result[..., 1, 0], result[..., 1, 1] = (
        turn.real,
        -turn.imag,
        turn.imag,
        turn.real,
    )
    return result


def put(linear: np.ndarray, start: np.ndarray, place: np.ndarray) -> np.ndarray:
    """(..., 3, 3) of (..., 2, 2) that take `start` (..., 2) to `place` (..., 2)."""
    matrices = np.zeros((*linear.shape[:-2], 3, 3))
    matrices[..., :2, :2], matrices[..., 2, 2] = linear, 1
    matrices[..., :2, 2] = place - (linear @ start[..., None])[..., 0]
    return matrices


FRAMES_PER_GROUP = 4  # what the paper's 30 groups come to on its clips of about 120 frames


def group_of_frames(num_frames: int, num_groups: int) -> np.ndarray:
    """Group index (frames,) of every frame; sizes differ by at most one. 0 makes groups of four frames."""
    frames = np.arange(num_frames)
    if num_groups == 0:
        return frames // FRAMES_PER_GROUP
    return frames * min(num_groups, num_frames) // max(num_frames, 1)


@dataclass(frozen=True)
class Schedule:
    """The draws of a clip, a pure function of (seed, step, group, person).

    Nothing else enters: every context window, rank and resumed run draws the same.
    """

    available: np.ndarray  # (frames, persons) bool, frames that have a calibrated image of the person
    groups: int  # number of groups M, 0 = groups of four frames
    mode: str  # "iterative", "hold" (the first available member for all steps) or "off" (each frame its own)
    seed: int
    cuts: tuple[int, ...] = ()  # first frames of shots, which begin a group

    def source_frame(self, step: int) -> np.ndarray:
        """(frames, persons) int: the frame whose calibrated image each frame uses at `step`; -1 = none.

        Only frames with an image of their own take part: the others stay uncalibrated whatever their group draws.
        """
        frames, persons = self.available.shape
        if self.mode == "off":
            return np.where(self.available, np.arange(frames)[:, None], -1)
        source = np.full((frames, persons), -1)
        group = group_of_frames(frames, self.groups)
        starts = np.union1d(np.flatnonzero(np.diff(group, prepend=-1)), self.cuts).astype(int)
        for g, (start, stop) in enumerate(zip(starts, [*starts[1:], frames], strict=True)):
            for person in range(persons):
                members = start + np.flatnonzero(self.available[start:stop, person])
                if len(members):
                    drawn = 0 if self.mode == "hold" else self._draw(step, g, person, len(members))
                    source[members, person] = members[drawn]
        return source

    def _draw(self, step: int, group: int, person: int, count: int) -> int:
        if count == 1:
            return 0
        # Philox is counter-based: its stream at a counter does not depend on what was drawn before.
        stream = np.random.Philox(key=self.seed % 2**64, counter=[0, person, group, step])
        return int(np.random.Generator(stream).integers(count))
