"""Configuration of training. Every knob is documented here; the recipes in `configs/` say where they differ."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from core.config import check_choice, check_positive
from core.errors import UserError
from data.config import PeopleConfig
from tpc.config import PRESETS, CalibratedTrainingConfig, CompositionConfig

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


def check_share(config: object, name: str) -> None:
    """Refuse a value outside [0, 1]."""
    if not 0 <= (value := getattr(config, name)) <= 1:
        raise UserError(f"{name}={value} must be a share, 0 to 1")


@dataclass
class DataConfig:
    """Where clips come from and how they are cut."""

    source: str = "rendered"  # people drawn on the fly, or "videos": those of `root`, with pose files
    root: str | None = None
    split: str = "train"  # or "heldout": identities of rendered people; of videos, what their manifest marks so
    # Width and height, multiples of the VAE's times the UNet's factor.
    size: list[int] = field(default_factory=lambda: [128, 128])
    num_frames: int = 1  # of a clip; 1 for the image stage
    stride: int = 1  # a clip takes every stride-th frame
    # Folder of the videos' pose images under their names, such as DensePose, for models that read these; null: draw
    # OpenPose figures.
    pose_images: str | None = None
    # Of videos: "person", as large as the image allows with everybody inside over the whole clip, clips whose people
    # do not fit are left out; "pad", made smaller with black borders where they do not; "centre", whomever it cuts.
    crop: str = "person"
    # Of videos: least distance in frames from the reference to the clip, or as far as possible in shorter ones; 0: any
    # frame but the clip's own.
    sample_margin: int = 0
    # Folders of `prepare.py latents` and `prepare.py embeddings`, read in place of encoding.
    latents: str | None = None
    embeddings: str | None = None
    seed: int = 0  # clip number i is a function of (seed, i) alone
    workers: int = 2  # loader processes a training process; 0 loads in the training process itself
    # Folder that keeps `cache_clips` clips once they are made; null makes every clip when it is needed. With
    # num_frames=1 a cached clip has `cache_frames` frames, two images of which are paired at random each time.
    cache: str | None = None
    cache_clips: int = 6000
    cache_frames: int = 3
    cache_latents: bool = False  # the VAE's latents of the cached images too, so that training need not encode them
    cache_surfaces: bool = False  # surface maps of cached rendered people too, for attention.surface
    people: PeopleConfig = field(default_factory=PeopleConfig)  # looks of rendered ones

    def check(self) -> None:
        check_choice(self, "source", ("rendered", "videos"))
        check_choice(self, "split", ("train", "heldout"))  # development people are for choices, never for training
        if len(self.size) != 2 or min(self.size) < 8:
            raise UserError(f"size={self.size} must be a width and a height of at least 8 pixels")
        check_positive(self, "num_frames")
        if self.sample_margin < 0:
            raise UserError(f"sample_margin={self.sample_margin} must not be negative; 0 takes any other frame")
        if self.sample_margin and (self.source != "videos" or self.cache):
            raise UserError(
                f"sample_margin={self.sample_margin} needs source=videos, and no data.cache, which keeps a few images "
                "of every clip and pairs these"
            )
        if self.cache_latents and not self.cache:
            raise UserError("cache_latents=true keeps latents beside cached clips; give data.cache=, a folder")
        if self.cache_surfaces and (self.source != "rendered" or not self.cache):
            raise UserError("cache_surfaces=true keeps maps of rendered people beside cached clips; give data.cache=")


@dataclass
class OptimizerConfig:
    """AdamW and its schedule. Learning rates are per step, not scaled by batch size or processes."""

    name: str = "adamw"  # or "adamw8bit", whose two moments take one byte each instead of four (needs bitsandbytes)
    learning_rate: float = 1e-5
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 1e-2
    epsilon: float = 1e-8
    schedule: str = "constant_with_warmup"  # or another of SCHEDULES, as diffusers defines them
    # Steps below learning_rate at the start: step i of n, counted from 0, has (i + 1) / (n + 1) of it. "constant" has
    # none.
    warmup_steps: int = 0
    max_grad_norm: float = 1.0  # gradients are clipped to it

    def check(self) -> None:
        check_choice(self, "name", ("adamw", "adamw8bit"))
        check_choice(self, "schedule", SCHEDULES)
        if self.warmup_steps < 0:
            raise UserError(f"warmup_steps={self.warmup_steps} must not be negative")
        if not self.max_grad_norm > 0:
            raise UserError(f"max_grad_norm={self.max_grad_norm} must be above 0")


@dataclass
class NoiseConfig:
    """Noise schedule and loss. The schedule is saved with the pipeline, so sampling uses the same table."""

    num_train_timesteps: int = 1000
    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: str = "v_prediction"
    rescale_betas_zero_snr: bool = True  # without it dark and bright images come out grey
    timestep_spacing: str = "trailing"  # sampling starts at the last timestep, which has zero SNR
    # Min-SNR weight min(snr + 1, gamma) / (snr + 1) for velocity prediction, 1 at zero terminal SNR, where sampling
    # starts; null gives every timestep the weight 1.
    snr_gamma: float | None = 5.0
    # Of the error where the person is, against 1 elsewhere; needs masks. The mean weight of every sample stays 1.
    person_weight: float = 1.0
    noise_offset: float = 0.0  # standard deviation of a constant added to the noise of each (sample, channel)
    condition_dropout: float = 0.1  # share of samples trained without reference and with zero context, for guidance
    # Above 1 more of the drawn timesteps are noisy ones, where the reference is all that a network can go by; 1:
    # evenly, as published.
    timestep_shift: float = 1.0

    def check(self) -> None:
        check_choice(self, "prediction_type", ("v_prediction", "epsilon", "sample"))
        check_share(self, "condition_dropout")
        if not self.person_weight > 0:
            raise UserError(f"person_weight={self.person_weight} must be above 0")
        if self.timestep_shift <= 0:
            raise UserError(f"timestep_shift={self.timestep_shift} must be positive; 1 draws timesteps evenly")
        # At zero terminal SNR the noise alone says nothing about the image.
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise UserError("prediction_type=epsilon cannot be sampled with noise.rescale_betas_zero_snr=true")


@dataclass
class AttentionLossConfig:
    """Attention supervision by known matches, see `training/attention_loss.py`; published models train without."""

    weight: float = 0.0  # of the loss beside the diffusion objective's; 0: none
    radius: float = 0.75  # deviation of the Gaussian around the right place, in tokens
    score_threshold: float = 0.3  # least score of keypoints
    # Cells a side of the image in each of which a point of the background is supervised too, for clips and references
    # that share a camera which stands still; 0: the body alone.
    background: int = 0
    # Random points a frame on the person's surface in place of those of the keypoints; needs data.cache_surfaces.
    # Keypoints lie inside the body, and where it turns they say only about what is visible.
    surface: int = 0

    def check(self) -> None:
        if self.weight < 0:
            raise UserError(f"weight={self.weight} must be at least 0")
        if not self.radius > 0:
            raise UserError(f"radius={self.radius} must be above 0")
        for name in ("background", "surface"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative")


@dataclass
class LoraConfig:
    """Low-rank adapters, for trainable=lora: a layer's weight W becomes W + alpha / rank * B A."""

    rank: int = 16
    alpha: float = 16.0
    motion: bool = True  # adapt motion modules too; with single frames they take no part and are never adapted
    # "merged" adds the adapters to the weights of `output/pipeline`; "separate" writes them alone, to `output/lora`,
    # for `infer.py model=... lora=...` or as the sub-folder `lora` of a pipeline folder.
    export: str = "merged"

    def check(self) -> None:
        check_choice(self, "export", ("merged", "separate"))
        check_positive(self, "rank")


