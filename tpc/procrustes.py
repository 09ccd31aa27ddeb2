"""Similarity, affine and linear maps between two sets of corresponding points, by weighted least squares.

Convention, for every transform here:
    direction   source -> target: `transform(source)` is close to `target`
    points      (..., k, 2), each point (x, y) in pixels, y pointing down, pixel centres at integers
    rotation    radians, atan2(matrix[1, 0], matrix[0, 0]); with y down a positive angle turns clockwise on the screen
    weights     (..., k) not negative, such as keypoint scores; only their ratios matter; None = equal
    libraries   numpy or torch, as given (torch: differentiable, on the same device); always float64

Leading dimensions are a batch and broadcast. A point counts where its weight is positive and all four coordinates are
finite. No estimate is NaN: where none in the batch can be determined, `from_estimate` returns a `FailedEstimation`;
where only some can, `valid` tells which, and the others hold the identity.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

import numpy as np

Array: TypeAlias = Any  # numpy.ndarray or torch.Tensor
Transform = TypeVar("Transform")

# Two points are distinct when they are further apart than this, relative to the largest coordinate.
RELATIVE_DISTANCE = 1e-9
# Points lie on one line when the smaller principal variance is below this part of the larger one.
RELATIVE_FLATNESS = 1e-12
# Below this correlation of the two point sets no rotation fits better than another; a mirror image has correlation 0.
MIN_CORRELATION = 1e-9

REASONS = {
    1: "no point is visible in both",
    2: "only one point is visible in both; two distinct points are needed",
    3: "the points of the source coincide",
    4: "the points of the target coincide",
    5: "one side mirrors the other, so that no rotation fits",
    6: "fewer than three points are visible in both; an affine map needs three",
    7: "the points of the source lie on one line; an affine map needs three that do not",
    8: "the points of the target lie on one line; the affine map would flatten the image",
}


@dataclass(frozen=True)
class FailedEstimation:
    """Returned by `from_estimate` in place of a transform: false in a condition, with the reason in words."""

    reason: str

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class AffineTransform:
    """y = A x + t with six free parameters: rotation, two scales, shear and translation."""

    matrix: Array  # (..., 3, 3), last row 0 0 1
    valid: Array = True  # (...) bool, False where the identity stands in

    @classmethod
    def from_estimate(cls, source: Array, target: Array, weights: Array = None) -> AffineTransform | FailedEstimation:
        """Least squares over all six parameters, from three points or more that are not on one line."""
        points = _Correspondence.of(source, target, weights)
        if isinstance(points, FailedEstimation):
            return points
        xp, m = points.xp, points.moments()
        reason = xp.where(_is_flat(m.target), 8, 0 * m.count)
        reason = xp.where(_is_flat(m.source), 7, reason)
        reason = xp.where(m.count < 3, 6, reason)
        reason = m.reason(xp, reason)

        def build(valid: Array) -> AffineTransform:
            scatter = xp.where(valid[..., None, None], m.source, points.eye(2))
            linear = m.cross @ xp.linalg.inv(scatter)
            offset = m.target_mean - (linear @ m.source_mean[..., None])[..., 0]
            matrix = _matrix_of(xp, linear, offset)
            return cls(xp.where(valid[..., None, None], matrix, points.eye(3)), valid)

        return _result(reason, build)

    def inverse(self) -> AffineTransform:
        return AffineTransform(library(self.matrix).linalg.inv(self.matrix), self.valid)

    def __call__(self, points: Array) -> Array:
        """Map points (..., k, 2), or one point (2,) when the transform is not batched."""
        return apply_matrix(self.matrix, points)


@dataclass(frozen=True)
class SimilarityTransform:
    """y = scale R(rotation) x + translation: moves, turns and resizes, never shears or mirrors."""

    scale: Array  # (...) positive
    rotation: Array  # (...) radians in [-pi, pi]
    translation: Array  # (..., 2) pixels
    valid: Array = True  # (...) bool, False where the identity stands in

    @classmethod
    def from_estimate(
        cls, source: Array, target: Array, weights: Array = None
    ) -> SimilarityTransform | FailedEstimation:
        """Procrustes analysis: the similarity with the least weighted squared error, from two distinct points or more.

        In two dimensions the closed form needs no SVD: with centred points written as complex numbers, y = c x has the
        least squares solution c = sum(w conj(x) y) / sum(w |x|^2); |c| is the scale and arg(c) the angle. Reflections
        are not among the candidates: this equals the SVD solution over proper rotations.
        """
        points = _Correspondence.of(source, target, weights)
        if isinstance(points, FailedEstimation):
            return points
        xp, m = points.xp, points.moments()
        real, imaginary = m.cross[..., 0, 0] + m.cross[..., 1, 1], m.cross[..., 1, 0] - m.cross[..., 0, 1]
        spread, target_spread = _trace(m.source), _trace(m.target)
        mirrored = real**2 + imaginary**2 <= MIN_CORRELATION**2 * spread * target_spread
        reason = m.reason(xp, xp.where(mirrored, 5, 0 * m.count))

        def build(valid: Array) -> SimilarityTransform:
            # Replaced before the square root and the division, so that no gradient is NaN either.
            a = xp.where(valid, real, xp.ones_like(real))
            b = xp.where(valid, imaginary, xp.zeros_like(imaginary))
            scale = xp.hypot(a, b) / xp.where(valid, spread, xp.ones_like(spread))
            rotation = xp.atan2(b, a)
            offset = m.target_mean - _turned(xp, scale, rotation, m.source_mean)
            return cls(scale, rotation, xp.where(valid[..., None], offset, xp.zeros_like(offset)), valid)

        return _result(reason, build)

    @classmethod
    def from_matrix(cls, matrix: Array) -> SimilarityTransform:
        """Read scale, angle and translation off (..., 3, 3); ValueError when one is not a proper similarity."""
        xp = library(matrix)
        matrix = _float64(xp, matrix)
        a, b, c, d = matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 1, 0], matrix[..., 1, 1]
        scale = xp.hypot(a, c)
        if not bool(((scale > 0) & (abs(a - d) <= 1e-6 * scale) & (abs(b + c) <= 1e-6 * scale)).all()):
            raise ValueError(f"matrix must be [[a, -b, tx], [b, a, ty], [0, 0, 1]] and not flatten, got {matrix}")
        return cls(scale, xp.atan2(c, a), matrix[..., :2, 2], xp.isfinite(scale))

    @property
    def matrix(self) -> Array:
        """(..., 3, 3), last row 0 0 1."""
        xp = library(self.scale, self.rotation, self.translation)
        scale, rotation = _float64(xp, self.scale), _float64(xp, self.rotation)
        a, b = scale * xp.cos(rotation), scale * xp.sin(rotation)
        linear = xp.stack([xp.stack([a, -b], -1), xp.stack([b, a], -1)], -2)
        return _matrix_of(xp, linear, _float64(xp, self.translation))

    def inverse(self) -> SimilarityTransform:
        xp = library(self.scale, self.rotation, self.translation)
        scale, rotation = 1 / _float64(xp, self.scale), -_float64(xp, self.rotation)
        offset = -_turned(xp, scale, rotation, _float64(xp, self.translation))
        return SimilarityTransform(scale, rotation, offset, self.valid)

    def __call__(self, points: Array) -> Array:
        """Map points (..., k, 2), or one point (2,) when the transform is not batched."""
        return apply_matrix(self.matrix, points)


@dataclass(frozen=True)
class LinearTransform(SimilarityTransform):
    """Scale and rotation only: the ablation in which the person is resized and turned but not put in place.

    The angle is the Procrustes solution's; the scale is the ratio of the diagonals of the two person boxes, the
    source's after the turn. `source_origin` goes to `target_origin`, such as the centres of the two images.
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
        similarity = SimilarityTransform.from_estimate(source, target, weights)
        if not similarity:
            return similarity
        points, valid, rotation = _Correspondence.of(source, target, weights), similarity.valid, similarity.rotation
        xp, one = points.xp, points.xp.ones_like(rotation)
        turn = SimilarityTransform(one, rotation, xp.zeros_like(similarity.translation))
        length = xp.where(valid, points.box_diagonal(turn(points.source)), one)
        scale = xp.where(valid, points.box_diagonal(points.target) / length, one)
        start, end = xp.asarray([source_origin, target_origin], dtype=rotation.dtype, device=rotation.device)
        offset = end - _turned(xp, scale, rotation, start)
        return cls(scale, rotation, xp.where(valid[..., None], offset, xp.zeros_like(offset)), valid)


