"""Names of tensors in published files, and in the modules of this project.

Only motion modules are named differently; everything else keeps its name. Published means
AnimateDiff, whose scheme AnimateAnyone and MagicAnimate share:

    published   down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_q.weight
    module      down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q.weight
"""

import re
from collections.abc import Mapping

import torch
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from torch import Tensor

from core.errors import UserError

MOTION = ".motion_modules."
# published -> module, inside a motion module
MOTION_NAMES = (
    (".temporal_transformer.", "."),
    (".attention_blocks.0.", ".attn1."),
    (".attention_blocks.1.", ".attn2."),
    (".norms.0.", ".norm1."),
    (".norms.1.", ".norm2."),
    (".ff_norm.", ".norm3."),
)
POSITIONS = ".pos_encoder.pe"


def module_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names -> names of `models.unets`. Position tables are left out: see `without_positions`."""
    renamed = {}
    for name, tensor in without_positions(tensors).items():
        if MOTION in name:
            for published, module in MOTION_NAMES:
                name = name.replace(published, module)
        renamed[name] = tensor
    return renamed


def published_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names of `models.unets` -> published names, with the position table that each published attention has."""
    renamed = {}
    for name, shape in shapes.items():
        if MOTION not in name:
            renamed[name] = shape
            continue
        name = re.sub(r"(\.motion_modules\.\d+\.)", r"\1temporal_transformer.", name)
        if name.endswith(".pos_embed.pe"):
            block = name.removesuffix(".pos_embed.pe")
            renamed |= {f"{block}.attention_blocks.{number}{POSITIONS}": shape for number in (0, 1)}
            continue
        for published, module in MOTION_NAMES[1:]:
            name = name.replace(module, published)
        renamed[name] = shape
    return renamed


def is_position_table(name: str) -> bool:
    return name.endswith((POSITIONS, ".pos_embed.pe"))


def without_positions(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not is_position_table(name)}


def position_length(tensors: Mapping[str, Tensor], what: str) -> int:
    """Frames that the motion modules of a file know, after a check that its position tables are the sinusoidal ones.

    The modules compute their tables from their configuration, and releases differ in length (24 or 32).

    Raises:
        UserError: there is no table, lengths differ, or a table holds something else than its formula.
    """
    tables = {name: tensor for name, tensor in tensors.items() if is_position_table(name)}
    if not tables:
        raise UserError(f"{what} has no position tables (*{POSITIONS}): its motion modules are missing or incomplete")
    lengths = {tensor.shape[1] for tensor in tables.values() if tensor.ndim == 3}
    if len(lengths) != 1:
        raise UserError(f"{what} has position tables of different lengths: {sorted(lengths)}")
    for name, tensor in tables.items():
        if tensor.is_meta:
            continue
        expected = position_table(*tensor.shape[1:])
        # Half precision keeps three digits of numbers up to one.
        if tensor.shape != expected.shape or not torch.allclose(tensor.float(), expected, atol=5e-3):
            raise UserError(f"{what}: {name} is not the sinusoidal table; other tables are not supported")
    return lengths.pop()


def position_table(length: int, channels: int) -> Tensor:
    """Sine on even and cosine on odd channels, (1, length, channels), as diffusers computes it."""
    return SinusoidalPositionalEmbedding(channels, max_seq_length=length).pe
