"""The files of AnimateAnyone as Moore Threads released it, of MusePose, and of Stable Diffusion to train from.

    denoising_unet.pth      a Stable Diffusion UNet
    motion_module.pth       motion modules of AnimateDiff
    reference_unet.pth      a Stable Diffusion UNet without output layers
    pose_guider.pth         the conditioning embedding of a ControlNet

MusePose has the same four.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from core.errors import UserError
from models.attention.context import fused_layers, same_reference
from models.checkpoints.convert import Family, Recognised, Sources
from models.checkpoints.inspect import image_unet
from models.checkpoints.loading import (
    MOTION,
    Shapes,
    compare,
    load_strictly,
    module_names,
    on_meta,
    position_table,
    shapes_of,
    shapes_on_meta,
    table_length,
)
from models.checkpoints.networks import (
    EMBEDDING,
    MotionSizes,
    Tensors,
    UNetSizes,
    check_not_swapped,
    check_reference_net,
    embedding_channels,
    has,
    joined,
    load_denoising_unet,
    load_reference_net,
    make_denoising_unet,
    motion_manifest,
    motion_sizes,
    reference_unet_manifest,
    unet_sizes,
)
from models.checkpoints.verify import Fixture
from models.config import AnimateAnyoneFiles, StableDiffusionFiles
from models.pipeline import AnimationPipeline
from models.unets import DenoisingUNet, MotionModule, PoseGuider, ReferenceNet

# Length of the position tables that MusePose computes, whatever lies in its file.
MUSEPOSE_LENGTH = 128


def with_motion(unet: Tensors, motion_module: Tensors) -> dict[str, Tensor]:
    """Tensors of an image UNet and of another file's motion modules."""
    image = {name: tensor for name, tensor in unet.items() if MOTION not in name}
    return image | {name: tensor for name, tensor in motion_module.items() if MOTION in name}


def load_image_unet(tensors: Tensors, what: str, dtype: torch.dtype = torch.float32) -> DenoisingUNet:
    """Denoising UNet from an image UNet, with new motion modules, which change nothing before they are trained."""
    network = on_meta(make_denoising_unet, unet_sizes(shapes_of(tensors)), MotionSizes(), norm_scope="frame")
    new = {}
    for name, module in network.named_modules():
        if isinstance(module, MotionModule):
            reset_motion_module(module.to_empty(device="cpu"))
            new |= {f"{name}.{entry}": value for entry, value in module.state_dict().items()}
    return load_strictly(network, with_motion(tensors, module_names(new)), what, dtype)


def reset_motion_module(module: MotionModule) -> None:
    """Random weights, output projection zero."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.LayerNorm, nn.GroupNorm)):
            part.reset_parameters()
    nn.init.zeros_(module.proj_out.weight)
    nn.init.zeros_(module.proj_out.bias)
    for block in module.transformer_blocks:
        block.pos_embed.pe = position_table(*block.pos_embed.pe.shape[1:])


def make_pose_guider(width: int, channels: tuple[int, ...]) -> PoseGuider:
    return PoseGuider(conditioning_embedding_channels=width, block_out_channels=channels)


def pose_guider_manifest(width: int, channels: tuple[int, ...]) -> Shapes:
    return shapes_on_meta(make_pose_guider, width, channels)


def load_pose_guider(tensors: Tensors, what: str, dtype: torch.dtype = torch.float32) -> PoseGuider:
    return load_strictly(on_meta(make_pose_guider, *pose_guider_sizes(shapes_of(tensors))), tensors, what, dtype)


def pose_guider_sizes(shapes: Shapes) -> tuple[int, tuple[int, ...]]:
    """Channels of the output, and of the embedding."""
    return shapes.get("conv_out.weight", UNetSizes().block_out_channels)[0], embedding_channels(shapes)


def pose_guider_from_control_net(tensors: Tensors, what: str, dtype: torch.dtype = torch.float32) -> PoseGuider:
    """Pose guider to start training from: a ControlNet's conditioning embedding, its last convolution zero."""
    embedding = {name.removeprefix(EMBEDDING): value for name, value in tensors.items() if name.startswith(EMBEDDING)}
    zeros = {name: torch.zeros_like(value) for name, value in embedding.items() if name.startswith("conv_out.")}
    return load_pose_guider(embedding | zeros, what, dtype)


