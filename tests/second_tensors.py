"""Tensors of the second device, and the rules by which operations take them; see `tests/second_device.py`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

ROOT = f"{Path(__file__).parents[1]}/"
NOT_OURS = (f"{ROOT}tests/", f"{ROOT}.venv/")
NAME, CPU = "second", torch.device("cpu")

# Operations that may take tensors of both devices, beside pointwise ones and numbers that are tensors of the CPU.
COPIES = {"aten::_to_copy", "aten::copy_"}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
PINNING = {"aten::is_pinned", "aten::_pin_memory"}
FACTS = {"aten::_has_compatible_shallow_copy_type", "aten::is_same_size"}
WITH_NUMBERS = {"aten::fill_", "aten::masked_fill", "aten::masked_fill_"}
# Operations that end when the device has told the program a value, or how many there are.
READS = {"aten::_local_scalar_dense", "aten::equal", "aten::_linalg_check_errors"}
SIZES = {
    *("aten::nonzero", "aten::masked_select", "aten::bincount"),
    *("aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"),
}


@dataclass(frozen=True)
class Wait:
    """A moment in which the program waits for the device."""

    kind: str  # "read", "size", "to device" or "to CPU"
    place: str  # file and function of ours, "models/vae.py vae_decode"; "autograd": in the backward pass
    line: int  # of the file


class Backend:
    """What torch asks of a device's module, `torch.second`, and the state of the device."""

    def __init__(self) -> None:
        self.waits: list[Wait] | None = None  # None: nobody asks
        self.double = True  # if there are tensors of float64
        self.random = torch.Generator().manual_seed(1).get_state()

    def is_available(self) -> bool:
        return self.waits is not None

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return int(self.is_available())

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed + 1).get_state()

    def get_rng_state(self, device: Any = None) -> Tensor:
        return self.random

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        self.random = state

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def note(self, kind: str) -> None:
        if self.waits is not None:
            self.waits.append(Wait(kind, *place()))

    @contextmanager
    def own_random_numbers(self) -> Iterator[None]:
        """Draw from the stream of the device within the block."""
        kept = torch.get_rng_state()
        torch.set_rng_state(self.random)
        try:
            yield
        finally:
            self.random = torch.get_rng_state()
            torch.set_rng_state(kept)


BACKEND = Backend()
_setup_privateuseone_for_python_backend(NAME, BACKEND)
SECOND = torch.device(NAME, 0)


def place() -> tuple[str, int]:
    """File, function and line of the innermost call in the project, tests left out."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(ROOT) and not code.co_filename.startswith(NOT_OURS):
            return f"{code.co_filename.removeprefix(ROOT)} {code.co_qualname}", frame.f_lineno
        frame = frame.f_back
    return "autograd", 0


class SecondTensor(Tensor):
    """A tensor of the second device around its data, a tensor of the CPU."""

    data_on_cpu: Tensor

    @staticmethod
    def __new__(cls, data: Tensor) -> "SecondTensor":
        if data.dtype == torch.float64 and not BACKEND.double:
            raise TypeError(f"{SECOND} has no tensors of float64 here")
        made = Tensor._make_wrapper_subclass(
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            layout=data.layout,
            device=SECOND,
        )
        made.data_on_cpu = data
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return execute(func, args, kwargs or {})

    # What torch does with a tensor's memory, and would not do with a subclass's.

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {self.device} tensor to numpy; use Tensor.cpu() first")
        return self.detach().cpu().numpy()

    def data_ptr(self) -> int:
        return self.data_on_cpu.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.data_on_cpu.untyped_storage()

    def __deepcopy__(self, memo: dict) -> "SecondTensor":
        copied = memo[id(self)] = SecondTensor(self.detach().data_on_cpu.clone()).requires_grad_(self.requires_grad)
        vars(copied).update((name, value) for name, value in vars(self).items() if name != "data_on_cpu")
        return copied

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.detach().data_on_cpu.__reduce_ex__(protocol)


@dataclass(frozen=True)
class Rule:
    """What the rules of devices depend on, of an operation."""

    name: str  # "aten::add", of all overloads
    pointwise: bool
    random: bool
    composite: bool  # made of others, which autograd or inference mode has not taken apart yet
    written: tuple[int, ...]  # positions of the arguments that it changes

    @staticmethod
    @cache
    def of(func: torch._ops.OpOverload) -> "Rule":
        schema = func._schema
        written = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
        pointwise = torch.Tag.pointwise in func.tags or schema.name.startswith("aten::_foreach_")
        key = torch._C.DispatchKey.CompositeImplicitAutograd
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)
        composite &= schema.name != "aten::scaled_dot_product_attention"
        random = torch.Tag.nondeterministic_seeded in func.tags
        return Rule(schema.name, pointwise, random, composite, tuple(written))


def laid_bare(value: Any, given: list[Tensor]) -> Any:
    """An argument with the data of the device's tensors in their places; adds all tensors to `given`."""
    if isinstance(value, Tensor):
        given.append(value)
        return value.data_on_cpu if isinstance(value, SecondTensor) else value
    return [laid_bare(part, given) for part in value] if isinstance(value, (list, tuple)) else value


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A value with a function of the tensors in their places."""
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(mapped(function, part) for part in value) if isinstance(value, (list, tuple)) else value


def bare(tensor: Tensor) -> Tensor:
    return tensor.data_on_cpu if isinstance(tensor, SecondTensor) else tensor


def execute(func: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Result of an operation by the rules of devices, computed on the CPU."""
    rule = Rule.of(func)
    if rule.name in PINNING:
        return pinned(args[0]) if rule.name == "aten::is_pinned" else pin(args[0])
    given: list[Tensor] = []
    inner = [laid_bare(arg, given) for arg in args]
    options = {name: laid_bare(value, given) for name, value in kwargs.items()}
    others = [tensor for tensor in given if not isinstance(tensor, SecondTensor)]
    asked, own = kwargs.get("device"), len(others) < len(given)
    here = own if asked is None else torch.device(asked).type == NAME
    if not own and not here:
        return func(*args, **kwargs)
    if rule.composite:
        return func.decompose(*args, **kwargs)
    if own and others:
        check_devices(func, rule, args, others)
    generator = kwargs.get("generator")
    if here and generator is not None and generator.device.type != NAME:
        raise RuntimeError(f"{func}: a generator of {generator.device} draws nothing on {SECOND}")
    note_waits(rule, args, kwargs, here)
    if asked is not None:
        options |= {"device": CPU, "pin_memory": False} if "pin_memory" in options else {"device": CPU}
    if rule.random and here:
        with BACKEND.own_random_numbers():
            result = func(*inner, **options)
    else:
        result = func(*inner, **options)
    # What is changed in place comes back as what was given.
    known = {id(bare(tensor)): tensor for tensor in given}

    def outer(made: Tensor) -> Tensor:
        return known[id(made)] if id(made) in known else SecondTensor(made) if here else made

    return mapped(outer, result)


