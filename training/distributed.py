"""The processes of a run: how they talk, what DeepSpeed must be told, and what cannot work is refused early."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, broadcast_object_list
from transformers.integrations import unset_hf_deepspeed_config

from core.config import load_config
from core.errors import UserError
from training.config import TrainConfig
from training.vae_config import VAEConfig

# The main process may render a cache or sample a validation while the others wait for it.
PATIENCE = timedelta(hours=4)
SHARDED = ("zero3", "fsdp")
GOODBYE = 0.5  # seconds


def make_accelerator(config: TrainConfig | VAEConfig, output: Path) -> Accelerator:
    """Accelerate's front end. Without a GPU, processes talk over gloo.

    Raises:
        UserError: a launch that this machine cannot serve, or one that disagrees with the configuration.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    graphics = torch.cuda.is_available()
    check_launch(launched, deepspeed, graphics)
    settings = {"timeout": PATIENCE} if graphics else {"timeout": PATIENCE, "backend": "gloo"}
    accelerator = Accelerator(
        # Accelerate chooses gloo for processes on a CPU, but not for DeepSpeed, which must not be told `cpu`.
        cpu=not deepspeed and not graphics and launched > 1,
        gradient_accumulation_steps=config.gradient_accumulation,
        mixed_precision=config.mixed_precision,
        log_with="tensorboard",
        project_dir=output,
        # Gradients lie in the buckets that DDP exchanges; by default it would copy them, 4 bytes a parameter more.
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            *([InitProcessGroupKwargs(**settings)] if launched > 1 or deepspeed else []),
        ],
    )
    if accelerator.num_processes != launched:
        raise UserError(
            f"{launched} processes were started but {accelerator.num_processes} take part; "
            "remove use_cpu: true from the accelerate configuration"
        )
    # `gradient_accumulation_steps` of an accelerate configuration would win over ours.
    accelerator.gradient_accumulation_steps = config.gradient_accumulation
    if deepspeed:
        configure_deepspeed(accelerator, config)
    return accelerator


def check_launch(launched: int, deepspeed: bool, graphics: bool) -> None:
    """Refuse launches that would train something else than was asked for, or fail late."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not graphics:
        raise UserError("FSDP needs GPUs; on CPUs use configs/accelerate/ddp.yaml or zero3.yaml")
    if deepspeed and not graphics and launched > 1 and not (shutil.which("g++") or shutil.which("c++")):
        raise UserError("DeepSpeed on CPUs compiles a communication extension and needs g++; or use ddp.yaml")


def configure_deepspeed(accelerator: Accelerator, config: TrainConfig) -> None:
    """Tell DeepSpeed the batch, accumulation and gradient norm of our configuration.

    Raises:
        UserError: a DeepSpeed file that says something else, or a memory format that DeepSpeed cannot spread.
    """
    if config.channels_last:
        raise UserError("DeepSpeed cannot spread channels_last=true; set channels_last=false")
    plugin = accelerator.state.deepspeed_plugin
    ours = {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "train_batch_size": config.batch_size * config.gradient_accumulation * accelerator.num_processes,
        "gradient_clipping": config.optimizer.max_grad_norm,
    }
    from_file = "ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ
    for key, value in ours.items():
        theirs = plugin.deepspeed_config.get(key, "auto")
        if from_file and theirs not in ("auto", value):
            raise UserError(f"the DeepSpeed file says {key}={theirs}, the training configuration makes it {value}")
        plugin.deepspeed_config[key] = value
    # With its states on the CPU, torch's fused AdamW runs there; DeepSpeed's own would have to be compiled first.
    plugin.deepspeed_config.setdefault("zero_force_ds_cpu_optimizer", False)
    # Accelerate has told transformers and diffusers that all networks are divided now; those of an export are not.
    unset_hf_deepspeed_config()


def spread_batch(config: TrainConfig) -> TrainConfig:
    """The configuration with `gradient_accumulation` chosen to reach `total_batch_size`, where that is given.

    Raises:
        UserError: the processes' batches do not divide it.
    """
    if config.total_batch_size is None:
        return config
    processes = int(os.environ.get("WORLD_SIZE", 1))
    together = config.batch_size * processes
    if config.total_batch_size < 1 or config.total_batch_size % together:
        raise UserError(
            f"total_batch_size={config.total_batch_size} is not a multiple of batch_size={config.batch_size} times "
            f"{processes} process(es); change one of them"
        )
    return replace(config, gradient_accumulation=config.total_batch_size // together)


def strategy(accelerator: Accelerator) -> str:
    """How states lie on the processes: "replicated", "zero1" to "zero3", or "fsdp"."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    return "fsdp" if accelerator.distributed_type == DistributedType.FSDP else "replicated"


def check_shared(accelerator: Accelerator, config: TrainConfig, file: Path) -> None:
    """Wait until the main process has written the configuration, then see that every process finds it.

    Raises:
        UserError: `output` is another folder for this process, on a disk of its machine's own.
    """
    accelerator.wait_for_everyone()
    if not file.is_file() or load_config(TrainConfig, [], files=[file]) != config:
        raise UserError(f"output={file.parent} must be one folder for all processes, on a file system they share")


def end_together(accelerator: Accelerator) -> None:
    """Take the process group apart when no process needs it any more.

    A gloo thread needs the interpreter for a moment to let go of its last message. The destructor of DDP's Reducer
    holds the interpreter while it waits for that thread, so whoever goes on at once may wait for ever.
    """
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        time.sleep(GOODBYE)
    accelerator.end_training()


def on_main(accelerator: Accelerator, work: Callable[[], Any]) -> None:
    """Call `work` on the main process while the others wait; what the user must put right ends all of them.

    Raises:
        UserError: the main process's, on every process.
    """
    message = [None]
    if accelerator.is_main_process:
        try:
            work()
        except UserError as error:
            message = [str(error)]
    broadcast_object_list(message)
    if message[0] is not None:
        raise UserError(message[0])
