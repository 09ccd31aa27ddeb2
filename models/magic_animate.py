"""MagicAnimate (Xu et al., CVPR 2024): appearance encoder, DensePose ControlNet, denoising UNet with norms over clips.

Shapes use b = batch, f = frames, i = reference images, m = calibrated images of a clip, c = channels, h, w = latent
size, H, W = picture size.

The appearance encoder is a `ReferenceNet` that runs at every step's timestep; frames see its middle and upward blocks.
Cross-attention sees an empty prompt, in both halves of guidance. Poses are DensePose pictures, which are an input; new
small networks read figures of OpenPose, which can be drawn.
"""

from dataclasses import replace
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn

from models.animator import Condition, Images, guided
from models.attention_layers import LayerShape, unet_layers
from models.attention_probe import Probe
from models.magic_animate_networks import ControlCondition, PromptEmbedding, control_residuals
from models.pictures import PictureSequence
from models.pipeline import AnimationPipeline
from models.reference_attention import (
    ReferenceContext,
    fused_layers,
    hide_reference,
    reference_layers,
    same_reference,
)
from models.small_networks import block_types, check_pose_channels, resolution_settings, unet_settings
from models.trainable import CalibratedPictures, NetworkSizes, TrainableAnimator
from models.unets import DenoisingUNet, ReferenceNet

# Of new small networks. A single token would get all of the attention, whatever a query asks.
PROMPT_TOKENS = 4


