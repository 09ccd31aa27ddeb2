"""Networks of the published animators from the tensors of their files, strictly.

Each function takes name -> tensor as `files.read_tensors` returns it. Sizes are read from the shapes unless given, so
smaller or wider networks of the same scheme load as well; heads and norm groups are those of Stable Diffusion 1.
"""

from collections.abc import Mapping

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from core.errors import UserError
from models.checkpoints.files import without_prefixes
from models.checkpoints.loading import load_strictly, shapes_of
from models.checkpoints.names import MOTION, module_names, position_length, position_table
from models.checkpoints.sizes import (
    MotionSizes,
    UNetSizes,
    make_control_net,
    make_denoising_unet,
    make_pose_guider,
    make_reference_net,
    motion_sizes,
    pose_guider_channels,
    unet_sizes,
)
from models.unets import DenoisingUNet, MotionModule, PoseGuider, ReferenceNet

Tensors = Mapping[str, Tensor]
# The ReferenceNet has no output; complete Stable Diffusion UNets do.
OUTPUT_LAYERS = ("conv_norm_out.", "conv_out.")
EMBEDDING = "controlnet_cond_embedding."
UNET_PREFIXES = ("module.", "unet.")


def load_reference_net(
    tensors: Tensors, what: str, sizes: UNetSizes | None = None, dtype: torch.dtype = torch.float32
) -> ReferenceNet:
    """ReferenceNet from `reference_unet.pth` of AnimateAnyone, the `appearance_encoder` of MagicAnimate, or a UNet.

    The first lacks the output layers, the second also the 20 tensors after the last write, which nothing reads.
    """
    tensors = without_prefixes(tensors, what, UNET_PREFIXES)
    sizes = sizes or unet_sizes(shapes_of(tensors))
    with torch.device("meta"):
        network = make_reference_net(sizes)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(OUTPUT_LAYERS)}
    return load_strictly(network, tensors, what, dtype, unread=network.unused_parameters())


def load_denoising_unet(
    tensors: Tensors,
    what: str,
    norm_scope: str,
    sizes: UNetSizes | None = None,
    motion: MotionSizes | None = None,
    dtype: torch.dtype = torch.float32,
    length: int | None = None,
) -> DenoisingUNet:
    """Denoising UNet from one dictionary with the tensors of the image UNet and of the motion modules.

    That is MagicAnimate's `temporal_attention.ckpt`, or AnimateAnyone's two files together: see `with_motion`.

    Args:
        length: frames of the position tables, for models whose own code computes them and ignores the file's; None:
            as in the file, which must then have them.
    """
    tensors = without_prefixes(tensors, what, UNET_PREFIXES)
    length = length or position_length(tensors, what)
    if motion is not None and motion.max_seq_length != length:
        raise UserError(f"{what} has position tables of {length} frames instead of {motion.max_seq_length}")
    tensors = module_names(tensors)
    shapes = shapes_of(tensors)
    with torch.device("meta"):
        network = make_denoising_unet(sizes or unet_sizes(shapes), motion or motion_sizes(shapes, length), norm_scope)
    return load_strictly(network, tensors, what, dtype)


def with_motion(unet: Tensors, motion_module: Tensors) -> dict[str, Tensor]:
    """The tensors of an image UNet and of a motion-module file in one dictionary.

    Only motion modules are taken from the second; trainers save further entries beside them.
    """
    image = {name: tensor for name, tensor in unet.items() if MOTION not in name}
    return image | {name: tensor for name, tensor in motion_module.items() if MOTION in name}


def load_image_unet(tensors: Tensors, what: str, dtype: torch.dtype = torch.float32) -> DenoisingUNet:
    """Denoising UNet from an image UNet, with new motion modules, which change nothing before they are trained."""
    sizes = unet_sizes(shapes_of(tensors))
    with torch.device("meta"):
        network = make_denoising_unet(sizes, MotionSizes(), norm_scope="frame")
    new = {}
    for name, module in network.named_modules():
        if isinstance(module, MotionModule):
            reset_motion_module(module.to_empty(device="cpu"))
            new |= {f"{name}.{entry}": value for entry, value in module.state_dict().items()}
    return load_strictly(network, with_motion(tensors, module_names(new)), what, dtype)


def reset_motion_module(module: MotionModule) -> None:
    """New random weights, output projection zero."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.LayerNorm, nn.GroupNorm)):
            part.reset_parameters()
    nn.init.zeros_(module.proj_out.weight)
    nn.init.zeros_(module.proj_out.bias)
    for block in module.transformer_blocks:
        block.pos_embed.pe = position_table(*block.pos_embed.pe.shape[1:])


def load_pose_guider(tensors: Tensors, what: str, dtype: torch.dtype = torch.float32) -> PoseGuider:
    """Pose guider from `pose_guider.pth`."""
    shapes = shapes_of(tensors)
    width = shapes["conv_out.weight"][0] if "conv_out.weight" in shapes else UNetSizes().block_out_channels[0]
    with torch.device("meta"):
        network = make_pose_guider(width, pose_guider_channels(shapes))
    return load_strictly(network, tensors, what, dtype)


def pose_guider_from_control_net(tensors: Tensors, what: str, dtype: torch.dtype = torch.float32) -> PoseGuider:
    """Pose guider to start training from: a ControlNet's conditioning embedding, its last convolution zero."""
    embedding = {name.removeprefix(EMBEDDING): value for name, value in tensors.items() if name.startswith(EMBEDDING)}
    for name in ("conv_out.weight", "conv_out.bias"):
        if name in embedding:
            embedding[name] = torch.zeros_like(embedding[name])
    return load_pose_guider(embedding, what, dtype)


def load_control_net(
    tensors: Tensors, what: str, sizes: UNetSizes | None = None, dtype: torch.dtype = torch.float32
) -> ControlNetModel:
    """ControlNet of Stable Diffusion 1, for example MagicAnimate's `densepose_controlnet`."""
    shapes = shapes_of(tensors)
    embedding = {name.removeprefix(EMBEDDING): shape for name, shape in shapes.items() if name.startswith(EMBEDDING)}
    with torch.device("meta"):
        network = make_control_net(sizes or unet_sizes(shapes), pose_guider_channels(embedding))
    return load_strictly(network, tensors, what, dtype)
