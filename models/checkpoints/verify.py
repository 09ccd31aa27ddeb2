"""Known answers: outputs of the published code from the published tensor names, which this project must reproduce.

A fixture is a pair of files: `NAME.json` describes networks, inputs and outputs, `NAME.safetensors` holds the numbers.
Instead of weights it has names, shapes and seeds, from which `synthetic_tensors` draws the same weights everywhere.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from core.errors import UserError
from models.checkpoints.convert import published_models
from models.checkpoints.networks import MotionSizes, UNetSizes

# Standard deviations of synthetic biases, and of norm weights about one.
BIAS_SCALE, NORM_SCALE = 0.05, 0.1
SELF_SCALED = "motion_encoder."  # begin of the names of Wan-Animate's weights that their layers scale by themselves


@dataclass(frozen=True)
class Fixture:
    """Networks, inputs and known outputs."""

    config: Mapping[str, Any]  # the numbers that define the networks
    shapes: Mapping[str, Mapping[str, list[int]]]  # checkpoint file -> tensor name -> shape
    seeds: Mapping[str, int]  # checkpoint file -> seed of its weights
    meanings: Mapping[str, str]  # output -> description
    tolerances: Mapping[str, float]  # output -> largest difference allowed in float32
    inputs: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]

    def checkpoint(self, file: str) -> dict[str, Tensor]:
        return synthetic_tensors(self.shapes[file], self.seeds[file])

    def unet_sizes(self) -> UNetSizes:
        config = self.config
        if not config.get("flip_sin_to_cos", True) or config.get("freq_shift", 0):
            raise UserError("flip_sin_to_cos must be true and freq_shift 0, as in Stable Diffusion 1")
        widths = tuple(config["block_out_channels"])
        names = ("in_channels", "out_channels", "layers_per_block", "cross_attention_dim")
        return UNetSizes(
            block_out_channels=widths,
            attention=(True,) * (len(widths) - 1) + (False,),
            use_linear_projection=config.get("use_linear_projection", False),
            **{name: config[name] for name in (*names, "num_attention_heads", "norm_num_groups")},
        )

    def motion_sizes(self) -> MotionSizes:
        config = self.config
        return MotionSizes(
            max_seq_length=config["motion_max_seq_length"],
            mid_block=config["motion_module_mid_block"],
            layers=config.get("motion_transformer_layers", 1),
            num_attention_heads=config["motion_num_attention_heads"],
        )

    def norm_scope(self) -> str:
        """Extent of the statistics of GroupNorms in ResNets and at the output: "frame" or "clip"."""
        words = {self.config["resnet_group_norm"], self.config.get("conv_norm_out", self.config["resnet_group_norm"])}
        if words - {"per frame", "per clip"} or len(words) != 1:
            raise UserError(f"resnet_group_norm and conv_norm_out must both be per frame or per clip, got {words}")
        other = self.config.get("motion_group_norm", "per frame"), self.config.get("spatial_transformer_group_norm")
        if other[0] != "per frame" or other[1] not in (None, "per frame"):
            raise UserError(f"group norm of motion modules and spatial transformers must be per frame, got {other}")
        return words.pop().removeprefix("per ")

    def reference_tokens(self, tokens: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(output, tokens) for outputs that are the input of a layer, from layer -> tokens."""
        for name, meaning in self.meanings.items():
            layer = re.search(r"input of (\S+\.attn1)\b", meaning)
            if layer and layer[1] in tokens:
                yield name, tokens[layer[1]]


@dataclass(frozen=True)
class Result:
    """Largest absolute difference of one output; NaN when it was not computed or holds NaN."""

    name: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance


def read_fixture(path: str | Path) -> Fixture:
    """`PATH`, `PATH.json` or `PATH.safetensors` name the same fixture."""
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
    description, numbers = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.safetensors")
    for file in (description, numbers):
        if not file.is_file():
            raise UserError(f"fixture={path}: {file} does not exist")
    try:
        entries: dict[str, Any] = json.loads(description.read_text(encoding="utf-8"))
        tensors, outputs = load_file(numbers), entries["outputs"]
        tolerances = dict.fromkeys(outputs, entries["tolerance"]) | entries.get("tolerances", {})
        return Fixture(
            config=entries["config"],
            shapes=entries["manifests"],
            seeds=entries["seeds"],
            meanings={name: entry.get("meaning", "") for name, entry in outputs.items()},
            tolerances={name: float(tolerances[name]) for name in outputs},
            inputs={name: tensors[name] for name in entries["inputs"]},
            expected={name: tensors[name] for name in outputs},
        )
    except SafetensorError as error:
        raise UserError(f"fixture={path}: {numbers} is damaged: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"fixture={path}: {description} is not a fixture description: {error!r}") from None


@torch.inference_mode()
def compute(fixture: Fixture) -> dict[str, Tensor]:
    """The outputs of the published model whose files the fixture describes."""
    known = {model.fixture: model.outputs for model in published_models().values() if model.fixture}
    outputs = known.get(frozenset(fixture.shapes))
    if outputs is None:
        files = "; ".join(", ".join(sorted(files)) for files in known)
        raise UserError(f"fixture of {', '.join(sorted(fixture.shapes))}; known are {files}")
    try:
        return dict(outputs(fixture))
    except KeyError as error:
        raise UserError(f"the fixture's configuration or inputs lack {error}") from error


def verify(fixture: Fixture) -> list[Result]:
    computed = compute(fixture)
    return [
        Result(name, difference(computed.get(name), expected), fixture.tolerances[name])
        for name, expected in fixture.expected.items()
    ]


def difference(computed: Tensor | None, expected: Tensor) -> float:
    """Largest absolute difference; NaN for what was not computed, infinity for another shape."""
    if computed is None:
        return math.nan
    if computed.shape != expected.shape:
        return math.inf
    return (computed.double() - expected.double()).abs().max().item()


def synthetic_tensors(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """One float32 tensor a name; every weight is random, those that start at zero in training too."""
    return {name: torch.from_numpy(synthetic_array(name, tuple(shape), seed)) for name, shape in shapes.items()}


def synthetic_array(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The float32 array of one name: the same name, shape and seed give the same numbers on every machine."""
    if name.endswith("pos_encoder.pe"):
        array = sinusoids(shape[1], shape[2])[None]
    elif len(shape) > 1 and name.startswith(SELF_SCALED):
        array = draws(name, shape, seed)
    elif len(shape) > 1:  # 1 / sqrt(fan in): activations keep their size
        array = draws(name, shape, seed) / math.sqrt(math.prod(shape[1:]))
    elif name.endswith("weight"):  # a vector of weights belongs to a norm
        array = 1 + NORM_SCALE * draws(name, shape, seed)
    else:
        array = BIAS_SCALE * draws(name, shape, seed)
    return np.asarray(array, np.float32)


def draws(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Numbers of mean 0 and variance 1, float64."""
    # A stream of its own for each tensor; all numbers are integers until they are scaled.
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    stream = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    words = stream.random_raw(math.prod(shape)).astype("<u8")
    sums = words.view("<u2").reshape(*shape, 4).astype(np.int64).sum(axis=-1)  # of four 16-bit integers
    return (sums - 2 * (2**16 - 1)) / math.sqrt((2**32 - 1) / 3)


def sinusoids(length: int, channels: int) -> np.ndarray:
    """Position table (length, channels), float64: sine on even, cosine on odd channels."""
    rates = np.exp(-math.log(10000.0) * np.arange(0, channels, 2) / channels)
    angles = np.arange(length)[:, None] * rates
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, channels)
