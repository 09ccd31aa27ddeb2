"""Measure clips: values of every frame and feature vectors, written as they come so that memory stays small; then the
numbers of a table, which are means over frames and distances of pooled features.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from core.files import write_json
from data.poses.poses import PoseEstimator, Poses
from evaluation.metric_suite import MetricSuite, measured_name
from metrics import steadiness
from metrics.face import FaceNetwork
from metrics.features import FeatureExtractor, WindowBuffer, image_tensor
from metrics.frechet import Moments, frechet_distance
from metrics.image import flicker, keypoint_error, part_colour_difference, part_colours
from metrics.mmd import polynomial_mmd
from metrics.motion import motion_dimension, motion_histograms, normalised_keypoints
from metrics.protocols import MEASURES, pixel_measure
from tpc.silhouettes import body_height, visible

VALUES_FILE = "values.json"
SIDES = ("generated", "truth")
OUTSIDE = 128  # grey level outside the region, for measures that are not taken pixel by pixel
SCORE_THRESHOLD = 0.3  # of keypoints that persons are compared by


@dataclass(frozen=True)
class FramePair:
    """One frame in the protocol's form."""

    generated: np.ndarray  # (h, w, 3) uint8
    truth: np.ndarray  # (h, w, 3) uint8
    mask: np.ndarray | None = None  # (h, w) bool, True on the person; None when regions are not measured
    person: dict[str, float] | None = None  # values of the measures of kind "person", see `person_values`
    # (2, 17, 3): generated and true keypoints as of `normalised_keypoints`, and 1 where they are visible
    tracks: np.ndarray | None = None

    def region(self, region: str) -> np.ndarray | None:
        """Mask of a region; None for the whole image."""
        return _region_mask(self.mask, region)


def _region_mask(person: np.ndarray | None, region: str) -> np.ndarray | None:
    if not region or person is None:
        return None
    return person if region == "foreground" else ~person


@torch.no_grad()
def measure_clip(pairs: Iterable[FramePair], metric_suite: MetricSuite, folder: Path) -> None:
    """Measure the frames of a clip in order and write the results to `folder`.

    `values.json` has the number of frames and the values of every measure taken frame by frame; NaN is null.
    """
    values: dict[str, list[float | None]] = {}
    frames, before, tracks = 0, None, []
    pooled = [name for name in metric_suite.extractors if MEASURES[name].is_pooled]
    steady = metric_suite.of_kind("steady")
    with ExitStack() as stack:
        writers: list[_FeatureWriter | _Rows] = [
            _FeatureWriter(stack, folder, measure, region, metric_suite)
            for measure in dict.fromkeys(map(metric_suite.source, pooled))
            for region in metric_suite.regions
        ]
        kept = [_Rows(region, metric_suite.extractors[steady[0]]) for region in metric_suite.regions if steady]
        writers += kept
        iterator = iter(pairs)
        while batch := list(islice(iterator, metric_suite.batch_size)):
            frames += len(batch)
            measured = _frame_values(batch, metric_suite) | _change_values(before, batch, metric_suite)
            before = batch[-1]
            tracks += [pair.tracks for pair in batch]
            for name, of_frames in measured.items():
                values.setdefault(name, []).extend(None if np.isnan(value) else value for value in of_frames)
            for region in metric_suite.regions if writers else ():
                for side in SIDES:
                    _write_features(batch, side, [writer for writer in writers if writer.region == region])
    for rows in kept:
        for measure in steady:
            formula, side = steadiness.MEASURES[measure.removesuffix("_truth")], SIDES[measure.endswith("_truth")]
            values[measured_name(measure, rows.region)] = formula(rows.of(side)).tolist()
    if metric_suite.of_kind("motion"):
        _write_motion(np.stack(tracks, axis=1), metric_suite, folder)
    write_json(folder / VALUES_FILE, {"frames": frames, "values": values})