def check_devices(func: torch._ops.OpOverload, rule: Rule, args: tuple, others: list[Tensor]) -> None:
    """Refuse tensors of the CPU, `others`, beside those of the device, unless CUDA takes them."""
    if rule.name in COPIES or rule.name in FACTS:
        return
    if rule.name in INDEXED and isinstance(args[0], SecondTensor):
        # Indices may lie on the CPU, and a single value.
        others = [value for value in args[2:3] if not isinstance(value, SecondTensor)]
        if all(isinstance(value, Tensor) and value.ndim == 0 for value in others):
            return
    elif rule.pointwise or rule.name in WITH_NUMBERS:
        changed: list[Tensor] = []
        laid_bare([args[i] for i in rule.written if i < len(args)], changed)
        if all(isinstance(tensor, SecondTensor) for tensor in changed) and all(tensor.ndim == 0 for tensor in others):
            return
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in others)
    raise RuntimeError(f"{func}: tensors of the CPU, {shapes}, beside those of {SECOND}")


def note_waits(rule: Rule, args: tuple, kwargs: dict[str, Any], here: bool) -> None:
    """Note what the program would wait for."""
    name = rule.name
    if name in READS:
        BACKEND.note("read")
    elif name in SIZES or (name == "aten::repeat_interleave" and kwargs.get("output_size") is None):
        BACKEND.note("size")
    elif name == "aten::_to_copy":
        note_copy(args[0], here, bool(kwargs.get("non_blocking")))
    elif name == "aten::copy_":
        beside = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        note_copy(args[1], isinstance(args[0], SecondTensor), bool(beside))
    elif name in INDEXED:
        indices = [index for index in args[1] if index is not None]
        value = args[2] if len(args) > 2 else None
        one = value is not None and value.numel() == 1 and len(indices) == 1  # becomes masked_fill
        for index in indices:
            if not isinstance(index, SecondTensor):
                BACKEND.note("to device")
            elif index.dtype in (torch.bool, torch.uint8) and not one:
                BACKEND.note("size")
        if value is not None and not isinstance(value, SecondTensor) and not one:
            BACKEND.note("to device")
    elif name == "aten::where":
        for value in args[1:]:
            if not isinstance(value, SecondTensor):  # numbers become arguments of other kernels, but are copied here
                BACKEND.note("to device")


def note_copy(source: Tensor, here: bool, beside: bool) -> None:
    """Note a copy from one device to the other; `here`: to the second, `beside`: non_blocking."""
    if here and not isinstance(source, SecondTensor) and not (beside and pinned(source)):
        BACKEND.note("to device")
    elif not here and isinstance(source, SecondTensor) and not beside:
        BACKEND.note("to CPU")


def pin(tensor: Tensor) -> Tensor:
    """A copy of a tensor of the CPU in pinned memory."""
    copied = tensor.clone()
    copied.is_in_pinned_memory = True
    return copied


def pinned(tensor: Tensor) -> bool:
    """Tell if a tensor of the CPU, or what it is a view of, came from `pin`."""
    return any(hasattr(part, "is_in_pinned_memory") for part in (tensor, tensor._base))
