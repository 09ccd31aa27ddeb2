"""MagicAnimate (Xu et al., CVPR 2024): appearance encoder, DensePose ControlNet, denoising UNet with norms over clips.

Shapes use b = batch, f = frames, c = channels, h, w = latent size, H, W = picture size.

The appearance encoder is a `ReferenceNet` that runs at every step's timestep; frames see its middle and upward blocks.
Cross-attention sees an empty prompt, in both halves of guidance. Poses are DensePose pictures, which are an input.
"""

import torch
from diffusers import AutoencoderKL, ConfigMixin, ControlNetModel, DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from models.animator import Animator
from models.pictures import PictureSequence
from models.pipeline import AnimationPipeline
from models.reference_attention import ReferenceContext, fused_layers, reference_layers
from models.unets import DenoisingUNet, ReferenceNet

CONTROL_CHUNK = 8


class PromptEmbedding(ModelMixin, ConfigMixin):
    """A text encoder's tokens of one fixed prompt, kept as a tensor (1, tokens, channels)."""

    @register_to_config
    def __init__(self, tokens: int = 77, channels: int = 768):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(1, tokens, channels))

    def forward(self) -> Tensor:
        return self.embedding


class MagicAnimate(nn.Module):
    """The networks as the denoising loop uses them; see `models.animator.Animator`."""

    reference_follows_timestep = True

    def __init__(
        self,
        reference_net: ReferenceNet,
        denoising_unet: DenoisingUNet,
        control_net: ControlNetModel,
        prompt: PromptEmbedding,
        fusion_blocks: str = "midup",
    ):
        super().__init__()
        self.reference_net = reference_net
        self.denoising_unet = denoising_unet
        self.control_net = control_net
        self.prompt = prompt
        self.fusion_blocks = fusion_blocks

    def encode_context(self, reference: Tensor) -> Tensor:
        """The empty prompt, whatever the reference."""
        return self.prompt().to(reference)

    def null_context(self, context: Tensor) -> Tensor:
        return context

    def encode_reference(self, latents: Tensor, timestep: Tensor | int, context: Tensor) -> dict[str, Tensor]:
        return fused_layers(self.reference_net(latents, timestep, context), self.fusion_blocks)

    def reading_layers(self) -> list[str]:
        return list(fused_layers(dict.fromkeys(reference_layers(self.denoising_unet)), self.fusion_blocks))

    def pose_condition(self, poses: PictureSequence, context: Tensor) -> "ControlCondition":
        return ControlCondition(self.control_net, poses, context)

    def predict(
        self,
        sample: Tensor,
        timestep: Tensor,
        context: Tensor,
        pose: list[Tensor],
        reference: ReferenceContext | None,
    ) -> Tensor:
        return self.denoising_unet(sample, timestep, context, reference=reference, residuals=pose)


class ControlCondition:
    """DensePose pictures of a clip; see `models.animator.PoseCondition`."""

    def __init__(self, control_net: ControlNetModel, poses: PictureSequence, context: Tensor):
        self.control_net = control_net
        self.poses = poses
        self.context = context

    def at_step(self, sample: Tensor, timestep: Tensor) -> "ControlResiduals":
        return ControlResiduals(self, sample, timestep)


class ControlResiduals:
    """What the ControlNet says of a clip at one step, each frame once although windows overlap.

    Only the frames of the latest window are kept. See `models.animator.StepCondition`.
    """

    def __init__(self, condition: ControlCondition, sample: Tensor, timestep: Tensor):
        self.condition = condition
        self.sample, self.timestep = sample, timestep
        self.kept = range(0)
        self.residuals: list[Tensor] = []

    def window(self, frames: range) -> list[Tensor]:
        """(f, c, h', w') each: one for every skip connection, then that of the middle block."""
        parts, known = [], frames.start
        if self.kept.start <= frames.start < self.kept.stop:
            shared = slice(frames.start - self.kept.start, frames.stop - self.kept.start)
            parts, known = [[part[shared] for part in self.residuals]], self.kept.stop
        for start in range(known, frames.stop, CONTROL_CHUNK):
            parts.append(self._compute(range(start, min(start + CONTROL_CHUNK, frames.stop))))
        self.kept, self.residuals = frames, [torch.cat(chunks) for chunks in zip(*parts, strict=True)]
        return self.residuals

    def _compute(self, frames: range) -> list[Tensor]:
        condition, latents = self.condition, self.sample[:, :, frames.start : frames.stop]
        return control_residuals(
            condition.control_net, latents, self.timestep, condition.context, condition.poses[frames]
        )


def control_residuals(
    control_net: ControlNetModel, latents: Tensor, timestep: Tensor | int, context: Tensor, poses: Tensor
) -> list[Tensor]:
    """What the ControlNet adds to the denoising UNet, frame by frame.

    Args:
        latents: noisy latents, (b, c, f, h, w).
        timestep: scalar or (b,).
        context: text tokens, (b, tokens, channels).
        poses: pose pictures, (b*f, 3, H, W) in [0, 1].

    Returns:
        (b*f, c, h', w') each: one for every skip connection, then that of the middle block.
    """
    num_frames = latents.shape[2]
    timesteps = torch.as_tensor(timestep, device=latents.device).expand(len(latents)).repeat_interleave(num_frames)
    down, mid = control_net(
        latents.transpose(1, 2).flatten(0, 1),
        timesteps,
        context.repeat_interleave(num_frames, dim=0),
        controlnet_cond=poses,
        return_dict=False,
    )
    return [*down, mid]


class MagicAnimatePipeline(AnimationPipeline):
    """`AnimationPipeline` of MagicAnimate. Its `poses` are DensePose pictures.

    Args:
        reference_net: the appearance encoder.
        control_net: the DensePose ControlNet.
        prompt: the empty prompt.
        fusion_blocks: "midup" or "full", the layers in which frames see the reference.
    """

    pose_kind = "DensePose"
    model_cpu_offload_seq = "prompt->reference_net->control_net->denoising_unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        reference_net: ReferenceNet,
        denoising_unet: DenoisingUNet,
        control_net: ControlNetModel,
        prompt: PromptEmbedding,
        scheduler: DDIMScheduler,
        fusion_blocks: str = "midup",
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
        self.register_to_config(fusion_blocks=fusion_blocks)

    def animator(self) -> Animator:
        return MagicAnimate(
            self.reference_net, self.denoising_unet, self.control_net, self.prompt, self.config.fusion_blocks
        )