def apply_matrix(matrix: Array, points: Array) -> Array:
    """Points (..., k, 2) or, for one matrix, a point (2,), after (..., 3, 3) affine matrices."""
    xp = library(matrix, points)
    matrix, points = _float64(xp, matrix), _float64(xp, points)
    if points.ndim == 1:
        return apply_matrix(matrix, points[None])[0]
    return points @ matrix[..., :2, :2].swapaxes(-1, -2) + matrix[..., None, :2, 2]


def residual(matrix: Array, source: Array, target: Array, weights: Array = None) -> Array:
    """Weighted root mean square distance (...) in pixels between mapped source and target points; 0 without points."""
    points = _Correspondence.of(source, target, weights)
    if isinstance(points, FailedEstimation):
        return _float64(library(matrix), matrix)[..., 0, 0] * 0
    squared = ((apply_matrix(matrix, points.source) - points.target) ** 2).sum(-1)
    return points.xp.sqrt((points.weights * squared).sum(-1))


def library(*arrays: Array) -> ModuleType:
    """torch when one of the arrays is a tensor, else numpy."""
    # Who has a tensor has imported torch; who has none need not wait for it.
    torch = sys.modules.get("torch")
    return torch if torch is not None and any(isinstance(array, torch.Tensor) for array in arrays) else np


