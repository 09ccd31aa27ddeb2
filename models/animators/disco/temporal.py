"""What DisCo's temporal variant adds to its networks: a look at the other frames in every ResNet and transformer.

Frames of one clip are folded into the batch, so that the networks around these blocks stay diffusers' own. Both
additions start at zero: a new temporal network computes what the image network computes, but for the norms, which take
their statistics over the clip. There are no position tables: the order of frames enters through the convolutions.

Shapes use f = frames, n = tokens, c = channels.
"""

from typing import Any

import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from models.norms import ClipGroupNorm, clip_norm


class TemporalResnetBlock(ResnetBlock2D):
    """ResNet block whose residual branch ends in a convolution over three neighbouring frames."""

    def __init__(self, in_channels: int, out_channels: int, temb_channels: int, groups: int, eps: float):
        super().__init__(
            in_channels=in_channels, out_channels=out_channels, temb_channels=temb_channels, groups=groups, eps=eps
        )
        self.norm1, self.norm2 = clip_norm(self.norm1), clip_norm(self.norm2)
        self.tem_norm = ClipGroupNorm(groups, out_channels, eps)
        self.tem_conv = nn.Conv1d(out_channels, out_channels, kernel_size=3, padding=1)
        nn.init.zeros_(self.tem_conv.weight)
        nn.init.zeros_(self.tem_conv.bias)

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        """(f, c, h, w), time embedding (f, channels) -> (f, c', h, w)."""
        hidden = self.conv1(F.silu(self.norm1(input_tensor)))
        hidden = hidden + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        hidden = hidden + self.over_frames(F.silu(self.tem_norm(hidden)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return input_tensor + hidden

    def over_frames(self, frames: Tensor) -> Tensor:
        """The temporal convolution, at every place by itself; (f, c, h, w) -> same shape."""
        height, width = frames.shape[-2:]
        places = self.tem_conv(frames.permute(2, 3, 1, 0).flatten(0, 1))  # (h*w, c, f)
        return places.unflatten(0, (height, width)).permute(3, 2, 0, 1)


class TemporalTransformerBlock(BasicTransformerBlock):
    """Transformer block with attention of each token to the same place in the other frames, before cross-attention.

    The published block normalises its input with the norm of cross-attention, `norm2`. The norm that it has for this
    purpose, `tem_norm`, is never used, and left out here.
    """

    def __init__(self, dim: int, num_attention_heads: int, attention_head_dim: int, cross_attention_dim: int):
        super().__init__(dim, num_attention_heads, attention_head_dim, cross_attention_dim=cross_attention_dim)
        self.tem_attn = Attention(query_dim=dim, heads=num_attention_heads, dim_head=attention_head_dim)
        nn.init.zeros_(self.tem_attn.to_out[0].weight)
        nn.init.zeros_(self.tem_attn.to_out[0].bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """(f, n, c) -> same shape; the unused arguments are those of the parent."""
        extra = cross_attention_kwargs or {}
        tokens = hidden_states + self.attn1(self.norm1(hidden_states), **extra)
        places = self.norm2(tokens).transpose(0, 1)  # (n, f, c)
        tokens = tokens + self.tem_attn(places).transpose(0, 1)
        tokens = tokens + self.attn2(self.norm2(tokens), encoder_hidden_states, **extra)
        return tokens + self.ff(self.norm3(tokens))


def add_time(network: nn.Module) -> None:
    """Make a UNet or ControlNet of the image model a temporal one, with new weights; for constructors."""
    for module in list(network.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, ResnetBlock2D):
                setattr(module, name, temporal_resnet(part))
            elif isinstance(part, BasicTransformerBlock):
                setattr(module, name, temporal_transformer(part))
    if getattr(network, "conv_norm_out", None) is not None:
        network.conv_norm_out = clip_norm(network.conv_norm_out)


def temporal_resnet(block: ResnetBlock2D) -> TemporalResnetBlock:
    """A new block of the same sizes."""
    return TemporalResnetBlock(
        block.in_channels,
        block.out_channels,
        block.time_emb_proj.in_features,
        block.norm1.num_groups,
        block.norm1.eps,
    )


def temporal_transformer(block: BasicTransformerBlock) -> TemporalTransformerBlock:
    """A new block of the same sizes."""
    return TemporalTransformerBlock(
        block.dim, block.num_attention_heads, block.attention_head_dim, block.cross_attention_dim
    )


def is_temporal(name: str) -> bool:
    """Whether a parameter belongs to what the temporal variant adds."""
    return ".tem_" in name