def _frame_values(batch: Sequence[FramePair], metric_suite: MetricSuite) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for region in metric_suite.regions:
        for measure in metric_suite.of_kind("pixels"):
            values[measured_name(measure, region)] = [
                pixel_measure(measure, metric_suite.protocol, pair.generated, pair.truth, pair.region(region))
                for pair in batch
            ]
        if metric_suite.distances:
            low, high = metric_suite.protocol.lpips_range
            images = [image_tensor(_region_frames(batch, side, region), metric_suite.device) for side in SIDES]
            first, second = (image / 255 * (high - low) + low for image in images)
        for measure, distance in metric_suite.distances.items():
            values[measured_name(measure, region)] = distance.distance(first, second).tolist()
    for measure in metric_suite.of_kind("person"):
        values[measure] = [pair.person[measure] for pair in batch]
    return values


def _change_values(
    before: FramePair | None, batch: Sequence[FramePair], metric_suite: MetricSuite
) -> dict[str, list[float]]:
    """Measures of kind "changes" of each frame of a batch since the one before; the first frame of a clip has none."""
    pairs = list(pairwise(batch if before is None else [before, *batch]))
    # The foreground is where the person is in either frame.
    masks = [None if a.mask is None or b.mask is None else a.mask | b.mask for a, b in pairs]
    values: dict[str, list[float]] = {}
    for region in metric_suite.regions:
        for measure in metric_suite.of_kind("changes"):
            values[measured_name(measure, region)] = [
                flicker((first.generated, then.generated), (first.truth, then.truth), _region_mask(mask, region))
                for (first, then), mask in zip(pairs, masks, strict=True)
            ]
    return values


def _region_frames(batch: Sequence[FramePair], side: str, region: str) -> np.ndarray:
    """The frames (n, h, w, 3) uint8 of one side, grey outside the region."""
    frames = np.stack([getattr(pair, side) for pair in batch])
    if region:
        frames[~np.stack([pair.region(region) for pair in batch])] = OUTSIDE
    return frames


class _FeatureWriter:
    """Appends the features of prepared frames, given in batches, to one file for each side."""

    def __init__(self, stack: ExitStack, folder: Path, measure: str, region: str, metric_suite: MetricSuite):
        self.region = region
        self.extractor: FeatureExtractor = metric_suite.extractors[measure]
        self._at_once = max(1, metric_suite.batch_size // 4)  # windows; each is many frames to the network
        protocol, windowed = metric_suite.protocol, measure in metric_suite.of_kind("windows")
        self._files = {
            side: stack.enter_context(_feature_file(folder, measure, region, side).open("wb")) for side in SIDES
        }
        self._windows = {side: WindowBuffer(protocol.window, protocol.stride) if windowed else None for side in SIDES}

    def write(self, side: str, rows: Tensor) -> None:
        windows = self._windows[side]
        parts = [rows] if windows is None else windows.push(rows).split(self._at_once)
        for part in parts:
            if len(part):
                self._files[side].write(self.extractor.extract(part).cpu().numpy().astype(np.float32).tobytes())


class _Rows:
    """Keeps the features of prepared frames, one vector each, for measures of kind "steady"."""

    def __init__(self, region: str, extractor: FeatureExtractor):
        self.region, self.extractor = region, extractor
        self._rows: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}

    def write(self, side: str, rows: Tensor) -> None:
        self._rows[side].append(self.extractor.extract(rows).cpu().numpy())

    def of(self, side: str) -> np.ndarray:  # (frames, dimension)
        return np.concatenate(self._rows[side])


def _write_motion(tracks: np.ndarray, metric_suite: MetricSuite, folder: Path) -> None:
    """Write the histograms of the motion in windows of a clip; `tracks` (2, frames, 17, 3) as of `FramePair`."""
    protocol, (name, *_) = metric_suite.protocol, metric_suite.of_kind("motion")
    for side, of_side in zip(SIDES, tracks, strict=True):
        vectors = motion_histograms(of_side[..., :2], of_side[..., 2] > 0, protocol.window, protocol.stride)
        _feature_file(folder, metric_suite.source(name), "", side).write_bytes(vectors.tobytes())


