"""Attention by head size: which kernel torch chooses, and what each of them takes."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_check.worker import Row
from benchmarks.speed.measuring import timed, wait_for
from models.attention.masking import masked_attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
OPERATION = "_scaled_dot_product_"  # begins the names of torch's fused ones
FRAMES = 4  # at a time, so that the kernel that writes all scores down has room for them
PERSON_FLAGS = 3  # channels for one calibrated person
HALF = ("bfloat16", "float16")  # the first is timed


@dataclass(frozen=True)
class AttentionCase:
    """One attention layer."""

    name: str
    channels: int  # of a head
    queries: int
    keys: int
    batch: int
    heads: int = 8
    flags: int = 0  # channels that say what is hidden from whom, see `models.attention.masking`
    must_be_fused: bool = True

    @property
    def operations(self) -> float:
        return 4.0 * self.batch * self.heads * self.queries * self.keys * self.channels


def attention_cases(tiny: bool) -> Iterator[AttentionCase]:
    """The layers of Stable Diffusion 1.5's sizes at 512 x 784 pixels, with a reference and a calibrated image."""
    height, width = (8, 8) if tiny else (98, 64)
    grids = [(-(-height // times)) * (width // times) for times in (1, 2, 4)]
    for channels, tokens in zip((40, 80, 160), grids, strict=True):
        for flags in (0, PERSON_FLAGS):
            named = f"images, heads of {channels}{' and flags' * bool(flags)}"
            yield AttentionCase(named, channels, tokens, 3 * tokens, FRAMES, flags=flags)
    for channels, tokens in zip((40, 80, 160), grids, strict=True):
        yield AttentionCase(f"frames, heads of {channels}", channels, 24, 24, tokens)
    # which its one wide head keeps from some kernels
    yield AttentionCase("VAE", 512, grids[0], grids[0], 1, heads=1, must_be_fused=False)


def attention_row(case: AttentionCase, device: torch.device) -> Row:
    """Backends that torch chooses by dtype; milliseconds of its choice and of every backend, and its kernel."""
    row: Row = {"attention": case.name, "queries": case.queries, "keys": case.keys}
    for name in HALF + ("float32",):
        with Chosen() as chosen:
            attention_work(case, getattr(torch, name), device)()
        row[name] = chosen.name
    work = attention_work(case, getattr(torch, HALF[0]), device)
    row["ms"] = 1e3 * least_seconds(work, device)
    if device.type == "cuda":
        row["kernel"] = slowest_kernel(work, device)[:60]
    return row | {f"{name}, ms": restricted(work, backend, device) for name, backend in BACKENDS.items()}


def is_fused(row: Row) -> bool:
    """True where no dtype of half precision writes the scores down."""
    return not any("math" in row[name] for name in HALF)


def attention_work(case: AttentionCase, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """The computation of a layer, flags appended and all."""

    def drawn(count: int) -> torch.Tensor:
        # as layers have them: heads side by side in every token
        return torch.randn(case.batch, count, case.heads, case.channels, device=device).to(dtype).transpose(1, 2)

    query, key, value = drawn(case.queries), drawn(case.keys), drawn(case.keys)
    if not case.flags:
        return lambda: scaled_dot_product_attention(query, key, value)
    flags = [
        (torch.rand(case.batch, count, case.flags, device=device) < share).float()
        for count, share in ((case.queries, 0.5), (case.keys, 0.2))
    ]
    return lambda: masked_attention(query, key, value, *flags)


class Chosen(TorchDispatchMode):
    """Notes the fused attention that torch calls; without any, products and a softmax write the scores down."""

    name = "math"

    def __torch_dispatch__(self, func: Any, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(OPERATION):
            self.name = name.removeprefix(OPERATION)
        return func(*args, **(kwargs or {}))


def slowest_kernel(work: Callable[[], object], device: torch.device) -> str:
    """Name of the CUDA kernel that takes longest of all that some work starts."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        work()
        wait_for(device)
    kernels = [event for event in recorded.key_averages() if event.device_type == DeviceType.CUDA]
    return max(kernels, key=lambda event: event.self_device_time_total).key if kernels else "not recorded"


def restricted(work: Callable[[], object], backend: SDPBackend, device: torch.device) -> float | str:
    """Milliseconds with this backend alone, or why there are none."""
    try:
        with sdpa_kernel(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they say which condition of the backend fails
            work()
            return 1e3 * least_seconds(work, device)
    except torch.OutOfMemoryError:
        return "out of memory"
    except RuntimeError:
        return "refuses"


def least_seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    return min(timed(work, device) for _ in range(repeats))