@dataclass(frozen=True)
class _Moments:
    """Weighted means (..., 2) and central second moments (..., 2, 2) of two point sets."""

    count: Array  # (...) points that count
    source_size: Array  # (...) largest coordinate, the unit of "distinct"
    target_size: Array
    source_mean: Array
    target_mean: Array
    source: Array
    target: Array
    cross: Array  # target by source

    def reason(self, xp: ModuleType, reason: Array) -> Array:
        """Reasons (...) int that hold for every transform, over those already found; 0 = none."""
        reason = xp.where(_trace(self.target) <= (RELATIVE_DISTANCE * self.target_size) ** 2, 4, reason)
        reason = xp.where(_trace(self.source) <= (RELATIVE_DISTANCE * self.source_size) ** 2, 3, reason)
        reason = xp.where(self.count == 1, 2, reason)
        return xp.where(self.count == 0, 1, reason)


@dataclass(frozen=True)
class _Correspondence:
    """Checked points in float64; weights (..., k) sum to 1, or are all 0; 0 where one is not finite."""

    xp: ModuleType
    source: Array
    target: Array
    weights: Array

    @classmethod
    def of(cls, source: Array, target: Array, weights: Array) -> _Correspondence | FailedEstimation:
        xp = library(source, target, weights)
        source, target = _float64(xp, source), _float64(xp, target)
        if source.ndim < 2 or target.ndim < 2 or source.shape[-2:] != target.shape[-2:] or source.shape[-1] != 2:
            shapes = f"{tuple(source.shape)} and {tuple(target.shape)}"
            raise ValueError(f"source and target must both be (..., k, 2) with the same k, got {shapes}")
        weights = xp.ones_like(source[..., 0]) if weights is None else _float64(xp, weights)
        if weights.ndim < 1 or weights.shape[-1] != source.shape[-2]:
            raise ValueError(f"weights must be (..., {source.shape[-2]}), got {tuple(weights.shape)}")
        if bool((weights < 0).any()):
            raise ValueError("weights must not be negative")
        if source.shape[-2] == 0:
            return FailedEstimation(REASONS[1])
        finite = xp.isfinite(source).all(-1) & xp.isfinite(target).all(-1)
        weights = xp.where(finite & xp.isfinite(weights), weights, xp.zeros_like(weights))
        used = (weights > 0)[..., None]
        source = xp.where(used, source, xp.zeros_like(source))
        target = xp.where(used, target, xp.zeros_like(target))
        # Divided by the largest first: sums of tiny weights would underflow.
        weights = weights / _positive(xp, xp.amax(weights, -1))[..., None]
        return cls(xp, source, target, weights / _positive(xp, weights.sum(-1))[..., None])

    def moments(self) -> _Moments:
        xp, weights = self.xp, self.weights[..., None]
        source_mean, target_mean = (weights * self.source).sum(-2), (weights * self.target).sum(-2)
        x, y = self.source - source_mean[..., None, :], self.target - target_mean[..., None, :]
        wx, wy = (weights * x).swapaxes(-1, -2), (weights * y).swapaxes(-1, -2)
        sizes = (xp.amax(abs(points), (-1, -2)) for points in (self.source, self.target))
        return _Moments((self.weights > 0).sum(-1), *sizes, source_mean, target_mean, wx @ x, wy @ y, wy @ x)

    def box_diagonal(self, positions: Array) -> Array:
        """Diagonal (...) of the axis-aligned box of the positions (..., k, 2) of the points that count."""
        xp, used = self.xp, (self.weights > 0)[..., None]
        far = xp.full_like(positions, np.inf)
        sides = xp.amax(xp.where(used, positions, -far), -2) - xp.amin(xp.where(used, positions, far), -2)
        return xp.sqrt((sides**2).sum(-1))

    def eye(self, n: int) -> Array:
        return self.xp.eye(n, dtype=self.source.dtype, device=self.source.device)


