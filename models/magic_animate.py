"""MagicAnimate (Xu et al., CVPR 2024): appearance encoder, DensePose ControlNet, denoising UNet with norms over clips.

Shapes use b = batch, f = frames, c = channels, h, w = latent size, H, W = picture size.
"""

import torch
from diffusers import ControlNetModel
from torch import Tensor


def control_residuals(
    control_net: ControlNetModel, latents: Tensor, timestep: Tensor | int, context: Tensor, poses: Tensor
) -> list[Tensor]:
    """What the ControlNet adds to the denoising UNet, frame by frame.

    Args:
        latents: noisy latents, (b, c, f, h, w).
        timestep: scalar or (b,).
        context: text tokens, (b, tokens, channels).
        poses: pose pictures, (b*f, 3, H, W) in [0, 1].

    Returns:
        (b*f, c, h', w') each: one for every skip connection, then that of the middle block.
    """
    num_frames = latents.shape[2]
    timesteps = torch.as_tensor(timestep, device=latents.device).expand(len(latents)).repeat_interleave(num_frames)
    down, mid = control_net(
        latents.transpose(1, 2).flatten(0, 1),
        timesteps,
        context.repeat_interleave(num_frames, dim=0),
        controlnet_cond=poses,
        return_dict=False,
    )
    return [*down, mid]
