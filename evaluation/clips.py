"""Clips with everything that an animation is measured by: rendered people, prepared data sets, videos with poses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.optimize import linear_sum_assignment

from core.errors import UserError
from data.clips.rendered import RenderedPeople
from data.config import DrivingPoseConfig
from data.inputs import Driving, Reference, fitting_poses
from data.people.renderer import Rendered
from data.people.scenes import Scene, misaligned_reference
from data.poses.files import load_poses
from data.poses.poses import PoseEstimate, PoseEstimator, Poses, estimate_image, estimate_poses
from data.preparation.clips import read_union
from data.preparation.layouts import video_named
from data.preparation.manifest import has_manifest, read_manifest
from data.transforms import apply_fit, fit_matrix
from data.video.files import VideoReader
from data.video.images import natural_order
from evaluation.config import RENDERED, RENDERED_FPS, ClipsConfig
from evaluation.folders import MASKS_SUFFIX, file_stamps
from tpc.config import CalibrationConfig
from tpc.retargeting import retargeted
from tpc.silhouettes import body_height, draw_silhouettes

# How the references of rendered clips are misaligned, in turn.
MISALIGNED_BY = ("", "turned", "", "scaled", "", "turned and scaled")
POSE_SUFFIXES = (".npz", ".json")
# Errors of masks in sizes of the person, the longer side of its box: greatest offset of the whole boundary, standard
# deviation and length of its raggedness. An IoU of 0.91 with the exact mask; BlazePose's masks of rendered people, who
# are easy to tell from their backgrounds, have 0.965, and as fine a grain.
MASK_OFFSET, MASK_RAGGEDNESS, MASK_GRAIN = 0.005, 0.005, 0.012


@dataclass(frozen=True)
class EvaluationClip:
    """A reference, a driving clip, and the right answer: the driving clip itself, unless another body drives."""

    name: str
    reference: Reference
    driving: Driving  # with frames and masks
    target: Driving | None = None  # the reference's person in the driver's motion, where that is somebody else

    def truth(self, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """True frames (f, h, w, 3) uint8 and person masks (f, h, w) bool at a model's (width, height)."""
        true = self.target or self.driving
        matrix = fit_matrix(true.poses.size, size)
        frames = np.stack([apply_fit(frame, matrix, size) for frame in true.frames])
        person = true.masks.any(axis=1).astype(np.uint8) * 255
        return frames, np.stack([apply_fit(mask, matrix, size) for mask in person]) >= 128


class ClipSet(Protocol):
    """Clips by name."""

    names: Sequence[str]

    def clip(self, name: str) -> EvaluationClip:
        """Images, poses and masks of a clip."""

    def stamps(self, name: str) -> list | None:
        """Facts that differ when a clip's files have changed; None for clips without files."""


class PosedClipSet(ClipSet, Protocol):
    """Clips whose poses can be had without their images."""

    def poses(self, name: str) -> tuple[Poses, Poses]:
        """Poses of the reference, one frame, and of the clip."""


def open_clips(config: ClipsConfig) -> PosedClipSet:
    """The clips that a configuration names."""
    return RenderedClips(config) if config.dataset == RENDERED else FilmedClips(config)


class RenderedClips:
    """Rendered people; half of the references are the first frame, the others show it turned, scaled, or both."""

    def __init__(self, config: ClipsConfig):
        self._config, self._people = config, rendered_people(config)
        self.names = [f"rendered-{index:03d}" for index in range(config.clips)]

    def poses(self, name: str) -> tuple[Poses, Poses]:
        clip = self.clip(name)
        return clip.reference.poses, clip.driving.poses

    def clip(self, name: str) -> EvaluationClip:
        index = self.names.index(name)
        scene = at_first_frame(self._people.scene(index))
        # Both are drawn for every clip, so that one clip's misalignment does not change another's.
        rng = np.random.default_rng([self._config.clip_seed, index])
        rotation = float(rng.choice([-1, 1]) * rng.uniform(np.pi / 4, np.pi))
        scale = float(rng.choice([rng.uniform(0.35, 0.6), rng.uniform(1.5, 2.2)]))
        misaligned_by = MISALIGNED_BY[index % len(MISALIGNED_BY)]
        reference = misaligned_reference(
            scene,
            scale=scale if "scaled" in misaligned_by else 1.0,
            rotation=rotation if "turned" in misaligned_by else 0.0,
        )
        return rendered_clip(scene, reference, name)

    def stamps(self, name: str) -> list:
        return []


