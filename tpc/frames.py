"""The stages of a calibration over a whole clip: estimate every frame, follow each person, warp what is needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from data.poses.poses import Poses
from tpc.config import CalibrationConfig
from tpc.estimation import Estimate, ReferencePerson, drawn_silhouette, estimate
from tpc.exhaustive import BITMAP_SIDE
from tpc.matching import assign_persons
from tpc.procrustes import apply_matrix
from tpc.silhouettes import draw_silhouette, silhouette_from_mask, visible
from tpc.storage import LazyImages, PackedMasks
from tpc.trajectory import interpolate, smooth, to_matrices, to_parameters, unwrap
from tpc.warping import ImagePyramid, mask_pyramid, place_person, quad_mask, remove_persons, warp_mask

# Calibrated images whose corners differ by less, in pixels of the model's frame, are one image.
SAME_PIXELS = 1 / 64


@dataclass(frozen=True)
class Scene:
    """Sizes (width, height) and (3, 3) maps between the original images and the model's frame."""

    size: tuple[int, int]
    reference_size: tuple[int, int]
    driving_size: tuple[int, int]
    frame_map: np.ndarray
    reference_map: np.ndarray


@dataclass(frozen=True)
class Estimates:
    """What the frames of a clip say, one by one.

    Attributes:
        frames: for every frame, the estimate of every person of the reference.
        target_masks, other_masks: see `Calibration`.
    """

    frames: list[list[Estimate]]
    target_masks: PackedMasks
    other_masks: PackedMasks


@dataclass(frozen=True)
class PersonTrack:
    """One person's transforms over the clip: (frames, 3, 3), identity where neither flag (frames,) is set."""

    matrices: np.ndarray
    calibrated: np.ndarray
    interpolated: np.ndarray

    @property
    def available(self) -> np.ndarray:
        return self.calibrated | self.interpolated


@dataclass(frozen=True)
class WarpedClip:
    """What warping a clip gives.

    Attributes:
        images, masks, member: see `Calibration`.
        iou: (frames, persons) of the calibrated and the driving person's masks, nan where there is nothing to compare.
    """

    images: LazyImages
    masks: PackedMasks
    member: np.ndarray
    iou: np.ndarray


def match_persons(persons: list[ReferencePerson], poses: Poses, config: CalibrationConfig) -> np.ndarray:
    """(frames, persons) int: the slot of the driving poses that each person of the reference takes, -1 = absent."""
    frames, available = poses.keypoints.shape[:2]
    seen = visible(poses.scores, poses.keypoints, config.score_threshold)
    if not persons:
        return np.full((frames, 0), -1)
    if config.match == "given":
        slots = np.arange(len(persons))
        present = np.pad(seen.any(-1), ((0, 0), (0, len(persons))))[:, : len(persons)]
        return np.where(present & (slots < available), slots, -1)
    return assign_persons(
        np.stack([p.keypoints for p in persons]),
        np.stack([p.seen for p in persons]),
        persons[0].size,
        poses.keypoints,
        seen,
        poses.size,
    )


def estimate_clip(
    persons: list[ReferencePerson],
    poses: Poses,
    slots: np.ndarray,
    masks: Sequence[np.ndarray] | None,
    scene: Scene,
    config: CalibrationConfig,
    order: Iterable[int],
) -> Estimates:
    """Estimate every person in every frame of `order`, which must name each frame once.

    The outline of a person whose mask is not given, or empty, is drawn around the keypoints.
    """
    frames: list[list[Estimate]] = [[] for _ in range(len(slots))]
    targets = PackedMasks.zeros((len(slots), len(persons)), scene.size)
    others = PackedMasks.zeros((len(slots),), scene.size)
    seen = visible(poses.scores, poses.keypoints, config.score_threshold)
    for f in order:
        given: list[np.ndarray | None] = [None] * poses.keypoints.shape[1]
        if masks is not None:
            given = [mask if mask.any() else None for mask in np.asarray(masks[f]).astype(bool)]
        outlines = [_model_mask(poses.keypoints[f, s], seen[f, s], given[s], scene) for s in range(len(given))]
        for p, person in enumerate(persons):
            slot = slots[f, p]
            if slot < 0:
                frames[f].append(Estimate(None, "the person is not in the frame"))
                continue
            targets[f, p] = outlines[slot]
            keypoints = poses.keypoints[f, slot]
            if given[slot] is None:
                silhouette = drawn_silhouette(keypoints, seen[f, slot], scene.driving_size)
            else:
                silhouette = silhouette_from_mask(given[slot], max_side=BITMAP_SIDE)
            frames[f].append(
                estimate(person, keypoints, poses.scores[f, slot], silhouette, scene.driving_size, config)
            )
        strangers = [outline for s, outline in enumerate(outlines) if s not in slots[f]]
        if strangers:
            others[f] = np.logical_or.reduce(strangers)
    return Estimates(frames, targets, others)


def _model_mask(keypoints: np.ndarray, seen: np.ndarray, mask: np.ndarray | None, scene: Scene) -> np.ndarray:
    """A driving person's mask (h, w) bool in the model's frame."""
    if mask is None:
        return draw_silhouette(apply_matrix(scene.frame_map, keypoints), seen, scene.size)
    if mask.shape == scene.size[::-1] and np.allclose(scene.frame_map, np.eye(3)):
        return mask
    return warp_mask(mask_pyramid(mask), scene.frame_map, scene.size)


