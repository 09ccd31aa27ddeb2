"""Networks, noise schedule and trainable parameters from the configuration."""

import hashlib
import inspect
import json
import os
from collections import ChainMap
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, ModelMixin, UniPCMultistepScheduler
from diffusers.models.transformers import Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from core.config import check_config
from core.errors import UserError
from inference.words import read_embeddings
from models.animators.animate_anyone.checkpoint import make_pose_guider
from models.animators.animate_anyone.model import AnimateAnyone
from models.animators.base import Animator
from models.animators.registry import (
    animator_class,
    component_classes,
    left_out_components,
    load_component,
    load_pipeline,
    network_folders,
    pipeline_class,
    pipeline_of,
    read_index,
    saved_class,
)
from models.checkpoints.loading import from_settings, network_names
from models.checkpoints.networks import MotionSizes, UNetSizes, make_denoising_unet, make_reference_net
from models.checkpoints.streaming import StoredTensors
from models.compiling import use_channels_last
from models.config import ANIMATORS, SCHEDULE
from models.lora import FOLDER as LORA_FOLDER
from models.lora import add_lora
from models.pipeline import AnimationPipeline
from models.sampling import is_flow
from models.vae import VAE, VideoVAE, load_vae, vae_class, vae_latent_channels, vae_scale_factor
from training.config import LENGTHS, ModelConfig, NoiseConfig, TrainConfig

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


def make_scheduler(
    config: NoiseConfig, init: str | None = None, noise: str = "diffusion"
) -> DDIMScheduler | UniPCMultistepScheduler:
    """The noise schedule of training, which the result carries to inference; what is not given is that of `init`.

    `noise` as `Animator.noise`. A flow has no schedule; its sampler takes as many noisy steps as training draws.
    """
    if noise == "flow":
        if given := given_schedule(config):
            raise UserError(
                f"noise.{next(iter(given))}= is of diffusion; the model is of flow matching, leave it null"
            )
        if init:
            return load_scheduler(init)
        return UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=config.timestep_shift
        )
    settings = {**SCHEDULE, "clip_sample": False} | (stored_schedule(init) if init else {})
    return DDIMScheduler(**settings | given_schedule(config))


def given_schedule(config: NoiseConfig) -> dict[str, Any]:
    """The settings of the schedule that a configuration does not leave to the model."""
    return {name: value for name in SCHEDULE if (value := getattr(config, name)) is not None}


def load_scheduler(folder: str | Path) -> Any:
    """The scheduler of a pipeline folder."""
    return load_component(Path(folder), "scheduler", read_index(Path(folder)).get("scheduler"), {}, torch.float32)


def stored_schedule(folder: str | Path) -> dict[str, Any]:
    """DDIM's settings for the schedule of a pipeline folder, whatever its sampler."""
    scheduler = load_scheduler(folder)
    if is_flow(scheduler):
        return {}
    known = inspect.signature(DDIMScheduler.__init__).parameters
    return {name: value for name, value in scheduler.config.items() if name in known}


def with_schedule(config: TrainConfig) -> TrainConfig:
    """The configuration with its whole noise schedule, where it leaves some of it to the model."""
    noise = noise_kind(config.model)
    settings = make_scheduler(config.noise, config.model.init, noise).config
    if noise == "flow":
        return config
    config = replace(config, noise=replace(config.noise, **{name: settings[name] for name in SCHEDULE}))
    check_config(config)
    return config


def noise_kind(config: ModelConfig) -> str:
    """`Animator.noise` of the model that is trained."""
    if config.init:
        return trainable_class("model.init", config.init, read_index(Path(config.init), "model.init")).noise
    return known_animator(config).noise


def make_networks(config: TrainConfig) -> tuple[VAE | VideoVAE, Animator]:
    """The frozen VAE and the networks to train: those of the pipeline folder `model.init`, or new ones."""
    if config.model.init:
        vae, model = open_animator("model.init", config.model.init, given_embeddings(config.model))
        return vae.requires_grad_(False).eval(), model
    vae = load_vae(config.model.vae).requires_grad_(False).eval()
    model = new_animator(config.model, vae, max(config.data.size))
    if config.model.start:
        start_from(model, config.model.start)
    return vae, model