def rendered_people(config: ClipsConfig) -> RenderedPeople:
    """Rendered people as the clips of a configuration show them."""
    return RenderedPeople(
        size=(config.source, config.source),
        num_frames=config.frames,
        stride=config.stride,
        fps=RENDERED_FPS,
        split=config.split,
        seed=config.clip_seed,
        length=config.clips,
        people=config.people,
    )


def at_first_frame(scene: Scene) -> Scene:
    """The scene with its first frame's pose as the reference's, as in the field's protocols for filmed clips."""
    return replace(scene, reference_pose=scene.poses[0])


def rendered_clip(scene: Scene, reference: Rendered, name: str) -> EvaluationClip:
    """The clip of a rendered scene; the reference given may be framed otherwise than the scene."""
    frames = [scene.render(pose) for pose in scene.poses]
    size = (reference.image.shape[1], reference.image.shape[0])
    return EvaluationClip(
        name,
        Reference(reference.image, _poses_of([reference], size), reference.mask[None]),
        Driving(
            np.stack([frame.image for frame in frames]),
            _poses_of(frames, scene.size),
            np.stack([frame.mask for frame in frames])[:, None],
        ),
    )


def _poses_of(frames: Sequence[Rendered], size: tuple[int, int]) -> Poses:
    keypoints = np.stack([frame.keypoints for frame in frames])[:, None]
    return Poses(keypoints, np.stack([frame.scores for frame in frames])[:, None], size, RENDERED_FPS)


def with_pose_noise(clip: EvaluationClip, deviation: float, rng: np.random.Generator) -> EvaluationClip:
    """The clip with errors in the keypoints of reference and frames, as a pose estimator makes them; masks stay.

    `deviation` is the standard deviation along x and y, in parts of the person's standing height in that image.
    """
    reference, driving = (
        replace(given, poses=_noisy(given.poses, deviation, rng)) for given in (clip.reference, clip.driving)
    )
    return replace(clip, reference=reference, driving=driving)


def _noisy(poses: Poses, deviation: float, rng: np.random.Generator) -> Poses:
    errors = rng.normal(0.0, deviation, poses.keypoints.shape)
    heights = [
        [body_height(points, scores > 0) for points, scores in zip(*frame, strict=True)]
        for frame in zip(poses.keypoints, poses.scores, strict=True)
    ]
    found = (poses.scores > 0)[..., None]  # what was not found stays where it is
    return replace(poses, keypoints=poses.keypoints + errors * np.asarray(heights)[..., None, None] * found)


def with_estimates(clip: EvaluationClip, estimator: PoseEstimator, smoothing: float | None = 0.0) -> EvaluationClip:
    """The clip with poses, and masks if the estimator gives any (else None), as `infer.py` estimates them.

    Whoever is found takes the place of the clip's nearest person; who is not found has no keypoints and an empty mask.
    """
    persons = clip.driving.poses.persons
    still = estimate_image(clip.reference.image, estimator, persons)
    moving = estimate_poses(clip.driving.frames, clip.driving.fps, estimator, persons)
    moving = replace(moving, poses=moving.poses.smoothed(smoothing))
    poses, masks = _in_places(still, clip.reference.poses)
    reference = replace(clip.reference, poses=poses, masks=None if masks is None else masks[0])
    poses, masks = _in_places(moving, clip.driving.poses)
    return replace(
        clip, reference=reference, driving=replace(clip.driving, poses=poses, masks=masks, drawn=poses.bridged())
    )