class MagicAnimate(TrainableAnimator):
    """The networks that are trained together; DeepSpeed and FSDP take one module.

    Args:
        fusion_blocks: "midup" or "full", the layers in which frames see the reference.
        pose_kind: what the pose pictures are, "DensePose" or "OpenPose".
    """

    reference_follows_timestep = True
    adapted_networks = ("denoising_unet", "reference_net", "control_net")

    def __init__(
        self,
        reference_net: ReferenceNet,
        denoising_unet: DenoisingUNet,
        control_net: ControlNetModel,
        prompt: PromptEmbedding,
        fusion_blocks: str = "midup",
        pose_kind: str = "DensePose",
    ):
        super().__init__()
        self.reference_net = reference_net
        self.denoising_unet = denoising_unet
        self.control_net = control_net
        self.prompt = prompt
        self.fusion_blocks = fusion_blocks
        self.pose_kind = pose_kind

    @classmethod
    def small(cls, sizes: NetworkSizes, latent_channels: int, picture_size: int) -> Self:
        """Its pose pictures are figures of OpenPose and its prompt is learned. ControlNet and motion modules end in
        zeros, so they start as no change."""
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
            use_motion_mid_block=False,
            norm_scope="clip",
            **block_types(attention, "Motion"),
            **shared,
        )
        # All published networks start as one image model, so that what one writes means something to the other's
        # attention; so do these.
        own = reference_net.state_dict().keys()
        same = {name: value for name, value in denoising_unet.state_dict().items() if name in own}
        reference_net.load_state_dict(same, strict=False)
        control_net = ControlNetModel.from_unet(
            reference_net, conditioning_embedding_out_channels=tuple(sizes.pose_channels)
        )
        prompt = PromptEmbedding(PROMPT_TOKENS, sizes.context_dim)
        # Equal tokens would stay equal.
        nn.init.normal_(prompt.embedding)
        return cls(reference_net, denoising_unet, control_net, prompt, pose_kind="OpenPose")

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
            dropped: samples that train the unconditional half of guidance, which sees no reference; a given
                `reference` hides it from them already.
        """
        batch, _, num_frames, height, width = noisy_latents.shape
        # DeepSpeed's bf16 turns the weights into bfloat16 and knows no autocast, so the inputs follow the weights.
        noisy_latents, reference_latents, poses, context = (
            part.to(self.dtype) for part in (noisy_latents, reference_latents, poses, self.prompt())
        )
        # Calibrated images come clip by clip; like their clip's reference they are encoded at its timestep.
        per_clip = len(reference_latents) // batch - 1
        timesteps = torch.cat([timestep, timestep.repeat_interleave(per_clip)])
        tokens = self.reference_net(reference_latents, timesteps, context.expand(len(reference_latents), -1, -1))
        tokens = fused_layers(tokens, self.fusion_blocks)
        if reference is None:
            grids = self.denoising_unet.attention_grids(height, width)
            seen = hide_reference(
                same_reference(tokens, num_frames), dropped.bool().repeat_interleave(num_frames), grids
            )
        else:
            seen = replace(reference, tokens=tokens, projected=None)
        context = context.expand(batch, -1, -1)
        residuals = control_residuals(
            self.control_net, noisy_latents, timestep, context, poses.transpose(1, 2).flatten(0, 1)
        )
        seen = replace(seen, probe=probe)
        return self.denoising_unet(noisy_latents, timestep, context, reference=seen, residuals=residuals)

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
        """The empty prompt, whatever the reference, (1, tokens, channels)."""
        return self.prompt().to(reference.pictures)

    def encode_images(self, images: Images, timestep: int, subject: Tensor) -> dict[str, Tensor]:
        latents = images.latents
        tokens = self.reference_net(latents, timestep, subject.expand(len(latents), -1, -1))
        return fused_layers(tokens, self.fusion_blocks)

    def pose_condition(self, poses: PictureSequence, subject: Tensor) -> ControlCondition:
        return ControlCondition(self.control_net, poses, subject)

    def predict(self, sample: Tensor, timestep: Tensor, condition: Condition, scales: tuple[float, ...]) -> Tensor:
        """The unconditional half sees no image; both have the same prompt and residuals."""

        def denoised(seen: ReferenceContext | None) -> Tensor:
            return self.denoising_unet(sample, timestep, condition.subject, reference=seen, residuals=condition.pose)

        return guided(lambda: denoised(condition.seen), lambda: denoised(None), *scales)

    def attention_layers(self, latent_size: tuple[int, int]) -> dict[str, LayerShape]:
        names = fused_layers(dict.fromkeys(reference_layers(self.denoising_unet)), self.fusion_blocks)
        return unet_layers(self.denoising_unet, latent_size, names)

    # The rest is of `models.trainable.TrainableAnimator`.

    def prepare_stage(self, stage: str) -> None:
        """Norms over clips of one frame are norms over frames, which take a batch at once."""
        self.denoising_unet.train_on_single_frames(stage == "image")
        if stage == "image":
            self.denoising_unet.use_motion_on_single_frames(False)

    def trainable_choices(self, stage: str) -> tuple[str, ...]:
        """As published: everything but the motion modules, then these."""
        return ("full",) if stage == "image" else ("motion", "full")

    def trained_parameters(self, choice: str, stage: str, image_encoder: bool) -> set[str]:
        """Everything, or the motion modules, which take no part where clips have one frame.

        Args:
            image_encoder: whether the prompt is learned; that of a published model came from a frozen text encoder.
        """
        names = {name for name, _ in self.named_parameters()} - self.unread_parameters()
        motion = {name for name in names if "motion_modules" in name}
        if choice == "motion":
            return motion
        prompt = {name for name in names if name.startswith("prompt.")}
        return names - (set() if image_encoder else prompt) - (motion if stage == "image" else set())

    def unread_parameters(self) -> set[str]:
        """What follows the appearance encoder's last written layer."""
        return {f"reference_net.{name}" for name in self.reference_net.unread_parameters()}

    def twin_of(self, name: str) -> str:
        """The appearance encoder starts as the denoising UNet."""
        return name.replace("reference_net.", "denoising_unet.", 1)

    def settings(self) -> dict[str, Any]:
        return {"fusion_blocks": self.fusion_blocks, "pose_kind": self.pose_kind}

    def check_size(self, factor: int, size: tuple[int, int]) -> None:
        """Pose pictures must end as small as the latents, too."""
        check_pose_channels(self.control_net.config.conditioning_embedding_out_channels, factor)
        super().check_size(factor, size)


class MagicAnimatePipeline(AnimationPipeline):
    """`AnimationPipeline` of MagicAnimate. Its `poses` are DensePose pictures, as published.

    Args:
        reference_net: the appearance encoder.
        control_net: the ControlNet of the poses.
        prompt: the empty prompt.
        fusion_blocks: "midup" or "full", the layers in which frames see the reference.
        pose_kind: what the pose pictures are, "DensePose" or "OpenPose".
        window_size: frames that the motion modules were trained on.
    """

    animator_kind = MagicAnimate
    model_cpu_offload_seq = "prompt->reference_net->control_net->denoising_unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        reference_net: ReferenceNet,
        denoising_unet: DenoisingUNet,
        control_net: ControlNetModel,
        prompt: PromptEmbedding,
        scheduler: DDIMScheduler,
        fusion_blocks: str = "midup",
        pose_kind: str = "DensePose",
        window_size: int | None = None,
    ):
        DiffusionPipeline.__init__(self)
        self.set_components(
            window_size,
            vae=vae,
            reference_net=reference_net,
            denoising_unet=denoising_unet,
            control_net=control_net,
            prompt=prompt,
            scheduler=scheduler,
        )
        self.register_to_config(fusion_blocks=fusion_blocks, pose_kind=pose_kind)
