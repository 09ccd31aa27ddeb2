"""AnimateAnyone (Hu et al., CVPR 2024) as one module: reference net, denoising UNet, pose guider, image encoder.

Shapes use b = batch, f = frames, i = reference images, c = channels, h, w = latent size, H, W = image size.
"""

from typing import Self

import torch
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from models.animators.base import Condition, Images, guided
from models.animators.reference_animator import ReferenceAnimator, small_unets
from models.animators.small_networks import check_pose_channels, small_image_encoder
from models.animators.trainable import CalibratedImages, NetworkSizes
from models.attention.context import ReferenceContext
from models.attention.probe import Probe
from models.clip_images import clip_pixels
from models.images import ImageSequence
from models.unets import DenoisingUNet, PoseGuider, ReferenceNet, one_token_parameters

# Pose features of clips up to this length are computed once; at 784x512 pixels a frame takes 4 MB in half precision.
# For longer ones each window computes its own at every step, for 0.6 % more work.
KEPT_FRAMES = 256
POSE_CHUNK = 8


class AnimateAnyone(ReferenceAnimator):
    """The networks that are trained together; DeepSpeed and FSDP take one module.

    Frames see the reference's tokens beside their own in every self-attention layer, and one token of its image
    embedding in cross-attention, which is what `encode_reference` gives.
    """

    takes_embeddings = True
    adapted_networks = ("denoising_unet", "reference_net")
    frozen_parts = ("image_encoder",)

    def __init__(
        self,
        reference_net: ReferenceNet,
        denoising_unet: DenoisingUNet,
        pose_guider: PoseGuider,
        image_encoder: CLIPVisionModelWithProjection,
    ):
        super().__init__()
        self.reference_net = reference_net
        self.denoising_unet = denoising_unet
        self.pose_guider = pose_guider
        self.image_encoder = image_encoder

    @classmethod
    def small(cls, sizes: NetworkSizes, latent_channels: int, image_size: int) -> Self:
        """Pose guider and motion modules end in zeros, so they start as no change."""
        settings = {"use_motion_mid_block": True}
        reference_net, denoising_unet = small_unets(sizes, latent_channels, image_size, settings)
        pose_guider = PoseGuider(sizes.block_out_channels[0], 3, tuple(sizes.pose_channels))
        return cls(reference_net, denoising_unet, pose_guider, small_image_encoder(sizes))

    def forward(
        self,
        noisy_latents: Tensor,
        timestep: Tensor,
        reference_latents: Tensor,
        reference_image: Tensor,
        poses: Tensor,
        dropped: Tensor,
        reference: ReferenceContext | None = None,
        probe: Probe | None = None,
        reference_mask: Tensor | None = None,
        calibrated: CalibratedImages | None = None,
    ) -> Tensor:
        """See `TrainableAnimator.forward`.

        Args:
            reference_image: for the image encoder; or what it gave, (b, 1, channels).
            dropped: samples that train the unconditional half of guidance: no reference, zero context.
        """
        known = reference_image.ndim == 3
        context = reference_image if known else image_context(self.image_encoder, reference_image)
        # DeepSpeed's bf16 turns the weights into bfloat16 and knows no autocast, so the inputs follow the weights.
        dtype = self.denoising_unet.dtype
        noisy_latents, reference_latents, poses = (x.to(dtype) for x in (noisy_latents, reference_latents, poses))
        context = context.to(dtype) * (dropped == 0)[:, None, None]
        # Calibrated images come clip by clip; like their clip's reference they are encoded with its embedding.
        per_clip = len(reference_latents) // len(noisy_latents) - 1
        contexts = torch.cat([context, context.repeat_interleave(per_clip, dim=0)])
        tokens = self.write_tokens(reference_latents, 0, contexts)
        seen = self.training_context(tokens, noisy_latents, dropped, reference, probe)
        return self.denoising_unet(noisy_latents, timestep, context, self.pose_guider(poses), seen)

    # What follows is of `models.animators.base.Animator`.

    def encode_reference(self, reference: Images) -> Tensor:
        """The image embedding of the reference, (1, 1, channels)."""
        return image_context(self.image_encoder, reference.pixels).to(self.dtype)

    def pose_condition(self, poses: ImageSequence, conditioning: Tensor) -> "PoseFeatures":
        return PoseFeatures(self.pose_guider, poses)

    def predict(self, sample: Tensor, timestep: Tensor, condition: Condition, scales: tuple[float, ...]) -> Tensor:
        """The unconditional half sees no image and a zero context, and keeps the pose."""
        context, pose = condition.conditioning, condition.pose
        return guided(
            lambda: self.denoising_unet(sample, timestep, context, pose, condition.context),
            lambda: self.denoising_unet(sample, timestep, torch.zeros_like(context), pose, None),
            *scales,
        )

    # The rest is of `models.animators.trainable.TrainableAnimator`.

    def unused_parameters(self) -> set[str]:
        """What follows the ReferenceNet's last written layer, and queries and keys of attention to one image token."""
        names = super().unused_parameters()
        for network in ("denoising_unet", "reference_net"):
            names |= {f"{network}.{name}" for name in one_token_parameters(getattr(self, network))}
        return names

    def check_size(self, factor: int, size: tuple[int, int]) -> None:
        """Pose features must be of the latents' size, too."""
        check_pose_channels(self.pose_guider.config.block_out_channels, factor)
        super().check_size(factor, size)


class PoseFeatures:
    """Pose guider features of a clip, the same at every step; `PoseCondition` and `StepCondition` of an animator."""

    def __init__(self, pose_guider: PoseGuider, poses: ImageSequence, kept_frames: int = KEPT_FRAMES):
        self.pose_guider = pose_guider
        self.poses = poses
        self.features = self._compute(range(len(poses))) if len(poses) <= kept_frames else None

    def at_step(self, sample: Tensor, timestep: Tensor) -> "PoseFeatures":
        return self

    def window(self, frames: range) -> Tensor:
        """(1, c, f, h, w)"""
        if self.features is None:
            return self._compute(frames)
        return self.features[:, :, frames.start : frames.stop]

    def _compute(self, frames: range) -> Tensor:
        parts = [frames[start : start + POSE_CHUNK] for start in range(0, len(frames), POSE_CHUNK)]
        return torch.cat([self.pose_guider(self.poses[part].transpose(0, 1)[None]) for part in parts], dim=2)


def image_context(image_encoder: CLIPVisionModelWithProjection, image: Tensor) -> Tensor:
    """Image embedding of the reference as cross-attention context: one token, as the published weights expect.

    The image is squashed to the encoder's square input, aspect ratio not kept, in training and inference alike.

    Args:
        image: (b, 3, H, W) in [-1, 1].

    Returns:
        (b, 1, projection channels).
    """
    pixels = clip_pixels(image, image_encoder.config.image_size).to(next(image_encoder.parameters()).dtype)
    return image_encoder(pixels).image_embeds[:, None]
