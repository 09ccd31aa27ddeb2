"""The UNet and the two ControlNets of DisCo, diffusers' own with CLIP tokens of the person in cross-attention.

The image model treats frames as single images. The temporal variant (`temporal=True`) treats the batch as the frames
of one clip, which every ResNet and transformer then mixes. Both additions start at zero: a new temporal network
computes what the image network computes, but for the norms, which take their statistics over the clip. There are no
position tables: the order of frames enters through the convolutions.

Shapes use f = frames, n = tokens, c = channels, h, w = latent size, H, W = image size.
"""

import inspect
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from diffusers import ConfigMixin, ControlNetModel, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from models.attention.processors import set_image_processors
from models.unets import ClipGroupNorm, clip_norm, with_parameters

# Prefixes of the ControlNets' layer names, so that one context serves all networks.
POSE_PREFIX, BACKGROUND_PREFIX = "pose_control_net.", "background_control_net."
# Widths of the pose images' embedding, for a VAE of factor 8.
EMBEDDING_WIDTHS = (16, 32, 96, 256)


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
        # The temporal convolution, at all coordinates alike
        tracks = F.silu(self.tem_norm(hidden)).permute(2, 3, 1, 0).flatten(0, 1)  # (h*w, c, f)
        hidden = hidden + self.tem_conv(tracks).unflatten(0, hidden.shape[-2:]).permute(3, 2, 0, 1)
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return input_tensor + hidden


class TemporalTransformerBlock(BasicTransformerBlock):
    """Transformer block with attention of each token to the same coordinates in other frames, before cross-attention.

    As published, its input is normalised with the norm of cross-attention, `norm2`; `tem_norm` is left out.
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
        tracks = self.norm2(tokens).transpose(0, 1)  # (n, f, c)
        tokens = tokens + self.tem_attn(tracks).transpose(0, 1)
        tokens = tokens + self.attn2(self.norm2(tokens), encoder_hidden_states, **extra)
        return tokens + self.ff(self.norm3(tokens))


def add_time(network: nn.Module) -> None:
    """Make a UNet or ControlNet of the image model a temporal one, with new weights."""
    for module in list(network.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, ResnetBlock2D):
                channels = part.in_channels, part.out_channels, part.time_emb_proj.in_features
                setattr(module, name, TemporalResnetBlock(*channels, part.norm1.num_groups, part.norm1.eps))
            elif isinstance(part, BasicTransformerBlock):
                heads = part.num_attention_heads, part.attention_head_dim
                setattr(module, name, TemporalTransformerBlock(part.dim, *heads, part.cross_attention_dim))
    if getattr(network, "conv_norm_out", None) is not None:
        network.conv_norm_out = clip_norm(network.conv_norm_out)


def is_temporal(name: str) -> bool:
    """True for parameters that the temporal variant adds."""
    return ".tem_" in name


class DiscoUNet(UNet2DConditionModel):
    """Stable Diffusion's UNet; if `temporal`, the batch is a clip whose frames attend to each other."""

    @with_parameters(UNet2DConditionModel.__init__, temporal=False)
    def __init__(self, *args, temporal: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_to_config(temporal=temporal)
        if temporal:
            add_time(self)
        set_image_processors(self)


class DiscoControlNet(ControlNetModel):
    """ControlNet of the pose, on images (f, 3, H, W) in [0, 1], or of the background, on latents (f, c, h, w)."""

    @with_parameters(ControlNetModel.__init__, temporal=False, latent_conditioning=False)
    def __init__(self, *args, temporal: bool = False, latent_conditioning: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_to_config(temporal=temporal, latent_conditioning=latent_conditioning)
        if latent_conditioning:
            channels = self.config.conditioning_channels, self.config.block_out_channels[0]
            convolution = nn.Conv2d(*channels, kernel_size=3, padding=1)
            self.controlnet_cond_embedding = nn.Sequential(OrderedDict(conv_in=convolution))
        if temporal:
            add_time(self)
        set_image_processors(self, prefix=BACKGROUND_PREFIX if latent_conditioning else POSE_PREFIX)


class TokenProjection(ModelMixin, ConfigMixin):
    """The trained projection of CLIP's tokens to the width of cross-attention; it starts as CLIP's own."""

    @register_to_config
    def __init__(self, in_channels: int = 1024, out_channels: int = 768):
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens)  # (b, tokens, in) -> (b, tokens, out)


def new_control_net(
    unet: DiscoUNet, latent_conditioning: bool, embedding_widths: tuple[int, ...] = EMBEDDING_WIDTHS
) -> DiscoControlNet:
    """The ControlNet that training starts with: the UNet's downward half, and an output of zero.

    Each of the embedding's widths after the first halves the pose images.
    """
    known = inspect.signature(ControlNetModel.__init__).parameters
    network = DiscoControlNet(
        **{name: value for name, value in unet.config.items() if name in known},
        conditioning_channels=unet.config.in_channels if latent_conditioning else 3,
        conditioning_embedding_out_channels=embedding_widths,
        latent_conditioning=latent_conditioning,
        temporal=unet.config.temporal,
    )
    shared = ("conv_in.", "time_embedding.", "down_blocks.", "mid_block.")
    started = {name: value for name, value in unet.state_dict().items() if name.startswith(shared)}
    if latent_conditioning:
        conv = unet.conv_in.state_dict()
        started |= {f"controlnet_cond_embedding.conv_in.{name}": value for name, value in conv.items()}
    return started_from(network, started)


def with_time(network: DiscoUNet | DiscoControlNet) -> DiscoUNet | DiscoControlNet:
    """The temporal network that training starts with: an image network's weights, new blocks that add zero."""
    return started_from(type(network).from_config(network.config, temporal=True), network.state_dict())


def started_from(network: ModelMixin, weights: Mapping[str, Tensor]) -> ModelMixin:
    """A new network with copies of `weights` where it has their names, in their dtype and on their device."""
    like = next(iter(weights.values()))
    own = {name: value.to(like.device, like.dtype) for name, value in network.state_dict().items()}
    network.load_state_dict(own | {name: value.clone() for name, value in weights.items()}, assign=True)
    return network


def recipe_parameters(names: set[str], choice: str, image_encoder: bool) -> set[str]:
    """Those of the parameters of `DisCo` that a published recipe trains, which leaves CLIP as it is."""

    def part(*prefixes: str) -> set[str]:
        return {name for name in names if name.startswith(prefixes)}

    unet, background = part("unet."), part(BACKGROUND_PREFIX)
    if choice == "attributes":  # pre-training on images of many people
        return {name for name in unet if ".transformer_blocks." in name} | background | part("token_projection.")
    if choice == "person":
        return {name for name in unet if ".attn2." in name} | background
    if choice == "temporal":
        return {name for name in names if is_temporal(name)}
    return names if image_encoder else names - part("image_encoder.")
