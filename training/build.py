"""Networks, noise schedule and trainable parameters from the configuration."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler
from diffusers.models.transformers import Transformer2DModel
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from core.errors import UserError
from models.animate_anyone import AnimateAnyone
from models.latents import VAE, vae_factor
from models.lora import add_lora
from models.pipeline import AnimationPipeline
from models.pipeline_folder import load_pipeline, read_index
from models.unets import DenoisingUNet, PoseGuider, ReferenceNet, one_token_parameters
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
        vae, model = open_animator("model.init", config.model.init)
        return vae.requires_grad_(False).eval(), model
    vae = load_vae(config.model.vae).requires_grad_(False).eval()
    model = new_networks(config.model, vae.config.latent_channels, max(config.data.size))
    if config.model.start:
        start_from(model, config.model.start)
    return vae, model


def start_from(model: AnimateAnyone, folder: str) -> None:
    """Give new networks the weights of a pipeline folder wherever name and shape agree.

    Transformers that the folder does not have end in zeros, so that they start as no change.

    Raises:
        UserError: not such a folder, or less than half of the weights agree.
    """
    started = open_animator("model.start", folder)[1]
    known = started.state_dict()
    # What a smaller ReferenceNet had no use for, it takes from its twin, as if both had started from the same model.
    read = {f"reference_net.{name}" for name, _ in started.reference_net.named_parameters()}
    read -= {f"reference_net.{name}" for name in started.reference_net.unread_parameters()}
    same, own = {}, model.state_dict()
    for name, value in own.items():
        twin = name.replace("reference_net.", "denoising_unet.", 1)
        source = twin if name.startswith("reference_net.") and name not in read else name
        if source in known and known[source].shape == value.shape:
            same[name] = known[source]
    shared, all_of_it = (sum(value.numel() for value in values) for values in (same.values(), own.values()))
    if shared < all_of_it / 2:
        raise UserError(
            f"model.start={folder} agrees with {shared / all_of_it:.0%} of the new networks' weights in name and shape; "
            "choose sizes closer to its own"
        )
    model.load_state_dict(same, strict=False)
    for name, module in model.named_modules():
        if isinstance(module, Transformer2DModel) and f"{name}.proj_out.weight" not in same:
            nn.init.zeros_(module.proj_out.weight)
            nn.init.zeros_(module.proj_out.bias)


def open_animator(key: str, folder: str) -> tuple[VAE, AnimateAnyone]:
    """VAE and networks of a pipeline folder.

    Args:
        key: of the configuration, for messages.

    Raises:
        UserError: a folder that is missing, lacks a component, or is of another model.
    """
    pipeline = load_pipeline(folder)
    if not isinstance(pipeline, AnimationPipeline) or not isinstance(pipeline.animator(), AnimateAnyone):
        raise UserError(f"{key}={folder} is a {type(pipeline).__name__}; train.py trains AnimateAnyone")
    return pipeline.vae, pipeline.animator()


def load_vae(folder: str | Path) -> VAE:
    """An AutoencoderKL or AutoencoderTiny from its folder."""
    return vae_kind(folder)[0].from_pretrained(folder)


def vae_kind(folder: str | Path) -> tuple[type[AutoencoderKL] | type[AutoencoderTiny], dict[str, Any]]:
    """Class and configuration of the VAE in a folder, from its config.json.

    Raises:
        UserError: not a VAE's folder, or another one's.
    """
    index = Path(folder) / "config.json"
    if not index.is_file():
        raise UserError(f"model.vae={folder} is not a VAE folder (no config.json)")
    settings = json.loads(index.read_text(encoding="utf-8"))
    kinds = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    if (kind := settings.get("_class_name")) not in kinds:
        raise UserError(f"model.vae={folder} is a {kind}; AutoencoderKL and AutoencoderTiny are known")
    return kinds[kind], settings


def new_networks(config: ModelConfig, latent_channels: int, picture_size: int) -> AnimateAnyone:
    """Randomly initialised networks; pose guider and motion modules end in zeros, so they start as no change."""
    widths = tuple(config.block_out_channels)
    if len(config.pose_channels) < 2:
        raise UserError(f"model.pose_channels={config.pose_channels} needs at least two entries")
    attention, heads = resolution_settings(config)
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
        down_block_types=tuple("CrossAttnDownBlock2D" if where == "both" else "DownBlock2D" for where in attention),
        up_block_types=tuple(
            "UpBlock2D" if where == "none" else "CrossAttnUpBlock2D" for where in reversed(attention)
        ),
        attention_head_dim=heads,  # diffusers' misnomer: this is the number of heads
        **shared,
    )
    denoising_unet = DenoisingUNet(
        down_block_types=tuple(
            "CrossAttnDownBlockMotion" if where == "both" else "DownBlockMotion" for where in attention
        ),
        up_block_types=tuple(
            "UpBlockMotion" if where == "none" else "CrossAttnUpBlockMotion" for where in reversed(attention)
        ),
        num_attention_heads=heads,
        motion_num_attention_heads=heads,
        motion_max_seq_length=config.motion_max_seq_length,
        use_motion_mid_block=True,
        **shared,
    )
    # Both UNets of a published model start as the same image model, so that what one writes means something to the
    # other's attention; so do these.
    own = reference_net.state_dict().keys()
    same = {name: value for name, value in denoising_unet.state_dict().items() if name in own}
    reference_net.load_state_dict(same, strict=False)
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


def resolution_settings(config: ModelConfig) -> tuple[list[str], tuple[int, ...]]:
    """Where each resolution of new UNets has attention, and its heads; finest first.

    Raises:
        UserError: not one entry a resolution, or unknown ones.
    """
    widths, heads = list(config.block_out_channels), list(config.attention_heads)
    attention = list(config.attention or ["both"] * len(widths))
    if len(attention) != len(widths) or attention[-1] != "both" or not {"none", "up", "both"} >= set(attention):
        raise UserError(
            f"model.attention={attention} needs one of none, up, both for each of model.block_out_channels={widths}, "
            "and both for the last"
        )
    if len(heads) == 1:
        heads *= len(widths)
    if len(heads) != len(widths) or any(h < 1 or width % h for h, width in zip(heads, widths, strict=True)):
        raise UserError(
            f"model.attention_heads={heads} needs one number, or one for each of model.block_out_channels={widths} "
            "that divides it"
        )
    return attention, tuple(heads)


def what_is_trained(config: TrainConfig) -> str:
    """`trainable`, or what the stage trains without it."""
    return config.trainable or {"image": "full", "motion": "motion"}[config.stage]


def set_trainable(model: AnimateAnyone, config: TrainConfig) -> list[nn.Parameter]:
    """Freeze what is not trained; returns the rest, every one of which gets a gradient in every step.

    Frozen in any case: what follows the ReferenceNet's last written layer, queries and keys of cross-attention to the
    one image token, and motion modules where clips have one frame.
    """
    mode, unet = what_is_trained(config), model.denoising_unet
    if config.stage == "image":
        unet.use_motion_on_single_frames(False)
    model.requires_grad_(mode == "full")
    if mode == "lora":
        motion = config.lora.motion and config.stage == "motion"
        add_lora(unet, config.lora.rank, config.lora.alpha, motion)
        add_lora(model.reference_net, config.lora.rank, config.lora.alpha, motion)
    if mode == "full":
        model.image_encoder.requires_grad_(config.model.train_image_encoder)
        model.reference_net.freeze_unread_parameters()
        for network in (unet, model.reference_net):
            for name in one_token_parameters(network):
                network.get_parameter(name).requires_grad_(False)
    if mode != "lora":
        for parameter in unet.motion_parameters():
            parameter.requires_grad_(config.stage == "motion")
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def shrink_frozen(vae: VAE, model: AnimateAnyone, dtype: torch.dtype) -> None:
    """Keep frozen convolutions and linear layers in a smaller number format; autocast computes in it anyway.

    Norms stay in float32, which autocast gives them, and so do first layers: networks are asked for their dtype by
    their first parameter.
    """
    for network in (vae, *model.children()):
        first = next(network.parameters())
        for module in network.modules():
            own = list(module.parameters(recurse=False))
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not any(p is first or p.requires_grad for p in own):
                module.to(dtype)


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


def trained_window(config: TrainConfig) -> int | None:
    """Frames that the motion modules of the result know together: this run's, or those of `model.init`."""
    if config.stage == "motion":
        return config.data.num_frames
    return read_index(Path(config.model.init)).get("window_size") if config.model.init else None


