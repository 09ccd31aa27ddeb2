"""Networks of the Stable Diffusion 1 family: sizes from a file, what a file of these sizes holds, strict loading.

Tensors are as `files.read_tensors` gives them. Loaders read sizes from shapes, so smaller or wider networks of the
same scheme load as well; heads and norm groups, which shapes do not tell, are those of Stable Diffusion 1. Names and
shapes in a file (its manifest) are not listed: they follow from the network, built without memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel
from torch import Tensor

from core.errors import UserError
from models.animators.small_networks import block_types
from models.checkpoints.files import without_prefixes
from models.checkpoints.loading import (
    MOTION,
    Shapes,
    current_names,
    load_strictly,
    module_names,
    on_meta,
    position_length,
    published_names,
    shapes_of,
    shapes_on_meta,
)
from models.unets import DenoisingUNet, ReferenceNet

Tensors = Mapping[str, Tensor]
# The ReferenceNet has no output; complete Stable Diffusion UNets do.
OUTPUT_LAYERS = ("conv_norm_out.", "conv_out.")
EMBEDDING = "controlnet_cond_embedding."
UNET_PREFIXES = ("module.", "unet.")


@dataclass(frozen=True)
class UNetSizes:
    """Sizes of a UNet or ControlNet; defaults are Stable Diffusion 1.5."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)  # levels with spatial transformers, finest first
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    num_attention_heads: int = 8
    norm_num_groups: int = 32
    use_linear_projection: bool = False

    def __str__(self) -> str:
        return f"widths {joined(self.block_out_channels)}, context {self.cross_attention_dim}"


@dataclass(frozen=True)
class MotionSizes:
    """Sizes of motion modules; defaults are AnimateDiff v2, which AnimateAnyone has."""

    max_seq_length: int = 32
    mid_block: bool = True
    layers: int = 1
    num_attention_heads: int = 8
    norm_num_groups: int = 32  # at any width

    def __str__(self) -> str:
        return f"{self.max_seq_length} frames, {'with' if self.mid_block else 'no'} middle block"


def joined(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))


def count(shapes: Shapes, template: str) -> int:
    """Count of template.format(0), template.format(1), ... up to the first that is missing."""
    found = 0
    while template.format(found) in shapes:
        found += 1
    return found


def has(shapes: Shapes, *prefixes: str) -> bool:
    return any(name.startswith(prefixes) for name in shapes)


def widths(shapes: Shapes, prefix: str = "") -> tuple[int, ...]:
    """Channels of each resolution of a UNet, or of a VAE's encoder, finest first."""
    template = prefix + "down_blocks.{}.resnets.0.conv1.weight"
    return tuple(shapes[template.format(level)][0] for level in range(count(shapes, template)))


def unet_sizes(shapes: Shapes) -> UNetSizes:
    """Sizes of a UNet or ControlNet; what its tensors do not tell is Stable Diffusion 1.5's."""
    found: dict[str, Any] = {}
    if levels := range(len(widths(shapes))):
        found["block_out_channels"] = widths(shapes)
        found["attention"] = tuple(has(shapes, f"down_blocks.{level}.attentions.") for level in levels)
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
    return UNetSizes(**found)


def motion_sizes(shapes: Shapes, max_seq_length: int) -> MotionSizes:
    """Sizes of motion modules with names of this project, whose position tables have this length."""
    sizes = MotionSizes(max_seq_length, has(shapes, "mid_block.motion_modules."))
    layers = count(shapes, "down_blocks.0.motion_modules.0.transformer_blocks.{}.norm1.weight")
    return replace(sizes, layers=layers) if layers else sizes


def embedding_channels(shapes: Shapes, prefix: str = "") -> tuple[int, ...]:
    """Widths of a pose guider, or of a ControlNet's conditioning embedding, whose names begin with `prefix`."""
    blocks = count(shapes, prefix + "blocks.{}.weight")
    if f"{prefix}conv_in.weight" not in shapes or not blocks:
        return (16, 32, 96, 256)
    names = ("conv_in", *(f"blocks.{block}" for block in range(1, blocks, 2)))
    return tuple(shapes[f"{prefix}{name}.weight"][0] for name in names)


def unet_arguments(sizes: UNetSizes, suffix: str = "2D") -> dict[str, Any]:
    """Arguments of diffusers' UNets, but for their heads, with block classes of "2D" or "Motion"."""
    blocks = block_types(["both" if attention else "none" for attention in sizes.attention], suffix)
    others = {name: value for name, value in vars(sizes).items() if name not in ("attention", "num_attention_heads")}
    return {"sample_size": 64, **blocks, **others}


def control_net_arguments(sizes: UNetSizes, channels: tuple[int, ...]) -> dict[str, Any]:
    """Arguments of `ControlNetModel` with a conditioning embedding of these channels."""
    unknown = ("up_block_types", "out_channels", "sample_size")
    return {
        **{name: value for name, value in unet_arguments(sizes).items() if name not in unknown},
        "attention_head_dim": sizes.num_attention_heads,  # diffusers' misnomer: this is the number of heads
        "conditioning_embedding_out_channels": channels,
    }


def make_reference_net(sizes: UNetSizes) -> ReferenceNet:
    return ReferenceNet(attention_head_dim=sizes.num_attention_heads, **unet_arguments(sizes))


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


