"""Sizes of new small networks, checked, and as diffusers' and transformers' classes take them."""

from collections.abc import Sequence
from typing import Any

from transformers import CLIPVisionConfig

from core.errors import UserError
from models.config import IMAGE_ENCODER_HEADS, NetworkSizes, resolution_settings


def block_types(attention: Sequence[str], suffix: str = "2D") -> dict[str, tuple[str, ...]]:
    """`down_block_types` and `up_block_types` of a diffusers UNet with classes of "2D" or "Motion".

    Attention is "none", "up" or "both" for each resolution, finest first.
    """
    return {
        "down_block_types": tuple(f"{'CrossAttn' * (where == 'both')}DownBlock{suffix}" for where in attention),
        "up_block_types": tuple(f"{'CrossAttn' * (where != 'none')}UpBlock{suffix}" for where in reversed(attention)),
    }


def unet_settings(sizes: NetworkSizes, latent_channels: int, latent_side: int) -> dict[str, Any]:
    """Settings of a diffusers image UNet for latents of this side."""
    attention, heads = resolution_settings(sizes)
    return {
        "sample_size": latent_side,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "block_out_channels": tuple(sizes.block_out_channels),
        "layers_per_block": sizes.layers_per_block,
        "cross_attention_dim": sizes.context_dim,
        "norm_num_groups": sizes.norm_num_groups,
        "attention_head_dim": heads,  # diffusers' misnomer: this is the number of heads
        **block_types(attention),
    }


def check_pose_channels(channels: Sequence[int], factor: int) -> None:
    """Refuse an embedding of pose images that does not end at the latents' size, `factor` times smaller."""
    smaller = 2 ** (len(channels) - 1)
    if smaller != factor:
        raise UserError(
            f"model.pose_channels={list(channels)} make pose images {smaller} times smaller, but the VAE makes "
            f"images {factor} times smaller; each entry after the first halves them"
        )


def image_encoder_config(sizes: NetworkSizes) -> CLIPVisionConfig:
    """Small image encoder whose embedding is as wide as cross-attention's context."""
    return CLIPVisionConfig(
        hidden_size=sizes.image_encoder_width,
        intermediate_size=2 * sizes.image_encoder_width,
        num_hidden_layers=sizes.image_encoder_layers,
        num_attention_heads=IMAGE_ENCODER_HEADS,
        image_size=sizes.image_encoder_size,
        patch_size=sizes.image_encoder_patch,
        projection_dim=sizes.context_dim,
    )
