"""Networks, noise schedule and trainable parameters from the configuration."""

import json
from pathlib import Path

from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from core.errors import UserError
from models.animate_anyone import AnimateAnyone
from models.latents import VAE, vae_factor
from models.pipeline import AnimationPipeline
from models.pipeline_folder import load_pipeline
from models.unets import DenoisingUNet, PoseGuider, ReferenceNet
from training.config import ModelConfig, NoiseConfig, TrainConfig


def make_scheduler(config: NoiseConfig) -> DDIMScheduler:
    """The noise schedule of training, which the pipeline folder carries to inference."""
    return DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        timestep_spacing=config.timestep_spacing,
        clip_sample=False,
    )


def make_networks(config: TrainConfig) -> tuple[VAE, AnimateAnyone]:
    """The frozen VAE and the networks to train: those of the pipeline folder `model.init`, or new ones.

    Raises:
        UserError: a folder that is missing or lacks a component.
    """
    if config.model.init:
        pipeline = load_pipeline(config.model.init)
        model = AnimateAnyone(
            pipeline.reference_net, pipeline.denoising_unet, pipeline.pose_guider, pipeline.image_encoder
        )
        return pipeline.vae.requires_grad_(False).eval(), model
    vae = load_vae(config.model.vae).requires_grad_(False).eval()
    return vae, new_networks(config.model, vae.config.latent_channels, max(config.data.size))


def load_vae(folder: str | Path) -> VAE:
    """An AutoencoderKL or AutoencoderTiny from its folder; the folder's config.json says which."""
    index = Path(folder) / "config.json"
    if not index.is_file():
        raise UserError(f"model.vae={folder} is not a VAE folder (no config.json)")
    kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    kinds = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    if kind not in kinds:
        raise UserError(f"model.vae={folder} is a {kind}; AutoencoderKL and AutoencoderTiny are known")
    return kinds[kind].from_pretrained(folder)


def new_networks(config: ModelConfig, latent_channels: int, picture_size: int) -> AnimateAnyone:
    """Randomly initialised networks; pose guider and motion modules end in zeros, so they start as no change."""
    widths = tuple(config.block_out_channels)
    if len(config.pose_channels) < 2:
        raise UserError(f"model.pose_channels={config.pose_channels} needs at least two entries")
    shared = {
        "sample_size": picture_size // 2 ** (len(config.pose_channels) - 1),
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "block_out_channels": widths,
        "layers_per_block": config.layers_per_block,
        "cross_attention_dim": config.context_dim,
        "norm_num_groups": config.norm_num_groups,
    }
    reference_net = ReferenceNet(
        down_block_types=("CrossAttnDownBlock2D",) * len(widths),
        up_block_types=("CrossAttnUpBlock2D",) * len(widths),
        attention_head_dim=config.attention_heads,  # diffusers' misnomer: this is the number of heads
        **shared,
    )
    denoising_unet = DenoisingUNet(
        down_block_types=("CrossAttnDownBlockMotion",) * len(widths),
        up_block_types=("CrossAttnUpBlockMotion",) * len(widths),
        num_attention_heads=config.attention_heads,
        motion_num_attention_heads=config.attention_heads,
        motion_max_seq_length=config.motion_max_seq_length,
        use_motion_mid_block=True,
        **shared,
    )
    pose_guider = PoseGuider(widths[0], 3, tuple(config.pose_channels))
    image_encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=config.image_encoder_width,
            intermediate_size=2 * config.image_encoder_width,
            num_hidden_layers=config.image_encoder_layers,
            num_attention_heads=4,
            image_size=config.image_encoder_size,
            patch_size=config.image_encoder_patch,
            projection_dim=config.context_dim,
        )
    )
    return AnimateAnyone(reference_net, denoising_unet, pose_guider, image_encoder)


def set_trainable(model: AnimateAnyone, config: TrainConfig) -> list[nn.Parameter]:
    """Freeze what the stage does not train; returns the rest, every one of which gets a gradient.

    The image stage trains everything but motion modules (identity for single frames) and what nothing reads; the
    motion stage trains the motion modules alone.
    """
    model.requires_grad_(config.stage == "image")
    motion = model.denoising_unet.motion_parameters()
    for parameter in motion:
        parameter.requires_grad_(config.stage == "motion")
    if config.stage == "image":
        model.reference_net.freeze_unread_parameters()
        model.image_encoder.requires_grad_(config.model.train_image_encoder)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_pipeline(
    vae: VAE, model: AnimateAnyone, noise: NoiseConfig, window_size: int | None = None
) -> AnimationPipeline:
    """The networks as an inference pipeline that shares their memory.

    Args:
        window_size: frames that the motion modules are trained on together.
    """
    return AnimationPipeline(
        vae=vae,
        image_encoder=model.image_encoder,
        reference_net=model.reference_net,
        denoising_unet=model.denoising_unet,
        pose_guider=model.pose_guider,
        scheduler=make_scheduler(noise),
        window_size=window_size,
    )


def check_size(vae: VAE, size: list[int]) -> None:
    """Pictures must divide by the VAE's factor."""
    factor = vae_factor(vae)
    if size[0] % factor or size[1] % factor:
        raise UserError(f"data.size={size} must be multiples of {factor}, the VAE's factor")
