"""DreamPose (Karras et al., ICCV 2023): an image UNet that attends to CLIP and VAE tokens of the reference and has
five poses among its input channels.

Pose images are in [0, 1] and become `pose_range` of the UNet's configuration, [-1, 1] as published, where 0 says that
there is no pose. The empty image of the unconditional branch is what the published code feeds: zeros, grey to the VAE
and black to CLIP. Frames are denoised each by itself, from the same noise, given the poses before and after their own.

Shapes use b = batch, f = frames, i = reference images, n = context tokens, c = channels, h, w = latent size,
H, W = image size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from diffusers import SchedulerMixin
from torch import Tensor
from transformers import CLIPVisionModel

from models.animators.base import Animator, Condition, PoseCondition, TrainingBatch, zero_dropped
from models.animators.dream_pose.networks import DreamPoseUNet, ImageAdapter, branch_weights, consecutive_poses
from models.animators.small_networks import image_encoder_config, unet_settings
from models.attention.layers import KeyLayout, LayerShape, image_token_layers
from models.config import NetworkSizes
from models.images import ImageBatch, ImageSequence, clip_pixels
from models.pipeline import AnimationPipeline, animated_by

SOURCE = "images"  # name of the tokens that all layers share
# Published scales of guidance: image, pose.
IMAGE_SCALE, POSE_SCALE = 8.0, 3.0
POSE_CHUNK = 8
# Of new small networks: consecutive poses, and the channels of a figure.
SMALL_POSES = 5
FIGURE_CHANNELS = (0, 1, 2)
# Modes of condition dropout.
DROP_IMAGE, DROP_POSE, DROP_BOTH = 1, 2, 3


@dataclass(frozen=True)
class DreamPoseConditioning:
    """Conditioning that follows from the reference alone."""

    null: Tensor  # context of the empty image, (1, n, c)
    latent_size: tuple[int, int]  # (h, w)


class DreamPose(Animator):
    """The networks that are trained together; DeepSpeed and FSDP take one module."""

    trainable = True
    shared_noise = True
    joint_frames = False
    guidance_names = ("image", "pose")
    takes_batches = True
    drop_modes = 3
    adapted_networks = ("denoising_unet",)

    def __init__(self, denoising_unet: DreamPoseUNet, adapter: ImageAdapter, image_encoder: CLIPVisionModel):
        super().__init__()
        self.denoising_unet = denoising_unet
        self.adapter = adapter
        self.image_encoder = image_encoder

    @property
    def pose_kind(self) -> str:
        return self.denoising_unet.config.pose_kind

    @property
    def latent_side(self) -> int:
        # The adapter's latents are pooled 2 x 2; any other size is pooled to the same grid.
        rows, columns = self.adapter.config.latent_grid
        return round((4 * rows * columns) ** 0.5)

    def encode_reference(self, reference: ImageBatch) -> DreamPoseConditioning:
        return DreamPoseConditioning(self.null_context(), tuple(reference.latents.shape[-2:]))

    def encode_images(
        self, images: ImageBatch, timestep: int, conditioning: DreamPoseConditioning
    ) -> dict[str, Tensor]:
        return {SOURCE: self.image_context(images.pixels, images.latents)}

    def pose_condition(self, poses: ImageSequence, conditioning: DreamPoseConditioning) -> PoseCondition:
        unet, size = self.denoising_unet, conditioning.latent_size
        chunks = [range(start, min(start + POSE_CHUNK, len(poses))) for start in range(0, len(poses), POSE_CHUNK)]
        inputs = torch.cat([unet.pose_input(poses[chunk], size) for chunk in chunks])[None]  # (1, all frames, p, h, w)
        return lambda frames, sample, timestep: consecutive_poses(inputs, unet.config.poses, frames)

    def predict(self, sample: Tensor, timestep: Tensor, condition: Condition, dropped: Sequence[int]) -> Tensor:
        poses = zero_dropped(condition.pose, [branch in (DROP_POSE, DROP_BOTH) for branch in dropped])
        no_image = [branch in (DROP_IMAGE, DROP_BOTH) for branch in dropped]
        reference = condition.context.for_passes(no_image, null_image=-1)
        return self.denoising_unet(sample, timestep, poses, condition.conditioning.null, reference)

    def branches(self, scales: tuple[float, ...]) -> tuple[int, ...]:
        weights = zip((DROP_BOTH, DROP_POSE, 0), branch_weights(*scales), strict=True)
        return tuple(branch for branch, weight in weights if weight)

    def combined(self, predictions: Sequence[Tensor], scales: tuple[float, ...]) -> Tensor:
        weights = filter(None, branch_weights(*scales))
        return sum(weight * prediction for weight, prediction in zip(weights, predictions, strict=True))

    def null_image_tokens(self, conditioning: DreamPoseConditioning) -> dict[str, Tensor]:
        return {SOURCE: conditioning.null}

    def attention_layers(self, latent_size: tuple[int, int]) -> dict[str, LayerShape]:
        # Tokens are mixed over the image by the adapter, so only whole images can be shown or hidden.
        keys = KeyLayout(None, whole=self.adapter.config.clip_tokens)
        return image_token_layers(self.denoising_unet, latent_size, keys)

    def guidance_scales(self, scale: float | Sequence[float]) -> tuple[float, ...]:
        # A single number is the image's; the pose's goes with it: 1 switches guidance off, 8 is the published (8, 3).
        if not isinstance(scale, Sequence):
            slope = (POSE_SCALE - 1) / (IMAGE_SCALE - 1)
            scale = (scale, 1 + (scale - 1) * slope)
        return super().guidance_scales(scale)

    def initial_latents(self, noise: Tensor, scheduler: SchedulerMixin, start: Callable[[], Tensor]) -> Tensor:
        return scheduler.add_noise(start().to(noise), noise, scheduler.timesteps[:1])

    def image_context(self, images: Tensor, latents: Tensor) -> Tensor:
        """Context tokens of images (i, 3, H, W) in [-1, 1] and their latents (i, c, h, w), (i, n, c)."""
        side = self.image_encoder.config.image_size
        return self.mixed(clip_pixels(central_square(images), side), latents)

    def null_context(self) -> Tensor:
        """Context tokens of the empty image, (1, n, c)."""
        side = self.image_encoder.config.image_size
        black = -torch.ones(1, 3, 1, 1, device=self.image_encoder.device)
        return self.mixed(clip_pixels(black, side), self.adapter.null_latents[None])

    def mixed(self, pixels: Tensor, latents: Tensor) -> Tensor:
        """Context tokens of CLIP's input (i, 3, side, side) and latents (i, c, h, w), (i, n, c)."""
        tokens = self.image_encoder(pixels.to(self.image_encoder.dtype)).last_hidden_state
        return self.adapter(tokens.to(self.adapter.dtype), latents.to(self.adapter.dtype)).to(self.dtype)

    @classmethod
    def small(cls, sizes: NetworkSizes, latent_channels: int, latent_side: int) -> Self:
        # Poses are figures of OpenPose; the context is as wide as the image encoder's tokens, not `context_dim`.
        settings = unet_settings(sizes, latent_channels, latent_side) | {
            "in_channels": latent_channels + SMALL_POSES * len(FIGURE_CHANNELS),
            "cross_attention_dim": sizes.image_encoder_width,
        }
        unet = DreamPoseUNet(poses=SMALL_POSES, pose_channels=FIGURE_CHANNELS, pose_kind="OpenPose", **settings)
        config = image_encoder_config(sizes)
        tokens = 1 + (config.image_size // config.patch_size) ** 2
        grid = (max(settings["sample_size"] // 2, 1),) * 2
        adapter = ImageAdapter(tokens, config.hidden_size, latent_channels, grid)
        return cls(unet, adapter, CLIPVisionModel(config))

    def training_prediction(self, batch: TrainingBatch) -> Tensor:
        clips, _, num_frames, *size = batch.noisy_latents.shape
        # DeepSpeed's bf16 turns the weights into bfloat16 and knows no autocast, so the inputs follow the weights.
        latents, poses = batch.noisy_latents.to(self.dtype), batch.poses.to(self.dtype)
        images = batch.reference_image
        if batch.calibrated is not None:
            images = torch.cat([images, batch.calibrated.pixels])
        null = self.null_context()
        tokens = torch.cat([self.image_context(images, batch.reference_latents), null])  # (b + b*m + 1, n, c)
        no_image = (batch.dropped == DROP_IMAGE) | (batch.dropped == DROP_BOTH)
        reference = batch.context({SOURCE: tokens}).drop_to_null(batch.by_frame(no_image), len(tokens) - 1)
        unet = self.denoising_unet
        inputs = unet.pose_input(poses.transpose(1, 2).flatten(0, 1), size)  # (b*f, p, h, w)
        inputs = consecutive_poses(inputs.unflatten(0, (clips, num_frames)), unet.config.poses)
        has_pose = (batch.dropped == 0) | (batch.dropped == DROP_IMAGE)
        inputs = inputs * has_pose[:, None, None, None, None]  # (b, f, poses*p, h, w)
        return unet(latents, batch.timestep, inputs, null, reference)

    def trainable_choices(self, stage: str) -> tuple[str, ...]:
        return ("full", "adapter")  # UNet and adapter, as published, or the adapter alone

    def trained_parameters(self, choice: str, stage: str, image_encoder: bool) -> set[str]:
        parts = ("adapter.", "denoising_unet.") if choice == "full" else ("adapter.",)
        parts = (*parts, "image_encoder.") if image_encoder else parts
        return {name for name, _ in self.named_parameters() if name.startswith(parts)} - self.unused_parameters()

    def unused_parameters(self) -> set[str]:
        # CLIP's last norm, which its tokens do not pass
        return {name for name, _ in self.named_parameters() if name.startswith("image_encoder.post_layernorm.")}


def central_square(images: Tensor) -> Tensor:
    """The largest square in the middle of images (i, 3, H, W), which is what the published code shows to CLIP."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


@animated_by(DreamPose)
class DreamPosePipeline(AnimationPipeline):
    """`AnimationPipeline` of DreamPose. `guidance_scale` is the image's, or a pair (image, pose)."""

    model_cpu_offload_seq = "image_encoder->adapter->denoising_unet->vae"
