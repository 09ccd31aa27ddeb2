"""Wan-Animate (Alibaba, 2025): a video transformer with the reference as a frame of its context, before the clip's.

A latent is of four frames, the first of one. Segments of 77 frames carry on from the last frame of the one before.
Pose latents are added to the clip's tokens; faces, text and CLIP's tokens of the reference come in by cross-attention.
Guidance leads away from another prompt and from faces that do not move; none is the published setting.

Shapes use k = reference images, t = latent frames of a segment, f = its frames, c = channels, h, w = latent size,
n = tokens, H, W = image size, S = side of face images.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Self

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from torch import Tensor
from transformers import CLIPImageProcessorPil as CLIPImageProcessor
from transformers import CLIPVisionModel, T5Tokenizer, T5TokenizerFast, UMT5EncoderModel

from core.errors import UserError
from core.processes import to_device
from models.animators.base import Animator, Condition, PoseCondition, TrainingBatch
from models.animators.wan_animate.context import JointContext, joint_context, latent_probe
from models.animators.wan_animate.networks import WanAnimateTransformer3DModel, set_self_attention
from models.animators.wan_animate.small import small_networks
from models.animators.wan_animate.text import PROMPT, TOKENS, embedded, encoded_images, image_pixels, image_tokens
from models.attention.context import ReferenceContext
from models.attention.layers import LayerShape
from models.config import NetworkSizes
from models.images import ImageBatch, Words
from models.pipeline import AnimationPipeline, animated_by
from models.segments import SegmentImages
from models.vae import VideoVAE, clip_encode, video_encode

SOURCE = "reference"  # name of the tokens that all layers share
MASK_CHANNELS = 4  # one for each frame of a latent
TRAINED_SIDE = 120  # latents of a square of as many pixels as 1280 x 720
NULL_FACE = -1.0


@dataclass(frozen=True)
class WanConditioning:
    """Conditioning that follows from the reference alone, and from words."""

    vae: VideoVAE | None  # None: in training, which has encoded everything
    prompt: Tensor  # (1, 512, channels)
    negative: Tensor | None  # the same, of what guidance leads away from; None: there is no encoder for it
    image: Tensor  # CLIP's tokens, (1, n, channels)


@dataclass(frozen=True)
class SegmentInputs:
    """What drives segments, b of them."""

    poses: Tensor  # latents, (b, c, t, h, w)
    faces: Tensor  # (b, 3, f, S, S) in [-1, 1]
    carried: Tensor  # mask and latents of what is there already, (b, 4 + c, t, h, w)


class WanAnimate(Animator):
    """The transformer, and encoders that cached embeddings may stand in for."""

    vae_class = VideoVAE
    images_of_segment = 4
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

    trainable = True
    noise = "flow"
    adapted_networks = ("transformer",)
    motion_parts = ("face_adapter",)
    blocks = ("WanTransformerBlock", "WanAnimateFaceBlockCrossAttention")

    def __init__(
        self,
        transformer: WanAnimateTransformer3DModel,
        image_encoder: CLIPVisionModel | None,
        image_processor: CLIPImageProcessor | None,
        text_encoder: UMT5EncoderModel | None,
        tokenizer: T5Tokenizer | T5TokenizerFast | None,
        trained_side: int = TRAINED_SIDE,
    ):
        super().__init__()
        self.trained_side = trained_side
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
        return self.trained_side

    @property
    def face_size(self) -> int:
        return self.transformer.config.motion_encoder_size

    @property
    def longest_window(self) -> int:
        return (self.transformer.config.rope_max_seq_len - self.context_latents - 1) * self.frames_per_latent + 1

    @property
    def reads_text(self) -> bool:
        return self.text_encoder is not None and self.tokenizer is not None

    @property
    def reads_images(self) -> bool:
        return self.image_encoder is not None and self.image_processor is not None

    def encode_reference(self, reference: ImageBatch) -> WanConditioning:
        words = reference.words
        prompt = self.embedding("prompt", self.default_prompt if words.prompt is None else words.prompt, words)
        image = words.embeddings.get("image")
        if image is None:
            image = image_tokens(reference.pixels, self.image_encoder, self.image_processor)
        negative = self.embedding("negative_prompt", words.negative_prompt or "", words)
        return WanConditioning(reference.vae, prompt, negative, image.to(prompt))

    def check_words(self, words: Words, guided: bool) -> None:
        config, given = self.transformer.config, words.embeddings
        limits = dict.fromkeys(("prompt", "negative_prompt"), (TOKENS, config.text_dim))
        limits |= {"image": (math.inf, config.image_dim)}
        for name, embedding in given.items():
            (tokens, channels), (most, wanted) = embedding.shape[1:], limits[name]
            if channels != wanted or tokens > most:
                longest = f"at most {most} tokens" if tokens > most else "tokens"
                raise UserError(
                    f"embeddings= has {name} of {tokens} tokens with {channels} channels; the model reads {longest} "
                    f"with {wanted}"
                )
        if not self.reads_text and "prompt" not in given:
            raise UserError(
                "the text encoder is missing: give the prompt's embedding (embeddings= with an entry prompt, or "
                "model.embeddings= of train.py), or get text_encoder/ and tokenizer/ of the model"
            )
        if not self.reads_text and guided and "negative_prompt" not in given:
            raise UserError(
                "guidance needs the embedding of a negative prompt (embeddings= with an entry negative_prompt), "
                "or the text encoder; guidance_scale=1 does without"
            )
        if not self.reads_images and "image" not in given:
            raise UserError(
                "the image encoder is missing: give CLIP's tokens of the reference (embeddings= with an entry "
                "image), or get image_encoder/ and image_processor/ of the model"
            )

    def embedding(self, name: str, text: str, words: Words) -> Tensor | None:
        """The cached embedding of this name, or that of the text, (1, 512, channels); None without both."""
        found = words.embeddings.get(name)
        if found is not None:
            found = F.pad(found, (0, 0, 0, TOKENS - found.shape[1]))
        elif self.reads_text:
            found = embedded(text, self.text_encoder, self.tokenizer)
        return None if found is None else found.to(self.transformer.device, self.dtype)

    def encode_images(self, images: ImageBatch, timestep: int, conditioning: WanConditioning) -> dict[str, Tensor]:
        return {SOURCE: images.latents.flatten(2).transpose(1, 2)}  # (i, h w, c)

    def pose_condition(self, poses: SegmentImages, conditioning: WanConditioning) -> PoseCondition:
        vae, whole = conditioning.vae, range(len(poses))
        images = poses[whole] * 2 - 1
        known, count = torch.zeros_like(images), 0
        if poses.carried is not None:
            count = len(poses.carried)
            known[:count] = poses.carried.to(known)
        faces = images.new_full((1, 3, len(poses), self.face_size, self.face_size), NULL_FACE)
        if poses.faces is not None:
            faces = (poses.faces[whole] * 2 - 1).transpose(0, 1)[None]
        carried = self.known_frames(video_encode(vae, known), count)
        inputs = SegmentInputs(video_encode(vae, images).to(self.dtype), faces.to(self.dtype), carried.to(self.dtype))
        return lambda frames, sample, timestep: inputs

    def known_frames(self, latents: Tensor, carried: int) -> Tensor:
        """Latents (b, c, t, h, w) behind the mask (b, 4, t, h, w) that tells which of their frames are there."""
        mask = torch.zeros_like(latents[:, :1]).repeat(1, MASK_CHANNELS, 1, 1, 1)
        if carried:
            mask[:, :, : 1 + (carried - 1) // self.frames_per_latent] = 1
        return torch.cat([mask, latents], dim=1)

    def predict(self, sample: Tensor, timestep: Tensor, condition: Condition, dropped: Sequence[int]) -> Tensor:
        given, driving, context = condition.conditioning, condition.pose, condition.context
        prompt, faces = given.prompt, driving.faces
        if dropped[0]:
            prompt, faces = given.negative, torch.full_like(faces, NULL_FACE)
        words = WanConditioning(given.vae, prompt, None, given.image)
        return self.flow(sample, timestep.expand(1), context, replace(driving, faces=faces), words)

    def flow(
        self,
        sample: Tensor,
        timestep: Tensor,
        context: ReferenceContext,
        driving: SegmentInputs,
        words: WanConditioning,
    ) -> Tensor:
        """The predicted flow (b, c, 1 + t, h, w) of noisy latents, at timesteps (b,), of segments in one context.

        The context's index is (b, k), the reference first.
        """
        reference = context.tokens[SOURCE][context.index]  # (b, k, h w, c)
        reference = reference.unflatten(2, sample.shape[-2:]).permute(0, 4, 1, 2, 3).to(sample)
        reference = torch.cat([torch.ones_like(reference[:, :MASK_CHANNELS]), reference], dim=1)
        known = torch.cat([reference, driving.carried], dim=2)  # (b, 4 + c, k + t, h, w)
        # Calibrated images have the reference's noise, and what is predicted for them is thrown away.
        first, clip = sample[:, :, :1], sample[:, :, 1:]
        noisy = torch.cat([first] * reference.shape[2] + [clip], dim=2)
        latents = torch.cat([noisy, known], dim=1)
        sights = context.sights if isinstance(context, JointContext) else None
        probe = latent_probe(context, clip.shape[2], math.prod(self.token_grid(sample.shape[-2:])))
        inputs = words.prompt, words.image, driving.poses, driving.faces
        flow = self.transformer(latents, timestep, *inputs, sights, probe)
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

    # Training

    @classmethod
    def small(cls, sizes: NetworkSizes, latent_channels: int, latent_side: int) -> Self:
        return cls(**small_networks(sizes, latent_channels, latent_side))

    def check_image_encoder(self) -> None:
        """UserError without one: each clip of training has a reference of its own."""
        if not self.reads_images:
            raise UserError("the image encoder is missing: get image_encoder/ and image_processor/ of the model")

    @torch.no_grad()
    def constant_inputs(
        self, vae: VideoVAE, clip: tuple[int, int, int], embeddings: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        words = Words(embeddings=embeddings)
        self.check_image_encoder()
        self.check_words(words, guided=True)
        prompt, negative = self.embedding("prompt", PROMPT, words), self.embedding("negative_prompt", "", words)
        nothing = torch.zeros(1, 3, *clip, device=vae.device)
        return {"prompt": prompt, "negative_prompt": negative, "unknown": clip_encode(vae, nothing).float()}

    @torch.no_grad()
    def clip_inputs(
        self,
        vae: VideoVAE,
        clips: Mapping[str, Tensor],
        carried: Sequence[bool],
        constant: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        frames, poses = clips["frames"], clips.get("pose_latents")
        if poses is None:
            poses = clip_encode(vae, clips["poses"] * 2 - 1).float()
        known = self.known_frames(constant["unknown"], 0).repeat(len(frames), 1, 1, 1, 1)
        # A clip of no more frames than are carried would be given all that it is to learn.
        if rows := [j for j, goes_on in enumerate(carried) if goes_on and frames.shape[2] > self.carried_frames]:
            first = torch.stack([frames[j] for j in rows])
            first[:, :, self.carried_frames :] = 0
            for j, latents in zip(rows, clip_encode(vae, first).float().split(1), strict=True):
                known[j] = self.known_frames(latents, self.carried_frames)[0]
        image = to_device(image_pixels(clips["reference"], self.image_processor), frames.device)
        return {"poses": poses, "faces": clips["faces"], "carried": known, "image": image}

    def empty_inputs(self, clips: int, frames: int, latent_size: tuple[int, int]) -> dict[str, Tensor]:
        self.check_image_encoder()
        channels, side = self.latent_channels, self.face_size
        latent_frames = self.latent_frames(frames) - self.context_latents
        words = (1, TOKENS, self.transformer.config.text_dim)
        shapes = {
            "prompt": words,
            "negative_prompt": words,
            "poses": (clips, channels, latent_frames, *latent_size),
            "faces": (clips, 3, frames, side, side),
            "carried": (clips, MASK_CHANNELS + channels, latent_frames, *latent_size),
            "image": (clips, 3, *[self.image_encoder.config.image_size] * 2),
        }
        return {name: torch.empty(shape) for name, shape in shapes.items()}

    def training_prediction(self, batch: TrainingBatch) -> Tensor:
        # DeepSpeed's networks are half-precision, without autocast.
        given = {name: value.to(self.dtype) for name, value in batch.inputs.items()}
        clips, sample = len(batch.noisy_latents), batch.noisy_latents.to(self.dtype)
        dropped = batch.dropped.bool()
        prompt = torch.where(dropped[:, None, None], given["negative_prompt"], given["prompt"])
        faces = given["faces"].masked_fill(dropped[:, None, None, None, None], NULL_FACE)
        driving = SegmentInputs(given["poses"], faces, given["carried"])
        image = encoded_images(given["image"], self.image_encoder)
        tokens = {SOURCE: batch.reference_latents.flatten(2).transpose(1, 2)}  # (b + b m, h w, c)
        if batch.reference is None:
            index = torch.arange(clips, device=sample.device)[:, None]
            words = WanConditioning(None, prompt, None, image)
            return self.flow(sample, batch.timestep, ReferenceContext(tokens, index), driving, words)
        # Who sees what differs from clip to clip.
        index, n = batch.reference.index.tolist(), math.prod(self.token_grid(sample.shape[-2:]))
        frames, images = len(index) // clips, len(batch.reference_latents) // clips - 1
        found = []
        for j in range(clips):
            one, first = slice(j, j + 1), clips + j * images
            own = torch.cat([tokens[SOURCE][one], tokens[SOURCE][first : first + images]])
            context = replace(batch.reference.clip(j, frames), tokens={SOURCE: own})
            rows = [[0, *(image - first + 1 for image in row[1:])] for row in index[j * frames : (j + 1) * frames]]
            context = joint_context(context, n, self.frames_per_latent, rows)
            part = SegmentInputs(driving.poses[one], driving.faces[one], driving.carried[one])
            words = WanConditioning(None, prompt[one], None, image[one])
            found.append(self.flow(sample[one], batch.timestep[one], context, part, words))
        return torch.cat(found)

    def trainable_choices(self, stage: str) -> tuple[str, ...]:
        return ("full",)

    def trained_parameters(self, choice: str, stage: str, image_encoder: bool) -> set[str]:
        parts = ("transformer.", "image_encoder.") if image_encoder else ("transformer.",)
        return {name for name, _ in self.named_parameters() if name.startswith(parts)} - self.unused_parameters()

    def unused_parameters(self) -> set[str]:
        if self.image_encoder is None:
            return set()
        last = self.image_encoder.config.num_hidden_layers - 1  # its output is not asked for
        ends = (f".layers.{last}.", ".post_layernorm.")
        names = (f"image_encoder.{name}" for name, _ in self.image_encoder.named_parameters())
        return {name for name in names if any(end in name for end in ends)}


@animated_by(WanAnimate)
class WanAnimatePipeline(AnimationPipeline):
    """`AnimationPipeline` of Wan-Animate, whose folder is that of the pipeline of the same name in diffusers."""

    model_cpu_offload_seq = "text_encoder->image_encoder->transformer->vae"
    _optional_components = ["image_encoder", "image_processor", "text_encoder", "tokenizer"]
