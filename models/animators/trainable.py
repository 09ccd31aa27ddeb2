"""What `train.py` asks of an animator that it can train, beside `models.animators.base.Animator`.

Shapes use b = batch, f = frames, m = calibrated images of a clip, c = channels, h, w = latent size, H, W = image
size.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, Self

from torch import Tensor

from core.errors import UserError
from models.animators.base import Animator
from models.attention.context import ReferenceContext
from models.attention.probe import Probe


@dataclass(frozen=True)
class CalibratedImages:
    """The calibrated images of a batch, clip by clip.

    Attributes:
        pixels: (b*m, 3, H, W) in [-1, 1].
        masks: (b*m, 1, H, W), 1 where the calibrated person is.
    """

    pixels: Tensor
    masks: Tensor


class NetworkSizes(Protocol):
    """Sizes of new small networks; see `training.config.ModelConfig`, which has them all."""

    block_out_channels: list[int]
    attention: list[str] | None
    layers_per_block: int
    attention_heads: list[int]
    norm_num_groups: int
    motion_max_seq_length: int
    pose_channels: list[int]
    context_dim: int
    image_encoder_size: int
    image_encoder_patch: int
    image_encoder_width: int
    image_encoder_layers: int


class TrainableAnimator(Animator):
    """An animator whose `forward` is one training step's prediction, for DDP, DeepSpeed and FSDP to wrap.

    Attributes:
        drop_kinds: what condition dropout may take away, numbered from 1; 1: only everything at once.
        takes_embeddings: `forward` also takes what `image_encoder` and `animate_anyone.model.image_context` make of
            the reference, (b, 1, channels), as its `reference_image`.
        alters_reference: `vae_images` changes the images, so that their cached latents are of no use.
        calibrated_latents: `forward` needs the latents of calibrated images.
        adapted_networks: children that low-rank adapters are made for.
        motion_parts: what names of layers that see several frames have in common.
    """

    drop_kinds = 1
    takes_embeddings = False
    alters_reference = False
    calibrated_latents = True
    adapted_networks: tuple[str, ...] = ()
    motion_parts: tuple[str, ...] = ("motion_modules",)

    @classmethod
    @abstractmethod
    def small(cls, sizes: NetworkSizes, latent_channels: int, image_size: int) -> Self:
        """Randomly initialised networks, for `train.py model.animator=`.

        Raises:
            UserError: sizes that do not go together.
        """

    @abstractmethod
    def forward(
        self,
        noisy_latents: Tensor,
        timestep: Tensor,
        reference_latents: Tensor,
        reference_image: Tensor,
        poses: Tensor,
        dropped: Tensor,
        reference: ReferenceContext | None = None,
        probe: Probe | None = None,
        reference_mask: Tensor | None = None,
        calibrated: CalibratedImages | None = None,
    ) -> Tensor:
        """One training step's prediction for b clips.

        Args:
            noisy_latents: (b, c, f, h, w).
            timestep: (b,).
            reference_latents: of `vae_images`, (b, c, h, w); with `calibrated_latents` those of calibrated images
                follow, as many of every clip, (b + b*m, c, h, w).
            reference_image: (b, 3, H, W) in [-1, 1].
            poses: pose images, (b, 3, f, H, W) in [0, 1].
            dropped: (b,), the conditions that a sample goes without: 0 none, 1 to `drop_kinds` the kinds.
            reference: index and flags of what each of the b*f frames sees of [b references | b*m calibrated images]
                (its `tokens` are ignored); None: each clip its own reference.
            probe: looks at what queries attend to.
            reference_mask: (b, 1, H, W), 1 where the person is; given where `needs_mask`.
            calibrated: the calibrated images; None: there are none.

        Returns:
            Prediction, (b, c, f, h, w).
        """

    def vae_images(self, images: Tensor, masks: Tensor | None) -> Tensor:
        """The images whose latents `forward` takes, of references (n, 3, H, W) in [-1, 1], masks (n, 1, H, W)."""
        return images

    @abstractmethod
    def trainable_choices(self, stage: str) -> tuple[str, ...]:
        """What `trainable=` may be in a stage, "image" or "motion", beside "lora"; the default comes first."""

    @abstractmethod
    def trained_parameters(self, choice: str, stage: str, image_encoder: bool) -> set[str]:
        """Names of the parameters that a choice trains, every one of which gets a gradient in every step.

        Args:
            image_encoder: whether the image encoder may be among them.
        """

    def unused_parameters(self) -> set[str]:
        """Names of the parameters that no prediction depends on; adapters leave them alone."""
        return set()

    def initialized_from(self, name: str) -> str:
        """The parameter that a parameter starts as a copy of where two networks begin as the same model, or itself."""
        return name

    def prepare_stage(self, stage: str) -> None:
        """Make the networks ready for a stage, before what is trained is chosen."""

    def settings(self) -> dict[str, Any]:
        """Arguments of the pipeline's constructor and of this class's, beside the networks."""
        return {}

    def check_size(self, factor: int, size: tuple[int, int]) -> None:
        """Refuse training images of a size (width, height) that the networks cannot take.

        Args:
            factor: pixels of an image's side per latent.

        Raises:
            UserError: naming what is allowed.
        """
        multiple = factor * self.latent_multiple
        if size[0] % multiple or size[1] % multiple:
            raise UserError(f"data.size={list(size)} must be multiples of {multiple}, the model's factor")
        only = self.latent_size
        if only is not None and (size[1] // factor, size[0] // factor) != only:
            raise UserError(
                f"data.size={list(size)} must be [{only[1] * factor},{only[0] * factor}], the model's size"
            )
