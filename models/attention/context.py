"""What frames may see of reference images, as a value that travels among a network's arguments.

Shapes use b = batch, f = frames, n = query tokens, i = reference images, r = tokens of one reference image,
k = reference images that a frame sees, g = flag channels, c = channels.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.probe import Probe


@dataclass(frozen=True)
class ReferenceContext:
    """The reference images that a batch of frames may attend to.

    Attributes:
        tokens: layer name, or a name that layers share -> (i, r, c), what they see of each of the i different images.
            In reference attention a layer that is not named sees its own frame only.
        index: (b*f, k) long, the images that a frame sees; its keys are [own n | image 0: r | ... | image k-1: r], in
            cross-attention without its own.
        query_flags: number of query tokens of a layer -> (b*f, n, g), or None when every key is visible.
        key_flags: the same number -> (b*f, keys, g). A query is blind to a key iff the product of their flags,
            summed over g, is positive; see `tpc.attention`.
        projected: layer name -> keys and values of `tokens`, (i, r, c) each. A layer that is not in it yet adds its
            own, so contexts that share this dictionary project the tokens once. None: at every call.
        probe: looks at what queries attend to; None: nobody asks.
        dropped: (b*f,) bool, frames that go without images in reference attention; None: no frame does.
    """

    tokens: dict[str, Tensor]
    index: Tensor
    query_flags: dict[int, Tensor] | None = None
    key_flags: dict[int, Tensor] | None = None
    projected: dict[str, tuple[Tensor, Tensor]] | None = None
    probe: Probe | None = None
    dropped: Tensor | None = None

    def names(self, layer: str) -> bool:
        """Whether the layer sees reference images."""
        return layer in self.tokens or (self.projected is not None and layer in self.projected)

    def flags(self, tokens: int) -> tuple[Tensor, Tensor] | None:
        """Flags of queries and keys in layers of that many query tokens; None when every key is visible."""
        return None if self.query_flags is None else (self.query_flags[tokens], self.key_flags[tokens])

    def probe_flags(self, tokens: int, keys: int) -> tuple[Tensor, Tensor] | None:
        """`flags` as a probe takes them: frames that go without images are blind to them.

        Args:
            keys: of a layer of `tokens` query tokens, its own among them.
        """
        flags = self.flags(tokens)
        if self.dropped is None:
            return flags
        query = self.dropped.float()[:, None, None].expand(-1, tokens, -1)
        key = F.pad(query.new_ones(1, keys - tokens, 1), (0, 0, tokens, 0)).expand(len(query), -1, -1)
        if flags is None:
            return query, key
        return torch.cat([flags[0], query], dim=-1), torch.cat([flags[1], key], dim=-1)

    def without_probe(self) -> "ReferenceContext":
        """The same images for a further branch of guidance: attention is recorded in one branch alone."""
        return replace(self, probe=None)

    def clip(self, number: int, num_frames: int) -> "ReferenceContext":
        """What the frames of one clip of the batch see."""
        rows = slice(number * num_frames, (number + 1) * num_frames)

        def cut(flags: dict[int, Tensor] | None) -> dict[int, Tensor] | None:
            return None if flags is None else {tokens: value[rows] for tokens, value in flags.items()}

        return replace(
            self,
            index=self.index[rows],
            query_flags=cut(self.query_flags),
            key_flags=cut(self.key_flags),
            probe=None if self.probe is None else self.probe.clip(rows),
            dropped=None if self.dropped is None else self.dropped[rows],
        )


class TokenRecord:
    """What a ReferenceNet writes, layer -> (i, r, c).

    Not a dictionary itself: hooks that move a network's arguments between devices, such as diffusers' group
    offloading, rebuild dictionaries, and what is written into such a copy is lost.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, Tensor] = {}


def fused_layers(tokens: dict[str, Tensor], blocks: str) -> dict[str, Tensor]:
    """The tokens that frames get to see.

    Args:
        blocks: "full", those of all layers (AnimateAnyone), or "midup", those of the middle and the upward blocks
            (MagicAnimate).
    """
    if blocks == "full":
        return tokens
    if blocks != "midup":
        raise ValueError(f"blocks must be full or midup, got {blocks!r}")
    return {layer: value for layer, value in tokens.items() if not layer.startswith("down_blocks.")}


def same_reference(tokens: dict[str, Tensor], num_frames: int) -> ReferenceContext:
    """Every frame of clip j sees image j: the ordinary case, one reference per clip."""
    first = next(iter(tokens.values()))
    index = torch.arange(len(first), device=first.device).repeat_interleave(num_frames)[:, None]
    return ReferenceContext(tokens, index)


def hide_reference(reference: ReferenceContext, hidden: Tensor) -> ReferenceContext:
    """Let whole frames go without their images in reference attention, sample by sample, with one static graph.

    Used for condition dropout: such a frame's attention is plain self-attention, to rounding. Images must have as many
    tokens as frames.

    Args:
        hidden: (b*f,) bool.
    """
    return replace(reference, dropped=hidden, query_flags=without_flags(reference.query_flags, hidden))


def without_flags(query_flags: dict[int, Tensor] | None, dropped: Tensor) -> dict[int, Tensor] | None:
    """Flags of queries by which frames, those that `dropped` (b*f,) bool says, see every key."""
    if query_flags is None:
        return None
    kept = ~dropped[:, None, None]
    return {n: flags * kept.to(flags.dtype) for n, flags in query_flags.items()}


def without_dropped(reference: ReferenceContext, dropped: Tensor, null_image: int) -> ReferenceContext:
    """Let whole frames see the null image in place of what they would see, with one static graph.

    Used for condition dropout where keys are those of images alone: attention to several equal images is attention to
    one of them.

    Args:
        dropped: (b*f,) bool.
        null_image: its place among the images.
    """
    return replace(
        reference,
        index=torch.where(dropped[:, None], null_image, reference.index),
        query_flags=without_flags(reference.query_flags, dropped),
    )