def schedule_differences(config: TrainConfig) -> list[str]:
    """Settings of the noise schedule in which the run differs from the pipeline it starts from, for a warning."""
    if not config.model.init:
        return []
    path = Path(config.model.init) / "scheduler" / "scheduler_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    names = ("beta_schedule", "beta_start", "beta_end", "prediction_type", "rescale_betas_zero_snr")
    ours = {name: getattr(config.noise, name) for name in names}
    return [f"{name}={ours[name]}, was {saved.get(name)}" for name in names if saved.get(name) != ours[name]]


def check_precision(config: TrainConfig) -> None:
    """Refuse what is known to crash: on a CPU, torch 2.13 ends in a segmentation fault in the backward pass of clips
    in bf16 with channels-last memory."""
    if config.channels_last and config.mixed_precision == "bf16" and config.data.num_frames > 1:
        if not torch.cuda.is_available():
            raise UserError("channels_last=true with mixed_precision=bf16 and clips crashes on CPUs; set it to false")


def check_size(vae: VAE, model: AnimateAnyone, size: list[int]) -> None:
    """Pictures must divide by the VAE's factor, and pose features must be of the latents' size."""
    factor, channels = vae_factor(vae), model.pose_guider.config.block_out_channels
    smaller = 2 ** (len(channels) - 1)
    if smaller != factor:
        raise UserError(
            f"model.pose_channels={list(channels)} make pose pictures {smaller} times smaller, but the VAE makes "
            f"pictures {factor} times smaller; each entry after the first halves them"
        )
    if size[0] % factor or size[1] % factor:
        raise UserError(f"data.size={size} must be multiples of {factor}, the VAE's factor")
