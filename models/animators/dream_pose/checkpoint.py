"""DreamPose's published files, and Stable Diffusion's to train from.

unet_epoch_<n>.pth      a Stable Diffusion UNet whose first convolution takes five poses beside the latents
adapter_<n>.pth         the four tensors of `ImageAdapter`
vae_<n>.pth             a VAE whose decoder was fine-tuned to a person
"""

import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPVisionModel

from core.errors import UserError
from models.animators.dream_pose.model import DreamPosePipeline
from models.animators.dream_pose.networks import DreamPoseUNet, ImageAdapter, branch_weights, portrait_grid
from models.checkpoints.convert import IMAGE_SCHEDULE, Family, Recognised, Sources
from models.checkpoints.loading import Shapes, compare, load_strictly, on_meta, shapes_of, shapes_on_meta
from models.checkpoints.networks import Tensors, UNetSizes, has, load_autoencoder, unet_arguments, unet_sizes
from models.checkpoints.verify import Fixture
from models.config import DreamPoseFiles
from models.vae import vae_encode, vae_scale_factor

POSES = 5
# Channels of a pose image that are used, by their count: U and V of (part, U, V), or all of a coloured figure.
IMAGE_CHANNELS = {2: (1, 2), 3: (0, 1, 2)}
# What the published file lacks: it follows from the VAE.
NULL_LATENTS = "null_latents"


def make_unet(sizes: UNetSizes, channels: tuple[int, ...], poses: int = POSES) -> DreamPoseUNet:
    return DreamPoseUNet(
        attention_head_dim=sizes.num_attention_heads,
        poses=poses,
        pose_channels=channels,
        pose_kind="OpenPose" if len(channels) == 3 else "DensePose",
        **unet_arguments(sizes),
    )


def pose_channels(sizes: UNetSizes) -> tuple[int, ...] | None:
    """Channels of a pose image that a UNet of these sizes uses; None: it is not DreamPose's."""
    # One channel is not taken for a pose's: UNets for inpainting have five channels too many.
    channels, rest = divmod(sizes.in_channels - sizes.out_channels, POSES)
    return None if rest else IMAGE_CHANNELS.get(channels)


def load_dream_pose_unet(
    tensors: Tensors,
    what: str,
    sizes: UNetSizes | None = None,
    dtype: torch.dtype = torch.float32,
    poses: int = POSES,
    channels: tuple[int, ...] | None = None,
) -> DreamPoseUNet:
    """UNet from `unet_epoch_<n>.pth`; without `channels`, 2 are DensePose's, 3 those of a figure."""
    sizes = sizes or unet_sizes(shapes_of(tensors))
    channels = channels or pose_channels(sizes)
    if channels is None:
        raise UserError(
            f"{what} takes {sizes.in_channels} input channels; DreamPose's takes {sizes.out_channels} of the latents "
            f"and {POSES} poses of 2 or 3 channels"
        )
    return load_strictly(on_meta(make_unet, sizes, channels, poses), tensors, what, dtype)


def widened(tensors: Tensors, channels: int = 2) -> dict[str, Tensor]:
    """Tensors of a Stable Diffusion UNet with zeros for new pose channels, which change nothing."""
    kernel = tensors["conv_in.weight"]
    new = kernel.new_zeros(kernel.shape[0], POSES * channels, *kernel.shape[2:])
    return {**tensors, "conv_in.weight": torch.cat([kernel, new], dim=1)}


def load_adapter(
    tensors: Tensors, what: str, dtype: torch.dtype = torch.float32, latent_grid: tuple[int, int] | None = None
) -> ImageAdapter:
    """Adapter from `adapter_<n>.pth`, its null latents zero."""
    network = on_meta(ImageAdapter, **adapter_arguments(shapes_of(tensors), latent_grid))
    return load_strictly(network, tensors, what, dtype, unused=(NULL_LATENTS,))


