"""ReferenceNet, denoising UNet with motion modules, and pose guider, on diffusers' stock blocks and parameter names.

Shapes use b = batch, f = frames, i = images, c = channels, h, w = latent height and width.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from functools import wraps

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel, UNetMotionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn

from models.attention.context import ReferenceContext, TokenRecord
from models.attention.processors import ReferenceReadProcessor, ReferenceWriteProcessor, set_reference_processors


class ReferenceNet(UNet2DConditionModel):
    """A Stable Diffusion UNet whose product is the token set that enters each of its self-attention layers."""

    _keys_to_ignore_on_load_unexpected = ["conv_norm_out", "conv_out"]

    @wraps(UNet2DConditionModel.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.conv_norm_out, self.conv_out = None, nn.Identity()
        # Blocks after the last one with attention write nothing.
        reading = [i for i, block in enumerate(self.up_blocks) if hasattr(block, "attentions")]
        if not reading:
            raise ValueError("up_block_types must have a block with attention; got none")
        if reading[-1] < len(self.up_blocks) - 1:
            self.up_blocks = self.up_blocks[: reading[-1] + 1]
            self.up_blocks[-1].upsamplers = None
        layers = [name for name in self.attn_processors if "attn1" in name]
        self.num_written = len(layers)
        last = [name for name in layers if name.startswith("up_blocks")][-1:]
        set_reference_processors(
            self, lambda layer: ReferenceWriteProcessor(layer, is_last=f"{layer}.processor" in last)
        )

    def forward(self, sample: Tensor, timestep: Tensor | int, encoder_hidden_states: Tensor) -> dict[str, Tensor]:
        """Reference latents (i, c, h, w), context (i, tokens, channels) -> {layer: (i, h*w of that layer, c)}."""
        record = TokenRecord()
        super().forward(sample, timestep, encoder_hidden_states, cross_attention_kwargs={"written_tokens": record})
        if len(record.tokens) < self.num_written:
            raise RuntimeError(f"{len(record.tokens)} of {self.num_written} layers wrote: something copied the record")
        return record.tokens

    def unused_parameters(self) -> list[str]:
        """Names of the parameters after the last write, which no result depends on."""
        last = self.up_blocks[-1].attentions[-1]
        block = last.transformer_blocks[-1]
        unused = (block.attn1, block.norm2, block.attn2, block.norm3, block.ff, last.proj_out)
        ids = {id(parameter) for module in unused for parameter in module.parameters()}
        return [name for name, parameter in self.named_parameters() if id(parameter) in ids]


class ClipGroupNorm(nn.GroupNorm):
    """GroupNorm with one set of statistics for all frames of a clip, (f, c, h, w) -> same shape."""

    single_frames = False  # in training mode each frame is a clip of its own; in evaluation they are one clip

    def forward(self, frames: Tensor) -> Tensor:
        if self.single_frames and self.training:
            return super().forward(frames)
        return super().forward(frames.transpose(0, 1)[None])[0].transpose(0, 1)


def clip_norm(norm: nn.GroupNorm) -> ClipGroupNorm:
    """The same norm over clips, with the parameters of `norm`."""
    replacement = ClipGroupNorm(norm.num_groups, norm.num_channels, norm.eps)
    replacement.weight, replacement.bias = norm.weight, norm.bias
    return replacement


class MotionModule(AnimateDiffTransformer3D):
    """Temporal transformer as AnimateDiff and AnimateAnyone trained it.

    Unlike in its diffusers parent GroupNorm statistics are of one frame, a single frame passes unchanged unless
    `single_frames`, the output projection starts at zero, and blocks take part in gradient checkpointing.
    """

    def __init__(
        self,
        channels: int,
        num_attention_heads: int,
        num_layers: int,
        max_seq_length: int,
        norm_num_groups: int,
        single_frames: bool = False,
    ):
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=channels // num_attention_heads,
            in_channels=channels,
            num_layers=num_layers,
            norm_num_groups=norm_num_groups,
            positional_embeddings="sinusoidal",
            num_positional_embeddings=max_seq_length,
        )
        self.gradient_checkpointing = False
        self.single_frames = single_frames
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        num_frames: int = 1,
        cross_attention_kwargs: dict | None = None,
    ) -> Tensor:
        """(b*f, c, h, w) -> same shape; the unused arguments are those of the parent."""
        if num_frames == 1 and not self.single_frames:
            return hidden_states
        height, width = hidden_states.shape[-2:]
        tokens = self.norm(hidden_states).unflatten(0, (-1, num_frames)).permute(0, 3, 4, 1, 2).flatten(0, 2)
        tokens = self.proj_in(tokens)  # (b*h*w, f, c)
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = self._gradient_checkpointing_func(block, tokens)
            else:
                tokens = block(hidden_states=tokens)
        tokens = self.proj_out(tokens).unflatten(0, (-1, height, width))  # (b, h, w, f, c)
        return hidden_states + tokens.permute(0, 3, 4, 1, 2).flatten(0, 1)


class PoseConv2d(nn.Conv2d):
    """Convolution of the first `in_channels` channels, plus the remaining ones, pose features if any."""

    def forward(self, x: Tensor) -> Tensor:
        latents, pose_features = x.tensor_split([self.in_channels], dim=1)
        features = super().forward(latents)
        return features + pose_features if pose_features.shape[1] else features


def with_parameters(init: Callable, **added: object) -> Callable:
    """Decorator of an `__init__` that takes the parameters of `init` and further ones, name=default."""

    # diffusers reads from the signature which entries of a saved configuration belong to a class.
    def decorate(function: Callable) -> Callable:
        function = wraps(init)(function)
        signature = inspect.signature(init)
        further = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=added[name]) for name in added]
        function.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *further])
        return function

    return decorate


class DenoisingUNet(UNetMotionModel):
    """AnimateDiff's UNet with pose features after its first convolution and reference images in its attention."""

    @with_parameters(
        UNetMotionModel.__init__, norm_scope="frame", motion_norm_num_groups=None, motion_on_single_frames=False
    )
    def __init__(
        self,
        *args,
        # "frame" or "clip", over which GroupNorms of ResNets and output take their statistics; "clip" in MagicAnimate
        # and AnimateDiff v1, which therefore tie a frame's result to the others.
        norm_scope: str = "frame",
        motion_norm_num_groups: int | None = None,  # None: `norm_num_groups`
        motion_on_single_frames: bool = False,  # as the published code has it; False: an image model there
        **kwargs,
    ):
        if norm_scope not in ("frame", "clip"):
            raise ValueError(f"norm_scope must be frame or clip, got {norm_scope!r}")
        super().__init__(*args, **kwargs)
        self.register_to_config(
            norm_scope=norm_scope,
            motion_norm_num_groups=motion_norm_num_groups,
            motion_on_single_frames=motion_on_single_frames,
        )
        config = self.config
        self.conv_in = PoseConv2d(config.in_channels, config.block_out_channels[0], kernel_size=3, padding=1)
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            if hasattr(block, "motion_modules"):
                block.motion_modules = nn.ModuleList(
                    MotionModule(
                        module.in_channels,
                        module.num_attention_heads,
                        len(module.transformer_blocks),
                        config.motion_max_seq_length,
                        motion_norm_num_groups or config.norm_num_groups,
                        motion_on_single_frames,
                    )
                    for module in block.motion_modules
                )
        if norm_scope == "clip":
            for module in [module for module in self.modules() if isinstance(module, ResnetBlock2D)]:
                module.norm1, module.norm2 = clip_norm(module.norm1), clip_norm(module.norm2)
            self.conv_norm_out = clip_norm(self.conv_norm_out)
        set_reference_processors(self, ReferenceReadProcessor)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | int,
        encoder_hidden_states: Tensor,
        pose_features: Tensor | None = None,
        reference: ReferenceContext | None = None,
        residuals: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Predicted noise or velocity (b, c, f, h, w) of noisy latents (b, c, f, h, w) at timesteps, scalar or (b,).

        Context is (b, tokens, channels), pose features (b, c, f, h, w). Residuals of a ControlNet are (b*f, c, h', w')
        each, those of the skip connections, then that of the middle block.
        """
        by_clip = self.config.norm_scope == "clip" and not self.takes_single_frames(sample.shape[2])
        if by_clip and len(sample) > 1:
            return self.clip_by_clip(sample, timestep, encoder_hidden_states, pose_features, reference, residuals)
        return super().forward(
            sample if pose_features is None else torch.cat([sample, pose_features], dim=1),
            timestep,
            encoder_hidden_states,
            cross_attention_kwargs={"reference": reference},
            down_block_additional_residuals=None if residuals is None else tuple(residuals[:-1]),
            mid_block_additional_residual=None if residuals is None else residuals[-1],
            return_dict=False,
        )[0]

    def clip_by_clip(
        self,
        sample: Tensor,
        timestep: Tensor | int,
        encoder_hidden_states: Tensor,
        pose_features: Tensor | None,
        reference: ReferenceContext | None,
        residuals: Sequence[Tensor] | None,
    ) -> Tensor:
        """`forward` for norms over clips, which cannot tell the clips of a batch apart."""
        batch, num_frames = sample.shape[0], sample.shape[2]
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(batch)
        predictions = []
        for j in range(batch):
            clip, frames = slice(j, j + 1), slice(j * num_frames, (j + 1) * num_frames)
            predictions.append(
                self.forward(
                    sample[clip],
                    timesteps[clip],
                    encoder_hidden_states[clip],
                    None if pose_features is None else pose_features[clip],
                    None if reference is None else reference.clip(j, num_frames),
                    None if residuals is None else [part[frames] for part in residuals],
                )
            )
        return torch.cat(predictions)

    def use_motion_on_single_frames(self, used: bool) -> None:
        """Set `motion_on_single_frames`; image training of a published model needs the image model: False."""
        self.register_to_config(motion_on_single_frames=used)
        for module in self.modules():
            if isinstance(module, MotionModule):
                module.single_frames = used

    def train_on_single_frames(self, used: bool) -> None:
        """Take the batch entries in training mode as single frames, which norms over clips then take all at once."""
        for module in self.modules():
            if isinstance(module, ClipGroupNorm):
                module.single_frames = used

    def takes_single_frames(self, num_frames: int) -> bool:
        """Tell if norms take each clip of a batch, of `num_frames` frames, by itself; see `train_on_single_frames`."""
        norm = self.conv_norm_out
        by_frame = self.training and isinstance(norm, ClipGroupNorm) and norm.single_frames
        if by_frame and num_frames > 1:
            raise ValueError(f"clips must have one frame after train_on_single_frames(True), got {num_frames}")
        return by_frame


def one_token_parameters(unet: nn.Module) -> list[str]:
    """Names of the parameters that cross-attention to a single token does not depend on: its queries and keys."""
    # Softmax over one key is 1, so their gradient is zero; only weight decay would ever move them.
    unused = re.compile(r"\.attn2\.to_[qk]\.|\.transformer_blocks\.\d+\.norm2\.")
    return [name for name, _ in unet.named_parameters() if unused.search(name) and "motion_modules" not in name]


class PoseGuider(ControlNetConditioningEmbedding, ModelMixin, ConfigMixin):
    """Features of pose images for the denoising UNet's first resolution, frame by frame.

    Each of `block_out_channels` after the first halves the image: four of them fit a VAE of factor 8.
    """

    @register_to_config
    def __init__(
        self,
        conditioning_embedding_channels: int = 320,
        conditioning_channels: int = 3,
        block_out_channels: tuple[int, ...] = (16, 32, 96, 256),
    ):
        super().__init__(conditioning_embedding_channels, conditioning_channels, block_out_channels)

    def forward(self, pose: Tensor) -> Tensor:
        """Pose images (b, 3, f, H, W) in [0, 1] -> (b, c, f, h, w)."""
        features = super().forward(pose.transpose(1, 2).flatten(0, 1))
        return features.unflatten(0, (len(pose), -1)).transpose(1, 2)