def make_animate_anyone(sources: Sources) -> AnimationPipeline:
    """AnimateAnyone as published, and MusePose."""
    guider = "pose_guider" if sources.config.controlnet is None or sources.config.pose_guider else "controlnet"
    sources.require("denoising_unet", "motion_module", "reference_unet", guider, "image_encoder", "vae")
    parts = small_parts(sources)
    unet, unet_name = sources.tensors("denoising_unet")
    check_not_swapped(*sources.tensors("reference_unet"), unet)
    motion, motion_name = sources.tensors("motion_module")
    if not any(MOTION in name for name in motion):
        raise UserError(f"{motion_name} holds no motion modules")
    length = MUSEPOSE_LENGTH if sources.family.name == "musepose" else None
    denoising_unet = load_denoising_unet(
        with_motion(unet, motion), f"{unet_name} with {motion_name}", "frame", dtype=sources.dtype, length=length
    )
    reference_net = sources.load("reference_unet", load_reference_net)
    if guider == "controlnet":
        pose_guider = new_pose_guider(sources)
    else:
        pose_guider = sources.load("pose_guider", load_pose_guider)
    return make_pipeline(sources, reference_net, denoising_unet, pose_guider, *parts)


def make_base(sources: Sources) -> AnimationPipeline:
    """Base weights for training: both UNets from Stable Diffusion, the pose guider from a ControlNet."""
    sources.require("unet", "controlnet", "image_encoder", "vae")
    parts = small_parts(sources)
    unet, what = sources.tensors("unet")
    if sources.path("motion_module", required=False) is None:
        sources.notes.append("the motion modules are new: until they are trained, frames know nothing of each other")
        denoising_unet = load_image_unet(unet, what, sources.dtype)
    else:
        motion, motion_name = sources.tensors("motion_module")
        what_both = f"{what} with {motion_name}"
        denoising_unet = load_denoising_unet(with_motion(unet, motion), what_both, "frame", dtype=sources.dtype)
    denoising_unet.use_motion_on_single_frames(False)
    reference_net = load_reference_net(unet, what, dtype=sources.dtype)
    return make_pipeline(sources, reference_net, denoising_unet, new_pose_guider(sources), *parts)


def new_pose_guider(sources: Sources) -> PoseGuider:
    """The pose guider that training starts with."""
    sources.notes.append("the pose guider is new: until it is trained, poses have no effect")
    return sources.load("controlnet", pose_guider_from_control_net)


def small_parts(sources: Sources) -> tuple[CLIPVisionModelWithProjection, AutoencoderKL]:
    """Image encoder and VAE, whose folders are soon read, and are so before the UNets."""
    image_encoder = sources.load_folder("image_encoder", CLIPVisionModelWithProjection)
    return image_encoder, sources.load_folder("vae", AutoencoderKL)


def make_pipeline(
    sources: Sources,
    reference_net: ReferenceNet,
    denoising_unet: DenoisingUNet,
    pose_guider: PoseGuider,
    image_encoder: CLIPVisionModelWithProjection,
    vae: AutoencoderKL,
) -> AnimationPipeline:
    check_reference_net(reference_net, denoising_unet, vae)
    width, context = denoising_unet.config.block_out_channels[0], denoising_unet.config.cross_attention_dim
    if (channels := pose_guider.config.conditioning_embedding_channels) != width:
        raise UserError(f"the pose guider gives {channels} channels, the denoising UNet takes {width}")
    if (dimension := image_encoder.config.projection_dim) != context:
        raise UserError(f"image_encoder= gives {dimension} channels, the UNets' cross-attention takes {context}")
    return AnimationPipeline(
        vae=vae,
        image_encoder=image_encoder,
        reference_net=reference_net,
        denoising_unet=denoising_unet,
        pose_guider=pose_guider,
        scheduler=sources.family.scheduler(),
        window_size=sources.family.window,
        sampling=dict(sources.family.sampling) or None,
    )


