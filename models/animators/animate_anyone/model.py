"""AnimateAnyone (Hu et al., CVPR 2024) as one module: reference net, denoising UNet, pose guider, image encoder.

Frames attend to the reference's tokens beside their own in every self-attention layer, and in cross-attention to one
token, its CLIP embedding, which is the conditioning. Poses are OpenPose figures, whose features are added after the
first convolution.

Shapes use b = batch, f = frames, c = channels, h, w = latent size, H, W = image size.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from models.animators.base import Animator, Condition, PoseCondition, TrainingBatch, zero_dropped
from models.animators.reference_net import ReferenceNetMixin, small_unets
from models.animators.small_networks import check_pose_channels, image_encoder_config
from models.config import NetworkSizes
from models.images import ImageBatch, ImageSequence, clip_pixels
from models.unets import DenoisingUNet, PoseGuider, ReferenceNet, one_token_parameters

# Pose features of clips up to this length are computed once; at 784x512 pixels a frame takes 4 MB in half precision.
# For longer ones each window computes its own at every step, for 0.6 % more work.
KEPT_FRAMES = 256
POSE_CHUNK = 8


class AnimateAnyone(ReferenceNetMixin, Animator):
    """The networks that are trained together; DeepSpeed and FSDP take one module."""

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

    def encode_reference(self, reference: ImageBatch) -> Tensor:
        return image_context(self.image_encoder, reference.pixels).to(self.dtype)  # (1, 1, channels)

    def pose_condition(self, poses: ImageSequence, conditioning: Tensor) -> PoseCondition:
        return pose_features(self.pose_guider, poses)

    def predict(self, sample: Tensor, timestep: Tensor, condition: Condition, dropped: Sequence[int]) -> Tensor:
        # The unconditional half has no image and a zero context, and keeps the pose.
        dropped = [branch > 0 for branch in dropped]
        context = zero_dropped(condition.conditioning, dropped)  # (b, 1, channels)
        return self.denoising_unet(sample, timestep, context, condition.pose, condition.context.for_passes(dropped))

    def training_prediction(self, batch: TrainingBatch) -> Tensor:
        image = batch.reference_image
        context = image if image.ndim == 3 else image_context(self.image_encoder, image)  # (b, 1, channels)
        # DeepSpeed's bf16 turns the weights into bfloat16 and knows no autocast, so the inputs follow the weights.
        parts = (batch.noisy_latents, batch.reference_latents, batch.poses, context)
        latents, reference_latents, poses, context = (part.to(self.dtype) for part in parts)
        context = context * (batch.dropped == 0)[:, None, None]
        # Calibrated images come clip by clip; like their clip's reference they are encoded with its embedding.
        per_clip = len(reference_latents) // len(latents) - 1
        contexts = torch.cat([context, context.repeat_interleave(per_clip, dim=0)])  # (b + b*m, 1, channels)
        tokens = self.write_tokens(reference_latents, 0, contexts)  # layer -> (b + b*m, tokens, c)
        reference = batch.context(tokens).drop_images(batch.by_frame(batch.dropped > 0))
        return self.denoising_unet(latents, batch.timestep, context, self.pose_guider(poses), reference)

    @classmethod
    def small(cls, sizes: NetworkSizes, latent_channels: int, latent_side: int) -> Self:
        # Pose guider and motion modules end in zeros, so they start as no change.
        reference_net, denoising_unet = small_unets(sizes, latent_channels, latent_side, use_motion_mid_block=True)
        pose_guider = PoseGuider(sizes.block_out_channels[0], 3, tuple(sizes.pose_channels))
        image_encoder = CLIPVisionModelWithProjection(image_encoder_config(sizes))
        return cls(reference_net, denoising_unet, pose_guider, image_encoder)

    def unused_parameters(self) -> set[str]:
        names = super().unused_parameters()
        # queries and keys of attention to one image token
        for network in ("denoising_unet", "reference_net"):
            names |= {f"{network}.{name}" for name in one_token_parameters(getattr(self, network))}
        return names

    def check_size(self, factor: int, size: tuple[int, int]) -> None:
        check_pose_channels(self.pose_guider.config.block_out_channels, factor)
        super().check_size(factor, size)


def pose_features(pose_guider: PoseGuider, poses: ImageSequence, kept_frames: int = KEPT_FRAMES) -> PoseCondition:
    """Features (1, c, f, h, w) of a window's frames; those of clips up to `kept_frames` are computed now, and kept."""

    def compute(frames: range) -> Tensor:
        parts = [frames[start : start + POSE_CHUNK] for start in range(0, len(frames), POSE_CHUNK)]
        return torch.cat([pose_guider(poses[part].transpose(0, 1)[None]) for part in parts], dim=2)

    if len(poses) > kept_frames:
        return lambda frames, sample, timestep: compute(frames)
    features = compute(range(len(poses)))
    return lambda frames, sample, timestep: features[:, :, frames.start : frames.stop]


def image_context(image_encoder: CLIPVisionModelWithProjection, image: Tensor) -> Tensor:
    """Embedding (b, 1, channels) of images (b, 3, H, W) in [-1, 1], squashed to the encoder's square.

    It is one token of cross-attention's context, as the published weights expect.
    """
    pixels = clip_pixels(image, image_encoder.config.image_size).to(next(image_encoder.parameters()).dtype)
    return image_encoder(pixels).image_embeds[:, None]
