"""AnimateAnyone (Hu et al., CVPR 2024) as one module: reference net, denoising UNet, pose guider, image encoder.

Shapes use b = batch, f = frames, i = reference images, c = channels, h, w = latent size, H, W = picture size.
"""

from dataclasses import replace
from typing import Self

import torch
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from models.animator import Condition, Images, guided
from models.attention_layers import LayerShape, unet_layers
from models.attention_probe import Probe
from models.clip_pictures import clip_pixels
from models.pictures import PictureSequence
from models.reference_attention import ReferenceContext, hide_reference, same_reference
from models.small_networks import (
    block_types,
    check_pose_channels,
    resolution_settings,
    small_image_encoder,
    unet_settings,
)
from models.trainable import CalibratedPictures, NetworkSizes, TrainableAnimator
from models.unets import DenoisingUNet, PoseGuider, ReferenceNet, one_token_parameters

# Pose features of clips up to this length are computed once; at 784x512 pixels a frame takes 4 MB in half precision.
# For longer ones each window computes its own at every step, for 0.6 % more work.
KEPT_FRAMES = 256
POSE_CHUNK = 8


class AnimateAnyone(TrainableAnimator):
    """The networks that are trained together; DeepSpeed and FSDP take one module.

    Frames see the reference's tokens beside their own in every self-attention layer, and one token of its image
    embedding in cross-attention, which is what `encode_reference` gives.
    """

    takes_embeddings = True
    adapted_networks = ("denoising_unet", "reference_net")

    def __init__(
        self,
        reference_net: ReferenceNet,
        denoising_unet: DenoisingUNet,
        pose_guider: PoseGuider,
        image_encoder: CLIPVisionModelWithProjection,
    ):
        super().__init__()
        self.reference_net = reference_net
        self.denoising_unet = denoising_unet
        self.pose_guider = pose_guider
        self.image_encoder = image_encoder

    @classmethod
    def small(cls, sizes: NetworkSizes, latent_channels: int, picture_size: int) -> Self:
        """Pose guider and motion modules end in zeros, so they start as no change."""
        attention, heads = resolution_settings(sizes)
        shared = unet_settings(sizes, latent_channels, picture_size)
        reference_net = ReferenceNet(
            attention_head_dim=heads,  # diffusers' misnomer: this is the number of heads
            **block_types(attention),
            **shared,
        )
        denoising_unet = DenoisingUNet(
            num_attention_heads=heads,
            motion_num_attention_heads=heads,
            motion_max_seq_length=sizes.motion_max_seq_length,
            use_motion_mid_block=True,
            **block_types(attention, "Motion"),
            **shared,
        )
        # Both UNets of a published model start as the same image model, so that what one writes means something to the
        # other's attention; so do these.
        own = reference_net.state_dict().keys()
        same = {name: value for name, value in denoising_unet.state_dict().items() if name in own}
        reference_net.load_state_dict(same, strict=False)
        pose_guider = PoseGuider(shared["block_out_channels"][0], 3, tuple(sizes.pose_channels))
        return cls(reference_net, denoising_unet, pose_guider, small_image_encoder(sizes))

    def forward(
        self,
        noisy_latents: Tensor,
        timestep: Tensor,
        reference_latents: Tensor,
        reference_image: Tensor,
        poses: Tensor,
        dropped: Tensor,
        reference: ReferenceContext | None = None,
        probe: Probe | None = None,
        reference_mask: Tensor | None = None,
        calibrated: CalibratedPictures | None = None,
    ) -> Tensor:
        """See `TrainableAnimator.forward`.

        Args:
            reference_image: for the image encoder; or what it gave, (b, 1, channels).
            dropped: samples that train the unconditional half of guidance: no reference, zero context.
        """
        batch, _, num_frames, height, width = noisy_latents.shape
        dropped = dropped.bool()
        known = reference_image.ndim == 3
        context = reference_image if known else image_context(self.image_encoder, reference_image)
        # DeepSpeed's bf16 turns the weights into bfloat16 and knows no autocast, so the inputs follow the weights.
        dtype = self.denoising_unet.dtype
        noisy_latents, reference_latents, poses = (x.to(dtype) for x in (noisy_latents, reference_latents, poses))
        context = context.to(dtype) * ~dropped[:, None, None]
        # Calibrated images come clip by clip; like their clip's reference they are encoded with its embedding.
        per_clip = len(reference_latents) // batch - 1
        contexts = torch.cat([context, context.repeat_interleave(per_clip, dim=0)])
        tokens = self.reference_net(reference_latents, 0, contexts)
        if reference is None:
            seen = same_reference(tokens, num_frames)
            grids = self.denoising_unet.attention_grids(height, width)
            seen = hide_reference(seen, dropped.repeat_interleave(num_frames), grids)
        else:
            seen = ReferenceContext(tokens, reference.index, reference.query_flags, reference.key_flags)
        seen = replace(seen, probe=probe)
        return self.denoising_unet(noisy_latents, timestep, context, self.pose_guider(poses), seen)

    # What follows is `models.animator.Animator`.

    @property
    def dtype(self) -> torch.dtype:
        return self.denoising_unet.dtype

    @property
    def latent_channels(self) -> int:
        return self.denoising_unet.config.in_channels

    @property
    def latent_side(self) -> int:
        return self.denoising_unet.config.sample_size

    @property
    def longest_window(self) -> int:
        """The length of the motion modules' position tables."""
        return self.denoising_unet.config.motion_max_seq_length

    def encode_reference(self, reference: Images) -> Tensor:
        """The image embedding of the reference, (1, 1, channels)."""
        return image_context(self.image_encoder, reference.pictures).to(self.dtype)

    def encode_images(self, images: Images, timestep: int, subject: Tensor) -> dict[str, Tensor]:
        latents = images.latents
        return self.reference_net(latents, timestep, subject.expand(len(latents), -1, -1))

    def pose_condition(self, poses: PictureSequence, subject: Tensor) -> "PoseFeatures":
        return PoseFeatures(self.pose_guider, poses)

    def predict(self, sample: Tensor, timestep: Tensor, condition: Condition, scales: tuple[float, ...]) -> Tensor:
        """The unconditional half sees no image and a zero context, and keeps the pose."""
        context, pose = condition.subject, condition.pose
        return guided(
            lambda: self.denoising_unet(sample, timestep, context, pose, condition.seen),
            lambda: self.denoising_unet(sample, timestep, torch.zeros_like(context), pose),
            *scales,
        )

    def attention_layers(self, latent_size: tuple[int, int]) -> dict[str, LayerShape]:
        return unet_layers(self.denoising_unet, latent_size)

    # The rest is of `models.trainable.TrainableAnimator`.

    def prepare_stage(self, stage: str) -> None:
        if stage == "image":
            self.denoising_unet.use_motion_on_single_frames(False)

    def trainable_choices(self, stage: str) -> tuple[str, ...]:
        return ("full",) if stage == "image" else ("motion", "full")

    def trained_parameters(self, choice: str, stage: str, image_encoder: bool) -> set[str]:
        """Everything, or the motion modules, which take no part where clips have one frame."""
        names = {name for name, _ in self.named_parameters()}
        motion = {name for name in names if name.startswith("denoising_unet.") and "motion_modules" in name}
        if choice == "motion":
            return motion
        encoder = {name for name in names if name.startswith("image_encoder.")}
        return (
            names
            - self.unread_parameters()
            - (set() if image_encoder else encoder)
            - (motion if stage == "image" else set())
        )

    def unread_parameters(self) -> set[str]:
        """What follows the ReferenceNet's last written layer, and queries and keys of attention to one image token."""
        names = {f"reference_net.{name}" for name in self.reference_net.unread_parameters()}
        for network in ("denoising_unet", "reference_net"):
            names |= {f"{network}.{name}" for name in one_token_parameters(getattr(self, network))}
        return names

    def twin_of(self, name: str) -> str:
        """The ReferenceNet starts as the denoising UNet."""
        return name.replace("reference_net.", "denoising_unet.", 1)

    def check_size(self, factor: int, size: tuple[int, int]) -> None:
        """Pose features must be of the latents' size, too."""
        check_pose_channels(self.pose_guider.config.block_out_channels, factor)
        super().check_size(factor, size)


