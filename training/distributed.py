"""The processes of a run: how they talk, what DeepSpeed must be told, how signals end them."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DataLoaderConfiguration, DistributedType, broadcast_object_list
from transformers.integrations import unset_hf_deepspeed_config

from core.config import load_config
from core.errors import UserError
from training.config import TrainConfig

# The main process may render a cache or sample a validation while the others wait for it.
COLLECTIVE_TIMEOUT = timedelta(hours=4)
SHARDED = ("zero3", "fsdp")


def make_accelerator(config: TrainConfig, output: Path) -> Accelerator:
    """Accelerate's front end, of a `TrainConfig` or a `VAEConfig`; over gloo without a GPU."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    has_gpu = torch.cuda.is_available()
    check_launch(launched, deepspeed, has_gpu)
    group = {"timeout": COLLECTIVE_TIMEOUT} | ({} if has_gpu else {"backend": "gloo"})
    accelerator = Accelerator(
        # Accelerate chooses gloo for processes on a CPU, but not for DeepSpeed, which must not be told `cpu`.
        cpu=not deepspeed and not has_gpu and launched > 1,
        gradient_accumulation_steps=config.gradient_accumulation,
        mixed_precision=config.mixed_precision,
        log_with="tensorboard",
        project_dir=output,
        # Apple's GPUs have been given batches before these were there.
        dataloader_config=DataLoaderConfiguration(non_blocking=not torch.backends.mps.is_available()),
        # Gradients lie in the buckets that DDP exchanges; by default it would copy them, 4 bytes a parameter more.
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            *([InitProcessGroupKwargs(**group)] if launched > 1 or deepspeed else []),
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


def check_launch(launched: int, deepspeed: bool, has_gpu: bool) -> None:
    """Refuse launches that would fail late."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not has_gpu:
        raise UserError("FSDP needs GPUs; on CPUs use configs/accelerate/ddp.yaml or zero3.yaml")
    if deepspeed and not has_gpu and launched > 1 and not (shutil.which("g++") or shutil.which("c++")):
        raise UserError("DeepSpeed on CPUs compiles a communication extension and needs g++; or use ddp.yaml")


def configure_deepspeed(accelerator: Accelerator, config: TrainConfig) -> None:
    """Give DeepSpeed our batch size, accumulation and gradient norm."""
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
    # Accelerate has told transformers and diffusers that all networks are sharded now; those of an export are not.
    unset_hf_deepspeed_config()


def spread_batch(config: TrainConfig) -> TrainConfig:
    """Configuration whose `gradient_accumulation` reaches `total_batch_size`, where that is given."""
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
    """Placement of states on the processes: "replicated", "zero1" to "zero3", or "fsdp"."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    return "fsdp" if accelerator.distributed_type == DistributedType.FSDP else "replicated"


def check_shared(accelerator: Accelerator, config: TrainConfig, file: Path) -> None:
    """Refuse an output folder in which a process does not find the main one's configuration."""
    accelerator.wait_for_everyone()
    if not file.is_file() or load_config(TrainConfig, [], files=[file]) != config:
        raise UserError(f"output={file.parent} must be one folder for all processes, on a file system they share")


def check_validation(accelerator: Accelerator, config: TrainConfig) -> None:
    """Refuse validation where the parameters of a module are whole only while it runs."""
    if config.validation.steps and strategy(accelerator) == "fsdp":
        raise UserError(
            f"validation.steps={config.validation.steps} cannot sample under FSDP; set it to 0, and animate with "
            "what `python -m training.export` makes of a checkpoint"
        )


def end_together(accelerator: Accelerator) -> None:
    """End the process group when no process needs it any more."""
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        # A gloo thread needs the interpreter for a moment to let go of its last message, and the destructor of DDP's
        # Reducer holds the interpreter while it waits for that thread: without a pause it may wait for ever.
        time.sleep(0.5)
    accelerator.end_training()


def on_main(accelerator: Accelerator, work: Callable[[], Any]) -> None:
    """Call `work` on the main process while the others wait; its `UserError` is raised on every process."""
    message = [None]
    if accelerator.is_main_process:
        try:
            work()
        except UserError as error:
            message = [str(error)]
    broadcast_object_list(message)
    if message[0] is not None:
        raise UserError(message[0])


class StopRequest:
    """A signal that asked this process to stop, if there was one."""

    def __init__(self) -> None:
        self.signal: str | None = None  # its name

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Signal handler. A second Ctrl-C does not wait for the step to end."""
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def agreed(self, accelerator: Accelerator) -> bool:
        """True if any process was asked to stop: all of them must stop at the same step."""
        if accelerator.num_processes == 1:
            return self.signal is not None  # without a question to the device, whose answer comes after its work
        if self.signal is not None:
            accelerator.set_trigger()
        return accelerator.check_trigger()


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Within the block SIGTERM and Ctrl-C are noted instead of ending the process."""
    request = StopRequest()
    before = {number: signal.signal(number, request.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stop_signals(worker: int) -> None:
    """Ignore stop signals in a loader worker: clusters signal whole groups, and training still needs data.

    A worker ends by its training process's signal, or when that process is no more.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Only Linux says who sent a signal.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, daemon=True).start()


def _end_by_parent() -> None:
    parent = multiprocessing.parent_process().pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
