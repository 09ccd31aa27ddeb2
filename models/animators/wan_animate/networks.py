"""The transformer of Wan-Animate with any number of reference images in its context.

Shapes use b = batch, k = reference images, t = latent frames of the video, f = video frames, c = channels,
h, w = latent size, n = tokens, d = channels of a head, S = side of face images.
"""

from collections.abc import Sequence

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan_animate import WanAttention, WanAttnProcessor
from torch import Tensor

from models.animators.wan_animate.context import LatentProbe, Sight
from models.attention.masking import masked_attention

# What blocks hand on to their self-attention: cosine and sine, and beside them who sees what (None: everybody
# everything) and who records it (None: nobody). A plain tuple, which hooks of offloading and sharding take apart and
# rebuild.
Rotary = tuple[Tensor, Tensor, Sequence[Sight] | None, LatentProbe | None]


class SelfAttention(WanAttnProcessor):
    """Stock self-attention, or, of tokens that do not all see everything, by those who see the same."""

    def __init__(self, layer: str):
        super().__init__()
        self.layer = layer

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        if rotary_emb is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        *angles, sights, probe = rotary_emb
        if sights is None and probe is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, angles)
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key = (rotated(x.unflatten(2, (attn.heads, -1)), *angles).transpose(1, 2) for x in (query, key))
        if probe is not None:
            probe.record(self.layer, query, key)
        if sights is None:
            del query, key
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, angles)
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        attended = torch.empty_like(query)  # (b, heads, n, d)
        for sight in sights:
            part = query[:, :, sight.queries], key[:, :, sight.keys], value[:, :, sight.keys]
            if sight.flags is None:
                attended[:, :, sight.queries] = F.scaled_dot_product_attention(*part)
            else:
                attended[:, :, sight.queries] = masked_attention(*part, *sight.flags)
        return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))


def set_self_attention(transformer: diffusers.WanAnimateTransformer3DModel) -> None:
    """Give every self-attention of a transformer the processor that knows sights and probes."""
    processors = transformer.attn_processors
    layers = [name.removesuffix(".processor") for name in processors if name.endswith(".attn1.processor")]
    transformer.set_attn_processor(processors | {f"{layer}.processor": SelfAttention(layer) for layer in layers})


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (b, n, heads, d), each pair of channels turned by an angle, whose cosine and sine are (1, n, 1, d)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


class WanAnimateTransformer3DModel(diffusers.WanAnimateTransformer3DModel):
    """The stock model and its weights; `forward` takes further references, who sees them, and a probe of that.

    The latter two want `set_self_attention`.
    """

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        image: Tensor,
        poses: Tensor,
        faces: Tensor,
        sights: Sequence[Sight] | None = None,
        probe: LatentProbe | None = None,
    ) -> Tensor:
        """The predicted flow (b, c, k + t, h, w).

        Args:
            latents: noisy latents, mask and what is known, (b, 2 c + 4, k + t, h, w), the references first.
            timestep: (b,).
            text: embedded prompt, (b, 512, channels).
            image: CLIP's tokens of the reference, (b, tokens, channels).
            poses: latents of the pose images, (b, c, t, h, w).
            faces: (b, 3, f, S, S) in [-1, 1], f = 4 t - 3.
            sights: what each of the tokens sees; None: all of them.
            probe: of self-attention; None: nothing is recorded.
        """
        references = latents.shape[2] - poses.shape[2]
        rotary: Rotary = (*self._rotary(latents, references), sights, probe)
        context = self.patch_embedding(latents)
        hidden = torch.cat(
            [context[:, :, :references], context[:, :, references:] + self.pose_patch_embedding(poses)], dim=2
        )
        frames, height, width = hidden.shape[2:]
        hidden = hidden.flatten(2).transpose(1, 2).contiguous()
        time, modulation, text, image = self.condition_embedder(timestep, text, image, timestep_seq_len=None)
        modulation, encoded = modulation.unflatten(1, (6, -1)), torch.cat([image, text], dim=1)
        motion = self._motion(faces, references)
        for i, block in enumerate(self.blocks):
            inputs = hidden, encoded, modulation, rotary
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden = self._gradient_checkpointing_func(block, *inputs)
            else:
                hidden = block(*inputs)
            if i % self.config.inject_face_latents_blocks == 0:
                adapter = self.face_adapter[i // self.config.inject_face_latents_blocks]
                hidden = adapter(hidden, motion) + hidden
        shift, scale = (self.scale_shift_table + time.unsqueeze(1)).chunk(2, dim=1)
        flow = self.proj_out((self.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden))
        patch = self.config.patch_size
        flow = flow.unflatten(2, (*patch, -1)).unflatten(1, (frames, height, width))
        # (b, frames, rows, columns, p_t, p_h, p_w, c), each patch to its place
        return flow.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _rotary(self, latents: Tensor, references: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (1, n, 1, d) of all positions; every reference is at the place and time of the first."""
        cos, sin = self.rope(latents[:, :, references - 1 :])
        tokens = latents[0, 0, 0].numel() // (self.config.patch_size[1] * self.config.patch_size[2])
        cos, sin = (torch.cat([*[part[:, :tokens]] * (references - 1), part], dim=1) for part in (cos, sin))
        return cos, sin

    def _motion(self, faces: Tensor, references: int) -> Tensor:
        """What the faces do, (b, references + t, tokens, channels); nothing in the references."""
        images = faces.transpose(1, 2).flatten(0, 1)
        parts = [self.motion_encoder(part) for part in images.split(self.config.motion_encoder_batch_size)]
        motion = self.face_encoder(torch.cat(parts).unflatten(0, (len(faces), -1)))
        return torch.cat([torch.zeros_like(motion[:, :1]).expand(-1, references, -1, -1), motion], dim=1)
