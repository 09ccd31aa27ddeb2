"""Embeddings of prompts and references for Wan-Animate."""

import html

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BaseImageProcessor, CLIPVisionModel, PreTrainedTokenizerBase, UMT5EncoderModel

PROMPT = "视频中的人在做动作"  # the published default: the person in the video moves
TOKENS = 512  # of every embedding, which the transformer's cross-attention counts on


@torch.no_grad()
def embedded(text: str, encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The embedding (1, 512, channels) of a prompt, zeros behind its end; what is longer is cut off."""
    text = " ".join(html.unescape(html.unescape(text)).split())
    tokens = tokenizer([text], padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    ids, mask = (tokens[name].to(encoder.device) for name in ("input_ids", "attention_mask"))
    length = int(mask.sum())
    hidden = encoder.eval()(ids, mask).last_hidden_state[:, :length]
    return F.pad(hidden, (0, 0, 0, TOKENS - length))


def image_tokens(images: Tensor, encoder: CLIPVisionModel, processor: BaseImageProcessor) -> Tensor:
    """CLIP's tokens (b, n, channels) of images (b, 3, H, W) in [-1, 1]: those before its last layer."""
    return encoded_images(image_pixels(images, processor), encoder)


def image_pixels(images: Tensor, processor: BaseImageProcessor) -> Tensor:
    """What CLIP reads of images (b, 3, H, W) in [-1, 1], (b, 3, side, side)."""
    images = ((images.float() + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return processor(images=list(images), return_tensors="pt").pixel_values


def encoded_images(pixels: Tensor, encoder: CLIPVisionModel) -> Tensor:
    """`image_tokens` of `image_pixels`."""
    return encoder(pixels.to(encoder.device, encoder.dtype), output_hidden_states=True).hidden_states[-2]