def recognise_motion_modules(shapes: Shapes) -> Recognised | None:
    names = [name for name in shapes if MOTION in name]
    if 2 * len(names) <= len(shapes) or "conv_in.weight" in shapes:
        return None
    renamed = module_names(shapes)
    motion = motion_sizes(renamed, table_length(shapes))
    release = "v1, MagicAnimate" if motion.max_seq_length <= 24 else "v3"
    release = "v2, AnimateAnyone, MusePose, Champ" if motion.mid_block else release
    wanted = motion_manifest(motion_file_sizes(renamed), motion)
    return Recognised(f"motion modules (AnimateDiff {release})", str(motion), compare(wanted, shapes))


def motion_file_sizes(shapes: Shapes) -> UNetSizes:
    """Sizes of the UNet that motion modules alone, under the names of this project, belong to."""
    widths = []
    while (shape := shapes.get(f"down_blocks.{len(widths)}.motion_modules.0.proj_in.weight")) is not None:
        widths.append(shape[0])
    if not widths:
        return UNetSizes()
    layers = len({name.split(".")[3] for name in shapes if name.startswith("down_blocks.0.motion_modules.")})
    attention = (True,) * (len(widths) - 1) + (False,)
    return replace(UNetSizes(), block_out_channels=tuple(widths), attention=attention, layers_per_block=layers)


def recognise_pose_guider(shapes: Shapes) -> Recognised | None:
    if not has(shapes, "blocks."):
        return None
    width, channels = pose_guider_sizes(shapes)
    wanted = pose_guider_manifest(width, channels)
    return Recognised("pose guider", f"widths {joined(channels)}", compare(wanted, shapes))


def outputs(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    sizes = fixture.unet_sizes()
    reference_net = load_reference_net(fixture.checkpoint("reference_unet"), "reference_unet", sizes)
    tensors = with_motion(fixture.checkpoint("denoising_unet"), fixture.checkpoint("motion_module"))
    what = "denoising_unet and motion_module"
    unet = load_denoising_unet(tensors, what, fixture.norm_scope(), sizes, fixture.motion_sizes())
    pose_guider = load_pose_guider(fixture.checkpoint("pose_guider"), "pose_guider")

    inputs = fixture.inputs
    context, latents = inputs["clip_embeds"], inputs["noisy_latents"]
    pose = pose_guider(inputs["pose_images"])
    yield "pose_features", pose
    yield "prediction_without_reference", unet(latents, inputs["timestep"], context, pose)

    tokens = reference_net(inputs["ref_latents"], fixture.config["reference_timestep"], context)
    yield from fixture.reference_tokens(tokens)
    tokens = fused_layers(tokens, fixture.config["fusion_blocks"])
    seen = same_reference(tokens, latents.shape[2])
    yield "prediction_with_reference", unet(latents, inputs["timestep"], context, pose, seen)

    timestep, first, pose = inputs["guidance_timestep"], latents[:1], pose[:1]
    yield "guidance_uncond", unet(first, timestep, torch.zeros_like(context[:1]), pose)
    seen = same_reference({layer: value[:1] for layer, value in tokens.items()}, latents.shape[2])
    yield "guidance_cond", unet(first, timestep, context[:1], pose, seen)


VELOCITY = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
# AnimateAnyone and MusePose were trained with scaled_linear betas and are released with linear ones.
RELEASED = {"beta_schedule": "linear", **VELOCITY}
FAMILIES = (
    Family(
        "animate_anyone",
        AnimateAnyoneFiles,
        make_animate_anyone,
        RELEASED,
        window=24,
        sampling={"steps": 30, "guidance_scale": 3.5, "size": [512, 784]},
        recognisers=(
            recognise_motion_modules,
            recognise_pose_guider,
            image_unet("AnimateAnyone reference_unet", reference_unet_manifest),
        ),
        fixture=frozenset({"denoising_unet", "motion_module", "reference_unet", "pose_guider"}),
        outputs=outputs,
    ),
    Family(
        "musepose",
        AnimateAnyoneFiles,
        make_animate_anyone,
        RELEASED,
        window=48,
        sampling={"steps": 25, "guidance_scale": 3.5, "size": [768, 768]},  # its own command has 20 steps
        folder="MusePose",
    ),
    # What training from Stable Diffusion starts with; the training configuration replaces the schedule by its own.
    Family("stable_diffusion", StableDiffusionFiles, make_base, {"beta_schedule": "scaled_linear", **VELOCITY}),
)