def _write_features(batch: Sequence[FramePair], side: str, writers: list[_FeatureWriter | _Rows]) -> None:
    """Hand the frames of one side to the writers of one region; those that prepare them alike share the work."""
    frames = _region_frames(batch, side, writers[0].region)
    prepared: dict[int, Tensor] = {}
    for writer in writers:
        prepare = writer.extractor.prepare
        if id(prepare) not in prepared:
            prepared[id(prepare)] = prepare(frames)
        writer.write(side, prepared[id(prepare)])


def _feature_file(folder: Path, measure: str, region: str, side: str) -> Path:
    return folder / f"{measured_name(measure, region)}.{side}.f32"


@dataclass(frozen=True)
class Number:
    """One number of a result."""

    value: float | None  # None when nothing could be measured
    samples: int  # frames, windows or, of an MMD, clips that it rests on, of each side
    warning: str | None = None  # what makes it doubtful, or None
    error: float | None = None  # standard error, of an MMD


def summarise(folders: Sequence[Path], metric_suite: MetricSuite) -> dict[str, Number]:
    """Every measure over all clips, by name. Frames count alike, whichever clip they are of."""
    means = frame_means(folders)
    numbers: dict[str, Number] = {}
    for name, region, measure in metric_suite.measured_names():
        if MEASURES[measure].mmd:
            numbers[name] = _mmd(folders, measure, region, metric_suite)
        elif MEASURES[measure].is_pooled:
            numbers[name] = _distance(folders, measure, region, metric_suite)
        elif name in means:
            numbers[name] = means[name]
    return numbers


def clip_means(folder: Path) -> dict[str, float | None]:
    """The mean over the frames of one clip of every measure that is taken frame by frame."""
    return {name: number.value for name, number in frame_means([folder]).items()}


