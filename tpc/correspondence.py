"""Checked pairs of points and their moments, for numpy arrays and torch tensors alike; see `tpc.procrustes`."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch

Array: TypeAlias = Any  # numpy.ndarray or torch.Tensor

# Two points are distinct when they are further apart than this, relative to the largest coordinate.
RELATIVE_DISTANCE = 1e-9
# Points lie on one line when the smaller principal variance is below this part of the larger one.
RELATIVE_FLATNESS = 1e-12

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


class FailedEstimation:
    """What `from_estimate` returns instead of a transform: false in a condition, with the reason in words."""

    def __init__(self, reason: str):
        self.reason = reason

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"FailedEstimation({self.reason!r})"


@dataclass(frozen=True)
class Moments:
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
        """The reasons that hold for every transform, over those already found (...) int, 0 = none."""
        reason = xp.where(trace(self.target) <= (RELATIVE_DISTANCE * self.target_size) ** 2, 4, reason)
        reason = xp.where(trace(self.source) <= (RELATIVE_DISTANCE * self.source_size) ** 2, 3, reason)
        reason = xp.where(self.count == 1, 2, reason)
        return xp.where(self.count == 0, 1, reason)


@dataclass(frozen=True)
class Correspondence:
    """Checked points in float64; weights (..., k) sum to 1, or are all 0; 0 where one is not finite."""

    xp: ModuleType
    source: Array
    target: Array
    weights: Array

    @classmethod
    def of(cls, source: Array, target: Array, weights: Array) -> Correspondence | FailedEstimation:
        xp = library(source, target, weights)
        source, target = float64(xp, source), float64(xp, target)
        if source.ndim < 2 or target.ndim < 2 or source.shape[-2:] != target.shape[-2:] or source.shape[-1] != 2:
            shapes = f"{tuple(source.shape)} and {tuple(target.shape)}"
            raise ValueError(f"source and target must both be (..., k, 2) with the same k, got {shapes}")
        weights = xp.ones_like(source[..., 0]) if weights is None else float64(xp, weights)
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
        weights = weights / positive(xp, xp.amax(weights, -1))[..., None]
        return cls(xp, source, target, weights / positive(xp, weights.sum(-1))[..., None])

    def moments(self) -> Moments:
        xp, weights = self.xp, self.weights[..., None]
        source_mean, target_mean = (weights * self.source).sum(-2), (weights * self.target).sum(-2)
        x, y = self.source - source_mean[..., None, :], self.target - target_mean[..., None, :]
        wx, wy = (weights * x).swapaxes(-1, -2), (weights * y).swapaxes(-1, -2)
        sizes = (xp.amax(abs(points), (-1, -2)) for points in (self.source, self.target))
        return Moments((self.weights > 0).sum(-1), *sizes, source_mean, target_mean, wx @ x, wy @ y, wy @ x)

    def like(self, value: tuple[float, float]) -> Array:
        return self.source.new_tensor(value) if self.xp is torch else np.asarray(value, np.float64)

    def eye(self, n: int) -> Array:
        kind = {"device": self.source.device} if self.xp is torch else {}
        return self.xp.eye(n, dtype=self.source.dtype, **kind)


def library(*arrays: Array) -> ModuleType:
    return torch if any(isinstance(array, torch.Tensor) for array in arrays) else np


def float64(xp: ModuleType, array: Array) -> Array:
    return torch.as_tensor(array, dtype=torch.float64) if xp is torch else np.asarray(array, np.float64)


def positive(xp: ModuleType, array: Array) -> Array:
    return xp.where(array > 0, array, xp.ones_like(array))


def trace(moments: Array) -> Array:
    return moments[..., 0, 0] + moments[..., 1, 1]


def is_flat(moments: Array) -> Array:
    determinant = moments[..., 0, 0] * moments[..., 1, 1] - moments[..., 0, 1] * moments[..., 1, 0]
    return determinant <= RELATIVE_FLATNESS * trace(moments) ** 2


def turned(xp: ModuleType, scale: Array, rotation: Array, point: Array) -> Array:
    """scale R(rotation) point, for points (..., 2)."""
    a, b = scale * xp.cos(rotation), scale * xp.sin(rotation)
    x, y = point[..., 0], point[..., 1]
    return xp.stack([a * x - b * y, b * x + a * y], -1)


def matrix_of(xp: ModuleType, linear: Array, offset: Array) -> Array:
    """(..., 2, 2) and (..., 2) -> (..., 3, 3)."""
    zero = xp.zeros_like(offset[..., :1])
    last = xp.stack([zero, zero, zero + 1], -1)  # (..., 1, 3)
    return xp.concatenate([xp.concatenate([linear, offset[..., None]], -1), last], -2)
