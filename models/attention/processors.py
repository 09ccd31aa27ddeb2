"""Attention to reference images, which travel as an argument, never as state on a module.

In reference attention the ReferenceNet writes the tokens that enter its self-attention layers, and the denoising UNet
reads them as extra keys and values. In other models images are tokens of an image encoder in cross-attention.

Shapes use b = batch, f = frames, n = query tokens, i = reference images, r = tokens of one reference image,
k = reference images that a frame attends to, d = channels of a head, c = channels of all heads.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from models.attention.context import ReferenceContext, TokenRecord
from models.attention.masking import masked_attention


class PlainProcessor(AttnProcessor2_0):
    """Attention without reference images: of a layer to itself, or to context tokens."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        written_tokens: TokenRecord | None = None,
        reference: ReferenceContext | None = None,
    ) -> Tensor:
        # (b*f, n, c), context (b*f or b, tokens, c) -> (b*f, n or 1, c)
        if encoder_hidden_states is None:
            return super().__call__(attn, hidden_states, attention_mask=attention_mask)
        # Context of fewer rows than frames is shared by the frames of a clip, and projected once a clip.
        frames = len(hidden_states) // len(encoder_hidden_states)
        value = attn.to_v(encoder_hidden_states).repeat_interleave(frames, dim=0)  # (b*f, tokens, c)
        # One token gets all the attention, whatever the queries. Where these are trained nevertheless they keep their
        # gradient of zero, because DDP waits for every trainable parameter's.
        trained = torch.is_grad_enabled() and attn.to_q.weight.requires_grad
        if encoder_hidden_states.shape[1] == 1 and not trained:
            # (b*f, 1, c), the same for every query
            return attn.to_out[1](attn.to_out[0](value)) / attn.rescale_output_factor
        key = attn.to_k(encoder_hidden_states).repeat_interleave(frames, dim=0)
        query, key, value = (split_heads(part, attn.heads) for part in (attn.to_q(hidden_states), key, value))
        out = F.scaled_dot_product_attention(query, key, value, scale=attn.scale).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


class ReferenceWriteProcessor(AttnProcessor2_0):
    """Self-attention that first stores its input, (i, r, c), in `written_tokens`."""

    def __init__(self, layer: str, is_last: bool = False):
        super().__init__()
        self.layer = layer
        self.is_last = is_last  # what comes after is not used, so the attention itself is left out

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        written_tokens: TokenRecord,
    ) -> Tensor:
        written_tokens.tokens[self.layer] = hidden_states
        if self.is_last:
            return hidden_states
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)


class ReferenceReadProcessor(AttnProcessor2_0):
    """Self-attention whose keys and values are the frame's own tokens followed by those of its reference images."""

    def __init__(self, layer: str):
        super().__init__()
        self.layer = layer

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        reference: ReferenceContext | None = None,
    ) -> Tensor:
        if reference is None or not reference.has_images(self.layer):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        own = attn.to_k(hidden_states), attn.to_v(hidden_states)  # (b*f, n, c) each
        images = image_keys(attn, reference, self.layer, self.layer, hidden_states.dtype)  # (b*f, k*r, c) each
        if reference.dropped is not None:
            images = replace_dropped(own, images, reference.dropped)
        key, value = (torch.cat(parts, dim=1) for parts in zip(own, images, strict=True))  # (b*f, n + k*r, c)
        return attend_to_images(attn, self.layer, attn.to_q(hidden_states), key, value, reference)


class ImageTokenProcessor(PlainProcessor):
    """Cross-attention to the images of a frame; without a `ReferenceContext`, to the network's context tokens."""

    def __init__(self, layer: str, source: str = "images"):
        super().__init__()
        self.layer = layer  # unlike the name of any other layer of the model
        self.source = source  # name of its tokens in `ReferenceContext.tokens`

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        reference: ReferenceContext | None = None,
    ) -> Tensor:
        if reference is None or not reference.has_images(self.source):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        key, value = image_keys(attn, reference, self.layer, self.source, hidden_states.dtype)
        return attend_to_images(attn, self.layer, attn.to_q(hidden_states), key, value, reference)


