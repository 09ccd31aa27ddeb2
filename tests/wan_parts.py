"""The smallest Wan-Animate that has every part, and inputs for it."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from models.animators.wan_animate.model import WanAnimatePipeline
from models.animators.wan_animate.networks import WanAnimateTransformer3DModel

SIZE, SEGMENT = (48, 32), 5  # (width, height); frames
FACE = 16
TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 20,
    "latent_channels": 8,
    "out_channels": 8,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 4,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "image_dim": 8,
    "added_kv_proj_dim": 24,
    "rope_max_seq_len": 32,
    "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
    "motion_encoder_size": FACE,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 16,
    "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 2,
}
PIECES = [
    ("<pad>", 0.0),
    ("</s>", 0.0),
    ("<unk>", -9.0),
    ("▁", -1.0),
    *((letter, -2.0) for letter in "abcdefghijklmnop"),
]


def randomised(network: nn.Module) -> nn.Module:
    """Every parameter random, so that no path is a no-op."""
    for parameter in network.parameters():
        if parameter.numel() and parameter.std(unbiased=False) == 0:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


def transformer() -> WanAnimateTransformer3DModel:
    """With attention that reaches for what it sees, so that a reference counts."""
    network = randomised(WanAnimateTransformer3DModel(**TRANSFORMER))
    for block in network.blocks:
        for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.attn1.to_out[0]):
            layer.weight *= 3
    return network


@cache
def components() -> dict[str, Any]:
    """Components of the pipeline, not to be changed."""
    torch.manual_seed(0)
    clip = CLIPVisionConfig(
        hidden_size=8,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        intermediate_size=16,
        patch_size=4,
    )
    text = UMT5Config(vocab_size=len(PIECES), d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    channels = np.random.default_rng(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=8,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=channels.normal(0, 0.1, 8).tolist(),
        latents_std=channels.uniform(0.5, 1, 8).tolist(),
    )
    return {
        "vae": randomised(vae),
        "transformer": transformer(),
        "image_encoder": randomised(CLIPVisionModel(clip)),
        "image_processor": CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        "text_encoder": randomised(UMT5EncoderModel(text)),
        "tokenizer": T5Tokenizer(vocab=PIECES, extra_ids=0),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, num_train_timesteps=1000
        ),
    }


@cache
def wan_pipeline() -> WanAnimatePipeline:
    pipeline = WanAnimatePipeline(**components())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(frames: int) -> dict[str, np.ndarray]:
    """Arguments of a pipeline: reference, poses and faces."""
    draw = np.random.default_rng(0)
    return {
        "reference": draw.integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8),
        "poses": draw.integers(0, 256, (frames, *SIZE[::-1], 3), dtype=np.uint8),
        "faces": draw.integers(0, 256, (frames, FACE, FACE, 3), dtype=np.uint8),
    }


def published_folder(path: Path) -> Path:
    """Saved by diffusers' own pipeline of the stock classes, the transformer in shards."""
    stock = diffusers.WanAnimateTransformer3DModel(**TRANSFORMER)
    stock.load_state_dict(components()["transformer"].state_dict())
    diffusers.WanAnimatePipeline(**components() | {"transformer": stock}).save_pretrained(path, max_shard_size="100KB")
    # The published files name classes of other releases of transformers.
    index = json.loads((path / "model_index.json").read_text())
    index["tokenizer"][1], index["image_processor"][1] = "T5TokenizerFast", "CLIPImageProcessor"
    (path / "model_index.json").write_text(json.dumps(index))
    return path
