"""Small checkpoints of the published families, drawn from names as known-answer fixtures do, and where those lie."""

import os
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from models.animators.animate_anyone.checkpoint import pose_guider_manifest
from models.animators.magic_animate.checkpoint import appearance_encoder_manifest, empty_prompt
from models.animators.magic_animate.model import MagicAnimatePipeline
from models.checkpoints.convert import families, published_scheduler
from models.checkpoints.networks import (
    MotionSizes,
    UNetSizes,
    animated_unet_manifest,
    control_net_manifest,
    load_control_net,
    load_denoising_unet,
    load_reference_net,
    motion_manifest,
    reference_unet_manifest,
    unet_manifest,
)
from models.checkpoints.verify import synthetic_tensors

SIZES = UNetSizes(block_out_channels=(32, 64), attention=(True, False), layers_per_block=1, cross_attention_dim=16)
MOTION = MotionSizes()
MAGIC_MOTION = MotionSizes(max_seq_length=24, mid_block=False)
GUIDER_CHANNELS = (8, 16, 16)
MANIFESTS = {
    "denoising_unet": lambda: unet_manifest(SIZES),
    "motion_module": lambda: motion_manifest(SIZES, MOTION),
    "reference_unet": lambda: reference_unet_manifest(SIZES),
    "pose_guider": lambda: pose_guider_manifest(32, GUIDER_CHANNELS),
    "appearance_encoder": lambda: appearance_encoder_manifest(SIZES),
    "densepose_controlnet": lambda: control_net_manifest(SIZES, GUIDER_CHANNELS),
    "temporal_attention": lambda: animated_unet_manifest(SIZES, MAGIC_MOTION),
}


def published_tensors(file: str, seed: int = 1) -> dict[str, Tensor]:
    """What a small version of a published file holds."""
    return synthetic_tensors(MANIFESTS[file](), seed)


def write_weights(folder: Path) -> None:
    """Small files of AnimateAnyone and MagicAnimate, under the names and in the wrappings of the publishers."""
    for file in ("denoising_unet", "motion_module", "reference_unet", "pose_guider"):
        torch.save(published_tensors(file), folder / f"{file}.pth")
    for file in ("appearance_encoder", "densepose_controlnet"):
        (folder / file).mkdir()
        save_file(published_tensors(file), folder / file / "diffusion_pytorch_model.safetensors")
    (folder / "temporal_attention").mkdir()
    unet = {f"module.{name}": tensor for name, tensor in published_tensors("temporal_attention").items()}
    torch.save({"state_dict": unet, "global_step": 3}, folder / "temporal_attention" / "temporal_attention.ckpt")
    small_image_encoder().save_pretrained(folder / "image_encoder")
    small_text_encoder().save_pretrained(folder / "text_encoder")
    small_vae().save_pretrained(folder / "sd-vae-ft-mse")


def fixtures_folder() -> Path:
    """The folder of known-answer fixtures; the test is skipped when there is none."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
    folder = Path(os.environ.get("TPC_ANIMATE_FIXTURES", beside))
    if not folder.is_dir():
        pytest.skip("no known-answer fixtures: set TPC_ANIMATE_FIXTURES")
    return folder


def small_vae() -> AutoencoderKL:
    """Random, factor 4."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()


def small_image_encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    return CLIPVisionModelWithProjection(config).eval()


def small_text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=7,
        bos_token_id=0,
        eos_token_id=2,
    )


def small_text_encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    return CLIPTextModel(small_text_config()).eval()


def small_magic_pipeline() -> MagicAnimatePipeline:
    """MagicAnimate from small published files, factor 4."""
    pipeline = MagicAnimatePipeline(
        vae=small_vae(),
        reference_net=load_reference_net(published_tensors("appearance_encoder"), "appearance_encoder"),
        denoising_unet=load_denoising_unet(published_tensors("temporal_attention"), "temporal_attention", "clip"),
        control_net=load_control_net(published_tensors("densepose_controlnet"), "densepose_controlnet"),
        prompt=empty_prompt(small_text_encoder()),
        scheduler=published_scheduler("magic_animate"),
        window_size=families()["magic_animate"].window,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