def adapter_arguments(shapes: Shapes, latent_grid: tuple[int, int] | None = None) -> dict:
    """Arguments of `ImageAdapter` from the shapes of its tensors; what these do not tell is as published."""
    published = {"vae2clip.weight": (768, 1280), "linear1.weight": (50, 54)}
    found = {name: shapes[name] if len(shapes.get(name, ())) == 2 else shape for name, shape in published.items()}
    (channels, cells), (tokens, both) = found.values()
    return {
        "clip_tokens": tokens,
        "channels": channels,
        "latent_channels": max(both - tokens, 1),
        "latent_grid": latent_grid or portrait_grid(cells),
    }


def dream_pose_unet_manifest(sizes: UNetSizes) -> Shapes:
    return shapes_on_meta(make_unet, sizes, pose_channels(sizes))


def adapter_manifest(shapes: Shapes) -> Shapes:
    """`adapter_<n>.pth` of the sizes that these shapes tell."""
    entries = shapes_on_meta(ImageAdapter, **adapter_arguments(shapes))
    return {name: shape for name, shape in entries.items() if name != NULL_LATENTS}


def recognise_unet(shapes: Shapes) -> Recognised | None:
    if "up_blocks.0.resnets.0.conv1.weight" not in shapes or "conv_out.weight" not in shapes:
        return None
    sizes = unet_sizes(shapes)
    channels = pose_channels(sizes)
    if channels is None:
        return None
    detail = f"{sizes}, {POSES} poses of {len(channels)} channels"
    return Recognised("DreamPose unet_epoch", detail, compare(dream_pose_unet_manifest(sizes), shapes))


def recognise_adapter(shapes: Shapes) -> Recognised | None:
    if not has(shapes, "vae2clip."):
        return None
    arguments = adapter_arguments(shapes)
    rows, columns = arguments["latent_grid"]
    detail = f"{arguments['clip_tokens']} tokens, latents of {rows} x {columns}"
    return Recognised("DreamPose adapter", detail, compare(adapter_manifest(shapes), shapes))


def make_dream_pose(sources: Sources) -> DreamPosePipeline:
    """DreamPose as published; or, from a UNet without pose channels, the weights that its training starts with."""
    sources.require("unet", "image_encoder", "vae")
    tensors, what = sources.tensors("unet")
    sizes = unet_sizes(shapes_of(tensors))
    image_encoder = sources.load_folder("image_encoder", CLIPVisionModel)
    if sizes.in_channels == sizes.out_channels:
        tensors = widened(tensors)
        adapter = ImageAdapter(clip_token_count(image_encoder), image_encoder.config.hidden_size, sizes.out_channels)
        adapter = adapter.eval().to(sources.dtype)
        sources.notes.append(
            "the UNet's pose channels and the adapter are new: until they are trained, poses and the "
            "VAE's view of the reference have no effect"
        )
    else:
        check_epochs(sources)
        adapter = sources.load("adapter", load_adapter)
    denoising_unet = load_dream_pose_unet(tensors, what, dtype=sources.dtype)
    # float32 until the null latents are made
    if sources.path("vae").is_dir():
        vae = sources.load_folder("vae", AutoencoderKL, torch.float32)
    else:
        vae = load_autoencoder(*sources.tensors("vae"))
    check_fit(denoising_unet, adapter, image_encoder, vae)
    adapter.null_latents.data = null_latents(vae, adapter)
    return DreamPosePipeline(
        vae=vae.to(sources.dtype),
        image_encoder=image_encoder,
        adapter=adapter,
        denoising_unet=denoising_unet,
        scheduler=sources.family.scheduler(),
        window_size=sources.family.window,
        sampling=dict(sources.family.sampling) or None,
    )


def check_epochs(sources: Sources) -> None:
    """Refuse a UNet and an adapter that were found in `weights=` and are not of the same epoch."""
    found = [sources.path(name).name for name in ("unet", "adapter")]
    epochs = {re.findall(r"\d+", name)[-1] for name in found if re.findall(r"\d+", name)}
    if sources.config.unet is None and sources.config.adapter is None and len(epochs) > 1:
        raise UserError(
            f"{' and '.join(found)} in weights={sources.config.weights} are not of the same epoch; "
            "give unet= and adapter="
        )


