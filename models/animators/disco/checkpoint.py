"""DisCo's one published file, `mp_rank_00_model_states.pt`, and Stable Diffusion's to train from.

The file is DeepSpeed's; under `module` it has

    unet.                   Stable Diffusion's UNet
    controlnet.nets.0.      ControlNet of the pose
    controlnet.nets.1.      ControlNet of the background, on latents
    vae.                    with the names of older releases
    clip_image_encoder.     CLIP's image encoder with projection
    refer_clip_proj.        the projection of all of its tokens

Files of the attribute pre-training have one ControlNet, that of the background, under `controlnet.`. Files of the
temporal variant have `tem_*` tensors in ResNets and transformers, and a norm in each transformer that has no effect.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from core.errors import UserError
from models.animators.disco.model import SOURCE, DisCo, DiscoPipeline
from models.animators.disco.networks import (
    EMBEDDING_WIDTHS,
    DiscoControlNet,
    DiscoUNet,
    TokenProjection,
    new_control_net,
)
from models.attention.context import ReferenceContext
from models.checkpoints.convert import IMAGE_SCHEDULE, Family, Recognised, Sources
from models.checkpoints.loading import (
    Shapes,
    compare,
    current_names,
    load_strictly,
    old_names,
    on_meta,
    shapes_of,
    shapes_on_meta,
)
from models.checkpoints.networks import (
    EMBEDDING,
    Tensors,
    UNetSizes,
    control_net_arguments,
    count,
    embedding_channels,
    has,
    load_autoencoder,
    make_autoencoder,
    unet_arguments,
    unet_sizes,
)
from models.checkpoints.verify import Fixture
from models.config import DiscoFiles
from models.vae import vae_scale_factor

UNET, POSE, BACKGROUND = "unet.", "controlnet.nets.0.", "controlnet.nets.1."
VAE, CLIP, PROJECTION = "vae.", "clip_image_encoder.", "refer_clip_proj."
PARTS = (UNET, POSE, BACKGROUND, VAE, CLIP, PROJECTION)
ONE_CONTROL_NET = "controlnet."
# The integers 0, 1, 2, ..., which older releases of transformers saved.
POSITIONS = "vision_model.embeddings.position_ids"
# Norm that the published temporal block has and does not use.
UNUSED_NORM = re.compile(r"\.transformer_blocks\.\d+\.tem_norm\.")
LATENT_SIDE = 32  # trained on 256 x 256 pixels
# Published scale of guidance with each context of the unconditional half.
GUIDANCE = {"empty_image": 1.5, "zeros": 3.0}


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
    tensors: Tensors,
    what: str,
    sizes: UNetSizes | None = None,
    clip: CLIPVisionConfig | None = None,
    vae_norm_groups: int = 32,
    dtype: torch.dtype = torch.float32,
) -> DiscoWeights:
    parts = split_parts(tensors)
    strange = next(iter(parts.pop("", {})), None)
    if strange is not None:
        raise UserError(f"{what} is not DisCo's: it has {strange}")
    networks = make_networks({prefix: shapes_of(part) for prefix, part in parts.items()}, sizes, clip)
    if not parts[POSE]:
        del networks[POSE]
    loaded = {
        prefix: load_strictly(network, used_tensors(prefix, parts[prefix]), f"{what}, {prefix}*", dtype)
        for prefix, network in networks.items()
    }
    embeddings = loaded[CLIP].vision_model.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]
    return DiscoWeights(
        unet=loaded[UNET],
        pose_control_net=loaded.get(POSE),
        background_control_net=loaded[BACKGROUND],
        image_encoder=loaded[CLIP],
        token_projection=loaded[PROJECTION],
        vae=load_autoencoder(parts[VAE], f"{what}, {VAE}*", dtype, vae_norm_groups),
    )


def split_parts(entries: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Prefix -> entries without it; under "" what has none of the known prefixes."""
    parts: dict[str, dict[str, Any]] = {prefix: {} for prefix in PARTS}
    for name, entry in entries.items():
        if name.startswith(ONE_CONTROL_NET) and not name.startswith((POSE, BACKGROUND)):
            name = BACKGROUND + name.removeprefix(ONE_CONTROL_NET)
        prefix = next((prefix for prefix in PARTS if name.startswith(prefix)), "")
        parts.setdefault(prefix, {})[name.removeprefix(prefix)] = entry
    return parts