@dataclass
class AugmentationConfig:
    """Misaligned references and calibrated tokens in training; both are off by default, as published."""

    composition: CompositionConfig = field(default_factory=CompositionConfig)  # moves the reference's person
    calibrated: CalibratedTrainingConfig = field(default_factory=CalibratedTrainingConfig)  # as in TPC's inference


@dataclass
class ModelConfig:
    """The networks: a saved pipeline folder to start from, or the sizes of new ones."""

    animator: str = "animate_anyone"  # of new networks, see `models.animators.registry`; a folder says what it is
    init: str | None = None  # pipeline folder whose networks training starts from; null builds new ones
    # Pipeline folder whose weights new networks begin with wherever name and shape agree; the rest is random.
    start: str | None = None
    vae: str | None = None  # folder of a trained VAE, needed when init is null
    block_out_channels: list[int] = field(default_factory=lambda: [96, 160])
    # Of each resolution, finest first: "both" (down and up), "up" or "none"; null: "both", which the last must have.
    attention: list[str] | None = None
    layers_per_block: int = 1
    attention_heads: list[int] = field(default_factory=lambda: [4])  # one number, or one for each resolution
    norm_num_groups: int = 16
    motion_max_seq_length: int = 32  # frames that motion modules can ever attend to together
    pose_channels: list[int] = field(default_factory=lambda: [16, 32, 64, 96])
    context_dim: int = 64
    image_encoder_size: int = 64
    image_encoder_patch: int = 8
    image_encoder_width: int = 128
    image_encoder_layers: int = 3
    # In the image stage, of MagicAnimate the prompt; for a new one, published ones stay frozen.
    train_image_encoder: bool = False


