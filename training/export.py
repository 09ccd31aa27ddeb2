"""Pipeline folder, as `infer.py` loads it, from a checkpoint of any strategy; `train.py` ends with it too.

    python -m training.export checkpoint=runs/stage1 output=pipeline [average=false] [dtype=float16]

It needs no GPU and no second process.
"""

from core.config import check_first
from training.config import ExportConfig

check_first(__name__, ExportConfig, __doc__, paths=("checkpoint", "init", "vae"))


import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from core.config import load_config
from core.errors import UserError, run_command
from core.files import complete_folder
from models.animators.base import Animator
from models.animators.registry import network_folders, supervised_attention, write_training_facts
from models.checkpoints.loading import is_position_table, position_table
from models.checkpoints.streaming import StoredTensors, Written, write_tensors
from models.lora import is_adapter, merged_weight, save_lora, without_adapter
from models.pipeline import AnimationPipeline
from models.vae import VAE, VideoVAE
from training.build import base_digest, describe_networks, make_pipeline, set_trainable, stored_base, trained_window
from training.checkpoint import PROGRESS, check_base, checkpoints, saved_layout
from training.config import ExportConfig, TrainConfig
from training.ema import FILE as AVERAGE


def export_name(config: TrainConfig) -> str:
    """Name of a run's result in its output folder: "pipeline", or "lora" for adapters by themselves."""
    return "lora" if config.trainable == "lora" and config.lora.export == "separate" else "pipeline"


def export_checkpoint(config: TrainConfig, checkpoint: Path, folder: Path, average: bool = True) -> None:
    """Write the pipeline folder of a checkpoint, or the folder of its adapters, with EMA weights if `average`.

    Tensors go from file to file one after the other: a run that exports may have no room for its model twice.
    """
    saved = saved_layout(json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8")))
    check_base(checkpoint, saved.base, base_digest(config.model.init) if saved.base else None)
    vae, model = describe_networks(config)
    with torch.device("meta"):
        set_trainable(model, config)
    find = finder(vae, model, checkpoint, config, average)
    pipeline = make_pipeline(vae, model, config.noise, trained_window(config), config.model.init)
    if config.trainable == "lora":
        adapters = {name: find(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        model.load_state_dict(adapters, strict=False, assign=True)
    try:
        with complete_folder(folder) as temporary:
            if export_name(config) == "lora":
                networks = network_folders(config.model.init).items()
                save_lora(pipeline, temporary, {name: StoredTensors(path, name).digest() for name, path in networks})
            else:
                save_pipeline(pipeline, find, temporary, config)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{folder} could not be written ({reason}); {checkpoint} is complete: make room, then "
            f"python -m training.export checkpoint={checkpoint} output={folder}"
        ) from None


def finder(
    vae: VAE | VideoVAE, model: Animator, checkpoint: Path, config: TrainConfig, average: bool = True
) -> Callable[[str], Tensor]:
    """Function from a name in the model, or in the VAE behind "vae.", to its tensor.

    What was trained comes from the checkpoint, the rest unrounded from where the run took it. New networks come whole
    from the checkpoint, but for position tables: those of DeepSpeed's bf16 are rounded.
    """
    base, weights = stored_base(config, vae, model), checkpoint_weights(checkpoint)
    averages = StoredTensors(checkpoint / AVERAGE, "the average") if average and has_average(checkpoint) else {}
    shapes = {f"vae.{name}": tensor.shape for name, tensor in vae.state_dict().items()}
    shapes |= {name: tensor.shape for name, tensor in model.state_dict().items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def find(name: str) -> Tensor:
        source, where, known = weights, checkpoint, name
        if name in trained:
            source = averages if name in averages else weights
        elif (plain := without_adapter(name)) in base:
            source, where, known = base, config.model.init or config.model.vae, plain
        elif is_position_table(name):
            return position_table(*shapes[name][1:])
        found = source[known] if known in source else None
        if found is None or found.shape != shapes[name]:
            shape = "missing" if found is None else f"of shape {tuple(found.shape)}, not {tuple(shapes[name])}"
            raise UserError(f"{where} does not fit this configuration: {known} is {shape}")
        return found

    return find


def save_pipeline(
    pipeline: AnimationPipeline, find: Callable[[str], Tensor], folder: Path, config: TrainConfig
) -> None:
    """Write a pipeline of networks without weights, which `find` gives, in `export_dtype`, and how it was trained."""
    pipeline.save_config(folder)
    for name, component in pipeline.components.items():
        if component is not None and not isinstance(component, nn.Module):
            component.save_pretrained(folder / name)  # the scheduler, and what prepares inputs
    dtype = getattr(torch, config.export_dtype)
    for part, network in (("vae", pipeline.vae), *pipeline.animator.named_children()):
        if isinstance(network, PreTrainedModel):
            network.save_pretrained(folder / part, state_dict={})
        else:
            network.save_config(folder / part)
        named = network.state_dict(keep_vars=True)
        first = {id(tensor): name for name, tensor in reversed(named.items())}  # of names that share a tensor
        tensors = {
            without_adapter(name): Written(
                tuple(tensor.shape),
                dtype if tensor.is_floating_point() else tensor.dtype,
                partial(merged_weight, network, name, partial(find, f"{part}.{name}")),
            )
            for name, tensor in named.items()
            if not is_adapter(name) and first[id(tensor)] == name
        }
        file = SAFE_WEIGHTS_NAME if isinstance(network, PreTrainedModel) else SAFETENSORS_WEIGHTS_NAME
        write_tensors(folder / part / file, tensors)
    record_training(folder, config)


def record_training(folder: Path, config: TrainConfig) -> None:
    # Later stages keep what supervision made of the attention, so what a run begins with counts too.
    begun = config.model.init or config.model.start
    before = False if begun is None else supervised_attention(begun)
    write_training_facts(folder, True if config.attention.weight > 0 else before)


def has_average(checkpoint: Path) -> bool:
    return (checkpoint / AVERAGE).is_file()


def checkpoint_weights(checkpoint: Path) -> Mapping[str, Tensor]:
    """Whole weights by name from a checkpoint of any strategy; float32 where DeepSpeed kept masters."""
    if (checkpoint / "model.safetensors").is_file():
        return StoredTensors(checkpoint / "model.safetensors", f"checkpoint={checkpoint}")
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
    settings = load_config(ExportConfig, arguments, about=__doc__)
    checkpoint = find_checkpoint(settings.checkpoint)
    config = load_config(TrainConfig, [], files=[checkpoint.parent / "config.yaml"])
    config.model.init = settings.init or config.model.init
    config.model.vae = settings.vae or config.model.vae
    if config.model.init and not Path(config.model.init).is_dir():
        raise UserError(
            f"{checkpoint} was trained on {config.model.init}, which is not there; say init=, where it lies"
        )
    config.export_dtype = settings.dtype or config.export_dtype
    export_checkpoint(config, checkpoint, Path(settings.output), settings.average)
    print(f"pipeline of {checkpoint} in {settings.output}")


if __name__ == "__main__":
    run_command(main)
