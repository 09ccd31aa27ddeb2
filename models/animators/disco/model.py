"""DisCo (Wang et al., CVPR 2024): foreground as CLIP tokens, background and pose as ControlNets.

The person is cut out of the reference, and all of CLIP's tokens of that cut-out are the context of cross-attention in
the UNet and in both ControlNets. The reference without the person goes through the VAE to a ControlNet of its own; the
residuals of both are added up. Guidance takes the person away, in all three networks, and keeps pose and background.
TPC adds the tokens of calibrated cut-outs to the context of a frame; the background stays the reference's.

Shapes use b = batch, f = frames, i = reference images, m = calibrated images of a clip, c = channels, h, w = latent
size, H, W = image size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from models.animators.base import Animator, Condition, PoseCondition, TrainingBatch
from models.animators.disco.networks import (
    BACKGROUND_PREFIX,
    POSE_PREFIX,
    DiscoControlNet,
    DiscoUNet,
    TokenProjection,
    new_control_net,
    recipe_parameters,
    with_time,
)
from models.animators.small_networks import check_pose_channels, image_encoder_config, unet_settings
from models.attention.context import ReferenceContext
from models.attention.layers import KeyLayout, LayerShape, image_token_layers
from models.config import NULL_TOKENS, NetworkSizes
from models.images import ImageBatch, ImageSequence, clip_mask, clip_pixels
from models.pipeline import AnimationPipeline, animated_by

SOURCE = "images"  # the name of the tokens, which all layers of all networks share


@dataclass(frozen=True)
class DiscoConditioning:
    """Conditioning that follows from the reference alone."""

    null: Tensor  # tokens of the unconditional half of guidance, (1, tokens, channels)
    background: Tensor  # latents of the reference without the person, (1, c, h, w)


class DisCo(Animator):
    """The networks that are trained together; DeepSpeed and FSDP take one module."""

    needs_mask = True
    trainable = True
    alters_reference = True
    calibrated_latents = False
    adapted_networks = ("unet", "pose_control_net", "background_control_net")

    def __init__(
        self,
        unet: DiscoUNet,
        pose_control_net: DiscoControlNet,
        background_control_net: DiscoControlNet,
        image_encoder: CLIPVisionModelWithProjection,
        token_projection: TokenProjection,
        null_tokens: str = "empty_image",  # one of `NULL_TOKENS`
    ):
        super().__init__()
        if null_tokens not in NULL_TOKENS:
            raise ValueError(f"null_tokens must be one of {', '.join(NULL_TOKENS)}, got {null_tokens!r}")
        self.unet = unet
        self.pose_control_net = pose_control_net
        self.background_control_net = background_control_net
        self.image_encoder = image_encoder
        self.token_projection = token_projection
        self.null_tokens = null_tokens

    @property
    def denoising_unet(self) -> DiscoUNet:
        return self.unet

    @property
    def temporal(self) -> bool:
        return self.unet.config.temporal

    @property
    def joint_frames(self) -> bool:
        return self.temporal

    @property
    def takes_batches(self) -> bool:
        return not self.temporal  # which mixes the frames of a batch

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of the patches of CLIP's input, (16, 16) in the published model."""
        config = self.image_encoder.config
        return (config.image_size // config.patch_size,) * 2

    def encode_reference(self, reference: ImageBatch) -> DiscoConditioning:
        background = reference.encode(self.vae_images(reference.pixels, reference.masks))
        return DiscoConditioning(self.encode_null(), background)

    def encode_images(self, images: ImageBatch, timestep: int, conditioning: DiscoConditioning) -> dict[str, Tensor]:
        return {SOURCE: self.encode_foreground(images.pixels, images.masks)}

    def pose_condition(self, poses: ImageSequence, conditioning: DiscoConditioning) -> PoseCondition:
        return lambda frames, sample, timestep: poses[frames]  # (f, 3, H, W)

    def predict(self, sample: Tensor, timestep: Tensor, condition: Condition, dropped: Sequence[int]) -> Tensor:
        conditioning = condition.conditioning
        frames = sample.transpose(1, 2).flatten(0, 1)  # (b*f, c, h, w)
        reference = condition.context.for_passes([branch > 0 for branch in dropped], null_image=-1)
        prediction = self.predict_frames(
            frames, timestep, conditioning.null, condition.pose, conditioning.background, reference
        )
        return prediction.unflatten(0, (len(sample), -1)).transpose(1, 2)

    def null_image_tokens(self, conditioning: DiscoConditioning) -> dict[str, Tensor]:
        return {SOURCE: conditioning.null}

    def attention_layers(self, latent_size: tuple[int, int]) -> dict[str, LayerShape]:
        keys = KeyLayout(self.patch_grid, whole=1)
        return {
            **image_token_layers(self.pose_control_net, latent_size, keys, POSE_PREFIX),
            **image_token_layers(self.background_control_net, latent_size, keys, BACKGROUND_PREFIX),
            **image_token_layers(self.unet, latent_size, keys),
        }

    def encode_foreground(self, images: Tensor, masks: Tensor) -> Tensor:
        """Tokens (i, 1 + patches, channels) of the persons in images (i, 3, H, W) in [-1, 1], masks (i, 1, H, W)."""
        side = self.image_encoder.config.image_size
        # Masked after CLIP's normalisation, so that what masks leave out has CLIP's mean colour.
        return self.encode_tokens(clip_pixels(images, side) * clip_mask(masks, side))

    def encode_tokens(self, pixels: Tensor) -> Tensor:
        """CLIP's input (i, 3, side, side) -> tokens (i, 1 + patches, channels), the whole image's first."""
        hidden = self.image_encoder(pixels.to(self.image_encoder.dtype)).last_hidden_state
        # CLIP normalises the first token only, the one it was trained with.
        hidden = self.image_encoder.vision_model.post_layernorm(hidden)
        return self.token_projection(hidden.to(self.token_projection.dtype))

    def encode_null(self) -> Tensor:
        """The tokens of the unconditional half of guidance, (1, tokens, channels)."""
        config = self.image_encoder.config
        if self.null_tokens == "empty_image":
            side, device = config.image_size, self.image_encoder.device
            return self.encode_tokens(torch.zeros(1, config.num_channels, side, side, device=device))
        rows, columns = self.patch_grid
        width = self.token_projection.config.out_channels
        return torch.zeros(1, 1 + rows * columns, width, device=self.unet.device, dtype=self.dtype)

    def predict_frames(
        self,
        latents: Tensor,  # (f, c, h, w)
        timestep: Tensor,  # scalar or (f,)
        context: Tensor,  # tokens of every frame where `reference` is None, (1, tokens, channels)
        poses: Tensor,  # (f, 3, H, W) in [0, 1]
        background: Tensor,  # (1, c, h, w) or (f, c, h, w)
        reference: ReferenceContext | None,
    ) -> Tensor:
        """Prediction (f, c, h, w) without guidance for single images, or for one clip of the temporal variant."""
        residuals = self.control_residuals(latents, timestep, context, poses, background, reference)
        return self.unet(
            latents,
            timestep,
            context,
            cross_attention_kwargs={"reference": reference},
            down_block_additional_residuals=residuals[:-1],
            mid_block_additional_residual=residuals[-1],
            return_dict=False,
        )[0]

    def control_residuals(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Tensor,
        poses: Tensor,
        background: Tensor,
        reference: ReferenceContext | None,
    ) -> list[Tensor]:
        """The sum of both ControlNets, (f, c', h', w') each: of every skip connection, then of the middle block."""
        attending = {"cross_attention_kwargs": {"reference": reference}, "return_dict": False}
        residuals = []
        for network, image in ((self.pose_control_net, poses), (self.background_control_net, background)):
            down, mid = network(latents, timestep, context, controlnet_cond=image, **attending)
            residuals.append([*down, mid])
        return [one + other for one, other in zip(*residuals, strict=True)]

    def training_prediction(self, batch: TrainingBatch) -> Tensor:
        clips, _, num_frames = batch.noisy_latents.shape[:3]
        images, masks = batch.reference_image, batch.reference_mask
        if batch.calibrated is not None:
            images, masks = torch.cat([images, batch.calibrated.pixels]), torch.cat([masks, batch.calibrated.masks])
        null = self.encode_null()
        tokens = torch.cat([self.encode_foreground(images, masks), null])  # (b + b*m + 1, tokens, channels)
        reference = batch.context({SOURCE: tokens})
        reference = reference.drop_to_null(batch.by_frame(batch.dropped > 0), len(tokens) - 1)
        # DeepSpeed's bf16 turns the weights into bfloat16 and knows no autocast, so the inputs follow the weights.
        parts = (batch.noisy_latents.transpose(1, 2), batch.poses.transpose(1, 2), batch.reference_latents[:clips])
        latents, poses, background = (part.to(self.dtype) for part in parts)  # (b, f, ...), background (b, c, h, w)
        if self.temporal:
            predictions = [
                self.predict_frames(
                    latents[j], batch.timestep[j], null, poses[j], background[j : j + 1], reference.clip(j, num_frames)
                )
                for j in range(clips)
            ]
            return torch.stack(predictions).transpose(1, 2)  # (b, c, f, h, w)
        timesteps, background = (batch.by_frame(part) for part in (batch.timestep, background))
        prediction = self.predict_frames(
            latents.flatten(0, 1), timesteps, null, poses.flatten(0, 1), background, reference
        )
        return prediction.unflatten(0, (clips, num_frames)).transpose(1, 2)

    def vae_images(self, images: Tensor, masks: Tensor | None) -> Tensor:
        return images * (1 - masks.to(images.dtype))  # the person grey, the middle of the range of values

    @classmethod
    def small(cls, sizes: NetworkSizes, latent_channels: int, latent_side: int) -> Self:
        """Image model. ControlNets start as copies of the UNet's downward half, the projection as CLIP's own."""
        unet = DiscoUNet(**unet_settings(sizes, latent_channels, latent_side))
        image_encoder = CLIPVisionModelWithProjection(image_encoder_config(sizes))
        projection = TokenProjection(sizes.image_encoder_width, sizes.context_dim)
        projection.linear.load_state_dict(image_encoder.visual_projection.state_dict())
        control_nets = (new_control_net(unet, latent, tuple(sizes.pose_channels)) for latent in (False, True))
        return cls(unet, *control_nets, image_encoder, projection)

    def check_size(self, factor: int, size: tuple[int, int]) -> None:
        check_pose_channels(self.pose_control_net.config.conditioning_embedding_out_channels, factor)
        super().check_size(factor, size)

    def prepare_stage(self, stage: str) -> None:
        # Clips are trained with the temporal variant.
        if stage == "motion" and not self.temporal:
            for name in self.adapted_networks:
                setattr(self, name, with_time(getattr(self, name)))

    def trainable_choices(self, stage: str) -> tuple[str, ...]:
        return ("full", "attributes", "person") if stage == "image" else ("full", "temporal")

    def trained_parameters(self, choice: str, stage: str, image_encoder: bool) -> set[str]:
        names = {name for name, _ in self.named_parameters()} - self.unused_parameters()
        return recipe_parameters(names, choice, image_encoder)

    def unused_parameters(self) -> set[str]:
        return {"image_encoder.visual_projection.weight"}  # of CLIP's first token


@animated_by(DisCo)
class DiscoPipeline(AnimationPipeline):
    """An image, where its person is, and OpenPose figures in; an animation out."""

    model_cpu_offload_seq = "image_encoder->token_projection->pose_control_net->background_control_net->unet->vae"
