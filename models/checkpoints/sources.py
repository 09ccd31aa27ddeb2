"""The files that `convert` is given, and where the publishers' instructions put them."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import MISSING
from torch import Tensor

from core.errors import UserError
from models.checkpoints.files import read_tensors
from models.checkpoints.folders import load_folder
from models.checkpoints.kinds import OTHER_KINDS, SINGLE_FILE

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Frames that the published models were trained on at a time; None: as many as their motion modules know.
WINDOWS = {"animate_anyone": 24, "musepose": 48, "stable_diffusion": None, "magic_animate": 16, "disco": 16}


@dataclass
class ConvertConfig:
    """`convert`: files of one family -> a pipeline folder.

    family: "animate_anyone", "musepose", "magic_animate", or "stable_diffusion", from which to train an AnimateAnyone.
    output: the folder to write.
    dtype: of the weights written: float32, float16 or bfloat16.
    null_tokens: of disco, what the unconditional half of guidance sees: "empty_image" for models trained with
        dropped references (drop_ref above 0), "zeros" for the others.
    weights: folder that holds the files under their published names; each can also be given by itself:
        animate_anyone, musepose: denoising_unet, motion_module, reference_unet, pose_guider, image_encoder, vae;
            controlnet instead of pose_guider starts a new one
        magic_animate: appearance_encoder, densepose_controlnet, temporal_attention, text_encoder, vae
        stable_diffusion: unet, controlnet, image_encoder, vae, and optionally motion_module
        disco: checkpoint, in which everything is
        dreampose: unet, adapter, vae, image_encoder; with the unet of Stable Diffusion and no adapter: a new one
    """

    family: str = MISSING
    output: str = MISSING
    dtype: str = "float32"
    weights: str | None = None
    denoising_unet: str | None = None
    motion_module: str | None = None
    reference_unet: str | None = None
    pose_guider: str | None = None
    appearance_encoder: str | None = None
    densepose_controlnet: str | None = None
    temporal_attention: str | None = None
    unet: str | None = None
    adapter: str | None = None
    controlnet: str | None = None
    image_encoder: str | None = None
    text_encoder: str | None = None
    vae: str | None = None
    checkpoint: str | None = None
    null_tokens: str = "empty_image"


# Where the files lie in the folders that the publishers' instructions lead to; the first that exists is taken, and of
# several epochs (*) the last.
PLACES = {
    "denoising_unet": ("denoising_unet.pth",),
    "motion_module": ("motion_module.pth", "mm_sd_v15_v2.ckpt"),
    "reference_unet": ("reference_unet.pth",),
    "pose_guider": ("pose_guider.pth",),
    "appearance_encoder": ("appearance_encoder", "MagicAnimate/appearance_encoder"),
    "densepose_controlnet": ("densepose_controlnet", "MagicAnimate/densepose_controlnet"),
    "temporal_attention": (
        "temporal_attention/temporal_attention.ckpt",
        "MagicAnimate/temporal_attention/temporal_attention.ckpt",
        "temporal_attention.ckpt",
    ),
    "unet": ("unet_epoch_*.pth", "unet", "stable-diffusion-v1-5/unet"),
    "controlnet": ("control_v11p_sd15_openpose", "controlnet"),
    "adapter": ("adapter_*.pth",),
    "image_encoder": (
        "image_encoder",
        "clip-vit-base-patch32",
    ),
    "text_encoder": ("text_encoder", "stable-diffusion-v1-5/text_encoder"),
    "checkpoint": ("mp_rank_00_model_states.pt",),
    "vae": ("vae_*.pth", "sd-vae-ft-mse", "vae"),
}


def file_number(path: Path) -> int:
    """The last number in a file's name; 0 when there is none."""
    return int((re.findall(r"\d+", path.stem) or ["0"])[-1])


class Sources:
    """The files that a conversion names."""

    def __init__(self, config: ConvertConfig):
        self.config = config
        self.dtype = DTYPES[config.dtype]
        self.notes: list[str] = []

    def path(self, name: str, required: bool = True) -> Path | None:
        """The file or folder given as `name=`, or found in `weights=`."""
        if (given := getattr(self.config, name)) is not None:
            return Path(given)
        if self.config.weights is not None:
            folder, places = Path(self.config.weights), PLACES[name]
            if self.config.family == "musepose":  # beside AnimateAnyone's, its files lie in a folder of their own
                places = (*(f"MusePose/{place}" for place in places), *places)
            for place in places:
                if found := list(folder.glob(place)):
                    return max(found, key=file_number)
        if required:
            where = f" and not in weights={self.config.weights}" if self.config.weights else ""
            raise UserError(f"{name}= is required for family={self.config.family}{where}")
        return None

    def tensors(self, name: str) -> tuple[dict[str, Tensor], str]:
        """Tensors of a file, and the file's name for errors."""
        path = self.path(name)
        tensors = read_tensors(path, name)
        if any(key.startswith(SINGLE_FILE) for key in tensors):
            raise UserError(f"{name}={path} is {OTHER_KINDS[SINGLE_FILE]}")
        return tensors, f"{name}={path}"

    def load(self, name: str, build: Callable[..., torch.nn.Module], **arguments: object) -> torch.nn.Module:
        """The network that `build` makes of a file."""
        tensors, what = self.tensors(name)
        return build(tensors, what, dtype=self.dtype, **arguments)

    def folder(self, name: str, kind: type, dtype: torch.dtype | None = None) -> torch.nn.Module:
        """A network from a folder of diffusers or transformers."""
        path = self.path(name)
        return load_folder(kind, path, f"{name}={path}", dtype or self.dtype)
