"""The networks of a configuration without their weights, on the meta device: for sizes and estimates, in seconds."""

import inspect
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, PreTrainedModel

from core.errors import UserError
from models.animators.animate_anyone.checkpoint import make_pose_guider
from models.animators.animate_anyone.model import AnimateAnyone
from models.animators.base import Animator
from models.animators.registry import component_classes, read_index, saved_class
from models.checkpoints.networks import MotionSizes, UNetSizes, make_denoising_unet, make_reference_net
from models.vae import VAE
from training.build import new_animator, trainable_class, vae_kind
from training.config import TrainConfig

# Stable Diffusion 1.5's VAE and the image encoder of CLIP ViT-L/14, which the published AnimateAnyone has.
PUBLISHED_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
PUBLISHED_IMAGE_ENCODER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
}
PUBLISHED = "animate_anyone"  # whose published sizes are known without any folder
POSE_CHANNELS = (16, 32, 96, 256)


def describe_networks(config: TrainConfig) -> tuple[VAE, Animator]:
    """What `make_networks` makes, without weights; the published sizes without `model.init` and `model.vae`.

    Raises:
        UserError: a folder that is missing or is not what it should be.
    """
    with torch.device("meta"):
        if config.model.init:
            return folder_networks(Path(config.model.init))
        if config.model.vae:
            kind, settings = vae_kind(config.model.vae)
            vae = kind.from_config(settings)
            return vae, new_animator(config.model, vae.config.latent_channels, max(config.data.size))
        if config.model.animator != PUBLISHED:
            raise UserError(f"model.animator={config.model.animator} needs model.init= or model.vae= for an estimate")
        return published_networks()


def published_networks() -> tuple[AutoencoderKL, AnimateAnyone]:
    """AnimateAnyone as published."""
    sizes = UNetSizes()
    return AutoencoderKL(**PUBLISHED_VAE), AnimateAnyone(
        make_reference_net(sizes),
        make_denoising_unet(sizes, MotionSizes(), "frame"),
        make_pose_guider(sizes.block_out_channels[0], POSE_CHANNELS),
        CLIPVisionModelWithProjection(CLIPVisionConfig(**PUBLISHED_IMAGE_ENCODER)),
    )


def folder_networks(folder: Path) -> tuple[VAE, Animator]:
    """The networks of a pipeline folder, from its configuration files."""
    index = read_index(folder)
    animator, pipeline = trainable_class("model.init", folder, index), saved_class(index)
    arguments = {}
    for name, parameter in list(inspect.signature(animator.__init__).parameters.items())[1:]:
        if parameter.default is inspect.Parameter.empty:
            arguments[name] = described(folder, name, index.get(name), component_classes(pipeline, name))
        elif name in index:
            arguments[name] = index[name]
    vae = described(folder, "vae", index.get("vae"), component_classes(pipeline, "vae"))
    return vae, animator(**arguments)


def described(folder: Path, name: str, entry: list[str] | None, classes: dict[str, type]) -> nn.Module:
    """One network of a pipeline folder without weights; `entry` is its [library, class] in the index, if there."""
    settings = component_config(folder, name)
    if not isinstance(entry, list) or entry[-1] not in classes:
        raise UserError(f"model.init={folder}: component {name} is {entry}, not one of {', '.join(classes)}")
    network = classes[entry[-1]]
    if issubclass(network, PreTrainedModel):
        return network(network.config_class(**settings))
    return network.from_config(settings)


def component_config(folder: Path, name: str) -> dict:
    """The `config.json` of one network of a pipeline folder."""
    path = folder / name / "config.json"
    if not path.is_file():
        raise UserError(f"model.init={folder}: component {name} is missing or incomplete")
    return json.loads(path.read_text(encoding="utf-8"))
