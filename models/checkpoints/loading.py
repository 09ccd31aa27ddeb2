"""Strict loading: every missing, unexpected or misshapen tensor is named and stops the load."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from core.errors import UserError
from models.checkpoints.names import is_position_table, position_table

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Mismatch:
    """What differs between the tensors that are wanted and those that a file has. False when nothing does."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.misshapen)

    def lines(self, shown: int = 5) -> list[str]:
        """One line for each kind of difference: its count and first names."""
        parts = {"missing": self.missing, "unexpected": self.unexpected, "misshapen": self.misshapen}
        return [f"{kind} {len(names)}: {_first(names, shown)}" for kind, names in parts.items() if names]


def compare(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> Mismatch:
    """Both are name -> shape."""
    return Mismatch(
        missing=tuple(name for name in wanted if name not in found),
        unexpected=tuple(name for name in found if name not in wanted),
        misshapen=tuple(
            misshapen(name, found[name], wanted[name])
            for name in wanted
            if name in found and tuple(found[name]) != tuple(wanted[name])
        ),
    )


def misshapen(name: str, found: Iterable[int], wanted: Iterable[int]) -> str:
    """How a tensor of another shape is named."""
    return f"{name} {list(found)} instead of {list(wanted)}"


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def load_strictly(
    module: Module,
    tensors: Mapping[str, Tensor],
    what: str,
    dtype: torch.dtype = torch.float32,
    unread: Iterable[str] = (),
) -> Module:
    """Make `tensors` the parameters of a network that was built on the meta device.

    Nothing is copied that has the right dtype already: parameters are then the tensors themselves, for example parts
    of a mapped file. Others are converted one by one. Position tables are computed, not loaded.

    Args:
        module: network on the meta device; it is changed and returned.
        tensors: name -> tensor, names of the module.
        what: the file, for errors.
        unread: parameters that no result depends on; they may be missing and are then zeros.

    Raises:
        UserError: names or shapes differ, or a tensor holds no floating-point numbers.
    """
    state = module.state_dict()
    wanted = {name: tuple(value.shape) for name, value in state.items() if not is_position_table(name)}
    missing_unread = set(unread) - tensors.keys()
    wanted = {name: shape for name, shape in wanted.items() if name not in missing_unread}
    mismatch = compare(wanted, shapes_of(tensors))
    if mismatch:
        raise UserError(f"{what} does not fit {type(module).__name__}: {'; '.join(mismatch.lines())}")
    strange = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if strange:
        raise UserError(f"{what} holds {len(strange)} tensors that are not floating point: {_first(strange, 5)}")

    complete = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    for name, value in state.items():
        if is_position_table(name):
            complete[name] = position_table(*value.shape[1:]).to(dtype)
        elif name in missing_unread:
            complete[name] = torch.zeros(value.shape, dtype=dtype)
    module.load_state_dict(complete, strict=True, assign=True)
    return module.eval()


def _first(names: Iterable[str], shown: int) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
