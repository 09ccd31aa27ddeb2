"""What published checkpoint files hold: tensor name -> shape, for networks of any size.

The names follow from the networks, so they are built (without memory) and not listed.
"""

import torch

from models.checkpoints.loading import shapes_of
from models.checkpoints.names import MOTION, published_names
from models.checkpoints.networks import OUTPUT_LAYERS
from models.checkpoints.sizes import (
    MotionSizes,
    Shapes,
    UNetSizes,
    make_control_net,
    make_denoising_unet,
    make_pose_guider,
    make_reference_net,
)


def unet_manifest(sizes: UNetSizes) -> Shapes:
    """Published name -> shape of a Stable Diffusion UNet, which AnimateAnyone's `denoising_unet.pth` is too."""
    return {name: shape for name, shape in animated_unet_manifest(sizes, MotionSizes()).items() if MOTION not in name}


def reference_unet_manifest(sizes: UNetSizes) -> Shapes:
    """AnimateAnyone's `reference_unet.pth`: no output layers."""
    return {name: shape for name, shape in unet_manifest(sizes).items() if not name.startswith(OUTPUT_LAYERS)}


def appearance_encoder_manifest(sizes: UNetSizes) -> Shapes:
    """MagicAnimate's `appearance_encoder`: nothing after the last write either."""
    with torch.device("meta"):
        unread = set(make_reference_net(sizes).unused_parameters())
    return {name: shape for name, shape in reference_unet_manifest(sizes).items() if name not in unread}


def animated_unet_manifest(sizes: UNetSizes, motion: MotionSizes) -> Shapes:
    """MagicAnimate's `temporal_attention.ckpt`: image UNet and motion modules."""
    with torch.device("meta"):
        return published_names(shapes_of(make_denoising_unet(sizes, motion, "frame").state_dict()))


def motion_manifest(sizes: UNetSizes, motion: MotionSizes) -> Shapes:
    """AnimateDiff's motion-module files, which AnimateAnyone's `motion_module.pth` is too."""
    return {name: shape for name, shape in animated_unet_manifest(sizes, motion).items() if MOTION in name}


def control_net_manifest(sizes: UNetSizes, channels: tuple[int, ...]) -> Shapes:
    with torch.device("meta"):
        return shapes_of(make_control_net(sizes, channels).state_dict())


def pose_guider_manifest(width: int, channels: tuple[int, ...]) -> Shapes:
    with torch.device("meta"):
        return shapes_of(make_pose_guider(width, channels).state_dict())