def used_tensors(prefix: str, part: Tensors) -> dict[str, Tensor]:
    """The tensors of a part under the names of its network, without those that have no effect."""
    if prefix == PROJECTION:
        return {f"linear.{name}": tensor for name, tensor in part.items()}
    return {name: tensor for name, tensor in part.items() if name != POSITIONS and not UNUSED_NORM.search(name)}


def make_networks(
    parts: Mapping[str, Shapes], sizes: UNetSizes | None = None, clip: CLIPVisionConfig | None = None
) -> dict[str, torch.nn.Module]:
    """Prefix -> network of these shapes, without memory; all but the VAE."""
    sizes, clip = sizes or unet_sizes(parts[UNET]), clip or clip_config(parts[CLIP])
    temporal = is_temporal(parts)
    control_net = control_net_arguments(sizes, embedding_channels(parts[POSE], EMBEDDING)) | {"temporal": temporal}
    background = {"latent_conditioning": True, "conditioning_channels": sizes.in_channels}
    return {
        UNET: on_meta(make_unet, sizes, temporal),
        POSE: on_meta(DiscoControlNet, **control_net),
        BACKGROUND: on_meta(DiscoControlNet, **control_net, **background),
        CLIP: on_meta(CLIPVisionModelWithProjection, clip),
        PROJECTION: on_meta(TokenProjection, clip.hidden_size, sizes.cross_attention_dim),
    }


def make_unet(sizes: UNetSizes, temporal: bool = False) -> DiscoUNet:
    arguments = unet_arguments(sizes) | {"sample_size": LATENT_SIDE}
    return DiscoUNet(temporal=temporal, attention_head_dim=sizes.num_attention_heads, **arguments)


def is_temporal(parts: Mapping[str, Shapes]) -> bool:
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
    """Name -> shape of the complete file that these shapes are from, with a single ControlNet as `nets.1.`."""
    parts = split_parts(shapes)
    networks = make_networks(parts)
    if not parts[POSE]:
        del networks[POSE]
    vae = old_names(shapes_on_meta(make_autoencoder, parts[VAE]))
    wanted = {f"{VAE}{name}": shape for name, shape in vae.items()}
    for prefix, network in networks.items():
        own = shapes_of(network.state_dict())
        for name, shape in own.items():
            wanted[prefix + name.removeprefix("linear.")] = shape
            block, norm, part = name.partition(".norm2.")
            if norm and f"{block}.tem_attn.to_q.weight" in own:
                wanted[f"{prefix}{block}.tem_norm.{part}"] = shape
    return wanted


def recognise_disco(shapes: Shapes) -> Recognised | None:
    if not (has(shapes, PROJECTION, CLIP) and has(shapes, UNET)):
        return None
    parts = split_parts(shapes)
    found = {f"{prefix}{name}": shape for prefix, part in parts.items() for name, shape in part.items()}
    found.pop(f"{CLIP}{POSITIONS}", None)
    variant = "temporal variant" if is_temporal(parts) else "image model"
    if not parts[POSE]:
        variant = "attribute pre-training, no pose ControlNet"
    # The VAE's attention may have the names of today.
    mismatch = compare(current_names(disco_manifest(shapes)), current_names(found))
    return Recognised(f"DisCo ({variant})", str(unet_sizes(parts[UNET])), mismatch)


