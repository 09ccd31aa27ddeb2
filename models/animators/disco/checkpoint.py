"""DisCo's networks from the tensors of its one file, strictly.

`mp_rank_00_model_states.pt` is DeepSpeed's; under `module` it has

    unet.                   Stable Diffusion's UNet
    controlnet.nets.0.      ControlNet of the pose
    controlnet.nets.1.      ControlNet of the background, on latents
    vae.                    with the names of older releases
    clip_image_encoder.     CLIP's image encoder with projection
    refer_clip_proj.        the projection of all of its tokens

Files of the attribute pre-training have one ControlNet, that of the background, under `controlnet.`. Files of the
temporal variant have `tem_*` tensors in ResNets and transformers, and a norm in each transformer that nothing uses.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from core.errors import UserError
from models.animators.disco.networks import DiscoControlNet, DiscoUNet, TokenProjection
from models.checkpoints.autoencoder import current_names, load_autoencoder, make_autoencoder, old_names
from models.checkpoints.loading import compare, load_strictly, shapes_of
from models.checkpoints.recognised import Recognised, unet_detail
from models.checkpoints.sizes import (
    Shapes,
    UNetSizes,
    control_net_arguments,
    count,
    pose_guider_channels,
    unet_arguments,
    unet_sizes,
)

UNET, POSE, BACKGROUND = "unet.", "controlnet.nets.0.", "controlnet.nets.1."
VAE, CLIP, PROJECTION = "vae.", "clip_image_encoder.", "refer_clip_proj."
PARTS = (UNET, POSE, BACKGROUND, VAE, CLIP, PROJECTION)
ONE_CONTROL_NET = "controlnet."
# The numbers 0, 1, 2, ..., which older releases of transformers saved.
POSITIONS = "vision_model.embeddings.position_ids"
# Norm that the published temporal block has and does not use.
UNUSED_NORM = re.compile(r"\.transformer_blocks\.\d+\.tem_norm\.")
LATENT_SIDE = 32  # trained on 256 x 256 pixels


@dataclass(frozen=True)
class DiscoWeights:
    """The networks of one file; `pose_control_net` is None after the attribute pre-training."""

    unet: DiscoUNet
    pose_control_net: DiscoControlNet | None
    background_control_net: DiscoControlNet
    image_encoder: CLIPVisionModelWithProjection
    token_projection: TokenProjection
    vae: AutoencoderKL


def load_disco(
    tensors: Mapping[str, Tensor],
    what: str,
    sizes: UNetSizes | None = None,
    clip: CLIPVisionConfig | None = None,
    vae_norm_groups: int = 32,
    dtype: torch.dtype = torch.float32,
) -> DiscoWeights:
    """All networks of a file as `files.read_tensors` returns it; sizes are read from the shapes unless given.

    Args:
        vae_norm_groups: which shapes do not tell.

    Raises:
        UserError: missing, unexpected or misshapen tensors.
    """
    parts = split_parts(tensors)
    strange = next(iter(parts.pop("", {})), None)
    if strange is not None:
        raise UserError(f"{what} is not DisCo's: it has {strange}")
    shapes = {prefix: shapes_of(part) for prefix, part in parts.items()}
    with torch.device("meta"):
        networks = make_networks(shapes, sizes, clip)
    loaded = {
        prefix: load_strictly(networks[prefix], used_tensors(prefix, parts[prefix]), f"{what}, {prefix}*", dtype)
        for prefix in (UNET, BACKGROUND, CLIP, PROJECTION)
    }
    embeddings = loaded[CLIP].vision_model.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]
    pose = None
    if parts[POSE]:
        pose = load_strictly(networks[POSE], used_tensors(POSE, parts[POSE]), f"{what}, {POSE}*", dtype)
    return DiscoWeights(
        unet=loaded[UNET],
        pose_control_net=pose,
        background_control_net=loaded[BACKGROUND],
        image_encoder=loaded[CLIP],
        token_projection=loaded[PROJECTION],
        vae=load_autoencoder(parts[VAE], f"{what}, {VAE}*", dtype, vae_norm_groups),
    )


def split_parts(entries: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Prefix -> entries without it; under "" what has none of the known prefixes. Also for name -> shape."""
    parts: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in PARTS}
    for name, entry in entries.items():
        if name.startswith(ONE_CONTROL_NET) and not name.startswith((POSE, BACKGROUND)):
            name = BACKGROUND + name.removeprefix(ONE_CONTROL_NET)
        prefix = next((prefix for prefix in PARTS if name.startswith(prefix)), "")
        parts.setdefault(prefix, {})[name.removeprefix(prefix)] = entry
    return parts


