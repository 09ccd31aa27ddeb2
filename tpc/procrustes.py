"""Similarity, affine and linear maps between two sets of corresponding points, by weighted least squares.

Convention, for every transform here:
    direction   source -> target: `transform(source)` is close to `target`
    points      (..., k, 2), each point (x, y) in pixels, y pointing down, pixel centres at integers
    rotation    radians, atan2(matrix[1, 0], matrix[0, 0]); with y down a positive angle turns clockwise on the screen
    precision   everything is computed and returned in float64, whatever comes in
    libraries   numpy in, numpy out; torch in, torch out, differentiable and on the same device

Leading dimensions are a batch (frames, subsets of keypoints, ...) and broadcast against each other. A point counts
where its weight is positive and all four coordinates are finite.

No estimate is ever NaN. When no element of the batch can be determined, `from_estimate` returns a
`FailedEstimation`, which is false in a condition and says why. When only some can, `valid` tells which, and the
others hold the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from tpc.correspondence import (
    REASONS,
    Array,
    Correspondence,
    FailedEstimation,
    float64,
    is_flat,
    library,
    matrix_of,
    trace,
    turned,
)

Transform = TypeVar("Transform")
# Below this correlation of the two point sets no rotation fits better than another; a mirror image has correlation 0.
MIN_CORRELATION = 1e-9


@dataclass(frozen=True)
class AffineTransform:
    """y = A x + t with six free parameters: rotation, two scales, shear and translation.

    Attributes:
        matrix: (..., 3, 3), last row 0 0 1.
        valid: (...) bool, False where nothing could be estimated and the identity stands in.
    """

    matrix: Array
    valid: Array = True

    @classmethod
    def from_estimate(cls, source: Array, target: Array, weights: Array = None) -> AffineTransform | FailedEstimation:
        """Least squares over all six parameters.

        Args:
            source, target: (..., k, 2) corresponding points; three that are not on one line are needed.
            weights: (..., k) not negative, such as keypoint scores, or None for equal weights; only their ratios
                matter.
        """
        points = Correspondence.of(source, target, weights)
        if isinstance(points, FailedEstimation):
            return points
        xp, m = points.xp, points.moments()
        reason = xp.where(is_flat(m.target), 8, 0 * m.count)
        reason = xp.where(is_flat(m.source), 7, reason)
        reason = xp.where(m.count < 3, 6, reason)
        reason = m.reason(xp, reason)

        def build(valid: Array) -> AffineTransform:
            scatter = xp.where(valid[..., None, None], m.source, points.eye(2))
            linear = m.cross @ xp.linalg.inv(scatter)
            offset = m.target_mean - (linear @ m.source_mean[..., None])[..., 0]
            matrix = matrix_of(xp, linear, offset)
            return cls(xp.where(valid[..., None, None], matrix, points.eye(3)), valid)

        return _result(reason, build)

    @property
    def translation(self) -> Array:
        """(..., 2) pixels."""
        return self.matrix[..., :2, 2]

    def inverse(self) -> AffineTransform:
        """The transform from target to source."""
        return AffineTransform(library(self.matrix).linalg.inv(self.matrix), self.valid)

    def __call__(self, points: Array) -> Array:
        """Map points (..., k, 2), or one point (2,) when the transform is not batched."""
        return apply_matrix(self.matrix, points)


@dataclass(frozen=True)
class SimilarityTransform:
    """y = scale R(rotation) x + translation: moves, turns and resizes, never shears or mirrors.

    Attributes:
        scale: (...) positive.
        rotation: (...) radians in [-pi, pi].
        translation: (..., 2) pixels.
        valid: (...) bool, False where nothing could be estimated and the identity stands in.
    """

    scale: Array
    rotation: Array
    translation: Array
    valid: Array = True

    @classmethod
    def from_estimate(
        cls, source: Array, target: Array, weights: Array = None
    ) -> SimilarityTransform | FailedEstimation:
        """Procrustes analysis: the similarity with the least weighted squared error.

        In two dimensions the closed form needs no SVD: with centred points written as complex numbers, y = c x has the
        least squares solution c = sum(w conj(x) y) / sum(w |x|^2); |c| is the scale and arg(c) the angle.
        Reflections are not among the candidates, so this equals the SVD solution over proper rotations.

        Args:
            source, target: (..., k, 2) corresponding points; two distinct ones are enough.
            weights: (..., k) not negative, such as keypoint scores, or None for equal weights; only their ratios
                matter.
        """
        points = Correspondence.of(source, target, weights)
        if isinstance(points, FailedEstimation):
            return points
        xp, m = points.xp, points.moments()
        real, imaginary = m.cross[..., 0, 0] + m.cross[..., 1, 1], m.cross[..., 1, 0] - m.cross[..., 0, 1]
        spread, target_spread = trace(m.source), trace(m.target)
        mirrored = real**2 + imaginary**2 <= MIN_CORRELATION**2 * spread * target_spread
        reason = m.reason(xp, xp.where(mirrored, 5, 0 * m.count))

        def build(valid: Array) -> SimilarityTransform:
            # Replaced before the square root and the division, so that no gradient is NaN either.
            a = xp.where(valid, real, xp.ones_like(real))
            b = xp.where(valid, imaginary, xp.zeros_like(imaginary))
            scale = xp.hypot(a, b) / xp.where(valid, spread, xp.ones_like(spread))
            rotation = xp.atan2(b, a)
            offset = m.target_mean - turned(xp, scale, rotation, m.source_mean)
            return cls(scale, rotation, xp.where(valid[..., None], offset, xp.zeros_like(offset)), valid)

        return _result(reason, build)

    @classmethod
    def from_matrix(cls, matrix: Array) -> SimilarityTransform:
        """Read scale, angle and translation off (..., 3, 3); ValueError when one is not a proper similarity."""
        xp = library(matrix)
        matrix = float64(xp, matrix)
        a, b, c, d = matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 1, 0], matrix[..., 1, 1]
        scale = xp.hypot(a, c)
        if not bool(((scale > 0) & (abs(a - d) <= 1e-6 * scale) & (abs(b + c) <= 1e-6 * scale)).all()):
            raise ValueError(f"matrix must be [[a, -b, tx], [b, a, ty], [0, 0, 1]] and not flatten, got {matrix}")
        return cls(scale, xp.atan2(c, a), matrix[..., :2, 2], xp.isfinite(scale))

    @property
    def matrix(self) -> Array:
        """(..., 3, 3), last row 0 0 1."""
        xp = library(self.scale, self.rotation, self.translation)
        scale, rotation = float64(xp, self.scale), float64(xp, self.rotation)
        a, b = scale * xp.cos(rotation), scale * xp.sin(rotation)
        linear = xp.stack([xp.stack([a, -b], -1), xp.stack([b, a], -1)], -2)
        return matrix_of(xp, linear, float64(xp, self.translation))

    def inverse(self) -> SimilarityTransform:
        """The transform from target to source."""
        xp = library(self.scale, self.rotation, self.translation)
        scale, rotation = 1 / float64(xp, self.scale), -float64(xp, self.rotation)
        offset = -turned(xp, scale, rotation, float64(xp, self.translation))
        return SimilarityTransform(scale, rotation, offset, self.valid)

    def __call__(self, points: Array) -> Array:
        """Map points (..., k, 2), or one point (2,) when the transform is not batched."""
        return apply_matrix(self.matrix, points)


@dataclass(frozen=True)
class LinearTransform(SimilarityTransform):
    """Scale and rotation only: the ablation in which the person is resized and turned but not put in place.

    The angle is that of the Procrustes solution; the scale is the ratio of the diagonals of the two person boxes, the
    source's box taken after the turn. `source_origin` goes to `target_origin`, both the coordinate origin unless
    given; with the centres of the two images the image is turned and resized about its centre.
    """

    @classmethod
    def from_estimate(
        cls,
        source: Array,
        target: Array,
        weights: Array = None,
        source_origin: tuple[float, float] = (0.0, 0.0),
        target_origin: tuple[float, float] = (0.0, 0.0),
    ) -> LinearTransform | FailedEstimation:
        """Arguments as in `SimilarityTransform.from_estimate`, and the two points that correspond by definition."""
        similarity = SimilarityTransform.from_estimate(source, target, weights)
        if not similarity:
            return similarity
        points, valid, rotation = Correspondence.of(source, target, weights), similarity.valid, similarity.rotation
        xp, one = points.xp, points.xp.ones_like(rotation)
        turn = SimilarityTransform(one, rotation, xp.zeros_like(similarity.translation))
        length = xp.where(valid, _box_diagonal(points, turn(points.source)), one)
        scale = xp.where(valid, _box_diagonal(points, points.target) / length, one)
        offset = points.like(target_origin) - turned(xp, scale, rotation, points.like(source_origin))
        return cls(scale, rotation, xp.where(valid[..., None], offset, xp.zeros_like(offset)), valid)


def apply_matrix(matrix: Array, points: Array) -> Array:
    """Apply (..., 3, 3) affine matrices to points (..., k, 2) or, for one matrix, to a point (2,)."""
    xp = library(matrix, points)
    matrix, points = float64(xp, matrix), float64(xp, points)
    if points.ndim == 1:
        return apply_matrix(matrix, points[None])[0]
    return points @ matrix[..., :2, :2].swapaxes(-1, -2) + matrix[..., None, :2, 2]


def residual(matrix: Array, source: Array, target: Array, weights: Array = None) -> Array:
    """Weighted root mean square distance (...) in pixels between mapped source and target points; 0 without points."""
    points = Correspondence.of(source, target, weights)
    if isinstance(points, FailedEstimation):
        return float64(library(matrix), matrix)[..., 0, 0] * 0
    squared = ((apply_matrix(matrix, points.source) - points.target) ** 2).sum(-1)
    return points.xp.sqrt((points.weights * squared).sum(-1))


def _box_diagonal(points: Correspondence, positions: Array) -> Array:
    """Diagonal (...) of the axis-aligned box of the points that count."""
    xp, used = points.xp, (points.weights > 0)[..., None]
    far = xp.full_like(positions, np.inf)
    sides = xp.amax(xp.where(used, positions, -far), -2) - xp.amin(xp.where(used, positions, far), -2)
    return xp.sqrt((sides**2).sum(-1))


def _result(reason: Array, build: Callable[[Array], Transform]) -> Transform | FailedEstimation:
    valid = reason == 0
    if not bool(valid.any()):
        return FailedEstimation(
            REASONS[int(reason.reshape(-1)[0])] if len(reason.reshape(-1)) else "the batch is empty"
        )
    return build(valid)