def make_disco(sources: Sources) -> DiscoPipeline:
    if sources.config.unet is not None and sources.path("checkpoint", required=False) is None:
        weights = base_weights(sources)
    else:
        sources.require("checkpoint")
        weights = sources.load("checkpoint", load_disco)
    pose_control_net = weights.pose_control_net
    if pose_control_net is None:
        sources.notes.append("the pose ControlNet is new: until it is trained, poses have no effect")
        # Each width after the first halves the pose images, which must end as small as the latents.
        widths = EMBEDDING_WIDTHS[: vae_scale_factor(weights.vae).bit_length()]
        pose_control_net = new_control_net(weights.unet, False, widths).eval()
    return DiscoPipeline(
        **vars(weights) | {"pose_control_net": pose_control_net},
        scheduler=sources.family.scheduler(),
        null_tokens=sources.config.null_tokens,
        window_size=sources.family.window,
        sampling={**sources.family.sampling, "guidance_scale": GUIDANCE[sources.config.null_tokens]},
    )


def base_weights(sources: Sources) -> DiscoWeights:
    """Start of the published training: UNet of sd-image-variations, its copy as ControlNet, CLIP's own projection."""
    sources.require("unet", "image_encoder", "vae")
    tensors, what = sources.tensors("unet")
    image_encoder = sources.load_folder("image_encoder", CLIPVisionModelWithProjection)
    projection = image_encoder.visual_projection.weight
    unet = load_strictly(on_meta(make_unet, unet_sizes(shapes_of(tensors))), tensors, what, sources.dtype)
    if unet.config.cross_attention_dim != len(projection):
        context = unet.config.cross_attention_dim
        raise UserError(f"image_encoder= gives {len(projection)} channels, unet='s cross-attention takes {context}")
    token_projection = TokenProjection(*projection.shape[::-1]).to(sources.dtype).eval()
    token_projection.linear.load_state_dict({"weight": projection})
    sources.notes.append("the background ControlNet is new: until it is trained, the background has no effect")
    return DiscoWeights(
        unet=unet,
        pose_control_net=None,
        background_control_net=new_control_net(unet, True).eval(),
        image_encoder=image_encoder,
        token_projection=token_projection,
        vae=sources.load_folder("vae", AutoencoderKL),
    )


def outputs(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    weights = load_disco(
        fixture.checkpoint("module"),
        "module",
        fixture.unet_sizes(),
        CLIPVisionConfig(**fixture.config["clip"]),
        fixture.config["vae"].get("norm_num_groups", 32),
    )
    networks = vars(weights).copy()
    vae = networks.pop("vae")
    model = DisCo(**networks)
    inputs = fixture.inputs
    latents, timestep = inputs["noisy_latents"], inputs["timestep"]
    tokens, null = model.encode_tokens(inputs["foreground_images"]), model.encode_null()
    yield "image_tokens", tokens
    yield "image_tokens_null", null.expand(len(tokens), -1, -1)

    # One reference may serve several samples.
    seen = ReferenceContext({SOURCE: tokens}, torch.arange(len(latents))[:, None] % len(tokens))
    attending = {"cross_attention_kwargs": {"reference": seen}, "return_dict": False}
    conditions = (inputs["pose_images"], inputs["background_latents"])
    for index, network in enumerate((model.pose_control_net, model.background_control_net)):
        yield f"control_mid_net{index}", network(latents, timestep, null, conditions[index], **attending)[1]
    for index, residual in enumerate(model.control_residuals(latents, timestep, null, *conditions, seen)):
        yield f"control_residual_{index:02d}", residual
    yield "prediction_without_control", model.unet(latents, timestep, null, **attending)[0]
    yield "guidance_cond", model.predict_frames(latents, timestep, null, *conditions, seen)
    yield "guidance_uncond", model.predict_frames(latents, timestep, null, *conditions, None)
    yield "vae_mean", vae.encode(inputs["vae_images"]).latent_dist.mean
    yield "vae_decoded", vae.decode(inputs["vae_latents"]).sample


FAMILIES = (
    Family(
        "disco",
        DiscoFiles,
        make_disco,
        IMAGE_SCHEDULE,
        window=16,
        sampling={"steps": 50, "guidance_scale": GUIDANCE["empty_image"], "size": [256, 256]},
        recognisers=(recognise_disco,),
        fixture=frozenset({"module"}),
        outputs=outputs,
    ),
)
