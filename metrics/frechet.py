"""The Frechet distance between two sets of feature vectors, from statistics gathered as the vectors come.

FID is this distance between Inception features of frames, FID-VID and FVD between features of windows of frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg


class Moments:
    """Count, mean and covariance of vectors that come in batches, in float64.

    Batches are joined with the pairwise update of Chan, Golub and LeVeque (1979), which does not lose digits to large
    means. The same batches in the same order give the same bits.
    """

    def __init__(self, dimension: int):
        if dimension < 1:
            raise ValueError(f"dimension must be at least 1, got {dimension}")
        self.count = 0
        self.mean = np.zeros(dimension)
        self.scatter = np.zeros((dimension, dimension))  # sum of outer products of deviations from the mean

    @property
    def dimension(self) -> int:
        return len(self.mean)

    @property
    def covariance(self) -> np.ndarray:
        """(dimension, dimension), the unbiased estimate; needs at least two vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two vectors, got {self.count}")
        return self.scatter / (self.count - 1)

    def update(self, vectors: np.ndarray) -> None:  # (n, dimension)
        vectors = np.asarray(vectors, np.float64)
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension:
            raise ValueError(f"vectors must have the shape (n, {self.dimension}), got {vectors.shape}")
        if not np.isfinite(vectors).all():
            raise ValueError("vectors must be finite")
        if len(vectors):
            mean = vectors.mean(axis=0)
            deviations = vectors - mean
            self._join(len(vectors), mean, deviations.T @ deviations)

    def merge(self, other: Moments) -> None:
        if other.dimension != self.dimension:
            raise ValueError(f"other must be of dimension {self.dimension}, got {other.dimension}")
        if other.count:
            self._join(other.count, other.mean, other.scatter)

    def _join(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self.count + count
        apart = mean - self.mean
        self.scatter += scatter
        self.scatter += np.outer(apart, apart * (self.count * count / total))
        self.mean = self.mean + apart * (count / total)
        self.count = total


@dataclass(frozen=True)
class FrechetDistance:
    """A distance and what it rests on."""

    value: float  # the squared Frechet distance, the number that is published as FID or FVD
    samples: tuple[int, int]  # generated and true vectors
    dimension: int  # of a vector
    warning: str | None  # of what makes the number doubtful


def frechet_distance(generated: Moments, truth: Moments) -> FrechetDistance:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of at least two vectors each."""
    if generated.dimension != truth.dimension:
        raise ValueError(f"dimensions must agree, got {generated.dimension} and {truth.dimension}")
    first, second = generated.covariance, truth.covariance
    # (C1 C2)^(1/2) has the trace of the symmetric (R C2 R)^(1/2) with R = C1^(1/2), whose eigenvalues are real and not
    # negative, so singular covariances (of fewer vectors than dimensions) give no complex number.
    root = _symmetric_root(first)
    eigenvalues = scipy.linalg.eigvalsh(_symmetric(root @ second @ root))
    overlap = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    apart = generated.mean - truth.mean
    value = float(apart @ apart + np.trace(first) + np.trace(second) - 2 * overlap)
    samples = (generated.count, truth.count)
    warning = None
    if min(samples) <= truth.dimension:
        warning = (
            f"singular covariance: {samples[0]} generated and {samples[1]} true feature vectors for {truth.dimension} "
            f"dimensions; the covariance of n vectors has at most rank n - 1, and the distance is biased upwards. "
            f"More than {truth.dimension} vectors a set are needed"
        )
    return FrechetDistance(max(0.0, value), samples, truth.dimension, warning)


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = scipy.linalg.eigh(_symmetric(matrix))
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    return (matrix + matrix.T) / 2
