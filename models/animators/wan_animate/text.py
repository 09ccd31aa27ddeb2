"""Embeddings of prompts for Wan-Animate."""

import html

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

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
