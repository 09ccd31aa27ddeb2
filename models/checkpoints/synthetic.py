"""Weights drawn from names: the same name, shape and seed give the same numbers on every machine.

Fixtures of known answers list the tensors of a checkpoint instead of storing them. Each tensor has a Philox stream of
its own, so neither order nor company of a tensor matters, and all draws are integers until they are scaled.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

# Standard deviations of biases, and of norm weights about one.
BIAS_SCALE = 0.05
NORM_SCALE = 0.1
# A draw is the sum of four 16-bit integers: its mean and its variance.
DRAW_MEAN = 4 * (2**16 - 1) / 2
DRAW_VARIANCE = 4 * (2**32 - 1) / 12


def synthetic_tensors(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """One float32 tensor a name. Every weight is random, those that start at zero in training too.

    Kernels and matrices have standard deviation 1 / sqrt(fan in), so activations keep their size; position tables
    (`*pos_encoder.pe`) hold the sinusoids they always hold.
    """
    return {name: torch.from_numpy(synthetic_array(name, tuple(shape), seed)) for name, shape in shapes.items()}


def synthetic_array(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The float32 array of one name."""
    if name.endswith("pos_encoder.pe"):
        array = sinusoids(shape[1], shape[2])[None]
    elif len(shape) > 1:
        array = draws(name, shape, seed) / math.sqrt(math.prod(shape[1:]))
    elif name.endswith("weight"):  # a vector of weights belongs to a norm
        array = 1 + NORM_SCALE * draws(name, shape, seed)
    else:
        array = BIAS_SCALE * draws(name, shape, seed)
    return np.asarray(array, np.float32)


def draws(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Numbers of mean 0 and variance 1, float64."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    stream = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    words = stream.random_raw(math.prod(shape)).astype("<u8")
    sums = words.view("<u2").reshape(*shape, 4).astype(np.int64).sum(axis=-1)
    return (sums - int(DRAW_MEAN)) / math.sqrt(DRAW_VARIANCE)


def sinusoids(length: int, channels: int) -> np.ndarray:
    """Position table (length, channels), float64: sine on even, cosine on odd channels."""
    rates = np.exp(-math.log(10000.0) * np.arange(0, channels, 2) / channels)
    angles = np.arange(length)[:, None] * rates
    table = np.empty((length, channels))
    table[:, 0::2], table[:, 1::2] = np.sin(angles), np.cos(angles)
    return table
