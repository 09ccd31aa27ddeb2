"""Names of tensors in published files, and in the modules of this project; position tables, which are not loaded.

Everything keeps its name but motion modules, in the scheme of AnimateDiff that AnimateAnyone and MagicAnimate share,

    published   down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_q.weight
    module      down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q.weight

and the attention in the middle of a VAE, which was `query` and is `to_q`. All functions but `position_length` take
name -> tensor or name -> shape.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from torch import Tensor

from core.errors import UserError

Entry = TypeVar("Entry")

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
# files up to diffusers 0.14 -> today
VAE_NAMES = tuple(
    (f".mid_block.attentions.0.{old}.", f".mid_block.attentions.0.{new}.")
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
)
POSITIONS = ".pos_encoder.pe"


def replaced(entries: Mapping[str, Entry], pairs: Iterable[tuple[str, str]], within: str = "") -> dict[str, Entry]:
    """Entries with parts of those names replaced that have `within`."""
    renamed = {}
    for name, entry in entries.items():
        if within in name:
            for old, new in pairs:
                name = name.replace(old, new)
        renamed[name] = entry
    return renamed


def module_names(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Published names -> names of `models.unets`, without position tables."""
    kept = {name: entry for name, entry in entries.items() if not is_position_table(name)}
    return replaced(kept, MOTION_NAMES, MOTION)


def published_names(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Names of `models.unets` -> published names, with the position table that each published attention has."""
    renamed = {}
    for name, entry in entries.items():
        names = [name]
        if MOTION in name:
            name = re.sub(r"(\.motion_modules\.\d+\.)", r"\1temporal_transformer.", name)
            for published, module in MOTION_NAMES[1:]:
                name = name.replace(module, published)
            block, table, _ = name.partition(".pos_embed.pe")
            names = [f"{block}.attention_blocks.{index}{POSITIONS}" for index in (0, 1)] if table else [name]
        renamed |= dict.fromkeys(names, entry)
    return renamed


def current_names(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Names of a VAE of any release -> those of today."""
    return replaced(entries, VAE_NAMES)


def old_names(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Names of a VAE today -> those of the published files."""
    return replaced(entries, [(new, old) for old, new in VAE_NAMES])


def is_position_table(name: str) -> bool:
    return name.endswith((POSITIONS, ".pos_embed.pe"))


def table_length(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Frames of the first position table, 32 where there is none."""
    return next((shape[1] for name, shape in shapes.items() if is_position_table(name) and len(shape) == 3), 32)


def position_length(tensors: Mapping[str, Tensor], what: str) -> int:
    """Frames that the motion modules of a file know, after a check that its position tables are the sinusoidal ones.

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
        if tensor.shape != expected.shape or not tensor.float().allclose(expected, atol=5e-3):
            raise UserError(f"{what}: {name} is not the sinusoidal table; other tables are not supported")
    return lengths.pop()


def position_table(length: int, channels: int) -> Tensor:
    """Sine on even and cosine on odd channels, (1, length, channels), as diffusers computes it."""
    return SinusoidalPositionalEmbedding(channels, max_seq_length=length).pe
