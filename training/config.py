"""Configuration of training. Every knob is documented here; the recipes in `configs/` say where they differ."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from core.config import LARGEST_SEED, LARGEST_SIDE, choice, choices, number, numbers
from core.errors import UserError
from core.values import MANY
from data.config import CROPS, PeopleConfig
from models.config import ANIMATORS, resolution_settings
from tpc.config import PRESETS, CalibratedTrainingConfig, CompositionConfig

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
FRAMES_PER_LATENT = 4  # of a video VAE, whose first latent is of one frame
LENGTHS = "data.num_frames={} must be 1 more than a multiple of 4, as its latents are of 1, 4, 4 ... frames"
LARGEST_TRAINING_SEED = 2**31 - 1  # numpy's older generators, which libraries use, take 32 bits


@dataclass
class DataConfig:
    """Where clips come from and how they are cut."""

    # rendered: people drawn on the fly; videos: those of `root`, with pose files
    source: str = choice("rendered", ("rendered", "videos"))
    root: str | None = None  # folder of videos with pose files, as `prepare.py` makes it
    # identities of rendered people; of videos, what their manifest marks so. Development people are for choices
    # between settings, never for training.
    split: str = choice("train", ("train", "heldout"))
    # Width and height, multiples of the VAE's times the UNet's factor.
    size: list[int] = numbers([128, 128], 8, LARGEST_SIDE, length=2)
    num_frames: int = number(1, 1, 100_000)  # of a clip; 1 for the image stage
    stride: int = number(1, 1, 100_000)  # a clip takes every stride-th frame
    # Folder of the videos' pose images under their names, such as DensePose, for models that read these; null: draw
    # OpenPose figures.
    pose_images: str | None = None
    # Of videos: "person", as large as the image allows with everybody inside over the whole clip, clips whose people
    # do not fit are left out; "pad", made smaller with black borders where they do not; "centre", whomever it cuts.
    crop: str = choice("person", CROPS)
    # Of videos: least distance in frames from the reference to the clip, or as far as possible in shorter ones; 0: any
    # frame but the clip's own.
    sample_margin: int = number(0, 0, MANY)
    latents: str | None = None  # folder of `prepare.py latents`, read in place of encoding
    embeddings: str | None = None  # folder of `prepare.py embeddings`, read in place of encoding
    seed: int = number(0, 0, LARGEST_SEED)  # clip number i is a function of (seed, i) alone
    workers: int = number(2, 0, 1024)  # loader processes a training process; 0 loads in the training process itself
    # Folder that keeps `cache_clips` clips once they are made; null makes every clip when it is needed. With
    # num_frames=1 a cached clip has `cache_frames` frames, two images of which are paired at random each time.
    cache: str | None = None
    cache_clips: int = number(6000, 1, MANY)  # clips that the cache keeps
    cache_frames: int = number(3, 2, 100_000)  # frames of a cached clip, with num_frames=1
    cache_latents: bool = False  # the VAE's latents of the cached images too, so that training need not encode them
    cache_surfaces: bool = False  # surface maps of cached rendered people too, for attention.surface
    people: PeopleConfig = field(default_factory=PeopleConfig)  # looks and cameras of rendered ones

    def check(self) -> None:
        if self.sample_margin and (self.source != "videos" or self.cache):
            raise UserError(
                f"sample_margin={self.sample_margin} needs source=videos, and no data.cache, which keeps a few images "
                "of every clip and pairs these"
            )
        if self.cache is not None and Path(self.cache).is_file():
            raise UserError(f"cache={self.cache} is a file; give a folder that may be created")
        if self.cache_latents and not self.cache:
            raise UserError("cache_latents=true keeps latents beside cached clips; give data.cache=, a folder")
        if self.cache_surfaces and (self.source != "rendered" or not self.cache):
            raise UserError("cache_surfaces=true keeps maps of rendered people beside cached clips; give data.cache=")


@dataclass
class OptimizerConfig:
    """AdamW and its schedule. Learning rates are per step, not scaled by batch size or processes."""

    # adamw8bit: its two moments take one byte each instead of four (needs bitsandbytes)
    name: str = choice("adamw", ("adamw", "adamw8bit"))
    learning_rate: float = number(
        1e-5, 0, math.inf, excluded=math.inf
    )  # the highest, which the schedule starts from or rises to
    beta1: float = number(0.9, 0, 1, excluded=1)  # decay of the mean of gradients
    beta2: float = number(0.999, 0, 1, excluded=1)  # decay of the mean of their squares
    weight_decay: float = number(1e-2, 0, 10)  # part of the weights taken away, times the learning rate
    epsilon: float = number(1e-8, 0, 1)  # added to the root of the squares
    schedule: str = choice("constant_with_warmup", SCHEDULES)  # of the learning rate, as diffusers defines them
    # Steps below learning_rate at the start: step i of n, counted from 0, has (i + 1) / (n + 1) of it. "constant" has
    # none.
    warmup_steps: int = number(0, 0, MANY)
    max_grad_norm: float = number(1.0, 0, 1e9, excluded=0)  # gradients are clipped to it


@dataclass
class NoiseConfig:
    """Noise schedule and loss. The schedule is saved with the result, so sampling uses the same table.

    What is null of the schedule is as in `model.init`; new networks have the values of `models.config.SCHEDULE`.
    """

    num_train_timesteps: int | None = number(None, 2, 100_000)  # levels of noise; null: of new networks 1000
    # how beta, the noise added at a level, grows from beta_start to beta_end; null: of new networks scaled_linear
    beta_schedule: str | None = choice(None, ("scaled_linear", "linear", "squaredcos_cap_v2"))
    beta_start: float | None = number(None, 0, 1, excluded=0)  # of the cleanest level; null: of new networks 0.00085
    beta_end: float | None = number(None, 0, 1, excluded=1)  # of the noisiest level; null: of new networks 0.012
    # what the network predicts: velocity, the noise, or the clean image; null: of new networks v_prediction
    prediction_type: str | None = choice(None, ("v_prediction", "epsilon", "sample"))
    # without it dark and bright images come out grey; null: of new networks true
    rescale_betas_zero_snr: bool | None = None
    # timesteps of sampling; trailing, null of new networks, starts at the last one, which has zero SNR
    timestep_spacing: str | None = choice(None, ("trailing", "leading", "linspace"))
    # Min-SNR weight min(snr + 1, gamma) / (snr + 1) for velocity prediction, 1 at zero terminal SNR, where sampling
    # starts; null gives every timestep the weight 1.
    # Flow matching weighs all alike.
    snr_gamma: float | None = number(5.0, 0, 1e6, excluded=0)
    # Of the error where the person is, against 1 elsewhere; needs masks. The mean weight of every sample stays 1.
    person_weight: float = number(1.0, 0, 1e6, excluded=0)
    # standard deviation of a constant added to the noise of each (sample, channel)
    noise_offset: float = number(0.0, 0, 10)
    # share of samples trained without reference and with zero context, for guidance
    condition_dropout: float = number(0.1, 0, 1)
    # Above 1 more of the drawn timesteps are noisy ones, where the reference is all that a network can go by; 1:
    # evenly, as published. New models of flow matching are sampled with the same shift.
    timestep_shift: float = number(1.0, 0, 1e6, excluded=0)

    def check(self) -> None:
        if None not in (self.beta_start, self.beta_end) and self.beta_start >= self.beta_end:
            raise UserError(f"beta_start={self.beta_start} must be below noise.beta_end={self.beta_end}")
        # At zero terminal SNR the noise alone says nothing about the image.
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise UserError("prediction_type=epsilon cannot be sampled with noise.rescale_betas_zero_snr=true")


@dataclass
class AttentionLossConfig:
    """Attention supervision by known matches, see `training/attention_loss.py`; published models train without."""

    weight: float = number(0.0, 0, 1e6)  # of the loss beside the diffusion objective's; 0: none
    # deviation of the Gaussian around the right place, in tokens
    radius: float = number(0.75, 0, 1000, excluded=0)
    score_threshold: float = number(0.3, 0, 1)  # least score of keypoints
    # Cells a side of the image in each of which a point of the background is supervised too, for clips and references
    # that share a camera which stands still; 0: the body alone.
    background: int = number(0, 0, 1000)
    # Random points a frame on the person's surface in place of those of the keypoints; needs data.cache_surfaces.
    # Keypoints lie inside the body, and where it turns they say only about what is visible.
    surface: int = number(0, 0, 100_000)


@dataclass
class LoraConfig:
    """Low-rank adapters, for trainable=lora: a layer's weight W becomes W + alpha / rank * B A."""

    rank: int = number(16, 1, 4096)  # rows of A; more adapt more and take more memory
    alpha: float = number(16.0, 0, 1e6, excluded=0)  # the adapters count alpha / rank
    motion: bool = True  # adapt motion modules too; with single frames they take no part and are never adapted
    # "merged" adds the adapters to the weights of `output/pipeline`; "separate" writes them alone, to `output/lora`,
    # for `infer.py model=... lora=...` or as the sub-folder `lora` of a pipeline folder.
    export: str = choice("merged", ("merged", "separate"))