def frame_means(folders: Sequence[Path]) -> dict[str, Number]:
    """The mean over the frames of some clips of every measure that is taken frame by frame."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}  # of frames that could be measured
    frames: dict[str, int] = {}
    for folder in folders:
        content = json.loads((folder / VALUES_FILE).read_text(encoding="utf-8"))
        for name, values in content["values"].items():
            known = np.array([value for value in values if value is not None], np.float64)
            sums[name] = sums.get(name, 0.0) + float(known.sum())
            counts[name] = counts.get(name, 0) + len(known)
            frames[name] = frames.get(name, 0) + len(values)
    numbers = {}
    for name, count in counts.items():
        missing = frames[name] - count
        warning = f"{missing} of {frames[name]} frames could not be measured" if missing else None
        numbers[name] = Number(sums[name] / count if count else None, count, warning)
    return numbers


def _distance(folders: Sequence[Path], measure: str, region: str, metric_suite: MetricSuite) -> Number:
    moments = [Moments(_dimension(measure, metric_suite)) for _ in SIDES]
    for side, total in zip(SIDES, moments, strict=True):
        for folder in folders:
            for vectors in _vectors(folder, measure, region, side, metric_suite):
                total.update(vectors)
    kind = MEASURES[measure].kind
    if min(total.count for total in moments) < 2:
        window = f" of {metric_suite.protocol.window} frames" if kind == "windows" else ""
        return Number(None, moments[1].count, f"{moments[1].count} {kind}{window}; a covariance needs two")
    distance = frechet_distance(*moments)
    return Number(distance.value, distance.samples[1], distance.warning)


def _mmd(folders: Sequence[Path], measure: str, region: str, metric_suite: MetricSuite) -> Number:
    sides: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}
    for folder in folders:
        for side, clips in sides.items():
            clips += [np.concatenate(v) for v in [list(_vectors(folder, measure, region, side, metric_suite))] if v]
    clips = len(sides["truth"])
    if clips < 2:
        windows = "" if MEASURES[measure].kind == "given" else f" of {metric_suite.protocol.window} frames or more"
        return Number(None, clips, f"{clips} clips{windows}; an MMD needs two")
    estimate = polynomial_mmd(sides["generated"], sides["truth"])
    short = len(folders) - clips
    warning = f"{short} of {len(folders)} clips are shorter than a window" if short else None
    return Number(estimate.value, clips, warning, estimate.error)


def _dimension(measure: str, metric_suite: MetricSuite) -> int:
    if MEASURES[measure].kind == "motion":
        return motion_dimension(metric_suite.protocol.window)
    return metric_suite.extractors[measure].dimension


def _vectors(folder: Path, measure: str, region: str, side: str, metric_suite: MetricSuite) -> Iterator[np.ndarray]:
    """The vectors (n, dimension) of one side of a clip, 1024 at a time."""
    if MEASURES[measure].kind == "given":
        yield metric_suite.given[side][folder.name]
        return
    dimension = _dimension(measure, metric_suite)
    with _feature_file(folder, metric_suite.source(measure), region, side).open("rb") as file:
        while block := file.read(1024 * dimension * 4):
            vectors = np.frombuffer(block, np.float32).reshape(-1, dimension)
            if not np.isfinite(vectors).all():
                raise UserError(
                    f"{measure}: features of the {side} clip {folder.name!r} are not finite; "
                    "the file of its network may be damaged"
                )
            yield vectors


@dataclass(frozen=True)
class PersonKeypoints:
    """The person of a frame: (17, 2) pixels and (17,) scores, all 0 when nobody was found."""

    keypoints: np.ndarray
    scores: np.ndarray

    @property
    def height(self) -> float:
        """Standing height in pixels, 0 when unknown."""
        return body_height(self.keypoints, visible(self.scores, self.keypoints, SCORE_THRESHOLD))


NOBODY = PersonKeypoints(np.zeros((17, 2), np.float32), np.zeros(17, np.float32))


def with_persons(
    frames: Iterable[np.ndarray], estimator: PoseEstimator | Poses
) -> Iterator[tuple[np.ndarray, PersonKeypoints]]:
    """Every frame (h, w, 3) uint8 of a clip with its most prominent person; few frames are held at a time.

    Instead of an estimator, poses of as many frames that are known; their first person is taken.
    """
    if isinstance(estimator, Poses):
        for index, frame in enumerate(frames):
            poses = estimator[index].resized(frame.shape[1::-1])
            yield frame, PersonKeypoints(poses.keypoints[0, 0], poses.scores[0, 0]) if poses.persons else NOBODY
        return
    held: deque[np.ndarray] = deque()

    def source() -> Iterator[np.ndarray]:
        for frame in frames:
            held.append(frame)
            yield frame

    for persons in estimator.video(source(), 1):
        person = persons[0] if persons else None
        yield held.popleft(), NOBODY if person is None else PersonKeypoints(person.keypoints, person.scores)


def person_tracks(found: PersonKeypoints, target: PersonKeypoints, size: tuple[int, int]) -> np.ndarray:
    """Persons of a generated and a true image of (width, height) as `FramePair.tracks`."""
    return np.stack(
        [
            np.column_stack(
                [
                    normalised_keypoints(person.keypoints, size),
                    visible(person.scores, person.keypoints, SCORE_THRESHOLD),
                ]
            )
            for person in (found, target)
        ]
    )


def person_values(
    generated: np.ndarray,
    found: PersonKeypoints,
    truth: np.ndarray,
    target: PersonKeypoints,
    face: FaceNetwork | None = None,
) -> dict[str, float]:
    """Pose and identity measures of one frame: images (h, w, 3) uint8 and their persons."""
    error = keypoint_error(
        found.keypoints, found.scores, target.keypoints, target.scores, target.height, SCORE_THRESHOLD
    )
    colours = [
        part_colours(image, person.keypoints, person.scores, person.height, SCORE_THRESHOLD)
        for image, person in ((generated, found), (truth, target))
    ]
    values = {"keypoint_error": error, "part_colour": part_colour_difference(*colours)}
    if face is not None:
        sides = ((image, person.keypoints, person.scores) for image, person in ((generated, found), (truth, target)))
        values["face_identity"] = face.similarity(*sides, SCORE_THRESHOLD)
    return values
