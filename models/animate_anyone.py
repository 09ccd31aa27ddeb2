"""AnimateAnyone (Hu et al., CVPR 2024) as one module: reference net, denoising UNet, pose guider, image encoder.

Shapes use b = batch, f = frames, i = reference images, c = channels, h, w = latent size, H, W = picture size.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from models.attention_probe import Probe
from models.pictures import PictureSequence
from models.reference_attention import ReferenceContext, hide_reference, reference_layers, same_reference
from models.unets import DenoisingUNet, PoseGuider, ReferenceNet

# Pose features of clips up to this length are computed once; at 784x512 pixels a frame takes 4 MB in half precision.
# For longer ones each window computes its own at every step, for 0.6 % more work.
KEPT_FRAMES = 256
POSE_CHUNK = 8


class AnimateAnyone(nn.Module):
    """The networks that are trained together; DeepSpeed and FSDP take one module."""

    reference_follows_timestep = False

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
    ) -> Tensor:
        """One training step's prediction for b clips.

        Args:
            noisy_latents: (b, c, f, h, w).
            timestep: (b,).
            reference_latents: (i, c, h, w). The first b are the clips' references, in order; further ones are
                calibrated images, as many of every clip, seen where `reference` says so.
            reference_image: (b, 3, H, W) in [-1, 1], for the image encoder; or what it gave, (b, 1, channels).
            poses: pose pictures, (b, 3, f, H, W) in [0, 1].
            dropped: (b,) bool, samples that train the unconditional half of guidance: no reference, zero context.
            reference: index and flags of what each frame sees (its `tokens` are ignored); None: each clip its own
                reference.
            probe: looks at what its queries attend to.

        Returns:
            Prediction, (b, c, f, h, w).
        """
        batch, _, num_frames, height, width = noisy_latents.shape
        known = reference_image.ndim == 3
        context = reference_image if known else image_context(self.image_encoder, reference_image)
        # DeepSpeed's bf16 turns the weights into bfloat16 and knows no autocast, so the inputs follow the weights.
        dtype = self.denoising_unet.dtype
        noisy_latents, reference_latents, poses = (x.to(dtype) for x in (noisy_latents, reference_latents, poses))
        context = context.to(dtype) * ~dropped[:, None, None]
        # Calibrated images come clip by clip; like their clip's reference they are encoded with its embedding.
        per_clip = len(reference_latents) // batch - 1
        contexts = torch.cat([context, context.repeat_interleave(per_clip, dim=0)])
        tokens = self.reference_net(reference_latents, 0, contexts)
        if reference is None:
            seen = same_reference(tokens, num_frames)
            grids = self.denoising_unet.attention_grids(height, width)
            seen = hide_reference(seen, dropped.repeat_interleave(num_frames), grids)
        else:
            seen = ReferenceContext(tokens, reference.index, reference.query_flags, reference.key_flags)
        seen = replace(seen, probe=probe)
        return self.denoising_unet(noisy_latents, timestep, context, self.pose_guider(poses), seen)

    # The rest is `models.animator.Animator`.

    def encode_context(self, reference: Tensor) -> Tensor:
        """The image embedding of the reference, (1, 1, channels)."""
        return image_context(self.image_encoder, reference).to(self.denoising_unet.dtype)

    def null_context(self, context: Tensor) -> Tensor:
        return torch.zeros_like(context)

    def encode_reference(self, latents: Tensor, timestep: Tensor | int, context: Tensor) -> dict[str, Tensor]:
        return self.reference_net(latents, timestep, context)

    def reading_layers(self) -> list[str]:
        return reference_layers(self.denoising_unet)

    def pose_condition(self, poses: PictureSequence, context: Tensor) -> "PoseFeatures":
        return PoseFeatures(self.pose_guider, poses)

    def predict(
        self, sample: Tensor, timestep: Tensor, context: Tensor, pose: Tensor, reference: ReferenceContext | None
    ) -> Tensor:
        return self.denoising_unet(sample, timestep, context, pose, reference)


class PoseFeatures:
    """Pose guider features of a clip, the same at every step; `PoseCondition` and `StepCondition` of an animator."""

    def __init__(self, pose_guider: PoseGuider, poses: PictureSequence, kept_frames: int = KEPT_FRAMES):
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

    The picture is squashed to the encoder's square input, aspect ratio not kept, in training and inference alike.

    Args:
        image: (b, 3, H, W) in [-1, 1].

    Returns:
        (b, 1, projection channels).
    """
    size = image_encoder.config.image_size
    # Rounding may leave [0, 1] by a little after the cubic filter; the encoder was trained on clipped pictures.
    pixels = F.interpolate(image.float(), (size, size), mode="bicubic", antialias=True).clamp(-1, 1) / 2 + 0.5
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    pixels = ((pixels - mean) / std).to(next(image_encoder.parameters()).dtype)
    return image_encoder(pixels).image_embeds[:, None]
