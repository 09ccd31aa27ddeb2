"""Saved pipelines: a folder with one sub-folder a component, as `save_pretrained` of diffusers writes it."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, SchedulerMixin
from transformers import CLIPVisionModel, CLIPVisionModelWithProjection

from core.errors import UserError
from models.animators.base import Animator
from models.animators.disco.model import DiscoPipeline
from models.animators.disco.networks import DiscoControlNet, DiscoUNet, TokenProjection
from models.animators.dream_pose.model import DreamPosePipeline
from models.animators.dream_pose.networks import DreamPoseUNet, ImageAdapter
from models.animators.magic_animate.model import MagicAnimatePipeline
from models.animators.magic_animate.networks import PromptEmbedding
from models.checkpoints.folders import load_folder
from models.lora import FOLDER as LORA_FOLDER
from models.lora import load_lora
from models.pipeline import AnimationPipeline
from models.unets import DenoisingUNet, PoseGuider, ReferenceNet

SHIPPED_MODEL = Path(__file__).parents[2] / "assets" / "tiny_model"
# Smaller ones, of each kind one, for comparisons; see their README.
SMALL_ANIMATORS = tuple(
    SHIPPED_MODEL.parent / "small_animators" / name
    for name in ("animate_anyone", "magic_animate", "disco", "dream_pose")
)
# Saved values of earlier releases that have another name today: (key of the index, value) -> value.
OLD_VALUES = {("null_tokens", "empty_picture"): "empty_image"}
COMPONENTS = ("vae", "image_encoder", "reference_net", "denoising_unet", "pose_guider", "scheduler")
PIPELINES = {
    kind.__name__: kind for kind in (AnimationPipeline, MagicAnimatePipeline, DiscoPipeline, DreamPosePipeline)
}
NETWORKS = {
    kind.__name__: kind
    for kind in (
        AutoencoderKL,
        AutoencoderTiny,
        CLIPVisionModel,
        CLIPVisionModelWithProjection,
        ControlNetModel,
        DenoisingUNet,
        DiscoControlNet,
        DiscoUNet,
        DreamPoseUNet,
        ImageAdapter,
        PoseGuider,
        PromptEmbedding,
        ReferenceNet,
        TokenProjection,
    )
}


def pipeline_of(animator: type[Animator]) -> type[AnimationPipeline]:
    """The pipeline class of an animator's class."""
    return next(kind for kind in PIPELINES.values() if kind.animator_cls is animator)


def load_pipeline(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
) -> AnimationPipeline:
    """Load a pipeline from a local folder; nothing is downloaded, and every tensor must be there.

    Args:
        lora: folder of adapters that are added to the weights; those in the pipeline folder's own `lora` always are.
        lora_scale: weight of all adapters; 1 as they were trained.

    Raises:
        UserError: the folder is missing, is not a pipeline, lacks a component, or its weights do not fit.
    """
    folder = Path(folder)
    index = read_index(folder)
    kind = PIPELINES.get(index.get("_class_name"))
    if kind is None:
        known = ", ".join(PIPELINES)
        raise UserError(f"model={folder} is a {index.get('_class_name')}; the pipelines known here are {known}")
    arguments = {}
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        if parameter.default is inspect.Parameter.empty:
            arguments[name] = load_component(folder, name, index.get(name), dtype)
        elif name in index:
            arguments[name] = index[name]
    pipeline = kind(**arguments)
    for adapters in (folder / LORA_FOLDER if (folder / LORA_FOLDER).is_dir() else None, lora):
        if adapters is not None:
            load_lora(pipeline, adapters, lora_scale)
    return pipeline


def read_index(folder: Path) -> dict[str, Any]:
    """The contents of `model_index.json`, values of earlier releases under their names of today."""
    if not folder.is_dir():
        raise UserError(f"model={folder} does not exist; give a pipeline folder (train.py writes output/pipeline)")
    path = folder / "model_index.json"
    if not path.is_file():
        raise UserError(f"model={folder} is not a pipeline folder: it has no model_index.json")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"model={folder}: model_index.json is not valid JSON") from None
    if not isinstance(index, dict):
        raise UserError(f"model={folder}: model_index.json is not a pipeline's index")
    return {key: OLD_VALUES.get((key, str(value)), value) for key, value in index.items()}


def load_component(folder: Path, name: str, entry: Any, dtype: torch.dtype) -> Any:
    """One network or the scheduler; `entry` is its [library, class] in the index."""
    files = {path.suffix for path in (folder / name).glob("*")}
    if not isinstance(entry, list) or len(entry) != 2 or ".json" not in files:
        raise UserError(f"model={folder}: component {name} is missing or incomplete")
    if name == "scheduler":
        kind = getattr(diffusers, str(entry[1]), None)
        if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
            raise UserError(f"model={folder}: component {name} is a {entry[1]}, which diffusers does not have")
        try:
            return kind.from_pretrained(folder / name)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"model={folder}: component {name} cannot be loaded: {error}") from None
    if entry[1] not in NETWORKS:
        raise UserError(f"model={folder}: component {name} is a {entry[1]}, not one of {', '.join(NETWORKS)}")
    if ".safetensors" not in files:
        raise UserError(f"model={folder}: component {name} is missing or incomplete")
    return load_folder(NETWORKS[entry[1]], folder / name, f"model={folder}: component {name}", dtype)


def choose_device(device: str, dtype: str, process: int = 0) -> tuple[torch.device, torch.dtype]:
    """Device and number format of inference.

    Args:
        device: "auto" takes CUDA when there is one, or a torch device.
        dtype: "auto" takes bfloat16 on CUDA and float32 elsewhere, or "float32", "bfloat16", "float16".
        process: number of this process on its machine, which gets the CUDA device of that number.

    Raises:
        UserError: a device that torch does not know or this machine does not have, or another dtype.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype != "auto" and dtype not in known:
        raise UserError(f"dtype={dtype} is not one of auto, {', '.join(known)}")
    if device == "auto":
        device = f"cuda:{process}" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device} cannot be used: {str(error).splitlines()[0]}") from None
    if dtype == "auto":
        dtype = "bfloat16" if chosen.type == "cuda" else "float32"
    return chosen, known[dtype]
