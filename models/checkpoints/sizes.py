"""Sizes of the networks of the Stable Diffusion 1 family, read from tensor shapes, and networks of these sizes.

Build inside `with torch.device("meta"):` to get a network without memory; see `strict.load_strictly`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffusers import ControlNetModel

from models.unets import DenoisingUNet, PoseGuider, ReferenceNet

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class UNetSizes:
    """Defaults are Stable Diffusion 1.5. Heads and norm groups cannot be read from shapes.

    Attributes:
        attention: by level, finest first, whether it has spatial transformers.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    num_attention_heads: int = 8
    norm_num_groups: int = 32
    use_linear_projection: bool = False


@dataclass(frozen=True)
class MotionSizes:
    """Defaults are AnimateDiff v2, which AnimateAnyone has. Its motion modules have 32 norm groups at any width."""

    max_seq_length: int = 32
    mid_block: bool = True
    layers: int = 1
    num_attention_heads: int = 8
    norm_num_groups: int = 32


def unet_sizes(shapes: Shapes, defaults: UNetSizes | None = None) -> UNetSizes:
    """Sizes of a UNet or ControlNet from its tensors; what these do not tell is taken from `defaults`."""
    sizes = defaults or UNetSizes()
    found = {}
    levels = count(shapes, "down_blocks.{}.resnets.0.conv1.weight")
    if levels:
        found["block_out_channels"] = tuple(
            shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels)
        )
        found["attention"] = tuple(
            any(name.startswith(f"down_blocks.{level}.attentions.") for name in shapes) for level in range(levels)
        )
        found["layers_per_block"] = count(shapes, "down_blocks.0.resnets.{}.conv1.weight")
    if len(shapes.get("conv_in.weight", ())) == 4:
        found["in_channels"] = found["out_channels"] = shapes["conv_in.weight"][1]
    if "conv_out.weight" in shapes:
        found["out_channels"] = shapes["conv_out.weight"][0]
    for name, shape in shapes.items():
        if name.endswith("attn2.to_k.weight") and ".attentions." in name:
            found["cross_attention_dim"] = shape[1]
        if name.endswith(".proj_in.weight") and ".attentions." in name:
            found["use_linear_projection"] = len(shape) == 2
    return replace(sizes, **found)


def motion_sizes(shapes: Shapes, max_seq_length: int, defaults: MotionSizes | None = None) -> MotionSizes:
    """Sizes of motion modules with names of this project; see `names.position_length` for their length."""
    layers = count(shapes, "down_blocks.0.motion_modules.0.transformer_blocks.{}.norm1.weight")
    sizes = defaults or MotionSizes()
    return replace(
        sizes,
        max_seq_length=max_seq_length,
        mid_block=any(name.startswith("mid_block.motion_modules.") for name in shapes),
        layers=layers or sizes.layers,
    )


def pose_guider_channels(shapes: Shapes) -> tuple[int, ...]:
    """Widths of a pose guider's or ControlNet's conditioning embedding, names without prefix."""
    blocks = count(shapes, "blocks.{}.weight")
    if "conv_in.weight" not in shapes or not blocks:
        return (16, 32, 96, 256)
    return (shapes["conv_in.weight"][0], *(shapes[f"blocks.{block}.weight"][0] for block in range(1, blocks, 2)))


def make_reference_net(sizes: UNetSizes) -> ReferenceNet:
    return ReferenceNet(attention_head_dim=sizes.num_attention_heads, **unet_arguments(sizes, "2D"))


def make_denoising_unet(sizes: UNetSizes, motion: MotionSizes, norm_scope: str) -> DenoisingUNet:
    """The denoising UNet as the published code computes it: its motion modules act on single frames too."""
    return DenoisingUNet(
        num_attention_heads=sizes.num_attention_heads,
        motion_num_attention_heads=motion.num_attention_heads,
        motion_max_seq_length=motion.max_seq_length,
        temporal_transformer_layers_per_block=motion.layers,
        temporal_transformer_layers_per_mid_block=motion.layers,
        use_motion_mid_block=motion.mid_block,
        norm_scope=norm_scope,
        motion_norm_num_groups=motion.norm_num_groups,
        motion_on_single_frames=True,
        **unet_arguments(sizes, "Motion"),
    )


def make_control_net(sizes: UNetSizes, channels: tuple[int, ...]) -> ControlNetModel:
    return ControlNetModel(**control_net_arguments(sizes, channels))


def make_pose_guider(width: int, channels: tuple[int, ...]) -> PoseGuider:
    return PoseGuider(conditioning_embedding_channels=width, block_out_channels=channels)


def control_net_arguments(sizes: UNetSizes, channels: tuple[int, ...]) -> dict[str, Any]:
    """Of `ControlNetModel`; channels: widths of its conditioning embedding."""
    arguments = unet_arguments(sizes, "2D")
    for name in ("up_block_types", "out_channels", "sample_size"):
        del arguments[name]
    return {
        **arguments,
        "attention_head_dim": sizes.num_attention_heads,
        "conditioning_embedding_out_channels": channels,
    }


def unet_arguments(sizes: UNetSizes, kind: str) -> dict[str, Any]:
    """Of diffusers' UNets, but for their heads; kind: "2D" or "Motion", of their blocks."""
    down = [f"{'CrossAttn' if attention else ''}DownBlock{kind}" for attention in sizes.attention]
    up = [f"{'CrossAttn' if attention else ''}UpBlock{kind}" for attention in reversed(sizes.attention)]
    return {
        "sample_size": 64,
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "block_out_channels": sizes.block_out_channels,
        "layers_per_block": sizes.layers_per_block,
        "cross_attention_dim": sizes.cross_attention_dim,
        "norm_num_groups": sizes.norm_num_groups,
        "use_linear_projection": sizes.use_linear_projection,
    }


def count(shapes: Shapes, template: str) -> int:
    """How many of template.format(0), template.format(1), ... there are, up to the first that is missing."""
    number = 0
    while template.format(number) in shapes:
        number += 1
    return number
