"""The finished model as a pipeline folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from core.files import complete_folder
from models.pipeline import AnimationPipeline


@contextmanager
def averaged_weights(ema: EMAModel | None, trainable: list[nn.Parameter]) -> Iterator[None]:
    """Within the block the trainable parameters hold their moving average, if there is one."""
    if ema is None:
        yield
        return
    ema.store(trainable)
    ema.copy_to(trainable)
    try:
        yield
    finally:
        ema.restore(trainable)


def export_pipeline(
    pipeline: AnimationPipeline, ema: EMAModel | None, trainable: list[nn.Parameter], folder: Path, dtype: str
) -> None:
    """Write the pipeline folder, with averaged weights where there are any.

    Args:
        dtype: "float32" or "float16"; the networks in memory are left as they are.
    """
    with averaged_weights(ema, trainable), complete_folder(folder) as temporary:
        pipeline.save_pretrained(temporary)
        if dtype == "float16":
            for file in temporary.rglob("*.safetensors"):
                halve_weights(file)


def halve_weights(file: Path) -> None:
    """Rewrite a safetensors file with its float32 tensors as float16, metadata kept."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    halved = {name: t.half() if t.dtype == torch.float32 else t for name, t in tensors.items()}
    save_file(halved, file, metadata)
