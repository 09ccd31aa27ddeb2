"""DreamPose's networks from the tensors of its files, and what these files are.

`unet_epoch_<n>.pth` is a Stable Diffusion UNet whose first convolution takes five poses beside the latents,
`adapter_<n>.pth` the four tensors of `ImageAdapter`, `vae_<n>.pth` a VAE whose decoder was fine-tuned to a person.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from core.errors import UserError
from models.animators.dream_pose.networks import DreamPoseUNet, ImageAdapter, portrait_grid
from models.checkpoints.loading import compare, load_strictly, shapes_of
from models.checkpoints.recognised import Recognised, unet_detail
from models.checkpoints.sizes import Shapes, UNetSizes, unet_arguments, unet_sizes

POSES = 5
# Channels of a pose image that are used, by their number: U and V of (part, U, V), or all of a coloured figure.
IMAGE_CHANNELS = {2: (1, 2), 3: (0, 1, 2)}
# What the published file lacks: it follows from the VAE.
NULL_LATENTS = "null_latents"


def load_dream_pose_unet(
    tensors: Mapping[str, Tensor],
    what: str,
    sizes: UNetSizes | None = None,
    dtype: torch.dtype = torch.float32,
    poses: int = POSES,
    channels: tuple[int, ...] | None = None,
) -> DreamPoseUNet:
    """UNet from `unet_epoch_<n>.pth`.

    Args:
        poses, channels: see `DreamPoseUNet`; None: 2 channels are DensePose's, 3 those of a figure.
    """
    sizes = sizes or unet_sizes(shapes_of(tensors))
    channels = channels or pose_channels(sizes)
    if channels is None:
        raise UserError(
            f"{what} takes {sizes.in_channels} input channels; DreamPose's takes {sizes.out_channels} of the latents "
            f"and {POSES} poses of 2 or 3 channels"
        )
    with torch.device("meta"):
        network = make_dream_pose_unet(sizes, channels, poses)
    return load_strictly(network, tensors, what, dtype)


def widened(tensors: Mapping[str, Tensor], channels: int = 2) -> dict[str, Tensor]:
    """The tensors of a Stable Diffusion UNet with zeros for new pose channels, which therefore change nothing yet.

    Args:
        channels: of one pose.
    """
    kernel = tensors["conv_in.weight"]
    new = kernel.new_zeros(kernel.shape[0], POSES * channels, *kernel.shape[2:])
    return {**tensors, "conv_in.weight": torch.cat([kernel, new], dim=1)}


def load_adapter(
    tensors: Mapping[str, Tensor],
    what: str,
    dtype: torch.dtype = torch.float32,
    latent_grid: tuple[int, int] | None = None,
) -> ImageAdapter:
    """Adapter from `adapter_<n>.pth`, its null latents zero.

    Args:
        latent_grid: (rows, columns) of its pooled latents; None: 5 : 4 as far as their number allows.
    """
    arguments = adapter_arguments(shapes_of(tensors), latent_grid)
    with torch.device("meta"):
        network = ImageAdapter(**arguments)
    return load_strictly(network, tensors, what, dtype, unread=(NULL_LATENTS,))


def adapter_arguments(shapes: Shapes, latent_grid: tuple[int, int] | None = None) -> dict:
    """Arguments of `ImageAdapter` from the shapes of its tensors; what these do not tell is as published."""
    published = {"vae2clip.weight": (768, 1280), "linear1.weight": (50, 54)}
    found = {name: shapes[name] if len(shapes.get(name, ())) == 2 else shape for name, shape in published.items()}
    (channels, cells), (tokens, both) = found.values()
    return {
        "clip_tokens": tokens,
        "channels": channels,
        "latent_channels": max(both - tokens, 1),
        "latent_grid": latent_grid or portrait_grid(cells),
    }


def pose_channels(sizes: UNetSizes) -> tuple[int, ...] | None:
    """Channels of a pose image that a UNet of these sizes uses; None: it is not DreamPose's.

    One channel is not taken for a pose's: UNets for inpainting have five channels too many.
    """
    number, rest = divmod(sizes.in_channels - sizes.out_channels, POSES)
    return None if rest else IMAGE_CHANNELS.get(number)


def make_dream_pose_unet(sizes: UNetSizes, channels: tuple[int, ...], poses: int = POSES) -> DreamPoseUNet:
    return DreamPoseUNet(
        attention_head_dim=sizes.num_attention_heads,
        poses=poses,
        pose_channels=channels,
        pose_kind="OpenPose" if len(channels) == 3 else "DensePose",
        **unet_arguments(sizes, "2D"),
    )


def dream_pose_unet_manifest(sizes: UNetSizes) -> Shapes:
    """`unet_epoch_<n>.pth`."""
    with torch.device("meta"):
        return shapes_of(make_dream_pose_unet(sizes, pose_channels(sizes)).state_dict())


def adapter_manifest(shapes: Shapes) -> Shapes:
    """`adapter_<n>.pth` of the sizes that these shapes tell."""
    with torch.device("meta"):
        entries = shapes_of(ImageAdapter(**adapter_arguments(shapes)).state_dict())
    return {name: shape for name, shape in entries.items() if name != NULL_LATENTS}


def recognise_unet(shapes: Shapes) -> Recognised | None:
    if "up_blocks.0.resnets.0.conv1.weight" not in shapes or "conv_out.weight" not in shapes:
        return None
    sizes = unet_sizes(shapes)
    channels = pose_channels(sizes)
    if channels is None:
        return None
    detail = f"{unet_detail(sizes)}, {POSES} poses of {len(channels)} channels"
    return Recognised("DreamPose unet_epoch", detail, compare(dream_pose_unet_manifest(sizes), shapes))


def recognise_adapter(shapes: Shapes) -> Recognised | None:
    if not any(name.startswith("vae2clip.") for name in shapes):
        return None
    arguments = adapter_arguments(shapes)
    rows, columns = arguments["latent_grid"]
    detail = f"{arguments['clip_tokens']} tokens, latents of {rows} x {columns}"
    return Recognised("DreamPose adapter", detail, compare(adapter_manifest(shapes), shapes))