@dataclass
class AugmentationConfig:
    """Misaligned references and calibrated tokens in training, off by default, as published; and long videos."""

    composition: CompositionConfig = field(default_factory=CompositionConfig)  # moves the reference's person
    calibrated: CalibratedTrainingConfig = field(default_factory=CalibratedTrainingConfig)  # as in TPC's inference
    # Share of clips that go on from one before, whose last frame they are given, of models of segments.
    carried: float = number(0.5, 0, 1)

    def needs_float64(self) -> bool:
        """True if transforms are computed where the model is; articulated ones are made with the data, on the CPU."""
        similar = self.calibrated.probability > 0 and self.calibrated.transform != "articulated"
        return similar or self.composition.probability > 0


@dataclass
class ModelConfig:
    """The networks: a saved pipeline folder to start from, or the sizes of new ones."""

    animator: str = choice("animate_anyone", ANIMATORS)  # of new networks; a folder says what it is
    init: str | None = None  # pipeline folder whose networks training starts from; null builds new ones
    # File of a prompt's and a negative prompt's embeddings, as infer.py reads it, in place of the text encoder in
    # `init`, which training then does not load.
    embeddings: str | None = None
    # Pipeline folder whose weights new networks begin with wherever name and shape agree; the rest is random.
    start: str | None = None
    vae: str | None = None  # folder of a trained VAE, needed when init is null
    # widths of the UNets, one for each resolution; of Wan-Animate the one of its transformer
    block_out_channels: list[int] = numbers([96, 160], 1, 8192)
    # Of each resolution, finest first: "both" (down and up), "up" or "none"; null: "both", which the last must have.
    attention: list[str] | None = choices(None, ("both", "up", "none"))
    layers_per_block: int = number(1, 1, 100)  # residual blocks of each resolution; blocks of the transformer
    attention_heads: list[int] = numbers([4], 1, 1024)  # one number, or one for each resolution
    norm_num_groups: int = number(16, 1, 8192)  # groups of GroupNorm, which divide every width
    motion_max_seq_length: int = number(32, 1, 100_000)  # frames that motion modules can ever attend to together
    pose_channels: list[int] = numbers([16, 32, 64, 96], 1, 8192)  # widths of the pose encoder
    context_dim: int = number(64, 1, 65536)  # width of the image encoder's tokens in cross-attention
    image_encoder_size: int = number(64, 1, 8192)  # side in pixels of what the image encoder gets
    image_encoder_patch: int = number(8, 1, 8192)  # side in pixels of its patches
    image_encoder_width: int = number(128, 1, 65536)  # of its layers
    image_encoder_layers: int = number(3, 1, 1000)  # of the image encoder
    # In the image stage, of MagicAnimate the prompt; for a new one, published ones stay frozen.
    train_image_encoder: bool = False