def make_autoencoder(shapes: Shapes, norm_num_groups: int = 32) -> AutoencoderKL:
    """VAE of these shapes, names of today; scale factor 0.18215, as in Stable Diffusion."""
    channels = widths(shapes, "encoder.") or (128, 256, 512, 512)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=count(shapes, "encoder.down_blocks.0.resnets.{}.conv1.weight") or 2,
        latent_channels=shapes.get("decoder.conv_in.weight", (0, 4))[1],
        norm_num_groups=norm_num_groups,
        sample_size=512,
        scaling_factor=0.18215,
    )


def animated_unet_manifest(sizes: UNetSizes, motion: MotionSizes) -> Shapes:
    """Published name -> shape of an image UNet with motion modules, MagicAnimate's `temporal_attention.ckpt`."""
    return published_names(shapes_on_meta(make_denoising_unet, sizes, motion, "frame"))


def motion_manifest(sizes: UNetSizes, motion: MotionSizes) -> Shapes:
    """Motion modules alone, AnimateDiff's files and AnimateAnyone's `motion_module.pth`."""
    return {name: shape for name, shape in animated_unet_manifest(sizes, motion).items() if MOTION in name}


def unet_manifest(sizes: UNetSizes) -> Shapes:
    """A Stable Diffusion UNet, which AnimateAnyone's `denoising_unet.pth` is too."""
    return {name: shape for name, shape in animated_unet_manifest(sizes, MotionSizes()).items() if MOTION not in name}


def reference_unet_manifest(sizes: UNetSizes) -> Shapes:
    """The same without output layers, AnimateAnyone's `reference_unet.pth`."""
    return {name: shape for name, shape in unet_manifest(sizes).items() if not name.startswith(OUTPUT_LAYERS)}


def control_net_manifest(sizes: UNetSizes, channels: tuple[int, ...]) -> Shapes:
    return shapes_on_meta(make_control_net, sizes, channels)


def load_reference_net(
    tensors: Tensors, what: str, sizes: UNetSizes | None = None, dtype: torch.dtype = torch.float32
) -> ReferenceNet:
    """ReferenceNet from AnimateAnyone's `reference_unet.pth`, MagicAnimate's `appearance_encoder`, or a UNet.

    The first lacks the output layers, the second also the 20 tensors after the last write, which have no effect.
    """
    tensors = without_prefixes(tensors, what, UNET_PREFIXES)
    network = on_meta(make_reference_net, sizes or unet_sizes(shapes_of(tensors)))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(OUTPUT_LAYERS)}
    return load_strictly(network, tensors, what, dtype, network.unused_parameters())


def load_denoising_unet(
    tensors: Tensors,
    what: str,
    norm_scope: str,
    sizes: UNetSizes | None = None,
    motion: MotionSizes | None = None,
    dtype: torch.dtype = torch.float32,
    length: int | None = None,
) -> DenoisingUNet:
    """Denoising UNet from the tensors of the image UNet and of the motion modules.

    A `length` of position tables is for models whose own code computes them; else the file must have them.
    """
    tensors = without_prefixes(tensors, what, UNET_PREFIXES)
    length = length or position_length(tensors, what)
    if motion is not None and motion.max_seq_length != length:
        raise UserError(f"{what} has position tables of {length} frames instead of {motion.max_seq_length}")
    tensors = module_names(tensors)
    shapes = shapes_of(tensors)
    sizes, motion = sizes or unet_sizes(shapes), motion or motion_sizes(shapes, length)
    return load_strictly(on_meta(make_denoising_unet, sizes, motion, norm_scope), tensors, what, dtype)


def load_control_net(
    tensors: Tensors, what: str, sizes: UNetSizes | None = None, dtype: torch.dtype = torch.float32
) -> ControlNetModel:
    """ControlNet of Stable Diffusion 1, for example MagicAnimate's `densepose_controlnet`."""
    shapes = shapes_of(tensors)
    network = on_meta(make_control_net, sizes or unet_sizes(shapes), embedding_channels(shapes, EMBEDDING))
    return load_strictly(network, tensors, what, dtype)


def load_autoencoder(
    tensors: Tensors, what: str, dtype: torch.dtype = torch.float32, norm_num_groups: int = 32
) -> AutoencoderKL:
    """VAE of Stable Diffusion 1 from tensors with the names of any release."""
    tensors = current_names(tensors)
    return load_strictly(on_meta(make_autoencoder, shapes_of(tensors), norm_num_groups), tensors, what, dtype)


def check_not_swapped(reference: Tensors, what: str, unet: Tensors) -> None:
    """Refuse the denoising UNet's own file, with its output layers, in place of the reference net's, which it fits."""
    reference, unet = (without_prefixes(tensors, what, UNET_PREFIXES) for tensors in (reference, unet))
    if has(shapes_of(reference), *OUTPUT_LAYERS) and all(
        name in unet and torch.equal(tensor, unet[name]) for name, tensor in reference.items()
    ):
        raise UserError(f"{what} holds the weights of the denoising UNet; those of the reference net are another file")


def check_reference_net(reference_net: ReferenceNet, denoising_unet: DenoisingUNet, vae: AutoencoderKL) -> None:
    """Refuse networks that do not belong together."""
    ours, theirs = denoising_unet.config, reference_net.config
    for name in ("block_out_channels", "layers_per_block", "in_channels", "cross_attention_dim"):
        if ours[name] != theirs[name]:
            raise UserError(f"{name} is {theirs[name]} in the reference net and {ours[name]} in the denoising UNet")
    if vae.config.latent_channels != ours.in_channels:
        raise UserError(f"vae= has {vae.config.latent_channels} latent channels, the UNets take {ours.in_channels}")
