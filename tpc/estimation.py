"""The transform that carries a person of the reference onto a driving person: one frame at a time, each judged."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np

from data.poses.person import COCO_MIRROR, PackedMasks
from data.poses.poses import Poses
from tpc.bends.bending import Pose
from tpc.bends.outlines import Outline, align_outline
from tpc.config import CalibrationConfig
from tpc.procrustes import (
    AffineTransform,
    FailedEstimation,
    LinearTransform,
    SimilarityTransform,
    apply_matrix,
    residual,
)
from tpc.silhouettes import (
    BITMAP_SIDE,
    FIXED_RULES,
    NUM_KEYPOINTS,
    NUM_SAMPLES,
    ReferenceSilhouette,
    Silhouette,
    body_height,
    draw_silhouette,
    facing,
    silhouette_from_mask,
    silhouette_iou,
    visible,
)
from tpc.subsets import SearchLimits, Selection, select_exhaustive
from tpc.warping import Framing, mask_pyramid, warp_mask

# A torso turned by more than about 75 degrees from the camera is seen neither from the front nor from behind.
MIN_FACING = 0.25
DRAWING_SIDE = 320  # pixels of the person's longer side when a silhouette is drawn for comparison only


@dataclass(frozen=True)
class ReferencePerson:
    """A person of the reference, as all frames need it."""

    keypoints: np.ndarray  # (17, 2)
    scores: np.ndarray  # (17,)
    seen: np.ndarray  # (17,) bool
    silhouette: ReferenceSilhouette  # from the person's mask, or drawn around the keypoints
    size: tuple[int, int]  # (width, height) of the reference
    mask: np.ndarray | None = None  # (h, w) bool, as given

    @classmethod
    def of(
        cls,
        keypoints: np.ndarray,
        scores: np.ndarray,
        size: tuple[int, int],
        mask: np.ndarray | None,
        threshold: float,
    ) -> "ReferencePerson":
        seen = visible(scores, keypoints, threshold)
        if mask is None:
            outline = drawn_silhouette(keypoints, seen, size, NUM_SAMPLES)
        else:
            outline = silhouette_from_mask(mask, NUM_SAMPLES)
        points, scores = keypoints.astype(np.float64), scores.astype(np.float64)
        return cls(points, scores, seen, ReferenceSilhouette.of(outline), size, mask)

    @property
    def centre(self) -> np.ndarray:
        """(2,) middle of the visible keypoints."""
        return self.keypoints[self.seen].mean(0) if self.seen.any() else np.zeros(2)

    @cached_property
    def outline(self) -> Outline | None:
        """The outline of the mask; None when none was given."""
        return None if self.mask is None else Outline.of(self.keypoints, self.seen, self.mask)

    def mirrored(self) -> "ReferencePerson":
        """The same person with left and right keypoints exchanged."""
        exchanged = (values[COCO_MIRROR] for values in (self.keypoints, self.scores, self.seen))
        return ReferencePerson(*exchanged, self.silhouette, self.size, self.mask)


@dataclass(frozen=True)
class Estimate:
    """The transform of one person in one frame."""

    matrix: np.ndarray | None  # (3, 3) reference to driving pixels, or None
    reason: str | None = None  # why there is none; or something to know about the one there is
    keypoints: tuple[int, ...] = ()  # indices of the points used
    residual: float = 0.0  # their weighted RMS distance after the transform, driving pixels
    # Of samples of the two silhouettes, which selection and gate go by; `PersonFrame.mask_iou` is that of the pixels.
    iou: float = 0.0
    mirrored: bool = False  # left and right keypoints of the reference were exchanged
    common: tuple[int, ...] = ()  # indices of the points visible in both
    pose: Pose | None = None  # for the bends of an articulated calibration


def estimate_clip(
    persons: list[ReferencePerson],
    poses: Poses,
    slots: np.ndarray,
    masks: Sequence[np.ndarray] | None,
    framing: Framing,
    config: CalibrationConfig,
    order: Iterable[int],
) -> tuple[list[list[Estimate]], PackedMasks, PackedMasks]:
    """Estimates [frame][person], target masks and other masks of a clip, see `Calibration`.

    Args:
        slots: (frames, persons), see `matching.match_persons`.
        masks: of every frame (driving persons, H, W) bool; a person without one, or with an empty one, is drawn.
        order: names each frame once; a frame's masks are read once.
    """
    frames: list[list[Estimate]] = [[] for _ in range(len(slots))]
    targets = PackedMasks.zeros((len(slots), len(persons)), framing.size)
    others = PackedMasks.zeros((len(slots),), framing.size)
    seen = visible(poses.scores, poses.keypoints, config.score_threshold)
    for f in order:
        given: list[np.ndarray | None] = [None] * poses.keypoints.shape[1]
        if masks is not None:
            given = [mask if mask.any() else None for mask in np.asarray(masks[f]).astype(bool)]
        outlines = [_model_mask(poses.keypoints[f, s], seen[f, s], given[s], framing) for s in range(len(given))]
        for p, person in enumerate(persons):
            slot = slots[f, p]
            if slot < 0:
                frames[f].append(Estimate(None, "the person is not in the frame"))
                continue
            targets[f, p] = outlines[slot]
            keypoints = poses.keypoints[f, slot]
            if given[slot] is None:
                silhouette = drawn_silhouette(keypoints, seen[f, slot], poses.size)
            else:
                silhouette = silhouette_from_mask(given[slot], max_side=BITMAP_SIDE)
            found = estimate(person, keypoints, poses.scores[f, slot], silhouette, poses.size, config)
            if config.transform == "articulated" and found.matrix is not None:
                pose = _pose(
                    person, found, keypoints, poses.scores[f, slot], seen[f, slot], silhouette, poses.size, config
                )
                found = replace(found, pose=pose)
            frames[f].append(found)
        strangers = [outline for s, outline in enumerate(outlines) if s not in slots[f]]
        if strangers:
            others[f] = np.logical_or.reduce(strangers)
    return frames, targets, others


def _pose(
    person: ReferencePerson,
    found: Estimate,
    keypoints: np.ndarray,
    scores: np.ndarray,
    seen: np.ndarray,
    silhouette: Silhouette,
    size: tuple[int, int],
    config: CalibrationConfig,
) -> Pose:
    """The driving person's keypoints, moved to where its silhouette, if it is not drawn around them, has them."""
    if found.mirrored:
        keypoints, scores, seen = (values[COCO_MIRROR] for values in (keypoints, scores, seen))
    target = np.where(seen[:, None], keypoints, 0).astype(np.float64)
    outlined = person.outline is not None and not silhouette.drawn
    if outlined:
        target = align_outline(
            person.outline,
            person.keypoints,
            target,
            seen & person.seen,
            found.matrix,
            silhouette,
            size,
            config.bend_radius,
        )
    return Pose(target, seen, scores.astype(np.float64), found.mirrored, found.matrix, outlined)


