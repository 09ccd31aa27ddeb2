"""What `AnimationPipeline` asks of a model. Each published animator answers it in a file of its own.

Shapes use f = frames, i = reference images, c = channels, h, w = latent size, H, W = picture size.
"""

from typing import Any, Protocol

from torch import Tensor

from models.pictures import PictureSequence
from models.reference_attention import ReferenceContext


class StepCondition(Protocol):
    """What the poses of a clip tell the model at one denoising step."""

    def window(self, frames: range) -> Any:
        """The condition of consecutive frames, in the form that `Animator.predict` takes. Windows come in order."""


class PoseCondition(Protocol):
    """What the poses of a clip tell the model."""

    def at_step(self, sample: Tensor, timestep: Tensor) -> StepCondition:
        """The condition at one step; sample (1, c, f, h, w) are the noisy latents of the whole clip."""


class Animator(Protocol):
    """A reference-attention animator.

    Attributes:
        reference_follows_timestep: the reference is encoded anew at every denoising step, at its timestep.
    """

    reference_follows_timestep: bool

    def encode_context(self, reference: Tensor) -> Tensor:
        """What cross-attention sees, (1, tokens, channels); reference (1, 3, H, W) in [-1, 1]."""

    def null_context(self, context: Tensor) -> Tensor:
        """What it sees instead in the unconditional half of guidance."""

    def encode_reference(self, latents: Tensor, timestep: Tensor | int, context: Tensor) -> dict[str, Tensor]:
        """Latents of reference or calibrated images, (i, c, h, w) -> layer -> the tokens frames see, (i, r, c)."""

    def reading_layers(self) -> list[str]:
        """Names of the layers in which frames see the reference, in module order."""

    def pose_condition(self, poses: PictureSequence, context: Tensor) -> PoseCondition:
        """What the pose pictures of a clip tell the model."""

    def predict(
        self, sample: Tensor, timestep: Tensor, context: Tensor, pose: Any, reference: ReferenceContext | None
    ) -> Tensor:
        """Prediction for one window, (1, c, f, h, w); pose is what `StepCondition.window` returns."""
