"""Pipeline folder, as `infer.py` loads it, from a checkpoint of any strategy; `train.py` ends with it too.

    python -m training.export checkpoint=runs/stage1 output=pipeline [average=false] [dtype=float16]

It needs no GPU and no second process.
"""

import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.config import load_config
from core.errors import UserError, run_command
from core.files import complete_folder
from models.animators.registry import supervised_attention, write_training_facts
from models.lora import merge, save_lora
from models.pipeline import AnimationPipeline
from training.build import make_networks, make_pipeline, set_trainable, trained_window
from training.checkpoint import checkpoints
from training.config import ExportConfig, TrainConfig
from training.ema import FILE as AVERAGE


def export_name(config: TrainConfig) -> str:
    """Name of a run's result in its output folder: "pipeline", or "lora" for adapters by themselves."""
    return "lora" if config.trainable == "lora" and config.lora.export == "separate" else "pipeline"


def export_checkpoint(config: TrainConfig, checkpoint: Path, folder: Path, average: bool = True) -> None:
    """Write the pipeline folder of a checkpoint, or the folder of its adapters, with EMA weights if `average`."""
    # Networks are built anew: what was trained comes from the checkpoint, the rest from where the run took it.
    vae, model = make_networks(config)
    set_trainable(model, config)
    load_trained(model, checkpoint, config, average)
    pipeline = make_pipeline(vae, model, config.noise, trained_window(config))
    try:
        with complete_folder(folder) as temporary:
            if export_name(config) == "lora":
                save_lora(pipeline, temporary)
            else:
                save_pipeline(pipeline, temporary, config)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{folder} could not be written ({reason}); {checkpoint} is complete: make room, then python -m "
            f"training.export checkpoint={checkpoint} output={folder}"
        ) from None


def save_pipeline(pipeline: AnimationPipeline, folder: Path, config: TrainConfig) -> None:
    """Write a pipeline with its adapters merged, in `export_dtype`, and how it was trained; networks in memory keep
    their dtype.
    """
    if config.trainable == "lora":
        for name in pipeline.animator_cls.adapted_networks:
            merge(getattr(pipeline, name))
    pipeline.save_pretrained(folder)
    # Later stages keep what supervision made of the attention, so what a run begins with counts too.
    begun = config.model.init or config.model.start
    before = False if begun is None else supervised_attention(begun)
    write_training_facts(folder, True if config.attention.weight > 0 else before)
    for file in folder.rglob("*.safetensors") if config.export_dtype == "float16" else ():
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        save_file({n: t.half() if t.dtype == torch.float32 else t for n, t in tensors.items()}, file, metadata)


def load_trained(model: nn.Module, checkpoint: Path, config: TrainConfig, average: bool = True) -> None:
    """Load trained weights from a checkpoint, and frozen ones unless they come from `model.init`."""
    weights = checkpoint_weights(checkpoint)
    if average and (checkpoint / AVERAGE).is_file():
        weights |= load_file(checkpoint / AVERAGE)
    # Buffers are tables that follow from the configuration, and DeepSpeed's bf16 would have rounded them.
    for name, parameter in model.named_parameters():
        tensor, found = parameter.data, weights.get(name)
        if not parameter.requires_grad and (config.model.init is not None or found is None):
            continue
        if found is None or found.shape != tensor.shape:
            shape = "missing" if found is None else f"of shape {tuple(found.shape)}, not {tuple(tensor.shape)}"
            raise UserError(f"{checkpoint} does not fit this configuration: {name} is {shape}")
        tensor.copy_(found)


def checkpoint_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Whole weights by name from a checkpoint of any strategy; float32 where DeepSpeed kept masters."""
    if (checkpoint / "model.safetensors").is_file():
        return load_file(checkpoint / "model.safetensors")
    if (checkpoint / "pytorch_model").is_dir():
        # DeepSpeed takes seconds to import, and most checkpoints need none of it.
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="pytorch_model")
    if (checkpoint / "pytorch_model_fsdp_0").is_dir():
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        with tempfile.TemporaryDirectory() as folder:
            dcp_to_torch_save(checkpoint / "pytorch_model_fsdp_0", f"{folder}/weights.pt")
            return torch.load(f"{folder}/weights.pt", weights_only=True)["model"]
    raise UserError(f"{checkpoint} holds no weights")


def find_checkpoint(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"checkpoint={path} is not a folder; give a checkpoint-<step> or a run's output folder")
    if complete := [folder for _, folder in checkpoints(path.parent) if folder == path]:
        return complete[0]
    found = checkpoints(path)
    if not found:
        raise UserError(f"checkpoint={path} is no complete checkpoint and holds none")
    return found[-1][1]


def main(arguments: list[str]) -> None:
    settings = load_config(ExportConfig, arguments)
    checkpoint = find_checkpoint(settings.checkpoint)
    config = load_config(TrainConfig, [], files=[checkpoint.parent / "config.yaml"])
    config.model.init = settings.init or config.model.init
    config.model.vae = settings.vae or config.model.vae
    config.export_dtype = settings.dtype or config.export_dtype
    export_checkpoint(config, checkpoint, Path(settings.output), settings.average)
    print(f"pipeline of {checkpoint} in {settings.output}")


if __name__ == "__main__":
    run_command(main)
