"""What an animator is: the one protocol that pipeline, calibration, attention recording and evaluation work through.

Each published animator answers it in a file of its own; `docs/animators.md` explains it and adds one. Shapes use
f = frames, i = reference images, r = tokens of one image, c = channels, h, w = latent size, H, W = image size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from models.attention.context import ReferenceContext
from models.attention.layers import LayerShape
from models.images import ImageSequence


class Images(Protocol):
    """Some reference and calibrated images; what is not asked for is not computed.

    Attributes:
        pixels: (i, 3, H, W) in [-1, 1].
        masks: (i, 1, H, W), 1 where a person is and 0 elsewhere; None: nobody knows.
        latents: of the images, (i, c, h, w), scaled to about unit variance.
    """

    pixels: Tensor
    masks: Tensor | None
    latents: Tensor

    def __len__(self) -> int:
        """Number of images i."""

    def encode(self, images: Tensor) -> Tensor:
        """Latents (n, c, h, w) of other images (n, 3, H, W) in [-1, 1]."""


class StepCondition(Protocol):
    """What the poses of a clip tell the model at one denoising step."""

    def window(self, frames: range) -> Any:
        """The condition of consecutive frames, as `Condition.pose` hands it on. Windows come in order."""


class PoseCondition(Protocol):
    """What the poses of a clip tell the model."""

    def at_step(self, sample: Tensor, timestep: Tensor) -> StepCondition:
        """The condition at one step; sample (1, c, f, h, w) are the noisy latents of the whole clip."""


@dataclass(frozen=True)
class Condition:
    """What one window of frames is denoised with.

    Attributes:
        conditioning: what `Animator.encode_reference` gave.
        pose: what `StepCondition.window` gave.
        context: the images each of the frames sees, with the tokens that `Animator.encode_images` gave.
    """

    conditioning: Any
    pose: Any
    context: ReferenceContext


class Animator(nn.Module, ABC):
    """A model that animates a reference image with poses. Its children are a pipeline's components, by their names.

    Attributes:
        pose_kind: what its pose images are; figures of "OpenPose" are drawn from keypoints.
        reference_follows_timestep: images are encoded anew at every denoising step, at its timestep.
        shared_noise: every frame starts from the same noise.
        needs_mask: `encode_reference` needs to know where the person is.
        joint_frames: the frames of a window see each other; otherwise windows need not overlap.
        guidance_names: what each scale of guidance is about.
        latent_multiple: what height and width of the latents must be multiples of.
    """

    pose_kind = "OpenPose"
    reference_follows_timestep = False
    shared_noise = False
    needs_mask = False
    joint_frames = True
    guidance_names: tuple[str, ...] = ("reference",)
    latent_multiple = 1

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Number format of the latents that `predict` takes."""

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels c of the latents that are denoised."""

    @property
    @abstractmethod
    def latent_side(self) -> int:
        """Side of the square latents that the model was trained on; other shapes get the same area."""

    @property
    def latent_size(self) -> tuple[int, int] | None:
        """(h, w) of the only latents that the model takes; None: any multiple of `latent_multiple`."""
        return None

    @property
    def longest_window(self) -> int | None:
        """Frames that can be denoised together; None: any number."""
        return None

    @abstractmethod
    def encode_reference(self, reference: Images) -> Any:
        """What follows from the reference alone, once a run: context, null context, background, as the model needs it.

        Args:
            reference: one image.

        Returns:
            Anything; it comes back in `encode_images`, `pose_condition` and `Condition.conditioning`.
        """

    @abstractmethod
    def encode_images(self, images: Images, timestep: int, conditioning: Any) -> dict[str, Tensor]:
        """What frames see of each image: tokens (i, r, c) by layer, or under a name that several layers share.

        The reference is one of the images, so it is seen through the same tokens as calibrated ones. Each image of a
        run comes once, or once a step where `reference_follows_timestep`.
        """

    @abstractmethod
    def pose_condition(self, poses: ImageSequence, conditioning: Any) -> PoseCondition:
        """What the pose images of a clip tell the model."""

    @abstractmethod
    def predict(self, sample: Tensor, timestep: Tensor, condition: Condition, scales: tuple[float, ...]) -> Tensor:
        """Guided prediction for one window, (1, c, f, h, w) as the noisy latents `sample`.

        Args:
            scales: one for each of `guidance_names`; all 1: the prediction with every condition, without guidance.
        """

    @abstractmethod
    def attention_layers(self, latent_size: tuple[int, int]) -> dict[str, LayerShape]:
        """The layers in which frames see images, in the order in which they run, for latents of this (h, w)."""

    def guidance_scales(self, scale: float | Sequence[float]) -> tuple[float, ...]:
        """One scale for each of `guidance_names`, from a number for all of them or from as many numbers.

        Raises:
            ValueError: another count of numbers.
        """
        names = self.guidance_names
        scales = tuple(map(float, scale)) if isinstance(scale, Sequence) else (float(scale),) * len(names)
        if len(scales) != len(names):
            raise ValueError(f"guidance_scale must be a number, or one for each of {', '.join(names)}; got {scale}")
        return scales

    def initial_latents(self, noise: Tensor, scheduler: SchedulerMixin, start: Callable[[], Tensor]) -> Tensor:
        """Where denoising starts, (1, c, f, h, w).

        Args:
            noise: (1, c, f, h, w), standard normal.
            scheduler: with its timesteps set.
            start: makes the latents (1, c, f, h, w) of the image that each frame takes as its reference, for models
                that start from it.
        """
        return noise * scheduler.init_noise_sigma


def guided(conditional: Callable[[], Tensor], unconditional: Callable[[], Tensor], scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, 2021). Two calls instead of one doubled batch halve the memory."""
    prediction = conditional()
    if scale == 1:
        return prediction
    null = unconditional()
    return null + scale * (prediction - null)


class PoseImages:
    """Pose images as they are, the same at every step; `PoseCondition` and `StepCondition` of an animator."""

    def __init__(self, poses: ImageSequence):
        self.poses = poses

    def at_step(self, sample: Tensor, timestep: Tensor) -> "PoseImages":
        return self

    def window(self, frames: range) -> Tensor:
        """(f, 3, H, W) in [0, 1]."""
        return self.poses[frames]
