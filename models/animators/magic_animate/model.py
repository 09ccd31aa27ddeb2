"""MagicAnimate (Xu et al., CVPR 2024): appearance encoder, DensePose ControlNet, denoising UNet with norms over clips.

Shapes use b = batch, f = frames, i = reference images, m = calibrated images of a clip, c = channels, h, w = latent
size, H, W = image size.

The appearance encoder is a `ReferenceNet` that runs at every step's timestep; frames see its middle and upward blocks.
Cross-attention sees an empty prompt, in both halves of guidance. Poses are DensePose images, which are an input; new
small networks read figures of OpenPose, which can be drawn.
"""

from typing import Any, Self

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn

from models.animators.base import Condition, Images, guided
from models.animators.magic_animate.networks import ControlCondition, PromptEmbedding, control_residuals
from models.animators.reference_animator import ReferenceAnimator, small_unets
from models.animators.small_networks import check_pose_channels
from models.animators.trainable import CalibratedImages, NetworkSizes
from models.attention.context import ReferenceContext
from models.attention.probe import Probe
from models.images import ImageSequence
from models.pipeline import AnimationPipeline
from models.unets import DenoisingUNet, ReferenceNet

# Of new small networks. A single token would get all of the attention, whatever a query asks.
PROMPT_TOKENS = 4


class MagicAnimate(ReferenceAnimator):
    """The networks that are trained together; DeepSpeed and FSDP take one module.

    Args:
        fusion_blocks: "midup" or "full", the layers in which frames see the reference.
        pose_kind: what the pose images are, "DensePose" or "OpenPose".
    """

    reference_follows_timestep = True
    adapted_networks = ("denoising_unet", "reference_net", "control_net")
    frozen_parts = ("prompt",)

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
    def small(cls, sizes: NetworkSizes, latent_channels: int, image_size: int) -> Self:
        """Its pose images are figures of OpenPose and its prompt is learned. ControlNet and motion modules end in
        zeros, so they start as no change."""
        settings = {"use_motion_mid_block": False, "norm_scope": "clip"}
        reference_net, denoising_unet = small_unets(sizes, latent_channels, image_size, settings)
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
        calibrated: CalibratedImages | None = None,
    ) -> Tensor:
        """See `TrainableAnimator.forward`.

        Args:
            dropped: samples that train the unconditional half of guidance, which sees no reference.
        """
        batch = len(noisy_latents)
        # DeepSpeed's bf16 turns the weights into bfloat16 and knows no autocast, so the inputs follow the weights.
        noisy_latents, reference_latents, poses, context = (
            part.to(self.dtype) for part in (noisy_latents, reference_latents, poses, self.prompt())
        )
        # Calibrated images come clip by clip; like their clip's reference they are encoded at its timestep.
        per_clip = len(reference_latents) // batch - 1
        timesteps = torch.cat([timestep, timestep.repeat_interleave(per_clip)])
        tokens = self.write_tokens(reference_latents, timesteps, context.expand(len(reference_latents), -1, -1))
        seen = self.training_context(tokens, noisy_latents, dropped, reference, probe)
        context = context.expand(batch, -1, -1)
        residuals = control_residuals(
            self.control_net, noisy_latents, timestep, context, poses.transpose(1, 2).flatten(0, 1)
        )
        return self.denoising_unet(noisy_latents, timestep, context, reference=seen, residuals=residuals)

    # What follows is of `models.animators.base.Animator`.

    def encode_reference(self, reference: Images) -> Tensor:
        """The empty prompt, whatever the reference, (1, tokens, channels)."""
        return self.prompt().to(reference.pixels)

    def pose_condition(self, poses: ImageSequence, conditioning: Tensor) -> ControlCondition:
        return ControlCondition(self.control_net, poses, conditioning)

    def predict(self, sample: Tensor, timestep: Tensor, condition: Condition, scales: tuple[float, ...]) -> Tensor:
        """The unconditional half sees no image; both have the same prompt and residuals."""

        def denoised(seen: ReferenceContext | None) -> Tensor:
            return self.denoising_unet(
                sample, timestep, condition.conditioning, reference=seen, residuals=condition.pose
            )

        return guided(lambda: denoised(condition.context), lambda: denoised(None), *scales)

    # The rest is of `models.animators.trainable.TrainableAnimator`.

    def prepare_stage(self, stage: str) -> None:
        """Norms over clips of one frame are norms over frames, which take a batch at once."""
        super().prepare_stage(stage)
        self.denoising_unet.train_on_single_frames(stage == "image")

    def settings(self) -> dict[str, Any]:
        return {"fusion_blocks": self.fusion_blocks, "pose_kind": self.pose_kind}

    def check_size(self, factor: int, size: tuple[int, int]) -> None:
        """Pose images must end as small as the latents, too."""
        check_pose_channels(self.control_net.config.conditioning_embedding_out_channels, factor)
        super().check_size(factor, size)


class MagicAnimatePipeline(AnimationPipeline):
    """`AnimationPipeline` of MagicAnimate. Its `poses` are DensePose images, as published.

    Args:
        reference_net: the appearance encoder.
        control_net: the ControlNet of the poses.
        prompt: the empty prompt.
        fusion_blocks: "midup" or "full", the layers in which frames see the reference.
        pose_kind: what the pose images are, "DensePose" or "OpenPose".
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
