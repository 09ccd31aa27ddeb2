"""Seconds, peak memory and operations of some work, and what the hardware could do at most."""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.speed.peers.driver_protocol import DTYPES, peak, reset_peak, wait_for
from core.errors import UserError

MATRIX_SIDE, MATRIX_SIDE_ON_GPU = 2048, 8192  # a GPU is through with the smaller ones before it is busy

# torch counts the attention kernels of GPUs, and leaves out those of CPUs.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *rest, **options: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *rest, **options: sdpa_backward_flop_count(grad, query, key, value)
    ),
}


@dataclass
class Measured:
    """Measurements of one thing."""

    seconds: list[float] = field(default_factory=list)  # by repetition
    peak_bytes: int = 0  # 0: not measured
    operations: float = 0.0  # floating-point ones of a repetition; 0: not counted
    parts: dict[str, list[float]] = field(default_factory=dict)  # of the seconds, by name
    facts: dict[str, float] = field(default_factory=dict)  # other numbers

    @property
    def typical(self) -> float:
        """Median of the repetitions, in seconds."""
        return median(self.seconds)

    def numbers(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        return {
            "seconds": self.typical,
            "least_seconds": min(self.seconds),
            "repetitions": len(self.seconds),
            "peak_mib": round(self.peak_bytes / 2**20),
            "gflop": self.operations / 1e9,
            "parts": {name: median(values) for name, values in self.parts.items()},
            **self.facts,
        }


def chosen_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"dtypes has {name}; {', '.join(DTYPES)} are known")
    return DTYPES[name]


def timed(work: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    started = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - started


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """A function that returns the most bytes held since: of a GPU by torch, else resident in this process (Linux)."""
    reset_peak(device)
    yield lambda: peak(device)


@contextmanager
def counting() -> Iterator[Callable[[], float]]:
    """A function that returns the floating-point operations since: of products, convolutions and attention."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        yield lambda: float(counter.get_total_flops())


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of products of square matrices: what the other rates are shares of."""
    side = MATRIX_SIDE_ON_GPU if device.type == "cuda" else MATRIX_SIDE
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    one @ other
    return 2 * side**3 / min(timed(lambda: one @ other, device) for _ in range(5))


def in_turns(works: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of several things, repeated in turns, so that a slow minute of the machine meets them all."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            found[name].append(work())
    return found


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, on which the numbers depend."""
    import diffusers  # its import takes seconds, which other users of this file need not wait

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def processor_name() -> str:
    """The processor's name, with the vector extensions that matter for speed."""
    if not (facts := Path("/proc/cpuinfo")).exists():
        return platform.processor() or platform.machine()
    lines = facts.read_text().splitlines()
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = values.get("flags", "").split()
    extensions = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{values.get('model name', platform.machine())} ({', '.join(extensions)})"
