"""MagicAnimate's networks beside its UNets: the ControlNet of the poses, and the embedded empty prompt.

Shapes use b = batch, f = frames, c = channels, h, w = latent size, H, W = image size.
"""

import torch
from diffusers import ConfigMixin, ControlNetModel, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from models.images import ImageSequence

CONTROL_CHUNK = 8


class PromptEmbedding(ModelMixin, ConfigMixin):
    """A text encoder's tokens of one fixed prompt, kept as a tensor (1, tokens, channels)."""

    @register_to_config
    def __init__(self, tokens: int = 77, channels: int = 768):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(1, tokens, channels))

    def forward(self) -> Tensor:
        return self.embedding


class ControlCondition:
    """Residuals of the ControlNet for windows of a clip, each frame once a step although windows overlap.

    Only the frames of the latest window are kept.
    """

    def __init__(self, control_net: ControlNetModel, poses: ImageSequence, context: Tensor):
        self.control_net = control_net
        self.poses = poses
        self.context = context
        self.sample: Tensor | None = None  # of the step that the kept residuals belong to
        self.kept = range(0)
        self.residuals: list[Tensor] = []

    def __call__(self, frames: range, sample: Tensor, timestep: Tensor) -> list[Tensor]:
        """(f, c, h', w') each: one for every skip connection, then that of the middle block.

        Args:
            frames: of the window.
            sample: noisy latents of the whole clip, (1, c, f, h, w).
        """
        parts, known = [], frames.start
        if sample is self.sample and self.kept.start <= frames.start < self.kept.stop:
            shared = slice(frames.start - self.kept.start, frames.stop - self.kept.start)
            parts, known = [[part[shared] for part in self.residuals]], self.kept.stop
        for start in range(known, frames.stop, CONTROL_CHUNK):
            chunk = range(start, min(start + CONTROL_CHUNK, frames.stop))
            latents = sample[:, :, chunk.start : chunk.stop]
            parts.append(control_residuals(self.control_net, latents, timestep, self.context, self.poses[chunk]))
        self.sample, self.kept = sample, frames
        self.residuals = [torch.cat(chunks) for chunks in zip(*parts, strict=True)]
        return self.residuals


def control_residuals(
    control_net: ControlNetModel, latents: Tensor, timestep: Tensor | int, context: Tensor, poses: Tensor
) -> list[Tensor]:
    """Residuals of the ControlNet for the denoising UNet, frame by frame.

    Args:
        latents: noisy latents, (b, c, f, h, w).
        timestep: scalar or (b,).
        context: text tokens, (b, tokens, channels).
        poses: pose images, (b*f, 3, H, W) in [0, 1].

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