def stored_networks(config: TrainConfig, vae: VAE | VideoVAE, model: Animator) -> dict[str, StoredTensors]:
    """Component -> what its folder in `model.init`, or `model.vae`, has; components are a part of tensors' names."""
    if config.model.init is None:
        folders = {"vae": Path(config.model.vae)}
    else:
        folders = network_folders(config.model.init)
    found = {}
    for part, network in (("vae", vae), *model.named_children()):
        if part in folders:

            def rename(entries: Mapping[str, Any], part: str = part, network: nn.Module = network) -> dict[str, Any]:
                return {f"{part}.{name}": entry for name, entry in network_names(entries, network).items()}

            found[part] = StoredTensors(folders[part], f"{folders[part]}", rename)
    return found


def stored_base(config: TrainConfig, vae: VAE | VideoVAE, model: Animator) -> Mapping[str, Tensor]:
    """The tensors that a run began with, by name, each read when it is asked for; those of the VAE behind "vae."."""
    if config.model.init and (Path(config.model.init) / LORA_FOLDER).is_dir():
        vae, model = make_networks(config)  # with its adapters added
        return {**{f"vae.{name}": value for name, value in vae.state_dict().items()}, **model.state_dict()}
    return ChainMap(*stored_networks(config, vae, model).values())


def base_digest(folder: str | Path) -> str:
    """Short digest of a pipeline folder's weights, its own adapters included, see `StoredTensors.digest`."""
    files = [*network_folders(folder).values(), *sorted((Path(folder) / LORA_FOLDER).rglob("*.safetensors"))]
    digests = [StoredTensors(file, str(file)).digest() for file in files]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def start_from(model: Animator, folder: str) -> None:
    """Load a pipeline folder's weights wherever name and shape agree.

    Transformers that the folder does not have end in zeros, so that they start as no change.
    """
    started = open_animator("model.start", folder)[1]
    known = started.state_dict()
    # What a smaller network had no use for, it takes from its twin, as if both had started from the same model.
    read = known.keys() - started.unused_parameters()
    same, own = {}, model.state_dict()
    for name, value in own.items():
        source = name if name in read else model.initialized_from(name)
        if source in known and known[source].shape == value.shape:
            same[name] = known[source]
    shared, all_of_it = (sum(value.numel() for value in values) for values in (same.values(), own.values()))
    if shared < all_of_it / 2:
        raise UserError(
            f"model.start={folder} agrees with {shared / all_of_it:.0%} of the new networks' weights in name and "
            "shape; choose sizes closer to its own"
        )
    model.load_state_dict(same, strict=False)
    for name, module in model.named_modules():
        if isinstance(module, Transformer2DModel) and f"{name}.proj_out.weight" not in same:
            nn.init.zeros_(module.proj_out.weight)
            nn.init.zeros_(module.proj_out.bias)


def given_embeddings(config: ModelConfig) -> dict[str, Tensor]:
    """Those of `model.embeddings`, by name, but that of an image: training has many."""
    found = {} if config.embeddings is None else read_embeddings(config.embeddings)
    return {name: value for name, value in found.items() if name != "image"}


def open_animator(key: str, folder: str, embeddings: Collection[str] = ()) -> tuple[VAE | VideoVAE, Animator]:
    """VAE and networks of a pipeline folder, without encoders that cached embeddings of these names stand in for.

    `key` is the configuration's, for messages.
    """
    trainable_class(key, folder, read_index(Path(folder), key))
    pipeline = load_pipeline(folder, argument=key, embeddings=embeddings)
    return pipeline.vae, pipeline.animator


def known_animator(config: ModelConfig) -> type[Animator]:
    """The class of `model.animator`."""
    if config.animator not in ANIMATORS:
        raise UserError(f"model.animator={config.animator} is not one of {', '.join(ANIMATORS)}")
    return animator_class(config.animator)