@dataclass
class ValidationConfig:
    """Clips of held-out people, sampled with and without TPC while training; nothing of the training changes by it."""

    steps: int = number(0, 0, MANY)  # optimiser steps from one validation to the next; 0 switches it off
    clips: int = number(4, 1, MANY)  # number of clips
    num_frames: int = number(1, 1, 100_000)  # of a clip
    # share of clips whose reference is moved, turned and resized first; measured by itself
    misaligned: float = number(0.5, 0, 1)
    num_inference_steps: int = number(20, 1, 1000)  # denoising steps
    guidance_scale: float = number(1.0, 0, 100)  # 1: none
    tpc: bool = True  # sample with TPC beside without
    preset: str = choice("best", PRESETS)  # of TPC
    root: str | None = None  # folder of held-out videos; null: the training folder, cut differently


@dataclass
class TrainConfig:
    """`train.py`: one loop for both stages."""

    stage: str = choice(MISSING, ("image", "motion"))  # image trains on single frames, motion on clips
    # "full", every network (of AnimateAnyone the motion modules only in stage=motion); "motion", the motion modules
    # alone; "lora", low-rank adapters of the UNets; what else a model offers, its `trainable_choices` say; null: what
    # the stage trains as published, of AnimateAnyone "full" for image and "motion" for motion. What no output depends
    # on is frozen in every case.
    trainable: str | None = None
    output: str = MISSING  # folder of checkpoints, logs and the finished pipeline
    seed: int = number(0, 0, LARGEST_TRAINING_SEED)  # of new weights and of everything drawn for a sample
    batch_size: int = number(1, 1, 100_000)  # clips of a process at a time, before accumulation
    gradient_accumulation: int = number(1, 1, MANY)  # batches whose gradients make one optimiser step
    # Batch size of an optimiser step over all processes; gradient_accumulation is then chosen to reach it with however
    # many there are. null: batch_size x gradient_accumulation x processes.
    total_batch_size: int | None = number(None, 1, MANY)
    max_steps: int = number(1000, 1, MANY)  # optimiser steps in all; the schedule ends there
    checkpoint_steps: int = number(500, 1, MANY)  # optimiser steps between complete states
    keep_checkpoints: int = number(2, 1, MANY)  # complete states that stay, the newest ones
    log_steps: int = number(10, 1, MANY)  # optimiser steps between lines of the log
    # EMA of the trainable parameters, which is then what is exported; 0: none
    ema_decay: float = number(0.0, 0, 1, excluded=1)
    # Steps with a loss or gradient that is not finite are skipped and counted; this many in a row end the run, with
    # the last checkpoint of finite steps as it was.
    max_skipped_steps: int = number(10, 1, MANY)
    # of the computation, beside float32 weights; null leaves it to the accelerate configuration
    mixed_precision: str | None = choice("bf16", ("no", "bf16", "fp16"))
    # "bfloat16" keeps frozen convolutions and linear layers in half the memory; the exported ones are those of
    # `model.init`, unrounded.
    frozen_dtype: str = choice("float32", ("float32", "bfloat16"))
    vae_chunk: int = number(8, 1, 100_000)  # images that pass the VAE at a time, which bounds the memory of encoding
    gradient_checkpointing: bool = False  # recompute UNet blocks, motion modules included, in the backward pass
    channels_last: bool = False  # memory format of convolutions; several times faster in bf16 on CPUs
    # of the weights in `output/pipeline`; float16: half the size
    export_dtype: str = choice("float32", ("float32", "float16"))
    # print sizes, trainable parameters, memory by strategy, and seconds a step of a few measured ones, then stop
    dry_run: bool = False
    dry_run_processes: int = number(8, 1, 100_000)  # GPUs among which the estimate's sharded strategies divide states
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    attention: AttentionLossConfig = field(default_factory=AttentionLossConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def check(self) -> None:
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

    def folders(self) -> dict[str, str | None]:
        """The folders that training reads, by their keys."""
        model, data = self.model, self.data
        named = {"model.init": model.init, "model.start": model.start, "model.vae": model.vae}
        named |= {"model.embeddings": model.embeddings}
        named |= {"data.root": data.root, "data.latents": data.latents, "data.embeddings": data.embeddings}
        return named | {"data.pose_images": data.pose_images, "validation.root": self.validation.root}

    def _check_supervision(self) -> None:
        composition, calibrated = self.augmentation.composition, self.augmentation.calibrated
        attention = self.attention
        if calibrated.transform == "articulated" and composition.probability > 0:
            raise UserError(
                "augmentation.calibrated.transform=articulated needs references that stay as the loader makes them; "
                "set augmentation.composition.probability=0 (data.people.reframed= moves those of rendered people)"
            )
        if calibrated.start > 0 and calibrated.images < self.data.num_frames:
            raise UserError(
                f"augmentation.calibrated.start={calibrated.start} needs an image of its own for every frame; set "
                f"augmentation.calibrated.images={self.data.num_frames}"
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
        if model.init is None:
            resolution_settings(model)
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
    """A new VAE for rendered people, or a published AutoencoderKL fine-tuned as DreamPose does.

    A new one is an AutoencoderTiny, or of videos an AutoencoderKLWan.
    """

    output: str = MISSING  # folder for the VAE, its logs and images
    init: str | None = None  # VAE folder to go on from, such as the `vae` of a pipeline folder; null starts anew
    # Train the decoder alone, so that models trained on the latents stay valid; AutoencoderKL needs it.
    freeze_encoder: bool = False
    seed: int = number(0, 0, LARGEST_TRAINING_SEED)  # of new weights and of everything drawn for a sample
    batch_size: int = number(8, 1, 100_000)  # images of a process at a time
    gradient_accumulation: int = number(1, 1, MANY)  # batches whose gradients make one optimiser step
    max_steps: int = number(1000, 1, MANY)  # optimiser steps in all; the schedule ends there
    log_steps: int = number(50, 1, MANY)  # optimiser steps between lines of the log
    # of the computation; null leaves it to the accelerate configuration
    mixed_precision: str | None = choice(None, ("no", "bf16", "fp16"))
    channels_last: bool = False  # memory format of convolutions; several times faster in bf16 on CPUs
    latent_channels: int = number(16, 1, 1024)  # of a new one
    width: int = number(48, 1, 8192)  # channels of every layer of a new one; of videos those of the finest images
    # Residual blocks at each resolution, finest first; each entry after the first halves the image.
    blocks: list[int] = numbers([0, 1, 2, 3], 0, 100)
    # A VAE of videos, whose images have so many times `width` channels at each resolution, finest first, and one
    # residual block; each entry after the first halves the image, the last two the number of frames. null: of images
    multiples: list[int] | None = numbers(None, 1, 64)
    # edges: absolute and squared error, the person weighted, and edges; squares: mean squared error
    loss: str = choice("edges", ("edges", "squares"))
    crop: float = number(0.0, 0, 1, excluded=1)  # random crops take away up to this part of an image's sides
    # deviation of noise on the latents in training: the decoder bears small errors
    latent_noise: float = number(0.05, 0, 10)
    latent_weight: float = number(1e-3, 0, 1e6)  # of the latents' mean square, which keeps them near zero
    person_weight: float = number(3.0, 0, 1e6)  # of a person's pixels against the background's
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def check(self) -> None:
        if not self.blocks:
            raise UserError("blocks=[] must hold a number of residual blocks for each resolution")
        name = "blocks" if self.multiples is None else "multiples"
        levels = getattr(self, name)
        factor = 2 ** (len(levels) - 1)
        if self.init is None and any(side % factor for side in self.data.size):
            raise UserError(
                f"data.size={self.data.size} must be multiples of {factor}, by which {name}={levels} make images "
                "smaller"
            )
        if self.multiples is not None and len(self.multiples) < 3:
            raise UserError(f"multiples={self.multiples} needs three resolutions or more, as time is halved twice")
        if self.multiples is not None and (self.data.num_frames - 1) % FRAMES_PER_LATENT:
            raise UserError(LENGTHS.format(self.data.num_frames))
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
    dtype: str | None = choice(None, ("float32", "float16"))  # of the weights; null: the run's `export_dtype`
    init: str | None = None  # where `model.init` of the run lies now; null: where it lay
    vae: str | None = None  # where `model.vae` of the run lies now


@dataclass
class CurvesConfig:
    """`python -m training.logs`."""

    runs: list[str] = field(default_factory=list)  # output folders of training runs
    output: str = "curve.png"  # image to write
    scalar: str = "loss"  # what is plotted, by its name in TensorBoard
    smoothing: int = number(9, 1, MANY)  # points averaged
