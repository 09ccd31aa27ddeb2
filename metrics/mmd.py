"""The maximum mean discrepancy (MMD) of clips' feature vectors with the polynomial kernel of JEDi.

JEDi (Luo et al., "Beyond FVD", ICLR 2025; github.com/oooolga/JEDi) compares V-JEPA features by k(x, y) = (x.y / d)^2
of d dimensions and multiplies by 100. Its code averages the kernel over all pairs, a vector with itself included,
which is biased upwards with few clips. Here only pairs of different clips count, so that the estimate is unbiased for
any number of clips; it can be negative.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SCALE = 100.0  # as JEDi's code prints it


@dataclass(frozen=True)
class MmdEstimate:
    value: float  # the squared MMD times `SCALE`
    error: float | None  # standard error, by the jackknife over clips; None for fewer than three
    clips: int


def polynomial_mmd(generated: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> MmdEstimate:
    """The distance of two sets of at least two clips, each some vectors (windows, dimension); all clips count alike.

    Clips of one index belong together, as what was made of the true one, and are never compared with each other:
    such pairs are not independent, and neither are windows of one clip. So two equal sets give exactly 0.

    The kernel sees only second moments: the population's value is |E[x x^T] - E[y y^T]|_F^2 / d^2, times `SCALE`.
    """
    count = len(truth)
    if len(generated) != count or count < 2:
        raise ValueError(f"the MMD needs two clips or more, as many of each side, got {len(generated)} and {count}")
    pairs = [np.concatenate(pair).astype(np.float64) for pair in zip(generated, truth, strict=True)]
    vectors = np.concatenate(pairs)
    if not np.isfinite(vectors).all():
        raise ValueError("vectors must be finite")
    # Mean over the generated windows of a clip minus mean over the true ones.
    signs = [np.repeat([1 / len(a), -1 / len(b)], [len(a), len(b)]) for a, b in zip(generated, truth, strict=True)]
    starts = np.cumsum([0, *map(len, pairs[:-1])])
    rows = np.empty(count)  # of each clip, summed over the others
    for index, (pair, sign) in enumerate(zip(pairs, signs, strict=True)):
        kernel = (pair @ vectors.T / vectors.shape[1]) ** 2
        of_clips = np.add.reduceat(sign @ kernel * np.concatenate(signs), starts)
        rows[index] = of_clips.sum() - of_clips[index]
    value = rows.sum() / (count * (count - 1))
    error = None
    if count > 2:
        without = (rows.sum() - 2 * rows) / ((count - 1) * (count - 2))  # the estimate without one clip
        error = SCALE * float(np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum()))
    return MmdEstimate(SCALE * float(value), error, count)
