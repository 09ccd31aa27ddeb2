"""`Animator`, the one class that pipeline, calibration, recording, training and evaluation work through.

`docs/animators.md` explains it and adds one. Shapes use b = batch, f = frames, i = images, m = calibrated images of a
clip, r = tokens of one image, c = channels, h, w = latent size, H, W = image size.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import Tensor, nn

from core.errors import UserError
from models.attention.context import Probe, ReferenceContext, same_reference
from models.attention.layers import LayerShape
from models.config import NetworkSizes
from models.images import ImageBatch, ImageSequence, Words
from models.vae import VAE, VideoVAE

# (frames of a window, noisy latents of the whole clip (1, c, f, h, w), timestep) -> `Condition.pose` of the window.
# Windows of a shot come in order.
PoseCondition = Callable[[range, Tensor, Tensor], Any]


@dataclass(frozen=True)
class Condition:
    """Conditions of one window of frames, or of a batch of passes over windows."""

    conditioning: Any  # from `Animator.encode_reference`, one for all passes
    pose: Any  # from the `PoseCondition`; of a batch its tensors are joined along their first axis
    context: ReferenceContext  # the images that each frame attends to, with the tokens of `Animator.encode_images`

    def without_probe(self) -> "Condition":
        return replace(self, context=replace(self.context, probe=None))


@dataclass(frozen=True)
class CalibratedImages:
    """The calibrated images of a batch, clip by clip."""

    pixels: Tensor  # (b*m, 3, H, W) in [-1, 1]
    masks: Tensor  # (b*m, 1, H, W), 1 where the calibrated person is


@dataclass(frozen=True)
class TrainingBatch:
    """Arguments of `Animator.forward`, b clips."""

    noisy_latents: Tensor  # (b, c, f, h, w)
    timestep: Tensor  # (b,)
    # Of `vae_images`, (b, c, h, w); with `calibrated_latents` also of calibrated images, clip by clip, (b + b*m, ...)
    reference_latents: Tensor
    reference_image: Tensor  # (b, 3, H, W) in [-1, 1]; with `takes_embeddings` also its embedding, (b, 1, channels)
    poses: Tensor  # pose images, (b, 3, f, H, W) in [0, 1]
    dropped: Tensor  # (b,), conditions that a sample goes without: 0 none, 1 to `drop_modes` as the animator says
    # Index and flags of what each of the b*f frames attends to among [b references | b*m calibrated images], its
    # `tokens` unused; None: each clip its own reference.
    reference: ReferenceContext | None = None
    probe: Probe | None = None
    reference_mask: Tensor | None = None  # (b, 1, H, W), 1 where the person is; given where `needs_mask`
    calibrated: CalibratedImages | None = None
    inputs: Mapping[str, Tensor] | None = None  # of `constant_inputs` and `clip_inputs`; None: there are none

    def context(self, tokens: dict[str, Tensor]) -> ReferenceContext:
        """The images that frames attend to, with tokens by layer, those of the b references first."""
        clips, _, num_frames = self.noisy_latents.shape[:3]
        reference = self.reference
        if reference is None:
            reference = same_reference({layer: value[:clips] for layer, value in tokens.items()}, num_frames)
        return replace(reference, tokens=tokens, projected=None, probe=self.probe)

    def by_frame(self, values: Tensor) -> Tensor:
        """One value a clip, (b, ...) -> one a frame, (b*f, ...)."""
        return values.repeat_interleave(self.noisy_latents.shape[2], dim=0)


class Animator(nn.Module, ABC):
    """A model that animates a reference image with poses. Its children are a pipeline's components, by their names.

    Arguments of the constructor without a default are its components: networks, `denoising_unet` among them where
    sizes and dtype are not said otherwise, and what prepares their inputs; `| None` says which a run may do without.
    Those with a default are settings, which are kept as attributes of their names and saved with a pipeline.
    """

    denoising_unet: ModelMixin

    pose_kind = "OpenPose"  # of the pose images; figures of "OpenPose" are drawn from keypoints
    reference_follows_timestep = False  # images are encoded anew at every denoising step, at its timestep
    shared_noise = False  # every frame starts from the same noise
    needs_mask = False  # `encode_reference` needs to know where the person is
    joint_frames = True  # frames of a window attend to each other; otherwise windows need not overlap
    guidance_names: tuple[str, ...] = ("reference",)  # of the scales of guidance
    takes_batches = False  # `predict` takes several passes
    latent_multiple = 1  # that height and width of the latents must be multiples of

    vae_class: Any = VAE  # of its pipeline's VAE; models of segments have a `VideoVAE`
    attachments: tuple[str, ...] = ("add", "replace")  # of calibrated images, that it knows
    takes_words = False  # a prompt, or its embedding, see `models.images.Words`
    default_prompt = ""
    encoders: Mapping[str, tuple[str, ...]] = {}  # embedding -> components that a run does without, given it
    # What makes the embeddings (1, n, c) of a text, or an image (1, 3, H, W) in [-1, 1], of it and these components.
    text_embedding: Callable[..., Tensor] | None = None
    image_embedding: Callable[..., Tensor] | None = None
    published_sampling: Mapping[str, Any] = {}  # settings for folders that say none, as `AnimationPipeline.sampling`
    face_size: int | None = None  # side of the face images that `pose_condition` gets; None: none

    # A model of segments denoises a segment, decodes it, and gives its last frames to the next; `pose_condition` is
    # asked for each with `models.segments.SegmentImages`, and `predict` for the whole of it.
    segment_frames: int | None = None  # of a segment as it was trained; None: clips are not divided, but in windows
    carried_frames = 1  # that a segment is given of the one before
    frames_per_latent = 1  # of a segment; its first latent is of one frame
    images_of_segment = 1  # calibrated images a person that a segment sees beside the reference
    context_latents = 0  # before the first frame's, which hold the reference

    trainable = False  # has what `train.py` asks, the methods below `training_prediction`
    drop_modes = 1  # what condition dropout may take away; 1: everything at once
    noise = "diffusion"  # that training adds, "diffusion" or "flow", see `models.noise`
    takes_embeddings = False  # cached image embeddings may stand in for the reference image
    alters_reference = False  # `vae_images` changes the images, so that their cached latents are of no use
    calibrated_latents = True  # training needs the latents of calibrated images
    adapted_networks: tuple[str, ...] = ()  # children that low-rank adapters are made for
    motion_parts: tuple[str, ...] = ("motion_modules",)  # in names of layers over several frames
    # Classes of the layers that FSDP gathers at a time.
    blocks: tuple[str, ...] = ("Transformer2DModel", "MotionModule", "ResnetBlock2D")

    compiled = False  # by `models.compiling`: arguments of the networks keep their form from call to call

    # Sizes and settings

    @property
    def dtype(self) -> torch.dtype:
        return self.denoising_unet.dtype

    @property
    def _no_split_modules(self) -> list[str]:
        """What accelerate asks for `blocks`; it refuses names that the networks do not have."""
        present = {type(module).__name__ for module in self.modules()}
        return [name for name in self.blocks if name in present]

    @property
    def latent_channels(self) -> int:
        return self.denoising_unet.config.out_channels

    @property
    def latent_side(self) -> int:
        """Side of the square latents that the model was trained on; other shapes get the same area."""
        return self.denoising_unet.config.sample_size

    @property
    def latent_size(self) -> tuple[int, int] | None:
        """(h, w) of the only latents that the model takes; None: any multiple of `latent_multiple`."""
        return None

    @property
    def longest_window(self) -> int | None:
        """Frames that can be denoised together; None: any number."""
        return None

    def latent_frames(self, frames: int) -> int:
        """Latents of consecutive frames that are denoised together."""
        return self.context_latents + 1 + (frames - 1) // self.frames_per_latent

    @classmethod
    def constructor_parameters(cls) -> tuple[list[inspect.Parameter], list[inspect.Parameter]]:
        """Components and settings among the arguments of the constructor."""
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        return [p for p in parameters if p.default is p.empty], [p for p in parameters if p.default is not p.empty]

    def settings(self) -> dict[str, Any]:
        return {parameter.name: getattr(self, parameter.name) for parameter in self.constructor_parameters()[1]}

    # Inference

    @abstractmethod
    def encode_reference(self, reference: ImageBatch) -> Any:
        """Conditioning that follows from the reference, one image, once a run: context, null context, background.

        It comes back in `encode_images`, `pose_condition` and `Condition.conditioning`.
        """

    @abstractmethod
    def encode_images(self, images: ImageBatch, timestep: int, conditioning: Any) -> dict[str, Tensor]:
        """Tokens (i, r, c) of images, by layer or under a name that several layers share.

        The reference is one of the images, so frames attend to it as to calibrated ones. Each image of a run comes
        once, or once a step where `reference_follows_timestep`.
        """

    @abstractmethod
    def pose_condition(self, poses: ImageSequence, conditioning: Any) -> PoseCondition:
        """The pose condition of a clip's windows."""

    @abstractmethod
    def predict(self, sample: Tensor, timestep: Tensor, condition: Condition, dropped: Sequence[int]) -> Tensor:
        """Predictions (b, c, f, h, w) of b passes, noisy latents `sample`, at a timestep (scalar).

        `dropped` has one of `branches` for each pass; b = 1 unless the animator `takes_batches`.
        """

    def branches(self, scales: tuple[float, ...]) -> tuple[int, ...]:
        """What the branches of guidance go without: 0 nothing, others as `TrainingBatch.dropped`.

        There is a scale for each of `guidance_names`; all 1: every condition, without guidance.
        """
        return (0,) if scales == (1,) else (0, 1)

    def combined(self, predictions: Sequence[Tensor], scales: tuple[float, ...]) -> Tensor:
        """The guided prediction, of those of the `branches`: classifier-free guidance (Ho and Salimans, 2021)."""
        if len(predictions) == 1:
            return predictions[0]
        conditional, null = predictions
        return null + scales[0] * (conditional - null)

    def null_image_tokens(self, conditioning: Any) -> dict[str, Tensor]:
        """Tokens (1, r, c) of the image that stands for none in cross-attention, as `encode_images` has them.

        In a batch where others have images, passes without attend to it; {}: to their own frame's tokens.
        """
        return {}

    def segment_context(self, context: ReferenceContext, latent_size: tuple[int, int]) -> ReferenceContext:
        """What a segment attends to as a whole, of what each of its frames attends to (models of segments)."""
        return context

    def check_words(self, words: Words, guided: bool) -> None:
        """UserError for embeddings that it cannot read, or without those of encoders that it has not.

        `guided`: guidance leads away from a negative prompt.
        """

    @abstractmethod
    def attention_layers(self, latent_size: tuple[int, int]) -> dict[str, LayerShape]:
        """Layers in which frames attend to images, in the order in which they run, for latents of this (h, w)."""

    def guidance_scales(self, scale: float | Sequence[float]) -> tuple[float, ...]:
        """One scale for each of `guidance_names`, from a number for all of them or from as many numbers."""
        names = self.guidance_names
        scales = tuple(map(float, scale)) if isinstance(scale, Sequence) else (float(scale),) * len(names)
        if len(scales) != len(names):
            raise ValueError(f"guidance_scale must be a number, or one for each of {', '.join(names)}; got {scale}")
        return scales

    def initial_latents(self, noise: Tensor, scheduler: SchedulerMixin, start: Callable[[], Tensor]) -> Tensor:
        """Latents (1, c, f, h, w) that denoising starts from, from standard normal noise of that shape.

        The scheduler's timesteps are set; `start` makes latents (1, c, f, h, w) of each frame's reference image.
        """
        return noise * scheduler.init_noise_sigma

    # Training, for animators that are `trainable`

    @classmethod
    def _untrained(cls) -> UserError:
        return UserError(f"{cls.__name__} cannot be trained: it lacks what docs/animators.md lists for train.py")

    @classmethod
    def small(cls, sizes: NetworkSizes, latent_channels: int, latent_side: int) -> Self:
        """Randomly initialised small networks for latents of this side; a `UserError` if sizes do not fit."""
        raise cls._untrained()

    def forward(self, **inputs: Any) -> Tensor:
        """`training_prediction` of these fields of a `TrainingBatch`; DDP and FSDP move and cast their tensors."""
        return self.training_prediction(TrainingBatch(**inputs))

    def training_prediction(self, batch: TrainingBatch) -> Tensor:
        """One training step's prediction, (b, c, f, h, w)."""
        raise self._untrained()

    def constant_inputs(
        self, vae: VAE | VideoVAE, clip: tuple[int, int, int], embeddings: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Inputs of training that are the same in every step, made once before it, for clips of (f, H, W).

        `embeddings` as in `models.images.Words`.
        """
        return {}

    def clip_inputs(
        self,
        vae: VAE | VideoVAE,
        clips: Mapping[str, Tensor],
        carried: Sequence[bool],
        constant: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Inputs of training that follow from a batch of clips, see `training.data`, without gradients.

        `carried`: of each clip, if it goes on from one before, whose last frames its first ones are.
        """
        return {}

    def empty_inputs(self, clips: int, frames: int, latent_size: tuple[int, int]) -> dict[str, Tensor]:
        """Tensors of the shapes that the two make, for estimates of memory."""
        return {}

    def vae_images(self, images: Tensor, masks: Tensor | None) -> Tensor:
        """The images whose latents training takes, of references (n, 3, H, W) in [-1, 1], masks (n, 1, H, W)."""
        return images

    def prepare_stage(self, stage: str) -> None:
        """Make the networks ready for stage "image" or "motion", before what is trained is chosen."""

    def trainable_choices(self, stage: str) -> tuple[str, ...]:
        """Values of `trainable=` in a stage, beside "lora"; the default comes first."""
        raise self._untrained()

    def trained_parameters(self, choice: str, stage: str, image_encoder: bool) -> set[str]:
        """Names of the parameters that a choice trains, each with a gradient in every step.

        The image encoder's are among them with `image_encoder` alone.
        """
        raise self._untrained()

    def unused_parameters(self) -> set[str]:
        """Names of the parameters that no prediction depends on."""
        return set()

    def initialized_from(self, name: str) -> str:
        """The parameter that a parameter starts as a copy of, or itself."""
        return name

    def check_size(self, factor: int, size: tuple[int, int]) -> None:
        """Refuse training images of a size (width, height) that the networks cannot take.

        The factor is the pixels of an image's side per latent.
        """
        multiple = factor * self.latent_multiple
        if size[0] % multiple or size[1] % multiple:
            raise UserError(f"data.size={list(size)} must be multiples of {multiple}, the model's factor")
        only = self.latent_size
        if only is not None and (size[1] // factor, size[0] // factor) != only:
            raise UserError(
                f"data.size={list(size)} must be [{only[1] * factor},{only[0] * factor}], the model's size"
            )


def zero_dropped(values: Tensor, dropped: Sequence[bool]) -> Tensor:
    """Values of all passes (1, ...) or of each (b, ...) -> (b, ...), zeros where dropped."""
    rows = values.expand(len(dropped), *values.shape[1:]).split(1)
    return torch.cat([torch.zeros_like(row) if drop else row for row, drop in zip(rows, dropped, strict=True)])