def follow_person(person: ReferencePerson, estimates: list[Estimate], config: CalibrationConfig) -> PersonTrack:
    """Bridge short gaps and filter noise in one person's transforms."""
    calibrated = np.array([e.matrix is not None for e in estimates], bool)
    matrices = np.stack([np.eye(3) if e.matrix is None else e.matrix for e in estimates] or [np.eye(3)][:0])
    similar = config.transform != "affine"
    matrices = matrices.reshape(-1, 3, 3)
    parameters = unwrap(to_parameters(matrices, person.centre, similar), calibrated)
    parameters, filled = interpolate(parameters, calibrated, config.max_gap)
    available = calibrated | filled
    if filled.any() or config.smoothing > 0:
        parameters = smooth(parameters, available, config.smoothing)
        changed = to_matrices(parameters, person.centre, similar)
        matrices = np.where(available[:, None, None], changed, matrices)
    return PersonTrack(matrices, calibrated, filled)


def warp_clip(
    reference: np.ndarray,
    masks: np.ndarray,
    tracks: list[PersonTrack],
    targets: PackedMasks,
    scene: Scene,
    config: CalibrationConfig,
) -> WarpedClip:
    """Find the distinct calibrated images, warp their masks now and the images when they are asked for.

    Fills the target masks of interpolated frames in which the person was not seen with the calibrated person's.
    """
    frames = len(tracks[0].matrices) if tracks else len(targets)
    member, iou = np.full((frames, len(tracks)), -1), np.full((frames, len(tracks)), np.nan)
    known: dict[tuple, int] = {}
    sources: list[tuple[int, np.ndarray]] = []
    warped = PackedMasks.zeros((int(sum(track.available.sum() for track in tracks)),), scene.size)
    coverage = [mask_pyramid(mask) for mask in masks]
    for p, track in enumerate(tracks):
        for f in np.flatnonzero(track.available):
            matrix = scene.frame_map @ track.matrices[f]
            key = (p, *_corner_key(matrix, scene.reference_size))
            if key not in known:
                known[key] = len(sources)
                warped[len(sources)] = warp_mask(coverage[p], matrix, scene.size)
                sources.append((p, matrix))
            member[f, p] = known[key]
            mask, target = warped[member[f, p]], targets[f, p]
            if target.any():
                iou[f, p] = np.count_nonzero(mask & target) / np.count_nonzero(mask | target)
            elif track.interpolated[f]:
                targets[f, p] = mask
    painter = _Painter(ImagePyramid(np.ascontiguousarray(reference)), coverage, masks, scene, config.fill)
    images = LazyImages(len(sources), scene.size, lambda i: painter.paint(*sources[i]))
    return WarpedClip(images, warped.first(len(sources)), member, iou)


def _corner_key(matrix: np.ndarray, size: tuple[int, int]) -> tuple[int, ...]:
    corners = np.array([[0, 0], [size[0], 0], [0, size[1]]], np.float64)
    return tuple(np.round(apply_matrix(matrix, corners).reshape(-1) / SAME_PIXELS).tolist())


class _Painter:
    """Paints calibrated images."""

    def __init__(self, image: ImagePyramid, coverage: list[ImagePyramid], masks: np.ndarray, scene: Scene, fill: str):
        self.image, self.coverage, self.scene, self.fill = image, coverage, scene, fill
        self.background = self._background(masks)

    def paint(self, person: int, matrix: np.ndarray) -> np.ndarray:
        """(h, w, 3) the image of one person after `matrix`, original reference pixels to the model's frame."""
        if self.fill == "reference":
            warped = self.image.warp(matrix, self.scene.size)
            return np.where(quad_mask(matrix, self.image.size, self.scene.size)[..., None], warped, np.uint8(0))
        return place_person(self.image, self.coverage[person], matrix, self.background)

    def _background(self, masks: np.ndarray) -> np.ndarray:
        width, height = self.scene.size
        background = np.zeros((height, width, 3), np.uint8)
        everybody = np.logical_or.reduce(masks, axis=0) if len(masks) else np.zeros(self.image.size[::-1], bool)
        if self.fill == "mean":
            pixels = self.image.levels[0][~everybody]
            background[:] = np.round(pixels.mean(0)) if len(pixels) else 127
        if self.fill == "scene":
            # A little wider than the mask, whose edge pixels still show the person, and wherever the image does not
            # reach: its outermost pixels, often a frame or a line, would be drawn out into bars.
            to_model, size = self.scene.reference_map, self.scene.size
            unknown = (mask_pyramid(everybody).warp(to_model, size) > 0) | ~quad_mask(to_model, self.image.size, size)
            grown = _grow(unknown, max(2, max(size) // 128))
            background = remove_persons(self.image.warp(to_model, size), grown)
        return background


def _grow(mask: np.ndarray, pixels: int) -> np.ndarray:
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * pixels + 1, 2 * pixels + 1))
    return cv2.dilate(mask.astype(np.uint8), kernel).astype(bool)
