"""Images as CLIP's image encoders take them."""

import torch.nn.functional as F
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


def clip_pixels(images: Tensor, side: int) -> Tensor:
    """Images (b, 3, H, W) in [-1, 1] -> (b, 3, side, side) float32 with CLIP's mean and deviation.

    They are squashed to the encoder's square, aspect ratio not kept, in training and inference alike.
    """
    # Rounding may leave [0, 1] by a little after the cubic filter; the encoder was trained on clipped images.
    pixels = F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True).clamp(-1, 1) / 2 + 0.5
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels - mean) / std


def clip_mask(masks: Tensor, side: int) -> Tensor:
    """Masks (b, 1, H, W) -> (b, 1, side, side) in [0, 1], soft along outlines as resized images are."""
    return F.interpolate(masks.float(), (side, side), mode="bilinear", antialias=True)
