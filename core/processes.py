"""The processes of `accelerate launch`, where no model is trained."""

import os
from datetime import timedelta

import torch
from accelerate import PartialState

from core.errors import UserError

# Processes wait for each other only at the end, when one may have hours of work left.
_LONGEST_WAIT = timedelta(days=30)


def process_state(device: str = "auto") -> PartialState:
    """The process group of `accelerate launch`, or the one process there is.

    Raises:
        UserError: several processes were started, but they cannot talk to each other.
    """
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    state = PartialState(cpu=on_cpu, timeout=_LONGEST_WAIT)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != started:
        raise UserError(
            f"{started} processes were started but {state.num_processes} found each other; "
            "launch with --multi_gpu --num_processes N, on CPUs too"
        )
    return state