def new_animator(config: ModelConfig, vae: VAE | VideoVAE, image_size: int) -> Animator:
    """Randomly initialised networks of `model.animator`, for a VAE's latents of images of this side in pixels."""
    cls = known_animator(config)
    if not isinstance(vae, cls.vae_class):
        wanted = "videos (AutoencoderKLWan)" if cls.vae_class is VideoVAE else "images"
        raise UserError(
            f"model.vae={config.vae} is an {type(vae).__name__}; {config.animator} needs a VAE of {wanted}"
        )
    return cls.small(config, vae_latent_channels(vae), image_size // vae_scale_factor(vae))


def trainable_class(key: str, folder: str | Path, index: dict[str, Any]) -> type[Animator]:
    """The animator class of a pipeline folder; `UserError`, naming the key, if it cannot be trained."""
    pipeline = saved_class(index)
    if pipeline is None or not pipeline.animator_cls.trainable:
        known = [cls.__name__ for cls in map(pipeline_class, ANIMATORS) if cls.animator_cls.trainable]
        raise UserError(f"{key}={folder} is a {index.get('_class_name')}; train.py trains {', '.join(known)}")
    return pipeline.animator_cls


def describe_networks(config: TrainConfig) -> tuple[VAE | VideoVAE, Animator]:
    """The networks of `make_networks` on the meta device; the published sizes without `model.init` and `model.vae`."""
    with torch.device("meta"):
        if config.model.init:
            return folder_networks(Path(config.model.init), given_embeddings(config.model))
        if config.model.vae:
            cls, settings = vae_class(config.model.vae)
            vae = from_settings(cls, settings)
            return vae, new_animator(config.model, vae, max(config.data.size))
        if config.model.animator != PUBLISHED:
            raise UserError(f"model.animator={config.model.animator} needs model.init= or model.vae= for an estimate")
        return published_networks()


def published_networks() -> tuple[AutoencoderKL, AnimateAnyone]:
    sizes = UNetSizes()
    return AutoencoderKL(**PUBLISHED_VAE), AnimateAnyone(
        make_reference_net(sizes),
        make_denoising_unet(sizes, MotionSizes(), "frame"),
        make_pose_guider(sizes.block_out_channels[0], POSE_CHANNELS),
        CLIPVisionModelWithProjection(CLIPVisionConfig(**PUBLISHED_IMAGE_ENCODER)),
    )


def folder_networks(folder: Path, embeddings: Collection[str] = ()) -> tuple[VAE | VideoVAE, Animator]:
    """The networks of a pipeline folder, from its configuration files; `embeddings` as of `open_animator`."""
    index = read_index(folder, "model.init")
    cls = trainable_class("model.init", folder, index)
    components, settings = cls.constructor_parameters()
    left_out = left_out_components(saved_class(index), folder, embeddings, f"model.init={folder}")
    animator = cls(
        **{p.name: None if p.name in left_out else described(folder, p.name, index) for p in components},
        **{p.name: index[p.name] for p in settings if p.name in index},
    )
    return described(folder, "vae", index), animator


def described(folder: Path, name: str, index: dict[str, Any]) -> Any:
    """One network of a pipeline folder without weights, or what prepares inputs of one."""
    path = folder / name / "config.json"
    types = component_classes(saved_class(index), name)
    if not any(issubclass(cls, nn.Module) for cls in types.values()):
        return load_component(folder, name, index.get(name), types, torch.float32, f"model.init={folder}")
    if not path.is_file():
        raise UserError(f"model.init={folder}: component {name} is missing or incomplete")
    settings = json.loads(path.read_text(encoding="utf-8"))
    entry = index.get(name)  # [library, class]
    if not isinstance(entry, list) or entry[-1] not in types:
        raise UserError(f"model.init={folder}: component {name} is {entry}, not one of {', '.join(types)}")
    return from_settings(types[entry[-1]], settings)


def set_trainable(model: Animator, config: TrainConfig) -> list[nn.Parameter]:
    """Freeze what is not trained; returns the rest, every one of which gets a gradient in every step."""
    choices = model.trainable_choices(config.stage)
    known = (*choices, "lora") if model.adapted_networks else choices
    choice = config.trainable or choices[0]
    if choice not in known:
        raise UserError(
            f"trainable={choice} is not one of {', '.join(known)}, which {type(model).__name__} has in "
            f"stage={config.stage}"
        )
    model.prepare_stage(config.stage)
    if choice == "lora":
        add_lora(model, config.lora.rank, config.lora.alpha, config.lora.motion and config.stage == "motion")
    else:
        trained = model.trained_parameters(choice, config.stage, config.model.train_image_encoder)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def save_memory(vae: VAE | VideoVAE, model: Animator, config: TrainConfig) -> None:
    """Apply what the configuration says of memory: `frozen_dtype`, `gradient_checkpointing`, `channels_last`."""
    # DeepSpeed makes all of the model half-precision, and has no autocast for the VAE beside it.
    if config.frozen_dtype == "bfloat16" and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        shrink_frozen(vae, model, torch.bfloat16)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if config.channels_last:
        use_channels_last(model, vae)


def enable_gradient_checkpointing(model: Animator) -> None:
    """Recompute blocks of UNets, ControlNets and transformers in the backward pass, motion modules included."""
    for network in model.children():
        if isinstance(network, ModelMixin) and network._supports_gradient_checkpointing:
            network.enable_gradient_checkpointing()


def shrink_frozen(vae: VAE | VideoVAE, model: Animator, dtype: torch.dtype) -> None:
    """Keep frozen convolutions and linear layers in a smaller dtype; autocast computes in it anyway.

    Norms stay in float32, which autocast gives them, and first layers, which tell a network's dtype.
    """
    for network in (vae, *model.children()):
        first = next(network.parameters())
        for module in network.modules():
            own = list(module.parameters(recurse=False))
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)) and not any(
                p is first or p.requires_grad for p in own
            ):
                module.to(dtype)


