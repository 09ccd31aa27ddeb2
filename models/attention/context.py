"""Reference images that frames attend to, as a value among a network's arguments.

Shapes use b = batch, f = frames, n = query tokens, i = reference images, r = tokens of one reference image,
k = reference images that a frame attends to, g = flag channels, c = channels, d = channels of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.masking import Visibility, joined_visibility


class Probe(Protocol):
    """Records attention to reference images beside the computation, whose result does not depend on it."""

    def record(
        self, layer: str, query: Tensor, key: Tensor, flags: tuple[Tensor, Tensor] | None, scale: float
    ) -> None:
        """Record queries (b*f, heads, n, d) and keys (b*f, heads, keys, d) of a layer; flags None: all is visible."""

    def clip(self, rows: slice) -> Self:
        """A probe of these frames of the batch, for networks that take the clips of a batch one after another."""


@dataclass(frozen=True)
class ReferenceContext:
    """The reference images that a batch of frames attends to."""

    # Layer, or a name that layers share -> (i, r, c), the tokens of the i different images. A layer of reference
    # attention without tokens attends to its own frame only.
    # Keys are [own n | image 0: r | ... | image k-1: r], in cross-attention without the own ones.
    tokens: dict[str, Tensor]
    index: Tensor  # (b*f, k) long, the images of each frame
    visibility: Visibility | None = None  # None: every key is visible
    # Layer -> keys and values of `tokens`, (i, r, c) each. A layer that is not in it yet adds its own, so that
    # contexts with the same dictionary project the tokens once. None: at every call.
    projected: dict[str, tuple[Tensor, Tensor]] | None = None
    probe: Probe | None = None  # None: nothing is recorded
    dropped: Tensor | None = None  # (b*f,) bool, frames that go without images in reference attention; None: no frame

    def has_images(self, layer: str) -> bool:
        """True where a layer has images to attend to."""
        return layer in self.tokens or (self.projected is not None and layer in self.projected)

    def flags(self, tokens: int) -> tuple[Tensor, Tensor] | None:
        """Flags of queries and keys in layers of that many query tokens; None when every key is visible."""
        return None if self.visibility is None else (self.visibility.query[tokens], self.visibility.key[tokens])

    def probe_flags(self, tokens: int, keys: int) -> tuple[Tensor, Tensor] | None:
        """`flags` of layers with so many keys, own ones included, that also hide the images of dropped frames."""
        flags = self.flags(tokens)
        if self.dropped is None:
            return flags
        query = self.dropped.float()[:, None, None].expand(-1, tokens, -1)
        key = F.pad(query.new_ones(1, keys - tokens, 1), (0, 0, tokens, 0)).expand(len(query), -1, -1)
        if flags is None:
            return query, key
        return torch.cat([flags[0], query], dim=-1), torch.cat([flags[1], key], dim=-1)

    def clip(self, index: int, num_frames: int) -> "ReferenceContext":
        """The part of the frames of one clip of the batch."""
        rows = slice(index * num_frames, (index + 1) * num_frames)
        return replace(
            self,
            index=self.index[rows],
            visibility=None if self.visibility is None else self.visibility.rows(rows),
            probe=None if self.probe is None else self.probe.clip(rows),
            dropped=None if self.dropped is None else self.dropped[rows],
        )

    def for_passes(self, dropped: Sequence[bool], null_image: int | None = None) -> "ReferenceContext | None":
        """The context of a batch of passes, equally many frames each, of which some go without images; None: all do.

        With a `null_image` these frames attend to it in cross-attention.
        """
        if not any(dropped) or all(dropped):
            return None if any(dropped) else self
        frames = torch.zeros(len(self.index) // len(dropped), dtype=torch.bool, device=self.index.device)
        rows = torch.cat([~frames if drop else frames for drop in dropped])
        return self.drop_images(rows) if null_image is None else self.drop_to_null(rows, null_image)

    def drop_images(self, dropped: Tensor) -> "ReferenceContext":
        """Condition dropout in reference attention: frames `dropped` (b*f,) bool go without images."""
        # With a static graph: such a frame attends to its own tokens several times, which is plain self-attention to
        # rounding. Images must have as many tokens as frames.
        return replace(self, dropped=dropped, visibility=self._lifted(dropped))

    def drop_to_null(self, dropped: Tensor, null_image: int) -> "ReferenceContext":
        """Condition dropout in cross-attention: frames `dropped` (b*f,) bool attend to image `null_image` alone."""
        # With a static graph: attention to several equal images is attention to one of them.
        index = torch.where(dropped[:, None], null_image, self.index)
        return replace(self, index=index, visibility=self._lifted(dropped))

    def _lifted(self, dropped: Tensor) -> Visibility | None:
        return None if self.visibility is None else self.visibility.lifted(dropped)


@dataclass(frozen=True)
class JointProbe:
    """Hands the frames of a batch of passes, equally many each, to the probes of those that are recorded."""

    probes: tuple[Probe | None, ...]
    num_frames: int

    def record(
        self, layer: str, query: Tensor, key: Tensor, flags: tuple[Tensor, Tensor] | None, scale: float
    ) -> None:
        for i, probe in enumerate(self.probes):
            if probe is not None:
                rows = slice(i * self.num_frames, (i + 1) * self.num_frames)
                own = None if flags is None else (flags[0][rows], flags[1][rows])
                probe.record(layer, query[rows], key[rows], own, scale)

    def clip(self, rows: slice) -> Self:
        return replace(self, probes=self.probes[rows.start // self.num_frames : rows.stop // self.num_frames])


def joined_contexts(contexts: Sequence[ReferenceContext]) -> ReferenceContext:
    """The context of a batch of passes of a run, equally many frames each."""
    probes = tuple(context.probe for context in contexts)
    return replace(
        contexts[0],
        index=torch.cat([context.index for context in contexts]),
        visibility=joined_visibility([context.visibility for context in contexts]),
        probe=JointProbe(probes, len(contexts[0].index)) if any(probe is not None for probe in probes) else None,
    )


class TokenRecord:
    """The tokens that a ReferenceNet writes, layer -> (i, r, c)."""

    # No dictionary itself: hooks that move a network's arguments between devices, such as diffusers' group offloading,
    # rebuild dictionaries, and what is written into such a copy is lost.
    def __init__(self) -> None:
        self.tokens: dict[str, Tensor] = {}


def fused_layers(tokens: dict[str, Tensor], blocks: str) -> dict[str, Tensor]:
    """The tokens that frames attend to, of "full" (all) or "midup" (middle and upward) blocks."""
    if blocks == "full":  # AnimateAnyone
        return tokens
    if blocks != "midup":  # MagicAnimate
        raise ValueError(f"blocks must be full or midup, got {blocks!r}")
    return {layer: value for layer, value in tokens.items() if not layer.startswith("down_blocks.")}


def same_reference(tokens: dict[str, Tensor], num_frames: int) -> ReferenceContext:
    """A context in which every frame of clip j attends to image j."""
    first = next(iter(tokens.values()))
    index = torch.arange(len(first), device=first.device).repeat_interleave(num_frames)[:, None]
    return ReferenceContext(tokens, index)