def used_tensors(prefix: str, part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a part under the names of its network, without those that nothing uses."""
    if prefix == PROJECTION:
        return {f"linear.{name}": tensor for name, tensor in part.items()}
    return {name: tensor for name, tensor in part.items() if name != POSITIONS and not UNUSED_NORM.search(name)}


def make_networks(
    parts: Mapping[str, Shapes], sizes: UNetSizes | None = None, clip: CLIPVisionConfig | None = None
) -> dict[str, torch.nn.Module]:
    """Prefix -> network of these shapes, but for the VAE."""
    sizes = sizes or unet_sizes(parts[UNET])
    temporal = is_temporal(parts)
    embedding = "controlnet_cond_embedding."
    channels = pose_guider_channels(
        {name.removeprefix(embedding): shape for name, shape in parts[POSE].items() if name.startswith(embedding)}
    )
    clip = clip or clip_config(parts[CLIP])
    return {
        UNET: DiscoUNet(
            temporal=temporal,
            attention_head_dim=sizes.num_attention_heads,
            **unet_arguments(sizes, "2D") | {"sample_size": LATENT_SIDE},
        ),
        POSE: DiscoControlNet(temporal=temporal, **control_net_arguments(sizes, channels)),
        BACKGROUND: DiscoControlNet(
            temporal=temporal,
            latent_conditioning=True,
            conditioning_channels=sizes.in_channels,
            **control_net_arguments(sizes, channels),
        ),
        CLIP: CLIPVisionModelWithProjection(clip),
        PROJECTION: TokenProjection(clip.hidden_size, sizes.cross_attention_dim),
    }


def is_temporal(parts: Mapping[str, Shapes]) -> bool:
    """Whether the UNet is the temporal variant's."""
    return any(".tem_conv." in name for name in parts[UNET])


def clip_config(shapes: Shapes) -> CLIPVisionConfig:
    """CLIP of OpenAI with these shapes: heads of 64 channels, quick GELU."""
    embeddings = "vision_model.embeddings."
    width = shapes.get(f"{embeddings}class_embedding", (1024,))[0]
    patch = shapes.get(f"{embeddings}patch_embedding.weight", (0, 3, 14, 14))[-1]
    positions = shapes.get(f"{embeddings}position_embedding.weight", (257,))[0]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shapes.get("vision_model.encoder.layers.0.mlp.fc1.weight", (4 * width,))[0],
        num_hidden_layers=count(shapes, "vision_model.encoder.layers.{}.layer_norm1.weight") or 24,
        num_attention_heads=max(1, width // 64),
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
        projection_dim=shapes.get("visual_projection.weight", (768,))[0],
        hidden_act="quick_gelu",
    )


def disco_manifest(shapes: Shapes) -> Shapes:
    """Name -> shape of the complete file that a file of these shapes is, or is most of.

    Files of the attribute pre-training have their ControlNet under `controlnet.nets.1.` in it.
    """
    parts = split_parts(shapes)
    with torch.device("meta"):
        networks = make_networks(parts)
        vae = make_autoencoder(parts[VAE])
    if not parts[POSE]:
        del networks[POSE]
    wanted = {f"{VAE}{name}": shape for name, shape in old_names(shapes_of(vae.state_dict())).items()}
    for prefix, network in networks.items():
        named = {name.removeprefix("linear."): tensor for name, tensor in network.state_dict().items()}
        wanted |= {f"{prefix}{name}": shape for name, shape in with_unused(shapes_of(named)).items()}
    return wanted


def with_unused(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes of a network and of the norms that its file has in addition."""
    unused = {
        name.replace(".norm2.", ".tem_norm."): shape
        for name, shape in shapes.items()
        if ".norm2." in name and f"{name.split('.norm2.')[0]}.tem_attn.to_q.weight" in shapes
    }
    return {**shapes, **unused}


def recognise_disco(shapes: Shapes) -> Recognised | None:
    """DisCo's file: image model, temporal variant, or attribute pre-training."""
    if not any(name.startswith((PROJECTION, CLIP)) for name in shapes) or not any(
        name.startswith(UNET) for name in shapes
    ):
        return None
    parts = split_parts(shapes)
    found = {f"{prefix}{name}": shape for prefix, part in parts.items() for name, shape in part.items()}
    found.pop(f"{CLIP}{POSITIONS}", None)
    variant = "temporal variant" if is_temporal(parts) else "image model"
    if not parts[POSE]:
        variant = "attribute pre-training, no pose ControlNet"
    # The VAE's attention may have the names of today.
    mismatch = compare(current_names(disco_manifest(shapes)), current_names(found))
    return Recognised(f"DisCo ({variant})", unet_detail(unet_sizes(parts[UNET])), mismatch)