def make_pipeline(
    vae: VAE | VideoVAE, model: Animator, noise: NoiseConfig, window_size: int | None = None, init: str | None = None
) -> AnimationPipeline:
    """An inference pipeline that shares the networks' memory; `init` is the folder that they began as."""
    return pipeline_of(type(model))(
        vae=vae,
        scheduler=make_scheduler(noise, init, model.noise),
        window_size=window_size,
        sampling=read_index(Path(init)).get("sampling") if init else None,
        **{p.name: getattr(model, p.name) for p in model.constructor_parameters()[0]},
        **model.settings(),
    )


def trained_window(config: TrainConfig) -> int | None:
    """Window size of the motion modules in frames: this run's, or that of `model.init`."""
    if config.stage == "motion":
        return config.data.num_frames
    return read_index(Path(config.model.init)).get("window_size") if config.model.init else None


def schedule_differences(config: TrainConfig) -> list[str]:
    """Settings of the noise schedule that differ from the pipeline in `model.init`, for a warning."""
    if not config.model.init:
        return []
    saved = SCHEDULE | stored_schedule(config.model.init)
    return [f"{n}={value}, was {saved[n]}" for n, value in given_schedule(config.noise).items() if saved[n] != value]


def check_length(model: Animator, config: TrainConfig) -> None:
    """Refuse lengths of clips, and settings, that latents of several frames do not go with."""
    if model.frames_per_latent == 1:
        return
    if (config.data.num_frames - 1) % model.frames_per_latent:
        raise UserError(LENGTHS.format(config.data.num_frames))
    if config.data.cache_latents and config.data.num_frames == 1:
        raise UserError("data.cache_latents=true keeps latents of clips here; data.num_frames=1 pairs single images")
    if config.augmentation.calibrated.start > 0:
        raise UserError(
            f"augmentation.calibrated.start={config.augmentation.calibrated.start} is for diffusion with a latent for "
            "every frame; leave it 0"
        )
    if config.attention.weight > 0:
        raise UserError(
            f"attention.weight={config.attention.weight} is for models with a latent for every frame; leave it 0"
        )


def check_precision(config: TrainConfig) -> None:
    """Refuse what is known to crash."""
    # On a CPU, torch 2.13 ends in a segmentation fault in the backward pass.
    if config.channels_last and config.mixed_precision == "bf16" and config.data.num_frames > 1:
        if not torch.cuda.is_available():
            raise UserError("channels_last=true with mixed_precision=bf16 and clips crashes on CPUs; set it to false")