def _model_mask(keypoints: np.ndarray, seen: np.ndarray, mask: np.ndarray | None, framing: Framing) -> np.ndarray:
    """A driving person's mask (h, w) bool in the model's frame."""
    if mask is None:
        return draw_silhouette(apply_matrix(framing.frame_map, keypoints), seen, framing.size)
    if mask.shape == framing.size[::-1] and np.allclose(framing.frame_map, np.eye(3)):
        return mask
    return warp_mask(mask_pyramid(mask), framing.frame_map, framing.size)


def drawn_silhouette(
    keypoints: np.ndarray, seen: np.ndarray, size: tuple[int, int], max_samples: int | None = None
) -> Silhouette:
    """The outline around a skeleton, drawn no larger than a comparison needs."""
    if not seen.any():
        return silhouette_from_mask(np.zeros((1, 1), bool))
    extent = np.ptp(keypoints[seen], axis=0).max()
    shrink = min(1.0, DRAWING_SIDE / max(float(extent), 1.0))
    # Pixels of the small drawing are (x + 0.5) shrink - 0.5, so that edges stay edges.
    small = (int(np.ceil(size[0] * shrink)), int(np.ceil(size[1] * shrink)))
    mask = draw_silhouette((keypoints + 0.5) * shrink - 0.5, seen, small)
    outline = silhouette_from_mask(mask, max_samples, BITMAP_SIDE)
    origin = tuple((value + 0.5) / shrink - 0.5 for value in outline.origin)
    return Silhouette(outline.mask, origin, outline.cell / shrink, outline.area / shrink**2, drawn=True)


def estimate(
    reference: ReferencePerson,
    keypoints: np.ndarray,
    scores: np.ndarray,
    silhouette: Silhouette,
    size: tuple[int, int],
    config: CalibrationConfig,
) -> Estimate:
    """Estimate and judge the transform that carries the reference person onto a driving person.

    Keypoints (17, 2), scores, silhouette and size (width, height) are of the driving frame; `config` is resolved.
    """
    seen = visible(scores, keypoints, config.score_threshold)
    note, mirrored = None, False
    ours, theirs = facing(reference.keypoints, reference.seen), facing(keypoints, seen)
    if ours * theirs < 0 and min(abs(ours), abs(theirs)) >= MIN_FACING:
        note = "one of the two is seen from behind"
        if config.back_view == "reject":
            return Estimate(None, note)
        if config.back_view == "swap":
            reference, mirrored, note = reference.mirrored(), True, f"{note}: left and right are exchanged"
    common = reference.seen & seen
    weights = common * (reference.scores * scores if config.weighted else 1.0)
    target = np.where(seen[:, None], keypoints, 0).astype(np.float64)
    shared = tuple(int(i) for i in np.flatnonzero(common))
    selection = _select(reference, target, weights, silhouette, size, config)
    if not selection.keypoints:
        return Estimate(None, selection.reason, mirrored=mirrored, common=shared)
    chosen = np.zeros(len(weights))
    chosen[list(selection.keypoints)] = weights[list(selection.keypoints)]
    transform = _fit(reference, target, chosen, size, config.transform)
    if not transform:
        return Estimate(None, transform.reason, mirrored=mirrored, common=shared)
    matrix = np.asarray(transform.matrix)
    error = float(residual(matrix, reference.keypoints, target, chosen))
    iou = silhouette_iou(matrix, reference.silhouette, silhouette, size)
    doubt = _doubt(matrix, iou, config)
    return Estimate(None if doubt else matrix, doubt or note, selection.keypoints, error, iou, mirrored, shared)


