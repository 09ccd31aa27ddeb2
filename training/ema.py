"""Exponential moving average of the trainable parameters, sharded over processes as the parameters are.

ZeRO-3 flattens a parameter, pads it and cuts it into equal parts, `ds_tensor`; under FSDP it is a DTensor.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from core.errors import UserError

FILE = "average.safetensors"


class WeightAverage:
    """EMA in float32 of the parts of parameters that a process holds.

    `named` are the trainable parameters, as prepared, with their bare names. The decay of step s is at most
    (1 + s) / (10 + s).
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]], decay: float):
        self.named = named
        # EMAModel copies what needs no gradient instead of averaging it, hence the flag on the parts.
        self.ema = EMAModel([part.float() for part in self._parts()], decay=decay, use_ema_warmup=False)

    def _parts(self) -> list[Tensor]:
        return [held_part(parameter).detach().requires_grad_() for _, parameter in self.named]

    def step(self) -> None:
        self.ema.step(self._parts())

    @contextmanager
    def applied(self, accelerator: Accelerator) -> Iterator[None]:
        """Within the block the parameters hold their average; every process must enter it."""
        kept = [part.detach().to("cpu", copy=True) for part in self._parts()]
        self._hold(self.ema.shadow_params, accelerator)
        try:
            yield
        finally:
            self._hold(kept, accelerator)

    @torch.no_grad()
    def _hold(self, parts: list[Tensor], accelerator: Accelerator) -> None:
        for (_, parameter), part in zip(self.named, parts, strict=True):
            held_part(parameter).copy_(part)
            # ZeRO-3 keeps small parameters whole as well, beside their parts.
            if hasattr(parameter, "ds_tensor") and parameter.numel() == parameter.ds_numel:
                parameter.data.copy_(whole(parameter, part, accelerator))

    @torch.no_grad()
    def save(self, folder: Path, accelerator: Accelerator) -> None:
        """Write the whole average; every process must call it."""
        tensors = {}
        for (name, parameter), part in zip(self.named, self.ema.shadow_params, strict=True):
            tensor = whole(parameter, part, accelerator)
            if accelerator.is_main_process:
                tensors[name] = tensor.detach().cpu().contiguous()
        if accelerator.is_main_process:
            save_file(tensors, folder / FILE, {"steps": str(self.ema.optimization_step)})

    def load(self, folder: Path, accelerator: Accelerator) -> None:
        """Read an average saved under any strategy; without one the present weights start it."""
        if not (folder / FILE).is_file():
            self.ema.shadow_params = [part.detach().float().clone() for part in self._parts()]
            return
        with safe_open(folder / FILE, "pt") as file:
            if set(file.keys()) != {name for name, _ in self.named}:
                raise UserError(f"{folder / FILE} averages other parameters than are trained now")
            self.ema.optimization_step = int(file.metadata()["steps"])
            for (name, parameter), shadow in zip(self.named, self.ema.shadow_params, strict=True):
                shadow.copy_(part_of(parameter, file.get_tensor(name), accelerator))


def held_part(parameter: nn.Parameter) -> Tensor:
    """The part of a parameter that this process holds, sharing its memory."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.data
    return parameter.to_local().detach() if isinstance(parameter, DTensor) else parameter.detach()


def whole(parameter: nn.Parameter, part: Tensor, accelerator: Accelerator) -> Tensor:
    """Tensor of a parameter's full shape from the parts of all processes, every one of which must call it."""
    if hasattr(parameter, "ds_tensor"):
        parts = accelerator.gather(part.to(accelerator.device))
        return parts[: parameter.ds_numel].view(parameter.ds_shape)
    if isinstance(parameter, DTensor):
        sharded = DTensor.from_local(
            part, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )
        return sharded.full_tensor()
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