def _in_places(found: PoseEstimate, true: Poses) -> tuple[Poses, np.ndarray | None]:
    """Poses and masks (f, persons, h, w) with the persons of `true` in their order."""
    distances = np.linalg.norm(true.keypoints[:, :, None] - found.poses.keypoints[:, None], axis=-1)
    both = (true.scores > 0)[:, :, None] & (found.poses.scores > 0)[:, None]  # (f, persons, found, 17)
    far = 1e6  # pixels, for those who are never seen together
    cost = np.where(both.any((0, 3)), (distances * both).sum((0, 3)) / np.maximum(both.sum((0, 3)), 1), far)
    keypoints, scores = np.zeros_like(true.keypoints), np.zeros_like(true.scores)
    masks = np.zeros((true.frames, true.persons, *true.size[::-1]), bool)
    for person, slot in zip(*linear_sum_assignment(cost), strict=True):
        keypoints[:, person], scores[:, person] = found.poses.keypoints[:, slot], found.poses.scores[:, slot]
        if found.masks is not None:
            masks[:, person] = found.masks[:, slot]
    without_masks = found.masks is None and found.poses.persons > 0
    return replace(true, keypoints=keypoints, scores=scores), None if without_masks else masks


def with_masks(clip: EvaluationClip, exact: EvaluationClip, kind: str, rng: np.random.Generator) -> EvaluationClip:
    """The clip with masks of one of `MASKS` in reference and frames; `exact` is the clip that it was made from.

    Estimated ones are an estimator's own where `with_estimates` has them, else each is an `estimated_mask`. Drawn ones
    are None, so that the calibration draws silhouettes around the keypoints.
    """

    def chosen(given: Reference | Driving, true: Reference | Driving) -> np.ndarray | None:
        if kind == "exact":
            return true.masks
        if kind == "drawn":
            return None
        if given.masks is not None and given.masks is not true.masks:
            return given.masks
        masks = [estimated_mask(mask, rng) for mask in true.masks.reshape(-1, *true.masks.shape[-2:])]
        return np.stack(masks).reshape(true.masks.shape)

    reference = replace(clip.reference, masks=chosen(clip.reference, exact.reference))
    return replace(clip, reference=reference, driving=replace(clip.driving, masks=chosen(clip.driving, exact.driving)))


def with_retargeting(clip: EvaluationClip, exact: EvaluationClip, mode: str) -> EvaluationClip:
    """The clip whose driving poses have the reference's proportions, by one of `RETARGETS` or "off".

    `exact` is the clip that it was made from: its true poses and masks are what retargeting without errors would give.
    """
    if mode == "off":
        return clip
    if mode == "exact":
        true = exact.target or exact.driving
        return replace(clip, driving=replace(clip.driving, poses=true.poses, masks=true.masks, drawn=None))
    driving, _ = retargeted(clip.reference, clip.driving, DrivingPoseConfig(retarget=mode), CalibrationConfig())
    return replace(clip, driving=driving)


