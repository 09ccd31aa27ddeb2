"""AnimateAnyone (Hu et al., CVPR 2024) as one module: reference net, denoising UNet, pose guider, image encoder.

Shapes use b = batch, f = frames, i = reference images, c = channels, h, w = latent size, H, W = picture size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from models.reference_attention import ReferenceContext, hide_reference, same_reference
from models.unets import DenoisingUNet, PoseGuider, ReferenceNet


class AnimateAnyone(nn.Module):
    """The networks that are trained together; DeepSpeed and FSDP take one module."""

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
    ) -> Tensor:
        """One training step's prediction for b clips.

        Args:
            noisy_latents: (b, c, f, h, w).
            timestep: (b,).
            reference_latents: (i, c, h, w). The first b are the clips' references, in order; further ones are
                calibrated images, seen where `reference` says so.
            reference_image: (b, 3, H, W) in [-1, 1], for the image encoder.
            poses: pose pictures, (b, 3, f, H, W) in [0, 1].
            dropped: (b,) bool, samples that train the unconditional half of guidance: no reference, zero context.
            reference: index and flags of what each frame sees (its `tokens` are ignored); None: each clip its own
                reference.

        Returns:
            Prediction, (b, c, f, h, w).
        """
        batch, _, num_frames, height, width = noisy_latents.shape
        context = image_context(self.image_encoder, reference_image) * ~dropped[:, None, None]
        extra = len(reference_latents) - batch
        image_context_ = torch.cat([context, context.new_zeros(extra, *context.shape[1:])]) if extra else context
        tokens = self.reference_net(reference_latents, 0, image_context_)
        if reference is None:
            seen = same_reference(tokens, num_frames)
            grids = self.denoising_unet.attention_grids(height, width)
            seen = hide_reference(seen, dropped.repeat_interleave(num_frames), grids)
        else:
            seen = ReferenceContext(tokens, reference.index, reference.query_flags, reference.key_flags)
        return self.denoising_unet(noisy_latents, timestep, context, self.pose_guider(poses), seen)


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
