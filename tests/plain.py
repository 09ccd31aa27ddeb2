"""The denoising loop by definition, each of whose shortcuts can be switched on alone.

Without shortcuts every image is encoded again for every frame that sees it, tokens and context are repeated over
frames and projected everywhere, masks are dense, the softmax is written out, every frame passes the pose network in
every window, and both halves of guidance are one batch whose first half is blind to the reference.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from models.animators.base import Animator, Condition
from models.animators.magic_animate.model import control_residuals
from models.attention.context import ReferenceContext
from models.attention.layers import self_attention_level, token_levels
from models.attention.masking import Visibility
from models.attention.processors import PlainProcessor, ReferenceReadProcessor
from models.denoising import guided_predictions
from models.images import ImageBatch, ImageSequence, as_images
from models.pipeline import AnimationPipeline
from models.reference_images import ReferenceImages
from models.sampling import context_windows, window_weights
from models.vae import vae_encode
from tpc import Calibration
from tpc.attach import frame_visibility

# Shortcut -> what has to be on for it.
SHORTCUTS = {
    "each image is encoded once": {"images"},
    "keys are projected once an image, masks are channels": {"attention"},
    "keys are projected once a run": {"images", "attention", "run"},
    "context is projected once a clip": {"context"},
    "poses pass their network once": {"poses"},
    "one half of guidance sees the reference": {"halves"},
}


class PlainAttention(AttnProcessor2_0):
    """Attention by definition: everything repeated for every frame, a dense mask, a softmax."""

    def __init__(self, layer: str):
        super().__init__()
        self.layer = layer

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, *, reference=None):
        seen, visible = hidden_states, None
        if encoder_hidden_states is not None:
            frames = len(hidden_states) // len(encoder_hidden_states)
            seen = encoder_hidden_states.repeat_interleave(frames, dim=0)
        elif reference is not None and self.layer in reference.tokens:
            seen = torch.cat([hidden_states, reference.tokens[self.layer][reference.index].flatten(1, 2)], dim=1)
            flags = reference.flags(hidden_states.shape[1])
            if flags is not None:
                visible = flags[0] @ flags[1].transpose(1, 2) == 0
        parts = (attn.to_q(hidden_states), attn.to_k(seen), attn.to_v(seen))
        heads = []
        for query, key, value in zip(*(part.chunk(attn.heads, dim=-1) for part in parts), strict=True):
            logits = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
            if visible is not None:
                logits = logits.masked_fill(~visible, -torch.inf)
            heads.append(logits.softmax(-1) @ value)
        return attn.to_out[0](torch.cat(heads, dim=-1))


def plain_unet(unet: nn.Module, shortcuts: set[str] = frozenset()) -> nn.Module:
    """The same weights with attention by definition where no shortcut is on."""
    plain = deepcopy(unet)
    processors = plain.attn_processors
    for name in processors:
        layer = name.removesuffix(".processor")
        if "motion_modules" in name:
            continue
        if layer.endswith("attn1"):
            processors[name] = (ReferenceReadProcessor if "attention" in shortcuts else PlainAttention)(layer)
        else:
            processors[name] = PlainProcessor() if "context" in shortcuts else PlainAttention(layer)
    plain.set_attn_processor(processors)
    return plain


@torch.no_grad()
def plain_animation(
    pipeline: AnimationPipeline,
    reference: np.ndarray,
    poses: np.ndarray,
    calibration: Calibration | None,
    latents: Tensor,
    window_size: int,
    overlap: int,
    steps: int,
    guidance: float,
    shortcuts: set[str] = frozenset(),
) -> Tensor:
    """Latents after the denoising loop, with these shortcuts and no others."""
    own, dtype = pipeline.animator, pipeline.denoising_unet.dtype
    animator = type(own)(**dict(own.named_children()), **own.settings())
    image = as_images(reference, "reference").to(dtype) * 2 - 1
    sequence = ImageSequence(
        torch.from_numpy(poses).permute(0, 3, 1, 2), poses.shape[2:0:-1], torch.device("cpu"), dtype
    )
    images = ReferenceImages(animator, ImageBatch(pipeline.vae, image, calibration=calibration), steps)
    context = images.conditioning
    condition = animator.pose_condition(sequence, context)
    grids = [level.queries for level in token_levels(animator.attention_layers(tuple(latents.shape[-2:])))]
    animator.denoising_unet = plain_unet(pipeline.denoising_unet, shortcuts)
    num_frames, size = len(poses), tuple(latents.shape[-2:])
    windows = context_windows(num_frames, window_size, overlap)
    pipeline.scheduler.set_timesteps(steps)
    for step, timestep in enumerate(pipeline.scheduler.timesteps):
        total = torch.zeros_like(latents)
        for window, weight in zip(windows, window_weights(windows, num_frames), strict=True):
            sample = latents[:, :, window.start : window.stop]
            if "images" in shortcuts:
                seen = images.context(step, int(timestep), window)
                seen = seen if "run" in shortcuts else replace(seen, projected=None)
            else:
                seen = plain_images(animator, pipeline.vae, image, context, calibration, step, timestep, window)
                seen = flagged(seen, calibration, step, window, size, grids)
            pose = (
                condition(window, latents, timestep)
                if "poses" in shortcuts
                else plain_pose(pipeline, sample, timestep, context, sequence[window])
            )
            guided = guided_prediction(animator, sample, timestep, context, pose, seen, guidance, grids, shortcuts)
            total[:, :, window.start : window.stop] += guided * weight.to(dtype)[:, None, None]
        latents = pipeline.scheduler.step(total, timestep, latents).prev_sample
    return latents


@dataclass(frozen=True)
class OneImage:
    """An image (1, 3, H, W) that is encoded whenever it is asked for; `models.images.ImageBatch`."""

    vae: nn.Module
    pixels: Tensor
    masks: Tensor | None = None

    @property
    def latents(self) -> Tensor:
        return self.encode(self.pixels)

    def __len__(self) -> int:
        return len(self.pixels)

    def encode(self, images: Tensor) -> Tensor:
        return vae_encode(self.vae, images)


def plain_images(
    animator: Animator,
    vae: nn.Module,
    reference: Tensor,
    context: Tensor,
    calibration: Calibration | None,
    step: int,
    timestep: Tensor,
    window: range,
) -> ReferenceContext:
    """The images of a window: the reference, and one for every frame and person, however often it occurs."""
    members = members_of(calibration, step, window)
    seen = [reference]
    for image in members.ravel():
        seen.append(reference if image < 0 else image_of(calibration, image).to(reference))
    at = timestep if animator.reference_follows_timestep else 0
    written = [animator.encode_images(OneImage(vae, one), at, context) for one in seen]
    index = 1 + torch.arange(members.size).reshape(members.shape)
    index = torch.cat([torch.zeros(len(window), 1, dtype=torch.long), index], dim=1)
    return ReferenceContext({layer: torch.cat([tokens[layer] for tokens in written]) for layer in written[0]}, index)


def members_of(calibration: Calibration | None, step: int, window: range) -> np.ndarray:
    """(frames, persons) calibrated images of a window at a step."""
    if calibration is None:
        return np.zeros((len(window), 0), int)
    return calibration.index(step)[window.start : window.stop]


def image_of(calibration: Calibration, image: int) -> Tensor:
    """(1, 3, h, w) in [-1, 1], float64."""
    return torch.from_numpy(calibration.images[int(image)]).permute(2, 0, 1)[None].double() / 127.5 - 1


def flagged(
    seen: ReferenceContext,
    calibration: Calibration | None,
    step: int,
    window: range,
    size: tuple[int, int],
    grids: list[tuple[int, int]],
) -> ReferenceContext:
    """With the flags of who may see what, if anybody is calibrated."""
    if calibration is None:
        return seen
    levels = [self_attention_level(grid) for grid in grids]
    flags = frame_visibility(calibration, window, members_of(calibration, step, window), levels)
    dtype = next(iter(seen.tokens.values())).dtype
    return replace(seen, visibility=flags.to(dtype=dtype))


def plain_pose(
    pipeline: AnimationPipeline, sample: Tensor, timestep: Tensor, context: Tensor, poses: Tensor
) -> Tensor | list[Tensor]:
    """Pose features, or ControlNet residuals, of these frames one by one."""
    if hasattr(pipeline, "pose_guider"):
        return torch.cat([pipeline.pose_guider(pose[None, :, None]) for pose in poses], dim=2)
    frames = [
        control_residuals(pipeline.control_net, sample[:, :, [i]], timestep, context, pose[None])
        for i, pose in enumerate(poses)
    ]
    return [torch.cat(parts) for parts in zip(*frames, strict=True)]


def guided_prediction(
    animator: Animator,
    sample: Tensor,
    timestep: Tensor,
    context: Tensor,
    pose: Any,
    seen: ReferenceContext,
    guidance: float,
    grids: list[tuple[int, int]],
    shortcuts: set[str],
) -> Tensor:
    """Both halves of guidance: in one batch that carries everything twice, or one after the other."""
    if "halves" in shortcuts:
        return guided_predictions(animator, [sample], timestep, [Condition(context, pose, seen)], (guidance,))[0]
    null = context if isinstance(pose, list) else torch.zeros_like(context)
    twice = [torch.cat([part, part]) for part in pose] if isinstance(pose, list) else torch.cat([pose, pose])
    poses = {"residuals": twice} if isinstance(pose, list) else {"pose_features": twice}
    both = torch.cat([sample, sample]), timestep, torch.cat([null, context])
    blind = blind_first_half(seen, grids)
    unconditional, conditional = animator.denoising_unet(*both, reference=blind, **poses).chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def blind_first_half(seen: ReferenceContext, grids: list[tuple[int, int]]) -> ReferenceContext:
    """What two clips may look at, the first of which must not see any image."""
    frames, images = seen.index.shape
    blind = torch.cat([torch.ones(frames, 1, 1), torch.zeros(frames, 1, 1)])
    query, key = {}, {}
    for n in {height * width for height, width in grids}:
        own, others = torch.zeros(2 * frames, n, 1), torch.ones(2 * frames, images * n, 1)
        query[n], key[n] = blind.expand(-1, n, -1), torch.cat([own, others], dim=1)
        if seen.visibility is not None:
            flags = [part.repeat(2, 1, 1) for part in seen.flags(n)]
            query[n], key[n] = (
                torch.cat([a.to(b), b], dim=-1) for a, b in zip((query[n], key[n]), flags, strict=True)
            )
    return replace(seen, index=seen.index.repeat(2, 1), visibility=Visibility(query, key))