@torch.no_grad()
def null_latents(vae: AutoencoderKL, adapter: ImageAdapter) -> Tensor:
    """Pooled latents of the empty image, grey, (latent channels, rows, columns)."""
    height, width = (2 * vae_scale_factor(vae) * cells for cells in adapter.config.latent_grid)
    grey = torch.zeros(1, vae.config.in_channels, height, width)
    return adapter.pooled(vae_encode(vae, grey))[0].to(adapter.dtype)


def clip_token_count(image_encoder: CLIPVisionModel) -> int:
    # patches, and one for the whole image
    return (image_encoder.config.image_size // image_encoder.config.patch_size) ** 2 + 1


def check_fit(unet: DreamPoseUNet, adapter: ImageAdapter, image_encoder: CLIPVisionModel, vae: AutoencoderKL) -> None:
    """Refuse networks that do not belong together."""
    tokens, channels = adapter.config.clip_tokens, adapter.config.channels
    if (clip_token_count(image_encoder), image_encoder.config.hidden_size) != (tokens, channels):
        found = f"{clip_token_count(image_encoder)} tokens of {image_encoder.config.hidden_size}"
        raise UserError(f"image_encoder= gives {found} channels, the adapter takes {tokens} of {channels}")
    if unet.config.cross_attention_dim != channels:
        wanted = unet.config.cross_attention_dim
        raise UserError(f"the adapter gives {channels} channels, the UNet's cross-attention takes {wanted}")
    latents = vae.config.latent_channels
    for name, wanted in (("UNet", unet.config.out_channels), ("adapter", adapter.config.latent_channels)):
        if latents != wanted:
            raise UserError(f"vae= has {latents} latent channels, the {name} takes {wanted}")


def outputs(fixture: Fixture) -> Iterator[tuple[str, Tensor]]:
    inputs, config = fixture.inputs, fixture.config
    poses, channels = config["poses"], tuple(range(config["pose_channels"]))
    unet = load_dream_pose_unet(
        fixture.checkpoint("unet"), "unet", fixture.unet_sizes(), poses=poses, channels=channels
    )
    rows, columns = inputs["image_latents"].shape[-2:]
    adapter = load_adapter(fixture.checkpoint("adapter"), "adapter", latent_grid=(rows // 2, columns // 2))
    norm_num_groups = config.get("vae", {}).get("norm_num_groups", 32)
    vae = load_autoencoder(fixture.checkpoint("vae"), "vae", norm_num_groups=norm_num_groups)

    image = adapter(inputs["clip_tokens"], inputs["image_latents"])
    null = adapter(inputs["clip_tokens_null"], inputs["image_latents_null"])
    yield "image_tokens", image
    yield "image_tokens_null", null

    latents, timestep = inputs["noisy_latents"], inputs["timestep"]
    # The fixture's poses are as the network takes them, five of every frame; clips have one frame here.
    poses = F.interpolate(inputs["poses"], latents.shape[-2:], mode="nearest")[:, None]
    absent = torch.zeros_like(poses)
    branches = {"null": (absent, null), "image": (absent, image), "image_pose": (poses, image)}
    predictions = {name: unet(latents[:, :, None], timestep, *branch)[:, :, 0] for name, branch in branches.items()}
    for name, prediction in predictions.items():
        yield f"prediction_{name}", prediction
    weights = branch_weights(config["guidance_image"], config["guidance_pose"])
    yield "guided", sum(weight * prediction for weight, prediction in zip(weights, predictions.values(), strict=True))

    yield "vae_mean", vae.encode(inputs["vae_images"]).latent_dist.mean
    yield "vae_decoded", vae.decode(inputs["vae_latents"]).sample


FAMILIES = (
    Family(
        name="dreampose",
        config=DreamPoseFiles,
        make=make_dream_pose,
        schedule=IMAGE_SCHEDULE,
        sampling={"steps": 100, "guidance_scale": 8.0, "size": [512, 640]},
        recognisers=(recognise_adapter, recognise_unet),
        fixture=frozenset({"unet", "adapter", "vae"}),
        outputs=outputs,
    ),
)
