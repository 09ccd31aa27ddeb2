"""The VAE from the tensors of a published file; DisCo's and DreamPose's hold one with the names of older releases."""

from collections.abc import Mapping

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from models.checkpoints.loading import compare, load_strictly, shapes_of
from models.checkpoints.recognised import Recognised, joined
from models.checkpoints.sizes import Shapes, count

# Attention of the middle blocks: name in files up to diffusers 0.14 -> name today.
ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
ATTENTION = ".mid_block.attentions.0."


def load_autoencoder(
    tensors: Mapping[str, Tensor], what: str, dtype: torch.dtype = torch.float32, norm_num_groups: int = 32
) -> AutoencoderKL:
    """AutoencoderKL of Stable Diffusion 1 from tensors with old or new names; sizes are read from the shapes.

    Args:
        norm_num_groups: which shapes do not tell.
    """
    renamed = current_names(tensors)
    with torch.device("meta"):
        network = make_autoencoder(shapes_of(renamed), norm_num_groups)
    return load_strictly(network, renamed, what, dtype)


def make_autoencoder(shapes: Shapes, norm_num_groups: int = 32) -> AutoencoderKL:
    """The network of these shapes, names of today; scale factor 0.18215, as in Stable Diffusion."""
    levels = count(shapes, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    widths = [shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels)]
    widths = widths or [128, 256, 512, 512]
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=tuple(widths),
        layers_per_block=count(shapes, "encoder.down_blocks.0.resnets.{}.conv1.weight") or 2,
        latent_channels=shapes.get("decoder.conv_in.weight", (0, 4))[1],
        norm_num_groups=norm_num_groups,
        sample_size=512,
        scaling_factor=0.18215,
    )


def current_names(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Old names of the middle attention -> names of today; others stay. Also for name -> shape."""
    return {_renamed(name, ATTENTION_NAMES): entry for name, entry in entries.items()}


def old_names(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Names of today -> those of the published files."""
    return {
        _renamed(name, {new: old for old, new in ATTENTION_NAMES.items()}): shape for name, shape in shapes.items()
    }


def recognise_autoencoder(shapes: Shapes) -> Recognised | None:
    if not any(name.startswith(("decoder.", "encoder.down_blocks.", "encoder.conv_in.")) for name in shapes):
        return None
    with torch.device("meta"):
        network = make_autoencoder(current_names(shapes))
    wanted = shapes_of(network.state_dict())
    old = any(f"{ATTENTION}{name}." in found for found in shapes for name in ATTENTION_NAMES)
    names = "names of older releases" if old else "names of today"
    detail = f"widths {joined(network.config.block_out_channels)}, {names}"
    return Recognised("autoencoder", detail, compare(old_names(wanted) if old else wanted, shapes))


def _renamed(name: str, names: Mapping[str, str]) -> str:
    block, attention, layer = name.rpartition(ATTENTION)
    part, dot, kind = layer.rpartition(".")
    return f"{block}{attention}{names.get(part, part)}{dot}{kind}" if attention else name
