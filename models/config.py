"""Names of animators, solvers and shipped models, and keys of `models.checkpoints`: known without networks."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from omegaconf import MISSING

from core.config import choice
from core.errors import UserError

# One line an animator: name, as `model.animator=` takes it -> module and class of its pipeline, imported when needed.
# Beside the animator's module, `checkpoint.py` may list the published files it can be made of.
ANIMATORS = {
    "animate_anyone": f"{__package__}.pipeline:AnimationPipeline",
    "magic_animate": f"{__package__}.animators.magic_animate.model:MagicAnimatePipeline",
    "disco": f"{__package__}.animators.disco.model:DiscoPipeline",
    "dream_pose": f"{__package__}.animators.dream_pose.model:DreamPosePipeline",
    "wan_animate": f"{__package__}.animators.wan_animate.model:WanAnimatePipeline",
}
SHIPPED_MODEL = Path(__file__).parents[1] / "assets" / "tiny_model"
# Smaller ones, one of each animator, for comparisons; see their README.
SMALL_ANIMATORS = tuple(
    folder for name in ANIMATORS if (folder := SHIPPED_MODEL.parent / "small_animators" / name).is_dir()
)
# DDIM; DPM-Solver++ of second order with multisteps (Lu et al., 2022); UniPC of second order (Zhao et al., 2023).
SOLVER_NAMES = ("ddim", "dpm++", "unipc")
IMAGE_ENCODER_HEADS = 4  # of new networks
# Noise schedule of new models, as DDIM's settings: what a model is trained and sampled with.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
EVERY_LEVEL = (0.0, 1.0)  # of noise
# Context of the unconditional half of DisCo's guidance: CLIP's tokens of an empty cut-out, for models trained with
# dropped references (`drop_ref`), or zeros, for the others.
NULL_TOKENS = ("empty_image", "zeros")


def check_sampling(guidance_interval: Sequence[float], solver: str | None) -> None:
    """UserError for an interval of noise levels or a solver that does not exist."""
    interval = list(guidance_interval)
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise UserError(f"guidance_interval={interval} must be two numbers, 0 <= first < second <= 1")
    if solver is not None and solver not in SOLVER_NAMES:
        raise UserError(f"solver={solver} must be one of {', '.join(SOLVER_NAMES)}")


@dataclass(frozen=True)
class ModelSizes:
    """Sizes that a pipeline takes."""

    multiple: int = 1  # that an image's sides in pixels must be of
    longest_window: int | None = None  # frames that can be denoised together; None: any number
    only: tuple[int, int] | None = None  # (width, height) in pixels; None: any multiple

    @classmethod
    def of_folder(cls, folder: str | Path) -> "ModelSizes":
        """What its JSON files tell before it is loaded; nothing where they cannot be read, for loading says why."""
        try:
            vae, unet = (
                json.loads((Path(folder) / name / "config.json").read_text(encoding="utf-8"))
                for name in ("vae", "denoising_unet")
            )
            levels = len(vae.get("encoder_block_out_channels") or vae["block_out_channels"])
            return cls(2 ** (levels - 1), unet.get("motion_max_seq_length") if "norm_scope" in unet else None)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()


class NetworkSizes(Protocol):
    """See `training.config.ModelConfig`, which has them all."""

    block_out_channels: list[int]
    attention: list[str] | None
    layers_per_block: int
    attention_heads: list[int]
    norm_num_groups: int
    motion_max_seq_length: int
    pose_channels: list[int]
    context_dim: int
    image_encoder_size: int
    image_encoder_patch: int
    image_encoder_width: int
    image_encoder_layers: int


def resolution_settings(sizes: NetworkSizes) -> tuple[list[str], tuple[int, ...]]:
    """Where each resolution of new UNets has attention, and its heads; finest first."""
    widths, heads = list(sizes.block_out_channels), list(sizes.attention_heads)
    attention = list(sizes.attention or ["both"] * len(widths))
    if len(attention) != len(widths) or attention[-1:] != ["both"] or not {"none", "up", "both"} >= set(attention):
        raise UserError(
            f"model.attention={attention} needs one of none, up, both for each of model.block_out_channels={widths}, "
            "and both for the last"
        )
    if len(heads) == 1:
        heads *= len(widths)
    if len(heads) != len(widths) or any(h < 1 or width % h for h, width in zip(heads, widths, strict=True)):
        raise UserError(
            f"model.attention_heads={heads} needs one number, or one for each of model.block_out_channels={widths} "
            "that divides it"
        )
    if any(width % sizes.norm_num_groups for width in widths):
        raise UserError(
            f"model.norm_num_groups={sizes.norm_num_groups} must divide every one of model.block_out_channels={widths}"
        )
    if len(sizes.pose_channels) < 2:
        raise UserError(f"model.pose_channels={list(sizes.pose_channels)} needs at least two entries")
    if sizes.image_encoder_patch > sizes.image_encoder_size or sizes.image_encoder_width % IMAGE_ENCODER_HEADS:
        raise UserError(
            f"model.image_encoder_patch={sizes.image_encoder_patch} must not be above "
            f"model.image_encoder_size={sizes.image_encoder_size}, and model.image_encoder_width="
            f"{sizes.image_encoder_width} must be a multiple of {IMAGE_ENCODER_HEADS}"
        )
    return attention, tuple(heads)


@dataclass
class VerifyConfig:
    """`verify`: known answers of a fixture against those computed here."""

    fixture: str = MISSING  # path without suffix


@dataclass
class ConvertConfig:
    """`convert`; families add a key for each of their files, see `published_file`."""

    family: str = MISSING  # the published model; `convert family=NAME --help` shows the keys of its files
    output: str = MISSING  # the folder to write
    dtype: str = choice("float32", ("float32", "float16", "bfloat16"))  # of the weights written
    weights: str | None = None  # folder that holds the files under their published names


def published_file(*places: str) -> Any:
    """A key that names a file, else the first that exists of these patterns in `weights=`."""
    return field(default=None, metadata={"places": places})


@dataclass
class AnimateAnyoneFiles(ConvertConfig):
    """`convert family=animate_anyone` and `musepose`; controlnet in place of pose_guider starts a new one."""

    denoising_unet: str | None = published_file("denoising_unet.pth")  # a Stable Diffusion UNet
    motion_module: str | None = published_file("motion_module.pth", "mm_sd_v15_v2.ckpt")  # those of AnimateDiff
    reference_unet: str | None = published_file("reference_unet.pth")  # a Stable Diffusion UNet without output layers
    pose_guider: str | None = published_file("pose_guider.pth")  # the conditioning embedding of a ControlNet
    controlnet: str | None = published_file("control_v11p_sd15_openpose", "controlnet")  # in place of pose_guider
    image_encoder: str | None = published_file("image_encoder")  # folder of CLIP's
    vae: str | None = published_file("sd-vae-ft-mse", "vae")  # folder of Stable Diffusion's


@dataclass
class StableDiffusionFiles(ConvertConfig):
    """`convert family=stable_diffusion`; without motion_module the motion modules are new."""

    unet: str | None = published_file("unet", "stable-diffusion-v1-5/unet")  # folder of Stable Diffusion's
    motion_module: str | None = published_file("motion_module.pth", "mm_sd_v15_v2.ckpt")  # those of AnimateDiff
    controlnet: str | None = published_file(
        "control_v11p_sd15_openpose", "controlnet"
    )  # that the pose guider starts as
    image_encoder: str | None = published_file("image_encoder")  # folder of CLIP's
    vae: str | None = published_file("sd-vae-ft-mse", "vae")  # folder of Stable Diffusion's


@dataclass
class MagicAnimateFiles(ConvertConfig):
    """`convert family=magic_animate`."""

    # folder of the reference UNet
    appearance_encoder: str | None = published_file("appearance_encoder", "MagicAnimate/appearance_encoder")
    # folder of the ControlNet that reads DensePose images
    densepose_controlnet: str | None = published_file("densepose_controlnet", "MagicAnimate/densepose_controlnet")
    # file of the UNet with motion modules
    temporal_attention: str | None = published_file(
        "temporal_attention/temporal_attention.ckpt",
        "MagicAnimate/temporal_attention/temporal_attention.ckpt",
        "temporal_attention.ckpt",
    )
    # folder of Stable Diffusion's
    text_encoder: str | None = published_file("text_encoder", "stable-diffusion-v1-5/text_encoder")
    vae: str | None = published_file("sd-vae-ft-mse", "vae")  # folder of Stable Diffusion's


@dataclass
class DiscoFiles(ConvertConfig):
    """`convert family=disco`: checkpoint; or unet, image_encoder and vae to train a new one."""

    checkpoint: str | None = published_file("mp_rank_00_model_states.pt")  # everything is in it
    unet: str | None = published_file("unet", "stable-diffusion-v1-5/unet")  # folder of Stable Diffusion's
    image_encoder: str | None = published_file("image_encoder")  # folder of CLIP's
    vae: str | None = published_file("sd-vae-ft-mse", "vae")  # folder of Stable Diffusion's
    # empty_image: for models trained with dropped references (drop_ref above 0); zeros: for the others
    null_tokens: str = choice("empty_image", NULL_TOKENS)


@dataclass
class DreamPoseFiles(ConvertConfig):
    """`convert family=dreampose`; with the unet of Stable Diffusion and no adapter: a new one."""

    # file of its own, or folder of Stable Diffusion's
    unet: str | None = published_file("unet_epoch_*.pth", "unet", "stable-diffusion-v1-5/unet")
    adapter: str | None = published_file("adapter_*.pth")  # file of what joins the embeddings of image and VAE
    vae: str | None = published_file("vae_*.pth", "sd-vae-ft-mse", "vae")  # file of its own, or a folder
    image_encoder: str | None = published_file("image_encoder", "clip-vit-base-patch32")  # folder of CLIP's


# Published models that `convert family=` knows -> the keys of their files.
FAMILIES = {
    "animate_anyone": AnimateAnyoneFiles,
    "musepose": AnimateAnyoneFiles,
    "stable_diffusion": StableDiffusionFiles,
    "magic_animate": MagicAnimateFiles,
    "disco": DiscoFiles,
    "dreampose": DreamPoseFiles,
}