def _result(reason: Array, build: Callable[[Array], Transform]) -> Transform | FailedEstimation:
    valid = reason == 0
    if not bool(valid.any()):
        first = reason.reshape(-1)[:1].tolist()
        return FailedEstimation(REASONS[first[0]] if first else "the batch is empty")
    return build(valid)


def _float64(xp: ModuleType, array: Array) -> Array:
    return np.asarray(array, np.float64) if xp is np else xp.as_tensor(array, dtype=xp.float64)


def _positive(xp: ModuleType, array: Array) -> Array:
    return xp.where(array > 0, array, xp.ones_like(array))


def _trace(moments: Array) -> Array:
    return moments[..., 0, 0] + moments[..., 1, 1]


def _is_flat(moments: Array) -> Array:
    determinant = moments[..., 0, 0] * moments[..., 1, 1] - moments[..., 0, 1] * moments[..., 1, 0]
    return determinant <= RELATIVE_FLATNESS * _trace(moments) ** 2


def _turned(xp: ModuleType, scale: Array, rotation: Array, point: Array) -> Array:
    """scale R(rotation) point, for points (..., 2)."""
    a, b = scale * xp.cos(rotation), scale * xp.sin(rotation)
    x, y = point[..., 0], point[..., 1]
    return xp.stack([a * x - b * y, b * x + a * y], -1)


def _matrix_of(xp: ModuleType, linear: Array, offset: Array) -> Array:
    """(..., 2, 2) and (..., 2) -> (..., 3, 3)."""
    zero = xp.zeros_like(offset[..., :1])
    last = xp.stack([zero, zero, zero + 1], -1)  # (..., 1, 3)
    return xp.concatenate([xp.concatenate([linear, offset[..., None]], -1), last], -2)