def image_keys(
    attn: Attention, reference: ReferenceContext, layer: str, source: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values (b*f, k*r, c) of each frame's images, projected once an image and not once a frame."""
    projected = {} if reference.projected is None else reference.projected
    if layer not in projected:
        tokens = reference.tokens[source].to(dtype)
        projected[layer] = attn.to_k(tokens), attn.to_v(tokens)
    key, value = (part[reference.index].flatten(1, 2) for part in projected[layer])
    return key, value


def project_images(network: nn.Module, reference: ReferenceContext) -> None:
    """Add the keys and values of every layer to `reference.projected`, as running the network does."""
    for name, processor in network.attn_processors.items():
        if isinstance(processor, ReferenceReadProcessor | ImageTokenProcessor):
            source = getattr(processor, "source", processor.layer)
            if reference.has_images(source):
                attn = network.get_submodule(name.removesuffix(".processor"))
                image_keys(attn, reference, processor.layer, source, attn.to_k.weight.dtype)


def replace_dropped(
    own: tuple[Tensor, Tensor], images: tuple[Tensor, Tensor], dropped: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values of images (b*f, k*n, c); in dropped frames (b*f,) bool the frame's own (b*f, n, c), repeated."""
    # Attention to the same tokens several times is attention to them once.
    times = images[0].shape[1] // own[0].shape[1]
    key, value = (
        torch.where(dropped[:, None, None], frame.repeat(1, times, 1), image)
        for frame, image in zip(own, images, strict=True)
    )
    return key, value


def attend_to_images(
    attn: Attention, layer: str, query: Tensor, key: Tensor, value: Tensor, reference: ReferenceContext
) -> Tensor:
    """Attention of projected queries (b*f, n, c) to projected keys and values (b*f, keys, c), and its output layer."""
    query, key, value = (split_heads(part, attn.heads) for part in (query, key, value))  # (b*f, heads, ., d)
    flags = reference.flags(query.shape[2])
    if flags is None:
        out = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
    else:
        out = masked_attention(query, key, value, *flags, scale=attn.scale)
    if reference.probe is not None:
        flags = reference.probe_flags(query.shape[2], key.shape[2])
        reference.probe.record(layer, query, key, flags, attn.scale)
    out = out.transpose(1, 2).flatten(2)  # (b*f, n, c)
    return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(b, n, heads*d) -> (b, heads, n, d)"""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


def set_reference_processors(unet: nn.Module, make_processor: Callable[[str], AttnProcessor2_0]) -> None:
    """Give every spatial self-attention layer `make_processor(layer)`; motion modules keep their own."""
    processors = unet.attn_processors
    for key in processors:
        if "motion_modules" not in key:
            layer = key.removesuffix(".processor")
            processors[key] = make_processor(layer) if layer.endswith("attn1") else PlainProcessor()
    unet.set_attn_processor(processors)


def set_image_processors(network: nn.Module, prefix: str = "", source: str = "images") -> None:
    """Let the spatial cross-attention of a UNet or ControlNet attend to image tokens of `ReferenceContext.tokens`."""
    processors = network.attn_processors
    for key in processors:
        layer = key.removesuffix(".processor")
        if layer.endswith("attn2") and "motion_modules" not in layer:
            # Prefixes must differ between the networks of a model.
            processors[key] = ImageTokenProcessor(f"{prefix}{layer}", source)
        elif layer.endswith("attn1") and "motion_modules" not in layer:
            processors[key] = PlainProcessor()
    network.set_attn_processor(processors)


def image_layers(network: nn.Module) -> list[str]:
    """Names of the layers that attend to image tokens, in module order."""
    return [p.layer for p in network.attn_processors.values() if isinstance(p, ImageTokenProcessor)]


def reference_layers(unet: nn.Module) -> list[str]:
    """Names of the layers of reference attention, in module order."""
    return [p.layer for p in unet.attn_processors.values() if isinstance(p, ReferenceReadProcessor)]
