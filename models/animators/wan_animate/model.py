"""Wan-Animate (Alibaba, 2025): a video transformer with the reference as a frame of its context, before the clip's.

A latent is of four frames, the first of one. Segments of 77 frames carry on from the last frame of the one before.
Pose latents are added to the clip's tokens; faces, text and CLIP's tokens of the reference come in by cross-attention.
Guidance leads away from another prompt and from faces that do not move; none is the published setting.

Shapes use k = reference images, t = latent frames of a segment, f = its frames, c = channels, h, w = latent size,
n = tokens, H, W = image size, S = side of face images.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from diffusers import SchedulerMixin
from torch import Tensor
from transformers import CLIPImageProcessorPil as CLIPImageProcessor
from transformers import CLIPVisionModel, T5Tokenizer, T5TokenizerFast, UMT5EncoderModel

from core.errors import UserError
from models.animators.base import Animator, Condition, PoseCondition
from models.animators.wan_animate.context import JointContext, joint_context
from models.animators.wan_animate.networks import WanAnimateTransformer3DModel, set_self_attention
from models.animators.wan_animate.text import PROMPT, embedded, image_tokens
from models.attention.context import ReferenceContext
from models.attention.layers import LayerShape
from models.images import ImageBatch, Words
from models.pipeline import AnimationPipeline, animated_by
from models.segments import SegmentImages
from models.vae import VideoVAE, video_encode

SOURCE = "reference"  # name of the tokens that all layers share
MASK_CHANNELS = 4  # one for each frame of a latent
TRAINED_SIDE = 120  # latents of a square of as many pixels as 1280 x 720
NULL_FACE = -1.0


@dataclass(frozen=True)
class WanConditioning:
    """Conditioning that follows from the reference alone, and from words."""

    vae: VideoVAE
    prompt: Tensor  # (1, 512, channels)
    negative: Tensor | None  # the same, of what guidance leads away from; None: there is no encoder for it
    image: Tensor  # CLIP's tokens, (1, n, channels)


@dataclass(frozen=True)
class SegmentInputs:
    """What drives a segment."""

    poses: Tensor  # latents, (1, c, t, h, w)
    faces: Tensor  # (1, 3, f, S, S) in [-1, 1]
    carried: Tensor  # mask and latents of what is there already, (1, 4 + c, t, h, w)


class WanAnimate(Animator):
    """The transformer, and encoders that cached embeddings may stand in for."""

    vae_class = VideoVAE
    images_of_segment = 4
    records_attention = False
    pose_kind = "Wan-Animate"
    takes_words = True
    default_prompt = PROMPT
    encoders = MappingProxyType(
        {"prompt": ("text_encoder", "tokenizer"), "image": ("image_encoder", "image_processor")}
    )
    published_sampling = MappingProxyType({"steps": 20, "guidance_scale": 1.0})
    latent_multiple = 2
    segment_frames = 77
    frames_per_latent = 4
    context_latents = 1
    text_embedding, image_embedding = staticmethod(embedded), staticmethod(image_tokens)

    def __init__(
        self,
        transformer: WanAnimateTransformer3DModel,
        image_encoder: CLIPVisionModel | None,
        image_processor: CLIPImageProcessor | None,
        text_encoder: UMT5EncoderModel | None,
        tokenizer: T5Tokenizer | T5TokenizerFast | None,
    ):
        super().__init__()
        self.transformer = transformer
        self.image_encoder, self.image_processor = image_encoder, image_processor
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        set_self_attention(transformer)

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def latent_channels(self) -> int:
        return self.transformer.config.latent_channels

    @property
    def latent_side(self) -> int:
        return TRAINED_SIDE

    @property
    def face_size(self) -> int:
        return self.transformer.config.motion_encoder_size

    @property
    def longest_window(self) -> int:
        return (self.transformer.config.rope_max_seq_len - self.context_latents - 1) * self.frames_per_latent + 1

    def encode_reference(self, reference: ImageBatch) -> WanConditioning:
        words = reference.words
        prompt = self.embedding("prompt", words.prompt or self.default_prompt, words)
        if prompt is None:
            raise UserError(
                "the text encoder is missing: give the prompt's embedding (embeddings= with an entry prompt), or get "
                "text_encoder/ and tokenizer/ of the model"
            )
        image = words.embeddings.get("image")
        if image is None:
            if self.image_encoder is None:
                raise UserError(
                    "the image encoder is missing: give CLIP's tokens of the reference (embeddings= with an entry "
                    "image), or get image_encoder/ and image_processor/ of the model"
                )
            image = image_tokens(reference.pixels, self.image_encoder, self.image_processor)
        negative = self.embedding("negative_prompt", words.negative_prompt or "", words)
        return WanConditioning(reference.vae, prompt, negative, image.to(prompt))

    def embedding(self, name: str, text: str, words: Words) -> Tensor | None:
        """The cached embedding of this name, or that of the text; None without both."""
        found = words.embeddings.get(name)
        if found is None and self.text_encoder is not None:
            found = embedded(text, self.text_encoder, self.tokenizer)
        return None if found is None else found.to(self.transformer.device, self.dtype)

    def encode_images(self, images: ImageBatch, timestep: int, conditioning: WanConditioning) -> dict[str, Tensor]:
        return {SOURCE: images.latents.flatten(2).transpose(1, 2)}  # (i, h w, c)

    def pose_condition(self, poses: SegmentImages, conditioning: WanConditioning) -> PoseCondition:
        vae, whole = conditioning.vae, range(len(poses))
        images = poses[whole] * 2 - 1
        known = torch.zeros_like(images)
        if poses.carried is not None:
            known[: len(poses.carried)] = poses.carried.to(known)
        carried = video_encode(vae, known)
        mask = torch.zeros_like(carried[:, :1]).expand(-1, MASK_CHANNELS, -1, -1, -1).clone()
        if poses.carried is not None:
            mask[:, :, : 1 + (len(poses.carried) - 1) // self.frames_per_latent] = 1
        faces = images.new_full((1, 3, len(poses), self.face_size, self.face_size), NULL_FACE)
        if poses.faces is not None:
            faces = (poses.faces[whole] * 2 - 1).transpose(0, 1)[None]
        inputs = SegmentInputs(
            video_encode(vae, images).to(self.dtype),
            faces.to(self.dtype),
            torch.cat([mask, carried], dim=1).to(self.dtype),
        )
        return lambda frames, sample, timestep: inputs

    def predict(self, sample: Tensor, timestep: Tensor, condition: Condition, dropped: Sequence[int]) -> Tensor:
        given, driving, context = condition.conditioning, condition.pose, condition.context
        prompt, faces = given.prompt, driving.faces
        if dropped[0]:
            if given.negative is None:
                raise UserError(
                    "guidance needs the embedding of a negative prompt (embeddings= with an entry negative_prompt), "
                    "or the text encoder; guidance_scale=1 does without"
                )
            prompt, faces = given.negative, torch.full_like(faces, NULL_FACE)
        reference = context.tokens[SOURCE][context.index[0]]  # (k, h w, c)
        reference = reference.unflatten(1, sample.shape[-2:]).permute(3, 0, 1, 2)[None].to(sample)
        reference = torch.cat([torch.ones_like(reference[:, :MASK_CHANNELS]), reference], dim=1)
        known = torch.cat([reference, driving.carried], dim=2)  # (1, 4 + c, k + t, h, w)
        # Calibrated images have the reference's noise, and what is predicted for them is thrown away.
        first, clip = sample[:, :, :1], sample[:, :, 1:]
        noisy = torch.cat([first] * reference.shape[2] + [clip], dim=2)
        latents = torch.cat([noisy, known], dim=1)
        sights = context.sights if isinstance(context, JointContext) else None
        flow = self.transformer(latents, timestep.expand(1), prompt, given.image, driving.poses, faces, sights)
        return torch.cat([flow[:, :, :1], flow[:, :, reference.shape[2] :]], dim=2)

    def segment_context(self, context: ReferenceContext, latent_size: tuple[int, int]) -> ReferenceContext:
        return joint_context(context, math.prod(self.token_grid(latent_size)), self.frames_per_latent)

    def token_grid(self, latent_size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the tokens of a latent frame."""
        patch = self.transformer.config.patch_size[1:]
        return latent_size[0] // patch[0], latent_size[1] // patch[1]

    def attention_layers(self, latent_size: tuple[int, int]) -> dict[str, LayerShape]:
        config = self.transformer.config
        grid = self.token_grid(latent_size)
        heads, channels = config.num_attention_heads, config.num_attention_heads * config.attention_head_dim
        return {f"blocks.{i}.attn1": LayerShape(grid, heads, channels) for i in range(config.num_layers)}

    def initial_latents(self, noise: Tensor, scheduler: SchedulerMixin, start: Callable[[], Tensor]) -> Tensor:
        return noise  # flow matching begins with nothing else


@animated_by(WanAnimate)
class WanAnimatePipeline(AnimationPipeline):
    """`AnimationPipeline` of Wan-Animate, whose folder is that of the pipeline of the same name in diffusers."""

    model_cpu_offload_seq = "text_encoder->image_encoder->transformer->vae"
    _optional_components = ["image_encoder", "image_processor", "text_encoder", "tokenizer"]
