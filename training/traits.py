"""What the objective asks of an animator, known before it is wrapped for distributed training."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from core.errors import UserError
from models.animators.base import Animator
from models.attention.layers import KeyLayout, TokenLevel, token_levels


@dataclass(frozen=True)
class TrainingTraits:
    """See `models.animators.base.Animator`, which has the attributes of the same names.

    Attributes:
        levels: of the layers in which frames see images.
    """

    levels: list[TokenLevel]
    drop_modes: int
    needs_mask: bool
    alters_reference: bool
    calibrated_latents: bool
    vae_images: Callable[[Tensor, Tensor | None], Tensor]

    @classmethod
    def of(cls, animator: Animator, latent_size: tuple[int, int]) -> "TrainingTraits":
        """The traits of an animator that is trained on latents of this (h, w)."""
        return cls(
            token_levels(animator.attention_layers(latent_size)),
            animator.drop_modes,
            animator.needs_mask,
            animator.alters_reference,
            animator.calibrated_latents,
            animator.vae_images,
        )

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(h, w) of the frames' tokens at every level."""
        return [level.queries for level in self.levels]

    @property
    def most_tokens(self) -> int:
        """Of a frame, in the layers that see images."""
        return max((height * width for height, width in self.grids), default=0)

    def check_supervised(self) -> None:
        """Refuse attention supervision where queries have no counterpart among the keys.

        Raises:
            UserError: the model has no reference attention on the layers' own grids.
        """
        if any(level.keys != KeyLayout(level.queries, own=True) for level in self.levels):
            raise UserError(
                "attention.weight= needs a model whose frames see the reference on the layers' own grids; set it to 0"
            )