class PoseFeatures:
    """Pose guider features of a clip, the same at every step; `PoseCondition` and `StepCondition` of an animator."""

    def __init__(self, pose_guider: PoseGuider, poses: PictureSequence, kept_frames: int = KEPT_FRAMES):
        self.pose_guider = pose_guider
        self.poses = poses
        self.features = self._compute(range(len(poses))) if len(poses) <= kept_frames else None

    def at_step(self, sample: Tensor, timestep: Tensor) -> "PoseFeatures":
        return self

    def window(self, frames: range) -> Tensor:
        """(1, c, f, h, w)"""
        if self.features is None:
            return self._compute(frames)
        return self.features[:, :, frames.start : frames.stop]

    def _compute(self, frames: range) -> Tensor:
        parts = [frames[start : start + POSE_CHUNK] for start in range(0, len(frames), POSE_CHUNK)]
        return torch.cat([self.pose_guider(self.poses[part].transpose(0, 1)[None]) for part in parts], dim=2)


def image_context(image_encoder: CLIPVisionModelWithProjection, image: Tensor) -> Tensor:
    """Image embedding of the reference as cross-attention context: one token, as the published weights expect.

    The picture is squashed to the encoder's square input, aspect ratio not kept, in training and inference alike.

    Args:
        image: (b, 3, H, W) in [-1, 1].

    Returns:
        (b, 1, projection channels).
    """
    pixels = clip_pixels(image, image_encoder.config.image_size).to(next(image_encoder.parameters()).dtype)
    return image_encoder(pixels).image_embeds[:, None]
