"""Names of animators, solvers and shipped models, and keys of `models.checkpoints`: known without networks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from core.config import check_choice
from core.errors import UserError

# One line an animator: name, as `model.animator=` takes it -> module and class of its pipeline, imported when needed.
# Beside the animator's module, `checkpoint.py` may list the published files it can be made of.
ANIMATORS = {
    "animate_anyone": "models.pipeline:AnimationPipeline",
    "magic_animate": "models.animators.magic_animate.model:MagicAnimatePipeline",
    "disco": "models.animators.disco.model:DiscoPipeline",
    "dream_pose": "models.animators.dream_pose.model:DreamPosePipeline",
}
SHIPPED_MODEL = Path(__file__).parents[1] / "assets" / "tiny_model"
# Smaller ones, one of each animator, for comparisons; see their README.
SMALL_ANIMATORS = tuple(
    folder for name in ANIMATORS if (folder := SHIPPED_MODEL.parent / "small_animators" / name).is_dir()
)
# DDIM; DPM-Solver++ of second order with multisteps (Lu et al., 2022); UniPC of second order (Zhao et al., 2023).
SOLVER_NAMES = ("ddim", "dpm++", "unipc")
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


@dataclass
class VerifyConfig:
    """`verify`: known answers of a fixture against those computed here."""

    fixture: str = MISSING  # path without suffix


@dataclass
class ConvertConfig:
    """`convert`; families add a key for each of their files, see `published_file`."""

    family: str = MISSING
    output: str = MISSING  # the folder to write
    dtype: str = "float32"  # of the weights written
    weights: str | None = None  # folder that holds the files under their published names

    def check(self) -> None:
        check_choice(self, "dtype", ("float32", "float16", "bfloat16"))


def published_file(*places: str) -> Any:
    """A key that names a file, else the first that exists of these patterns in `weights=`."""
    return field(default=None, metadata={"places": places})


@dataclass
class AnimateAnyoneFiles(ConvertConfig):
    """`convert family=animate_anyone` and `musepose`; controlnet in place of pose_guider starts a new one."""

    denoising_unet: str | None = published_file("denoising_unet.pth")
    motion_module: str | None = published_file("motion_module.pth", "mm_sd_v15_v2.ckpt")
    reference_unet: str | None = published_file("reference_unet.pth")
    pose_guider: str | None = published_file("pose_guider.pth")
    controlnet: str | None = published_file("control_v11p_sd15_openpose", "controlnet")
    image_encoder: str | None = published_file("image_encoder")
    vae: str | None = published_file("sd-vae-ft-mse", "vae")


@dataclass
class StableDiffusionFiles(ConvertConfig):
    """`convert family=stable_diffusion`; without motion_module the motion modules are new."""

    unet: str | None = published_file("unet", "stable-diffusion-v1-5/unet")
    motion_module: str | None = published_file("motion_module.pth", "mm_sd_v15_v2.ckpt")
    controlnet: str | None = published_file("control_v11p_sd15_openpose", "controlnet")
    image_encoder: str | None = published_file("image_encoder")
    vae: str | None = published_file("sd-vae-ft-mse", "vae")


@dataclass
class MagicAnimateFiles(ConvertConfig):
    appearance_encoder: str | None = published_file("appearance_encoder", "MagicAnimate/appearance_encoder")
    densepose_controlnet: str | None = published_file("densepose_controlnet", "MagicAnimate/densepose_controlnet")
    temporal_attention: str | None = published_file(
        "temporal_attention/temporal_attention.ckpt",
        "MagicAnimate/temporal_attention/temporal_attention.ckpt",
        "temporal_attention.ckpt",
    )
    text_encoder: str | None = published_file("text_encoder", "stable-diffusion-v1-5/text_encoder")
    vae: str | None = published_file("sd-vae-ft-mse", "vae")


@dataclass
class DiscoFiles(ConvertConfig):
    """`convert family=disco`: checkpoint; or unet, image_encoder and vae to train a new one."""

    checkpoint: str | None = published_file("mp_rank_00_model_states.pt")  # everything is in it
    unet: str | None = published_file("unet", "stable-diffusion-v1-5/unet")
    image_encoder: str | None = published_file("image_encoder")
    vae: str | None = published_file("sd-vae-ft-mse", "vae")
    null_tokens: str = "empty_image"  # for models trained with dropped references (drop_ref above 0), or "zeros"

    def check(self) -> None:
        super().check()
        if self.null_tokens not in NULL_TOKENS:
            raise UserError(f"null_tokens={self.null_tokens} is not one of {', '.join(NULL_TOKENS)}")


@dataclass
class DreamPoseFiles(ConvertConfig):
    """`convert family=dreampose`; with the unet of Stable Diffusion and no adapter: a new one."""

    unet: str | None = published_file("unet_epoch_*.pth", "unet", "stable-diffusion-v1-5/unet")
    adapter: str | None = published_file("adapter_*.pth")
    vae: str | None = published_file("vae_*.pth", "sd-vae-ft-mse", "vae")
    image_encoder: str | None = published_file("image_encoder", "clip-vit-base-patch32")


# Published models that `convert family=` knows -> the keys of their files.
FAMILIES = {
    "animate_anyone": AnimateAnyoneFiles,
    "musepose": AnimateAnyoneFiles,
    "stable_diffusion": StableDiffusionFiles,
    "magic_animate": MagicAnimateFiles,
    "disco": DiscoFiles,
    "dreampose": DreamPoseFiles,
}