@dataclass
class ValidationConfig:
    """Clips of held-out people, sampled with and without TPC while training; nothing of the training changes by it."""

    steps: int = 0  # optimiser steps from one validation to the next; 0 switches it off
    clips: int = 4
    num_frames: int = 1
    misaligned: float = 0.5  # share of clips whose reference is moved, turned and resized first; measured by itself
    num_inference_steps: int = 20
    guidance_scale: float = 1.0
    tpc: bool = True  # sample with TPC beside without
    preset: str = "best"  # of TPC: "paper", "release" or "best"
    root: str | None = None  # folder of held-out videos; null: the training folder, cut differently

    def check(self) -> None:
        check_choice(self, "preset", PRESETS)
        check_positive(self, "clips", "num_frames")
        check_share(self, "misaligned")


@dataclass
class TrainConfig:
    """`train.py`: one loop for both stages."""

    stage: str = MISSING  # "image" trains on single frames, "motion" on clips
    # "full", every network (of AnimateAnyone the motion modules only in stage=motion); "motion", the motion modules
    # alone; "lora", low-rank adapters of the UNets; what else a model offers, its `trainable_choices` say; null: what
    # the stage trains as published, of AnimateAnyone "full" for image and "motion" for motion. What no output depends
    # on is frozen in every case.
    trainable: str | None = None
    output: str = MISSING  # folder of checkpoints, logs and the finished pipeline
    seed: int = 0  # of new weights and of everything drawn for a sample
    batch_size: int = 1  # of a process, before accumulation
    gradient_accumulation: int = 1
    # Batch size of an optimiser step over all processes; gradient_accumulation is then chosen to reach it with however
    # many there are. null: batch_size x gradient_accumulation x processes.
    total_batch_size: int | None = None
    max_steps: int = 1000  # optimiser steps in all; the schedule ends there
    checkpoint_steps: int = 500  # between complete states
    keep_checkpoints: int = 2  # the newest ones
    log_steps: int = 10
    ema_decay: float = 0.0  # EMA of the trainable parameters, which is then what is exported; 0: none
    # Steps with a loss or gradient that is not finite are skipped and counted; this many in a row end the run, with
    # the last checkpoint of finite steps as it was.
    max_skipped_steps: int = 10
    mixed_precision: str | None = "bf16"  # or "no", "fp16"; null leaves it to the accelerate configuration
    # "bfloat16" keeps frozen convolutions and linear layers in half the memory; the exported ones are those of
    # `model.init`, unrounded.
    frozen_dtype: str = "float32"
    vae_chunk: int = 8  # images that pass the VAE at a time, which bounds the memory of encoding
    gradient_checkpointing: bool = False  # recompute UNet blocks, motion modules included, in the backward pass
    channels_last: bool = False  # memory format of convolutions; several times faster in bf16 on CPUs
    export_dtype: str = "float32"  # of the weights in `output/pipeline`; "float16": half the size
    dry_run: bool = False  # print sizes, trainable parameters and memory by strategy, then stop
    dry_run_processes: int = 8  # GPUs among which the estimate's sharded strategies divide their states
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    attention: AttentionLossConfig = field(default_factory=AttentionLossConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def check(self) -> None:
        check_choice(self, "stage", ("image", "motion"))
        check_choice(self, "export_dtype", ("float32", "float16"))
        check_choice(self, "mixed_precision", (None, "no", "bf16", "fp16"))
        check_choice(self, "frozen_dtype", ("float32", "bfloat16"))
        check_positive(self, "batch_size", "max_steps", "gradient_accumulation", "checkpoint_steps")
        check_positive(self, "keep_checkpoints", "log_steps", "max_skipped_steps", "vae_chunk", "dry_run_processes")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay={self.ema_decay} must be at least 0 and below 1")
        if self.stage == "image" and self.data.num_frames != 1:
            raise UserError(f"stage=image trains on single frames; data.num_frames={self.data.num_frames} must be 1")
        if self.stage == "motion" and self.data.num_frames < 2:
            raise UserError("stage=motion needs data.num_frames of at least 2")
        if self.stage == "image" and self.trainable == "motion":
            raise UserError("trainable=motion needs stage=motion: motion modules take no part in single frames")
        if self.mixed_precision != "bf16" and self.frozen_dtype == "bfloat16":
            raise UserError(f"frozen_dtype=bfloat16 needs mixed_precision=bf16, not {self.mixed_precision}")
        self._check_supervision()
        if not self.dry_run:  # which takes the published sizes where nothing else is given
            self._check_inputs()

    def _check_supervision(self) -> None:
        composition, attention = self.augmentation.composition, self.attention
        if self.augmentation.calibrated.transform == "articulated" and composition.probability > 0:
            raise UserError(
                "augmentation.calibrated.transform=articulated needs references that stay as the loader makes them; "
                "set augmentation.composition.probability=0 (data.people.reframed= moves those of rendered people)"
            )
        if attention.surface and not self.data.cache_surfaces:
            raise UserError(f"attention.surface={attention.surface} needs data.cache_surfaces=true")
        if attention.surface and composition.probability > 0:
            raise UserError(
                f"attention.surface={attention.surface} needs references that stay as they are; set "
                "augmentation.composition.probability=0"
            )
        if attention.background and composition.probability > 0 and composition.fill != "scene":
            raise UserError(
                f"attention.background={attention.background} needs backgrounds that stay where they are; "
                f"augmentation.composition.fill={composition.fill} moves them, scene does not"
            )

    def _check_inputs(self) -> None:
        model = self.model
        if model.init is None and self.frozen_dtype != "float32":
            raise UserError(f"frozen_dtype={self.frozen_dtype} needs model.init=, where the unrounded weights are")
        if model.init is None and self.trainable == "lora":
            raise UserError("trainable=lora adapts trained networks; give model.init=, a pipeline folder")
        if model.init is None and model.vae is None:
            raise UserError("model.init= (a pipeline folder) or model.vae= (a VAE, for new networks) is required")
        if self.data.source == "videos" and not self.data.root:
            raise UserError("data.source=videos needs data.root=, a folder of videos with pose files")


@dataclass
class VAEConfig:
    """A new AutoencoderTiny for rendered people, or a published AutoencoderKL fine-tuned as DreamPose does."""

    output: str = MISSING
    init: str | None = None  # VAE folder to go on from, such as the `vae` of a pipeline folder; null starts anew
    # Train the decoder alone, so that models trained on the latents stay valid; AutoencoderKL needs it.
    freeze_encoder: bool = False
    seed: int = 0
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_steps: int = 1000
    log_steps: int = 50
    mixed_precision: str | None = None
    channels_last: bool = False
    latent_channels: int = 16
    width: int = 48
    # Residual blocks at each resolution, finest first; each entry after the first halves the image.
    blocks: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
    loss: str = "edges"  # absolute and squared error, the person weighted, and edges; "squares": mean squared error
    crop: float = 0.0  # random crops take away up to this part of an image's sides
    latent_noise: float = 0.05  # deviation of noise on the latents in training: the decoder bears small errors
    latent_weight: float = 1e-3  # of the latents' mean square, which keeps them near zero
    person_weight: float = 3.0  # of a person's pixels against the background's
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def check(self) -> None:
        check_choice(self, "loss", ("edges", "squares"))
        if not 0 <= self.crop < 1:
            raise UserError(f"crop={self.crop} must be at least 0 and below 1, a part of the image's sides")
        if self.data.latents or self.data.embeddings:
            raise UserError("data.latents= and data.embeddings= are of a finished VAE; leave them out to train one")


@dataclass
class ExportConfig:
    """`python -m training.export`."""

    # A folder `checkpoint-<step>`, or the run's output folder, of which the newest is taken. The run's `config.yaml`
    # must lie beside it.
    checkpoint: str = MISSING
    output: str = MISSING  # the pipeline folder to write
    average: bool = True  # take the EMA weights, where the run kept them
    dtype: str | None = None  # of the weights, "float32" or "float16"; null: the run's `export_dtype`
    init: str | None = None  # where `model.init` of the run lies now; null: where it lay
    vae: str | None = None  # where `model.vae` of the run lies now

    def check(self) -> None:
        check_choice(self, "dtype", (None, "float32", "float16"))


@dataclass
class CurvesConfig:
    """`python -m training.logs`."""

    runs: list[str] = field(default_factory=list)  # output folders of training runs
    output: str = "curve.png"
    scalar: str = "loss"  # what is plotted
    smoothing: int = 9  # points averaged
