"""Configuration of training. Every knob is documented here; the files in `configs/` set them all."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from core.errors import UserError
from tpc.augmentation import (
    CalibratedTrainingConfig,
    CompositionConfig,
    check_calibrated_training,
    check_composition,
)


@dataclass
class DataConfig:
    """Where clips come from and how they are cut.

    source: "rendered" draws people on the fly; "videos" reads `root`, a folder of videos with pose files.
    root: the folder, for source=videos.
    split: identities of rendered people, "train" or "heldout".
    size: width and height of the pictures in pixels; multiples of the VAE's factor times the UNet's.
    num_frames: frames a clip; 1 for the image stage.
    stride: a clip takes every stride-th frame.
    seed: clip number i is a function of (seed, i) alone.
    workers: loader processes a training process; 0 loads in the training process itself.
    cache: folder that keeps `cache_clips` clips once they are made; null makes every clip when it is needed. With
        num_frames=1 a cached clip has `cache_frames` frames, two pictures of which are paired at random each time.
    """

    source: str = "rendered"
    root: str | None = None
    split: str = "train"
    size: list[int] = field(default_factory=lambda: [128, 128])
    num_frames: int = 1
    stride: int = 1
    seed: int = 0
    workers: int = 2
    cache: str | None = None
    cache_clips: int = 6000
    cache_frames: int = 3


@dataclass
class OptimizerConfig:
    """AdamW and its schedule. Learning rates are per step, not scaled by batch or processes."""

    learning_rate: float = 1e-5
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 1e-2
    epsilon: float = 1e-8
    schedule: str = "constant_with_warmup"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0


@dataclass
class NoiseConfig:
    """Noise schedule and loss. The schedule is saved with the pipeline, so sampling uses the same table.

    snr_gamma: min-SNR weight min(snr + 1, gamma) / (snr + 1) for velocity prediction, which is 1 at zero terminal SNR,
        where sampling starts; null gives every timestep the weight 1.
    noise_offset: standard deviation of a constant added to the noise of each (sample, channel).
    condition_dropout: share of samples trained without reference and with zero context, for guidance.
    """

    num_train_timesteps: int = 1000
    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: str = "v_prediction"
    rescale_betas_zero_snr: bool = True
    timestep_spacing: str = "trailing"
    snr_gamma: float | None = 5.0
    noise_offset: float = 0.0
    condition_dropout: float = 0.1


@dataclass
class AugmentationConfig:
    """Misaligned references and calibrated tokens in training; both are off by default, as published.

    composition: moves, turns and resizes the reference's person; calibrated: gives the model calibrated tokens as
        inference with TPC does. See `tpc/augmentation.py`.
    """

    composition: CompositionConfig = field(default_factory=CompositionConfig)
    calibrated: CalibratedTrainingConfig = field(default_factory=CalibratedTrainingConfig)


@dataclass
class ModelConfig:
    """The networks: a saved pipeline folder to start from, or the sizes of new ones.

    init: pipeline folder whose networks training starts from; null builds new ones with the sizes below.
    vae: folder of a trained VAE, needed when init is null.
    train_image_encoder: train the image encoder in the image stage (for a new one; published ones stay frozen).
    """

    init: str | None = None
    vae: str | None = None
    block_out_channels: list[int] = field(default_factory=lambda: [96, 160])
    layers_per_block: int = 1
    attention_heads: int = 4
    norm_num_groups: int = 16
    motion_max_seq_length: int = 32
    pose_channels: list[int] = field(default_factory=lambda: [16, 32, 64, 96])
    context_dim: int = 64
    image_encoder_size: int = 64
    image_encoder_patch: int = 8
    image_encoder_width: int = 128
    image_encoder_layers: int = 3
    train_image_encoder: bool = False


@dataclass
class ValidationConfig:
    """Pictures of held-out people while training; steps counts optimiser steps, 0 switches it off."""

    steps: int = 0
    clips: int = 4
    num_frames: int = 1
    num_inference_steps: int = 20
    guidance_scale: float = 1.0


@dataclass
class TrainConfig:
    """`train.py`: one loop for both stages.

    stage: "image" trains reference net, denoising UNet and pose guider on single frames; "motion" trains the motion
        modules on clips and nothing else.
    output: folder of checkpoints, logs and the finished pipeline.
    batch_size: clips a process and step, before accumulation.
    max_steps: optimiser steps in all; the schedule ends there.
    checkpoint_steps, keep_checkpoints: how often complete states are saved, and how many stay.
    mixed_precision: "no", "bf16" or "fp16"; null leaves it to the accelerate configuration.
    channels_last: memory format of convolutions; several times faster in bf16 on CPUs.
    export_dtype: number format of the weights in `output/pipeline`: "float32", or "float16", half the size.
    dry_run: print sizes, trainable parameters and memory estimate, then stop.
    """

    stage: str = MISSING
    output: str = MISSING
    seed: int = 0
    batch_size: int = 1
    gradient_accumulation: int = 1
    max_steps: int = 1000
    checkpoint_steps: int = 500
    keep_checkpoints: int = 2
    log_steps: int = 10
    ema_decay: float = 0.0
    mixed_precision: str | None = None
    gradient_checkpointing: bool = False
    channels_last: bool = False
    export_dtype: str = "float32"
    dry_run: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


@dataclass
class VAEConfig:
    """`train_vae.py`: a small convolutional autoencoder (diffusers' AutoencoderTiny) for rendered people.

    init: VAE folder to go on from; null starts anew.
    freeze_encoder: train the decoder alone, so that models trained on the latents stay valid.
    blocks: residual blocks at each resolution, finest first; each entry after the first halves the picture.
    latent_noise: standard deviation of noise added to latents in training, so that the decoder bears small errors.
    latent_weight: weight of the latents' mean square, which keeps them near zero.
    person_weight: how much more a person's pixels count than the background's.
    """

    output: str = MISSING
    init: str | None = None
    freeze_encoder: bool = False
    seed: int = 0
    batch_size: int = 8
    max_steps: int = 1000
    log_steps: int = 50
    mixed_precision: str | None = None
    channels_last: bool = False
    latent_channels: int = 16
    width: int = 48
    blocks: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
    latent_noise: float = 0.05
    latent_weight: float = 1e-3
    person_weight: float = 3.0
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


def check_train_config(config: TrainConfig) -> None:
    """Refuse what cannot work before anything is loaded."""
    choices = {
        "stage": (config.stage, ("image", "motion")),
        "data.source": (config.data.source, ("rendered", "videos")),
        "export_dtype": (config.export_dtype, ("float32", "float16")),
        "noise.prediction_type": (config.noise.prediction_type, ("v_prediction", "epsilon", "sample")),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            raise UserError(f"{key}={value} is not one of {', '.join(allowed)}")
    positive = {
        "batch_size": config.batch_size,
        "max_steps": config.max_steps,
        "gradient_accumulation": config.gradient_accumulation,
        "checkpoint_steps": config.checkpoint_steps,
        "keep_checkpoints": config.keep_checkpoints,
        "data.num_frames": config.data.num_frames,
    }
    for key, value in positive.items():
        if value < 1:
            raise UserError(f"{key}={value} must be at least 1")
    check_composition(config.augmentation.composition)
    check_calibrated_training(config.augmentation.calibrated)
    if config.stage == "image" and config.data.num_frames != 1:
        raise UserError(f"stage=image trains on single frames; data.num_frames={config.data.num_frames} must be 1")
    if config.stage == "motion" and config.data.num_frames < 2:
        raise UserError("stage=motion needs data.num_frames of at least 2")
    if config.model.init is None and config.model.vae is None:
        raise UserError("model.init= (a pipeline folder) or model.vae= (a VAE folder, for new networks) is required")
    if config.data.source == "videos" and not config.data.root:
        raise UserError("data.source=videos needs data.root=, a folder of videos with pose files")