def _select(
    reference: ReferencePerson,
    target: np.ndarray,
    weights: np.ndarray,
    silhouette: Silhouette,
    size: tuple[int, int],
    config: CalibrationConfig,
) -> Selection:
    """The keypoints that serve, by the configured rule."""
    if config.keypoints in FIXED_RULES:
        return select_fixed(config.keypoints, weights > 0, config.min_keypoints)
    if config.keypoints == "consensus":
        tolerance = config.consensus_tolerance * body_height(target, weights > 0)
        return select_consensus(reference.keypoints, target, weights, tolerance, config.min_keypoints)
    limits = SearchLimits(config.min_keypoints, config.min_scale, config.max_scale, config.max_rotation)
    return select_exhaustive(
        reference.keypoints,
        target,
        weights,
        reference.silhouette,
        silhouette,
        size,
        limits=limits,
        transform="procrustes" if config.transform == "articulated" else config.transform,
        origins=_origins(reference, size),
        tolerance=config.drawn_tolerance if reference.silhouette.drawn or silhouette.drawn else 0.0,
    )


def select_fixed(rule: str, common: np.ndarray, min_points: int) -> Selection:
    """The points of a fixed rule that are in `common` (17,) bool."""
    chosen = tuple(i for i in FIXED_RULES[rule] if common[i])
    if len(chosen) < min_points:
        group = "" if rule == "all" else f" of the {rule}"
        return Selection((), f"{len(chosen)} keypoints{group} are visible in both; {min_points} are needed")
    return Selection(chosen)


def select_consensus(
    source: np.ndarray, target: np.ndarray, weights: np.ndarray, tolerance: float, min_points: int
) -> Selection:
    """The largest set of points (17, 2) that one similarity maps to within `tolerance` pixels, of least error.

    Every pair of points proposes a transform, which is refitted once to the points that agree with it. Weight 0: not
    visible in both.
    """
    common = np.flatnonzero(weights > 0)
    if len(common) < min_points:
        return Selection((), f"{len(common)} keypoints are visible in both; {min_points} are needed")
    pairs = np.array(list(combinations(common, 2)))
    proposals = np.zeros((len(pairs), NUM_KEYPOINTS))
    np.put_along_axis(proposals, pairs, 1, axis=1)
    for _ in range(2):
        transform = SimilarityTransform.from_estimate(source, target, proposals * weights)
        if not transform:
            return Selection((), transform.reason)
        distance = np.linalg.norm(apply_matrix(transform.matrix, source) - target, axis=-1)
        agreeing = (distance <= tolerance) & (weights > 0) & transform.valid[:, None]
        proposals = agreeing.astype(np.float64)
    counts = agreeing.sum(-1)
    error = np.where(agreeing, np.minimum(distance, tolerance) ** 2, 0.0).sum(-1)
    best = np.lexsort((error, -counts))[0]
    if counts[best] < min_points:
        return Selection((), f"no {min_points} keypoints agree on one transform")
    return Selection(tuple(int(i) for i in np.flatnonzero(agreeing[best])))


def _fit(
    reference: ReferencePerson, target: np.ndarray, weights: np.ndarray, size: tuple[int, int], transform: str
) -> AffineTransform | SimilarityTransform | FailedEstimation:
    if transform == "affine":
        return AffineTransform.from_estimate(reference.keypoints, target, weights)
    if transform == "linear":
        return LinearTransform.from_estimate(reference.keypoints, target, weights, *_origins(reference, size))
    return SimilarityTransform.from_estimate(reference.keypoints, target, weights)


def _origins(reference: ReferencePerson, size: tuple[int, int]) -> list[tuple[float, float]]:
    """The centres of the two images, which a linear transform maps to each other."""
    return [((w - 1) / 2, (h - 1) / 2) for w, h in (reference.size, size)]


def _doubt(matrix: np.ndarray, iou: float, config: CalibrationConfig) -> str | None:
    """The reason why a transform is not to be trusted, None when it is."""
    scale = float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))
    angle = float(abs(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0]))))
    if not config.min_scale <= scale <= config.max_scale:
        return f"the scale {scale:.3g} is outside {config.min_scale:g} to {config.max_scale:g}"
    if angle > config.max_rotation:
        return f"the rotation of {angle:.0f} degrees is beyond {config.max_rotation:g}"
    if iou < config.min_iou:
        return f"the silhouettes' samples overlap by an IoU of {iou:.2f} only, less than {config.min_iou:g}"
    return None
