"""AnimateAnyone, MusePose and base weights to train from, as pipelines."""

from diffusers import AutoencoderKL
from transformers import CLIPVisionModelWithProjection

from core.errors import UserError
from models.checkpoints.networks import (
    load_denoising_unet,
    load_image_unet,
    load_pose_guider,
    load_reference_net,
    pose_guider_from_control_net,
    with_motion,
)
from models.checkpoints.sources import WINDOWS, Sources
from models.pipeline import AnimationPipeline
from models.schedules import published_scheduler
from models.unets import DenoisingUNet, PoseGuider, ReferenceNet

# Length of the position tables that MusePose computes, whatever lies in its file.
MUSEPOSE_LENGTH = 128


def animate_anyone(sources: Sources) -> AnimationPipeline:
    """AnimateAnyone as Moore Threads published it, and MusePose, which has the same files."""
    unet, unet_name = sources.tensors("denoising_unet")
    motion, motion_name = sources.tensors("motion_module")
    if not any(".motion_modules." in name for name in motion):
        raise UserError(f"{motion_name} holds no motion modules")
    denoising_unet = load_denoising_unet(
        with_motion(unet, motion),
        f"{unet_name} with {motion_name}",
        "frame",
        dtype=sources.dtype,
        length=MUSEPOSE_LENGTH if sources.config.family == "musepose" else None,
    )
    reference_net = sources.load("reference_unet", load_reference_net)
    if sources.path("pose_guider", required=sources.config.controlnet is None) is None:
        pose_guider = new_pose_guider(sources)
    else:
        pose_guider = sources.load("pose_guider", load_pose_guider)
    return animate_anyone_pipeline(sources, reference_net, denoising_unet, pose_guider)


def stable_diffusion(sources: Sources) -> AnimationPipeline:
    """Base weights for training: both UNets from Stable Diffusion, the pose guider from a ControlNet.

    Without `motion_module=` the motion modules are new.
    """
    unet, what = sources.tensors("unet")
    if sources.path("motion_module", required=False) is None:
        sources.notes.append("the motion modules are new: until they are trained, frames know nothing of each other")
        denoising_unet = load_image_unet(unet, what, sources.dtype)
    else:
        motion, motion_name = sources.tensors("motion_module")
        denoising_unet = load_denoising_unet(
            with_motion(unet, motion), f"{what} with {motion_name}", "frame", dtype=sources.dtype
        )
    denoising_unet.use_motion_on_single_frames(False)
    reference_net = load_reference_net(unet, what, dtype=sources.dtype)
    return animate_anyone_pipeline(sources, reference_net, denoising_unet, new_pose_guider(sources))


def animate_anyone_pipeline(
    sources: Sources, reference_net: ReferenceNet, denoising_unet: DenoisingUNet, pose_guider: PoseGuider
) -> AnimationPipeline:
    """The networks with image encoder, VAE and schedule."""
    family = sources.config.family
    image_encoder = sources.folder("image_encoder", CLIPVisionModelWithProjection)
    vae = sources.folder("vae", AutoencoderKL)
    width, context = denoising_unet.config.block_out_channels[0], denoising_unet.config.cross_attention_dim
    check_fit(reference_net, denoising_unet, vae)
    if pose_guider.config.conditioning_embedding_channels != width:
        channels = pose_guider.config.conditioning_embedding_channels
        raise UserError(f"the pose guider gives {channels} channels, the denoising UNet takes {width}")
    if image_encoder.config.projection_dim != context:
        dimension = image_encoder.config.projection_dim
        raise UserError(f"image_encoder= gives {dimension} channels, the UNets' cross-attention takes {context}")
    return AnimationPipeline(
        vae=vae,
        image_encoder=image_encoder,
        reference_net=reference_net,
        denoising_unet=denoising_unet,
        pose_guider=pose_guider,
        scheduler=published_scheduler(family),
        window_size=WINDOWS[family],
    )


def new_pose_guider(sources: Sources) -> PoseGuider:
    """The pose guider that training starts with."""
    sources.notes.append("the pose guider is new: until it is trained, poses have no effect")
    return sources.load("controlnet", pose_guider_from_control_net)


def check_fit(reference_net: ReferenceNet, denoising_unet: DenoisingUNet, vae: AutoencoderKL) -> None:
    """Refuse networks that do not belong together."""
    ours, theirs = denoising_unet.config, reference_net.config
    for name in ("block_out_channels", "layers_per_block", "in_channels", "cross_attention_dim"):
        if ours[name] != theirs[name]:
            raise UserError(f"{name} is {theirs[name]} in the reference net and {ours[name]} in the denoising UNet")
    if vae.config.latent_channels != ours.in_channels:
        raise UserError(f"vae= has {vae.config.latent_channels} latent channels, the UNets take {ours.in_channels}")
