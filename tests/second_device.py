"""A second device for tests on machines without an accelerator: its tensors compute on the CPU and say they do not.

    with second_device() as waits:
        model.to(SECOND)
        result = model(images.to(SECOND)).cpu()
    waits  # the moments in which the program waited for the device

Tensors of two devices in one operation are refused where CUDA refuses them. What makes a program wait for a GPU is
noted: values that Python reads, results whose size the values decide, copies in either direction unless they may run
beside the program. Random numbers come from a stream of the device's own, so they are none that a CPU would draw.
Autocast casts what CUDA's casts, and attention takes the CPU's kernel, so that equal programs give equal bits.

Importing this registers the device with torch, which has one place for a device that is not its own. The rules are in
`tests/second_tensors.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.second_tensors import BACKEND, NAME, SECOND, SecondTensor, Wait, bare, execute, mapped, note_copy

__all__ = ["SECOND", "Wait", "second_device"]

aten = torch.ops.aten

# Of CUDA's autocast, as far as they are ours or diffusers'.
LOW_PRECISION = (
    *("conv1d", "conv2d", "conv3d", "convolution", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "mv"),
    "scaled_dot_product_attention",
)
FULL_PRECISION = (
    *("group_norm", "layer_norm", "softmax.int", "log_softmax.int", "exp", "log", "pow.Tensor_Scalar", "cdist"),
    *("sum", "sum.dim_IntList", "linalg_vector_norm", "mse_loss", "upsample_nearest2d", "upsample_bilinear2d"),
)


class _Dispatch(TorchDispatchMode):
    """Sees what makes tensors out of none of the device's."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and leaving it out takes a third of an operation's time

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return execute(func, args, kwargs or {})


@contextmanager
def second_device(double: bool = True) -> Iterator[list[Wait]]:
    """Within the block there is the second device; yields the list that its waits are added to.

    Without `double` it refuses float64, as Apple's mps does.
    """
    swapped = torch.__future__.get_swap_module_params_on_conversion()
    # Parameters stay the same objects when their module is moved, as they do between devices of torch's own.
    torch.__future__.set_swap_module_params_on_conversion(True)
    outer, BACKEND.waits, BACKEND.double = (BACKEND.waits, BACKEND.double), [], double
    try:
        with _Dispatch():
            yield BACKEND.waits
    finally:
        BACKEND.waits, BACKEND.double = outer
        torch.__future__.set_swap_module_params_on_conversion(swapped)


# Kernels of the device for what torch's bindings do by themselves, behind the mode: lists that become tensors.


def _empty_strided(size: Any, stride: Any, dtype=None, layout=None, device=None, pin_memory=None) -> Tensor:
    return SecondTensor(torch.empty_strided(size, stride, dtype=dtype))


def _empty(size: Any, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None) -> Tensor:
    return SecondTensor(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    note_copy(source, isinstance(target, SecondTensor), non_blocking)
    bare(target).copy_(bare(source))
    return target


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that the CPU would take."""
    parts, options = (query, key, value), {"scale": scale, "enable_gqa": enable_gqa}
    inner = [bare(part.detach()) for part in parts]
    mask = None if attn_mask is None else bare(attn_mask.detach())
    if torch._fused_sdp_choice(*inner, mask, dropout_p, is_causal, **options) == 1:
        return aten._scaled_dot_product_flash_attention_for_cpu(
            *parts, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math(*parts, attn_mask, dropout_p, is_causal, **options)[0]


@dataclass(frozen=True)
class _Autocast:
    """An operation whose tensors are cast first, in autocast."""

    operation: Callable
    full: bool  # to float32, and not to autocast's dtype
    key: torch._C.DispatchKeySet = field(
        default_factory=lambda: torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        dtype = torch.float32 if self.full else torch.get_autocast_dtype(NAME)

        def cast(tensor: Tensor) -> Tensor:
            eligible = tensor.device.type == NAME and tensor.is_floating_point() and tensor.dtype != torch.float64
            return tensor.to(dtype) if eligible else tensor

        with torch._C._ExcludeDispatchKeyGuard(self.key):
            return self.operation(
                *(mapped(cast, arg) for arg in args), **{name: mapped(cast, value) for name, value in kwargs.items()}
            )


def _register() -> list[torch.library.Library]:
    """Give torch the kernels; they stay as long as the libraries."""
    library, others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    library.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for full, names in ((False, LOW_PRECISION), (True, FULL_PRECISION)):
        for name in names:
            packet, _, overload = name.partition(".")
            operation = getattr(getattr(aten, packet), overload or "default")
            library.impl(name, _Autocast(operation, full), "AutocastPrivateUse1")
    return [library, others]


LIBRARIES = _register()
