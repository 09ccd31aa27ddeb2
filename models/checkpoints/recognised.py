"""What recognising a checkpoint file tells; `kinds` lists who recognises what."""

from collections.abc import Iterable
from dataclasses import dataclass

from models.checkpoints.loading import Mismatch
from models.checkpoints.sizes import UNetSizes


@dataclass(frozen=True)
class Recognised:
    """The kind of a file, its sizes in words, and its difference from what its kind holds; None: not known."""

    kind: str
    detail: str = ""
    mismatch: Mismatch | None = None


def unet_detail(sizes: UNetSizes) -> str:
    """Sizes of a UNet or ControlNet in words."""
    return f"widths {joined(sizes.block_out_channels)}, context {sizes.cross_attention_dim}"


def joined(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))
