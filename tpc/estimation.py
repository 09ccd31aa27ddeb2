"""One person, one frame: which keypoints, which transform, and whether to trust it."""

from dataclasses import dataclass

import numpy as np

from tpc.config import CalibrationConfig
from tpc.exhaustive import (
    BITMAP_SIDE,
    NUM_SAMPLES,
    ReferenceSilhouette,
    SearchLimits,
    select_exhaustive,
    silhouette_iou,
)
from tpc.procrustes import AffineTransform, LinearTransform, SimilarityTransform, residual
from tpc.silhouettes import MIRRORED, Silhouette, body_height, draw_silhouette, facing, silhouette_from_mask, visible
from tpc.subset import FIXED_RULES, Selection, select_consensus, select_fixed

# A torso turned by more than about 75 degrees from the camera is seen neither from the front nor from behind.
MIN_FACING = 0.25
DRAWING_SIDE = 320  # pixels of the person's longer side when a silhouette is drawn for comparison only


@dataclass(frozen=True)
class ReferencePerson:
    """What all frames need of a person of the reference.

    Attributes:
        keypoints, scores, seen: (17, 2), (17,), (17,) bool.
        silhouette: from the person's mask, or drawn around the keypoints.
        size: (width, height) of the reference.
    """

    keypoints: np.ndarray
    scores: np.ndarray
    seen: np.ndarray
    silhouette: ReferenceSilhouette
    size: tuple[int, int]

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
        return cls(
            keypoints.astype(np.float64), scores.astype(np.float64), seen, ReferenceSilhouette.of(outline), size
        )

    @property
    def centre(self) -> np.ndarray:
        """(2,) middle of the visible keypoints."""
        return self.keypoints[self.seen].mean(0) if self.seen.any() else np.zeros(2)

    def mirrored(self) -> "ReferencePerson":
        """The same person with left and right keypoints exchanged."""
        exchanged = (values[MIRRORED] for values in (self.keypoints, self.scores, self.seen))
        return ReferencePerson(*exchanged, self.silhouette, self.size)


@dataclass(frozen=True)
class Estimate:
    """The transform of one frame.

    Attributes:
        matrix: (3, 3) reference to driving pixels, or None.
        reason: why there is none; or something to know about the one there is.
        keypoints: numbers of the points used.
        residual: their weighted RMS distance after the transform, driving pixels.
        iou: of the two silhouettes in the driving frame.
        mirrored: left and right keypoints of the reference were exchanged.
        common: numbers of the points visible in both.
    """

    matrix: np.ndarray | None
    reason: str | None = None
    keypoints: tuple[int, ...] = ()
    residual: float = 0.0
    iou: float = 0.0
    mirrored: bool = False
    common: tuple[int, ...] = ()


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
    return Silhouette(outline.mask, origin, outline.cell / shrink, outline.area / shrink**2)


def estimate(
    reference: ReferencePerson,
    keypoints: np.ndarray,
    scores: np.ndarray,
    silhouette: Silhouette,
    size: tuple[int, int],
    config: CalibrationConfig,
) -> Estimate:
    """Estimate and judge the transform that carries the reference person onto a driving person.

    Args:
        keypoints, scores: (17, 2) driving pixels, (17,).
        silhouette: of the driving person.
        size: (width, height) of the driving frame.
        config: resolved.
    """
    seen = visible(scores, keypoints, config.score_threshold)
    note, mirrored = None, False
    if _seen_from_other_side(reference, keypoints, seen):
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
    if doubt:
        return Estimate(None, doubt, selection.keypoints, error, iou, mirrored, shared)
    return Estimate(matrix, note, selection.keypoints, error, iou, mirrored, shared)


def _seen_from_other_side(reference: ReferencePerson, keypoints: np.ndarray, seen: np.ndarray) -> bool:
    ours, theirs = facing(reference.keypoints, reference.seen), facing(keypoints, seen)
    return ours * theirs < 0 and min(abs(ours), abs(theirs)) >= MIN_FACING


def _select(
    reference: ReferencePerson,
    target: np.ndarray,
    weights: np.ndarray,
    silhouette: Silhouette,
    size: tuple[int, int],
    config: CalibrationConfig,
) -> Selection:
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
    )


def _fit(reference: ReferencePerson, target: np.ndarray, weights: np.ndarray, size: tuple[int, int], transform: str):
    if transform == "affine":
        return AffineTransform.from_estimate(reference.keypoints, target, weights)
    if transform == "linear":
        centres = [((w - 1) / 2, (h - 1) / 2) for w, h in (reference.size, size)]
        return LinearTransform.from_estimate(reference.keypoints, target, weights, *centres)
    return SimilarityTransform.from_estimate(reference.keypoints, target, weights)


def _doubt(matrix: np.ndarray, iou: float, config: CalibrationConfig) -> str | None:
    """Why the transform is not to be trusted, None when it is."""
    scale = float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))
    angle = float(abs(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0]))))
    if not config.min_scale <= scale <= config.max_scale:
        return f"the scale {scale:.3g} is outside {config.min_scale:g} to {config.max_scale:g}"
    if angle > config.max_rotation:
        return f"the rotation of {angle:.0f} degrees is beyond {config.max_rotation:g}"
    if iou < config.min_iou:
        return f"the silhouettes overlap by an IoU of {iou:.2f} only"
    return None
