"""Saved pipelines: a folder with one sub-folder a component, as `save_pretrained` of diffusers writes it."""

import json
from pathlib import Path

import torch

from core.errors import UserError
from models.pipeline import AnimationPipeline

COMPONENTS = ("vae", "image_encoder", "reference_net", "denoising_unet", "pose_guider", "scheduler")


def load_pipeline(folder: str | Path, dtype: torch.dtype = torch.float32) -> AnimationPipeline:
    """Load a pipeline from a local folder; nothing is downloaded.

    Raises:
        UserError: the folder is missing, is not a pipeline, or lacks a component or its weights.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"model={folder} does not exist; give a pipeline folder (train.py writes output/pipeline)")
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"model={folder} is not a pipeline folder: it has no model_index.json")
    try:
        named = json.loads(index.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"model={folder}: model_index.json is not valid JSON") from None
    for component in COMPONENTS:
        files = {path.suffix for path in (folder / component).glob("*")}
        wanted = {".json"} if component == "scheduler" else {".json", ".safetensors"}
        if component not in named or not wanted <= files:
            raise UserError(f"model={folder}: component {component} is missing or incomplete")
    try:
        pipeline = AnimationPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"model={folder} cannot be loaded: {error}") from None
    for component in COMPONENTS:
        if isinstance(module := getattr(pipeline, component), torch.nn.Module):
            module.eval()
    return pipeline


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
