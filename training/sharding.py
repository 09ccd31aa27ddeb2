"""Parameters that are spread over processes by ZeRO-3 or FSDP: the part a process holds, and the whole.

Under ZeRO-3 a parameter is flattened, padded to a multiple of the processes, and cut into equal consecutive parts;
`ds_tensor` is a process's part. Under FSDP a parameter is a DTensor. Elsewhere a process holds all of it.
"""

from collections.abc import Iterable, Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def held_part(parameter: nn.Parameter) -> Tensor:
    """What this process holds of a parameter, sharing its memory."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.data
    return parameter.to_local().detach() if isinstance(parameter, DTensor) else parameter.detach()


def whole(parameter: nn.Parameter, part: Tensor, accelerator: Accelerator) -> Tensor:
    """Put the processes' parts of one tensor together; every process must call it.

    Args:
        parameter: says how the tensor is spread.
        part: this process's part, laid out as `held_part(parameter)`.

    Returns:
        A tensor of the parameter's full shape; `part` itself where nothing is spread.
    """
    if hasattr(parameter, "ds_tensor"):
        parts = accelerator.gather(part.to(accelerator.device))
        return parts[: parameter.ds_numel].view(parameter.ds_shape)
    if isinstance(parameter, DTensor):
        spread = DTensor.from_local(
            part, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )
        return spread.full_tensor()
    return part


def part_of(parameter: nn.Parameter, tensor: Tensor, accelerator: Accelerator) -> Tensor:
    """This process's part of a whole tensor: the inverse of `whole`."""
    if hasattr(parameter, "ds_tensor"):
        length = parameter.ds_tensor.numel()
        padded = tensor.new_zeros(length * accelerator.num_processes)
        padded[: tensor.numel()] = tensor.flatten()
        return padded.split(length)[accelerator.process_index].clone()
    if isinstance(parameter, DTensor):
        device = parameter.to_local().device
        return distribute_tensor(tensor.to(device), parameter.device_mesh, parameter.placements).to_local()
    return tensor


@torch.no_grad()
def hold_part(parameter: nn.Parameter, part: Tensor, accelerator: Accelerator) -> None:
    """Make `part` what this process holds of a parameter; every process must call it."""
    held_part(parameter).copy_(part)
    # ZeRO-3 keeps small parameters whole as well, beside their parts.
    if hasattr(parameter, "ds_tensor") and parameter.numel() == parameter.ds_numel:
        parameter.data.copy_(whole(parameter, part, accelerator))


@torch.no_grad()
def whole_tensors(
    named: Iterable[tuple[str, nn.Parameter]], parts: Iterable[Tensor], accelerator: Accelerator
) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors on the CPU, one after the other, on the main process; nothing on the others.

    Every process must go through it to the end.
    """
    for (name, parameter), part in zip(named, parts, strict=True):
        tensor = whole(parameter, part, accelerator)
        if accelerator.is_main_process:
            yield name, tensor.detach().cpu().contiguous()
