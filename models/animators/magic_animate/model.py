"""MagicAnimate (Xu et al., CVPR 2024): appearance encoder, DensePose ControlNet, denoising UNet with norms over clips.

The appearance encoder is a `ReferenceNet` that runs at every step's timestep; frames attend to its middle and upward
blocks. Cross-attention is to an empty prompt, in both halves of guidance. Poses are DensePose images, which are an
input; new small networks read figures of OpenPose, which can be drawn.

Shapes use b = batch, f = frames, m = calibrated images of a clip, c = channels, h, w = latent size, H, W = image size.
"""

from collections.abc import Sequence
from typing import Self

import torch
from diffusers import ConfigMixin, ControlNetModel, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from models.animators.base import Animator, Condition, PoseCondition, TrainingBatch
from models.animators.reference_net import ReferenceNetMixin, small_unets
from models.animators.small_networks import check_pose_channels
from models.config import NetworkSizes
from models.images import ImageBatch, ImageSequence
from models.pipeline import AnimationPipeline, animated_by
from models.unets import DenoisingUNet, ReferenceNet

# Of new small networks. A single token would get all of the attention, whatever a query asks.
PROMPT_TOKENS = 4
CONTROL_CHUNK = 8


class PromptEmbedding(ModelMixin, ConfigMixin):
    """A text encoder's tokens of one fixed prompt, kept as a tensor (1, tokens, channels)."""

    @register_to_config
    def __init__(self, tokens: int = 77, channels: int = 768):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(1, tokens, channels))

    def forward(self) -> Tensor:
        return self.embedding


class ControlCondition:
    """Residuals of the ControlNet for windows of a clip, each frame once a step although windows overlap.

    Only the frames of the latest window are kept.
    """

    def __init__(self, control_net: ControlNetModel, poses: ImageSequence, context: Tensor):
        self.control_net = control_net
        self.poses = poses
        self.context = context
        self.sample: Tensor | None = None  # of the step that the kept residuals belong to
        self.kept = range(0)
        self.residuals: list[Tensor] = []

    def __call__(self, frames: range, sample: Tensor, timestep: Tensor) -> list[Tensor]:
        parts, known = [], frames.start
        if sample is self.sample and self.kept.start <= frames.start < self.kept.stop:
            shared = slice(frames.start - self.kept.start, frames.stop - self.kept.start)
            parts, known = [[part[shared] for part in self.residuals]], self.kept.stop
        for start in range(known, frames.stop, CONTROL_CHUNK):
            chunk = range(start, min(start + CONTROL_CHUNK, frames.stop))
            latents = sample[:, :, chunk.start : chunk.stop]
            parts.append(control_residuals(self.control_net, latents, timestep, self.context, self.poses[chunk]))
        self.sample, self.kept = sample, frames
        self.residuals = [torch.cat(chunks) for chunks in zip(*parts, strict=True)]
        return self.residuals


def control_residuals(
    control_net: ControlNetModel, latents: Tensor, timestep: Tensor | int, context: Tensor, poses: Tensor
) -> list[Tensor]:
    """Residuals (b*f, c, h', w') of the ControlNet: one for every skip connection, then that of the middle block.

    Latents are (b, c, f, h, w), the timestep scalar or (b,), the context (b, tokens, channels), poses
    (b*f, 3, H, W) in [0, 1].
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


class MagicAnimate(ReferenceNetMixin, Animator):
    """The networks that are trained together; DeepSpeed and FSDP take one module."""

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

    def encode_reference(self, reference: ImageBatch) -> Tensor:
        # (1, tokens, channels), whatever the reference; not the parameter, which offloading takes back to the CPU
        return self.prompt().detach().to(reference.pixels)

    def pose_condition(self, poses: ImageSequence, conditioning: Tensor) -> PoseCondition:
        return ControlCondition(self.control_net, poses, conditioning)

    def predict(self, sample: Tensor, timestep: Tensor, condition: Condition, dropped: Sequence[int]) -> Tensor:
        # The unconditional half has no image; both have the same prompt and residuals.
        prompt = condition.conditioning.expand(len(sample), -1, -1)
        reference = condition.context.for_passes([branch > 0 for branch in dropped])
        return self.denoising_unet(sample, timestep, prompt, reference=reference, residuals=condition.pose)

    def training_prediction(self, batch: TrainingBatch) -> Tensor:
        clips = len(batch.noisy_latents)
        # DeepSpeed's bf16 turns the weights into bfloat16 and knows no autocast, so the inputs follow the weights.
        parts = (batch.noisy_latents, batch.reference_latents, batch.poses, self.prompt())
        latents, reference_latents, poses, prompt = (part.to(self.dtype) for part in parts)
        # Calibrated images come clip by clip; like their clip's reference they are encoded at its timestep.
        per_clip = len(reference_latents) // clips - 1
        timesteps = torch.cat([batch.timestep, batch.timestep.repeat_interleave(per_clip)])  # (b + b*m,)
        contexts = prompt.expand(len(reference_latents), -1, -1)  # (b + b*m, tokens, channels)
        tokens = self.write_tokens(reference_latents, timesteps, contexts)
        prompt = prompt.expand(clips, -1, -1)
        residuals = control_residuals(
            self.control_net, latents, batch.timestep, prompt, poses.transpose(1, 2).flatten(0, 1)
        )
        reference = batch.context(tokens).drop_images(batch.by_frame(batch.dropped > 0))
        return self.denoising_unet(latents, batch.timestep, prompt, reference=reference, residuals=residuals)

    @classmethod
    def small(cls, sizes: NetworkSizes, latent_channels: int, latent_side: int) -> Self:
        # ControlNet and motion modules end in zeros, so they start as no change; the prompt is learned.
        settings = {"use_motion_mid_block": False, "norm_scope": "clip"}
        reference_net, denoising_unet = small_unets(sizes, latent_channels, latent_side, **settings)
        control_net = ControlNetModel.from_unet(
            reference_net, conditioning_embedding_out_channels=tuple(sizes.pose_channels)
        )
        prompt = PromptEmbedding(PROMPT_TOKENS, sizes.context_dim)
        # Equal tokens would stay equal.
        nn.init.normal_(prompt.embedding)
        return cls(reference_net, denoising_unet, control_net, prompt, pose_kind="OpenPose")

    def prepare_stage(self, stage: str) -> None:
        super().prepare_stage(stage)
        # Norms over clips of one frame are norms over frames, which take a batch at once.
        self.denoising_unet.train_on_single_frames(stage == "image")

    def check_size(self, factor: int, size: tuple[int, int]) -> None:
        check_pose_channels(self.control_net.config.conditioning_embedding_out_channels, factor)
        super().check_size(factor, size)


@animated_by(MagicAnimate)
class MagicAnimatePipeline(AnimationPipeline):
    """`AnimationPipeline` of MagicAnimate. Its `poses` are DensePose images, as published."""

    model_cpu_offload_seq = "prompt->reference_net->control_net->denoising_unet->vae"