def estimated_mask(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mask (h, w) bool as an estimator gives it: everywhere wider or narrower, with a ragged boundary.

    Only pixels within `MASK_OFFSET` + 2 `MASK_RAGGEDNESS` sizes of the person of the boundary change. Every mask has
    errors of its own, so those of a clip's frames flicker, as from estimators that see one frame at a time.
    """
    if mask.all() or not mask.any():
        return mask.copy()
    size = max(np.ptp(indices) + 1 for indices in np.nonzero(mask))
    # A field of deviation 1 that is alike everywhere: white noise, smoothed.
    field = gaussian_filter(rng.standard_normal(mask.shape), MASK_GRAIN * size, mode="wrap")
    offset = rng.uniform(-MASK_OFFSET, MASK_OFFSET) + MASK_RAGGEDNESS * np.clip(field / field.std(), -2, 2)
    # Pixels to the boundary, positive inside; it runs halfway between pixel centres.
    depth = np.where(mask, distance_transform_edt(mask) - 0.5, 0.5 - distance_transform_edt(~mask))
    return depth + size * offset > 0


class ClipPaths(NamedTuple):
    """The files of a filmed clip."""

    poses: Path
    video: Path | None  # file or folder of frames; None when there are poses only
    masks: Path | None  # folder, or None: silhouettes are drawn around the keypoints


class FilmedClips:
    """Videos with poses; the reference is one of the video's own frames."""

    def __init__(self, config: ClipsConfig):
        self._config, root = config, Path(config.dataset)
        found = _prepared_clips(root) if has_manifest(root) else _videos_with_poses(root)
        # Clips of folders below are named with the folder; a part of a run needs a name without slashes.
        self._paths = {name.replace("/", "-"): paths for name, paths in found.items()}
        self.names = list(self._paths)[: config.clips or None]

    def poses(self, name: str) -> tuple[Poses, Poses]:
        path, reference_frame = self._paths[name].poses, self._config.reference_frame
        poses = load_poses(path, argument="dataset")
        if reference_frame >= poses.frames:
            raise UserError(f"reference_frame={reference_frame}: {path} has {poses.frames} frames")
        if poses.persons == 0:
            raise UserError(f"dataset: {path} shows nobody")
        return poses[reference_frame].person(0), poses[self._chosen(poses)].person(0)

    def clip(self, name: str) -> EvaluationClip:
        paths, video = self._paths[name], self._video(name)
        with VideoReader(video, argument="dataset") as reader:
            size, poses = reader.size, load_poses(paths.poses, size=reader.size, argument="dataset")
            if len(reader) != poses.frames:
                raise UserError(f"dataset: {video} has {len(reader)} frames, {paths.poses} has {poses.frames}")
            indices = [self._config.reference_frame, *np.arange(len(reader))[self._chosen(poses)].tolist()]
            images = reader.get(indices)
        reference, driving = (fitting_poses(part, size, "dataset") for part in self.poses(name))
        if paths.masks is None:
            masks = np.concatenate([draw_silhouettes(part) for part in (reference, driving)])  # (1 + f, 1, h, w)
        else:
            masks = np.stack([read_union(paths.masks, index, size) > 127 for index in indices])[:, None]
        return EvaluationClip(name, Reference(images[0], reference, masks[0]), Driving(images[1:], driving, masks[1:]))

    def stamps(self, name: str) -> list:
        return file_stamps([self._paths[name].poses, self._video(name)])

    def _video(self, name: str) -> Path:
        if self._paths[name].video is None:
            raise UserError(f"dataset: {self._paths[name].poses} has no video of its name beside it")
        return self._paths[name].video

    def _chosen(self, poses: Poses) -> slice:
        stride, frames = self._config.stride, self._config.frames or poses.frames
        return slice(0, (frames - 1) * stride + 1, stride)


def _prepared_clips(root: Path) -> dict[str, ClipPaths]:
    """The clips of a manifest that are marked as held out, or all when none is."""
    clips = read_manifest(root).clips
    clips = [clip for clip in clips if clip.split == "heldout"] or clips
    if not clips:
        raise UserError(f"dataset={root} holds no clip that could be prepared")
    return {clip.name: ClipPaths(clip.poses, clip.video, clip.masks) for clip in clips}


def _videos_with_poses(root: Path) -> dict[str, ClipPaths]:
    """The pose files below a folder, with videos and masks that lie beside them."""
    if not root.is_dir():
        raise UserError(f"dataset={root} is not a folder; give one, or dataset={RENDERED}")
    files = sorted((path for path in root.rglob("*") if path.suffix in POSE_SUFFIXES), key=natural_order)
    if not files:
        raise UserError(f"dataset={root} holds no pose files ({', '.join(POSE_SUFFIXES)})")
    found = {}
    for file in files:
        masks = file.with_name(file.stem + MASKS_SUFFIX)
        name = file.relative_to(root).with_suffix("").as_posix()
        found[name] = ClipPaths(file, video_named(file.with_suffix("")), masks if masks.is_dir() else None)
    return found
