"""Clips of filmed people: a folder that `prepare.py` made, or videos with pose files beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.errors import UserError
from data.inputs import Driving, Reference, fitting_poses
from data.poses.files import load_poses
from data.poses.poses import Poses
from data.preparation.clips import video_of
from data.preparation.manifest import has_manifest, read_manifest
from data.preparation.masks import read_union
from data.video.images import natural_order
from data.video.reading import VideoReader
from evaluation.clips import RENDERED, ClipsConfig, ClipSet, EvaluationClip, RenderedClips
from evaluation.folders import MASKS_SUFFIX
from tpc.silhouettes import draw_silhouette, visible

POSE_SUFFIXES = (".npz", ".json")
THRESHOLD = 0.3


def open_clips(config: ClipsConfig) -> ClipSet:
    """The clips that a configuration names.

    Raises:
        UserError: a folder that does not exist or holds no clip.
    """
    config.check()
    return RenderedClips(config) if config.dataset == RENDERED else FilmedClips(config)


@dataclass(frozen=True)
class FilmedFiles:
    """The files of a clip.

    Attributes:
        poses: pose file.
        video: file or folder of frames; None when there are poses only.
        masks: folder, or None: drawn around the keypoints.
    """

    poses: Path
    video: Path | None
    masks: Path | None


class FilmedClips:
    """Videos with poses; the reference is one of the video's own frames."""

    def __init__(self, config: ClipsConfig):
        self._config, root = config, Path(config.dataset)
        found = _prepared(root) if has_manifest(root) else _beside(root)
        # Clips of folders below are named with the folder; a part of a run needs a name without slashes.
        named = {name.replace("/", "-"): files for name, files in found.items()}
        self.names = list(named)[: config.clips or None]
        self._files = named

    def poses(self, name: str) -> tuple[Poses, Poses]:
        poses = load_poses(self._files[name].poses, argument="dataset")
        number = self._config.reference_frame
        if number >= poses.frames:
            raise UserError(f"reference_frame={number}: {self._files[name].poses} has {poses.frames} frames")
        if poses.persons == 0:
            raise UserError(f"dataset: {self._files[name].poses} shows nobody")
        return poses[number].person(0), poses[self._chosen(poses)].person(0)

    def clip(self, name: str) -> EvaluationClip:
        files, video = self._files[name], self._video(name)
        with VideoReader(video, argument="dataset") as reader:
            size, poses = reader.size, load_poses(files.poses, size=reader.size, argument="dataset")
            if len(reader) != poses.frames:
                raise UserError(f"dataset: {video} has {len(reader)} frames, {files.poses} has {poses.frames}")
            numbers = [self._config.reference_frame, *np.arange(len(reader))[self._chosen(poses)].tolist()]
            images = reader.get(numbers)
        reference, driving = (fitting_poses(part, size, "dataset") for part in self.poses(name))
        masks = _drawn(reference, driving) if files.masks is None else _read(files.masks, numbers, size)
        return EvaluationClip(
            name,
            Reference(images[0], reference, masks[0]),
            Driving(images[1:], driving, masks[1:]),
        )

    def stamps(self, name: str) -> list:
        files = [self._files[name].poses, self._video(name)]
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    def _video(self, name: str) -> Path:
        if self._files[name].video is None:
            raise UserError(f"dataset: {self._files[name].poses} has no video of its name beside it")
        return self._files[name].video

    def _chosen(self, poses: Poses) -> slice:
        stride, frames = self._config.stride, self._config.frames or poses.frames
        return slice(0, (frames - 1) * stride + 1, stride)


def _prepared(root: Path) -> dict[str, FilmedFiles]:
    """The clips of a manifest that are marked as held out, or all when none is."""
    clips = read_manifest(root).clips
    clips = [clip for clip in clips if clip.split == "heldout"] or clips
    if not clips:
        raise UserError(f"dataset={root} holds no clip that could be prepared")
    return {clip.name: FilmedFiles(clip.poses, clip.video, clip.masks) for clip in clips}


def _beside(root: Path) -> dict[str, FilmedFiles]:
    """The pose files below a folder, with what lies beside them."""
    if not root.is_dir():
        raise UserError(f"dataset={root} is not a folder; give one, or dataset={RENDERED}")
    files = sorted((path for path in root.rglob("*") if path.suffix in POSE_SUFFIXES), key=natural_order)
    if not files:
        raise UserError(f"dataset={root} holds no pose files ({', '.join(POSE_SUFFIXES)})")
    found = {}
    for file in files:
        masks = file.with_name(file.stem + MASKS_SUFFIX)
        name = file.relative_to(root).with_suffix("").as_posix()
        found[name] = FilmedFiles(file, video_of(file), masks if masks.is_dir() else None)
    return found


def _read(folder: Path, numbers: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """(n, 1, h, w) bool: the union of the persons in the frames with these numbers."""
    return np.stack([read_union(folder, number, size) > 127 for number in numbers])[:, None]


def _drawn(reference: Poses, driving: Poses) -> np.ndarray:
    """(1 + f, 1, h, w) bool: silhouettes around the keypoints of the reference and of the clip."""
    keypoints = np.concatenate([reference.keypoints, driving.keypoints])[:, 0]
    scores = np.concatenate([reference.scores, driving.scores])[:, 0]
    drawn = [
        draw_silhouette(points, visible(known, points, THRESHOLD), driving.size)
        for points, known in zip(keypoints, scores, strict=True)
    ]
    return np.stack(drawn)[:, None]
