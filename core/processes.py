"""Devices, and the processes of `accelerate launch` where no model is trained."""

import os
from datetime import timedelta

import torch
from accelerate import PartialState
from torch import Tensor

from core.errors import UserError


def has_own_memory(device: torch.device) -> bool:
    """True for a device to which data are copied over a bus."""
    return device.type not in ("cpu", "mps")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; the program goes on before it is there, and before earlier work is done."""
    if not has_own_memory(device):
        return tensor.to(device)
    # Of copies over a bus only those out of pinned memory let it go on.
    if tensor.device.type == "cpu" and tensor.numel():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def process_state(device: str = "auto") -> PartialState:
    """Processes of `accelerate launch`, or the only one; `UserError` when others are not found."""
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    # Processes wait for each other only at the end, when one may have hours of work left.
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != started:
        raise UserError(
            f"{started} processes were started but {state.num_processes} found each other; "
            "launch with --multi_gpu --num_processes N, on CPUs too"
        )
    return state


def choose_device(device: str, dtype: str, process: int = 0) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of inference; "auto" takes CUDA and bfloat16 there, else the CPU and float32.

    `process` is the index on its machine, and of its CUDA device. Raises `UserError` for an unknown or absent device
    or dtype.
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
