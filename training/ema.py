"""Exponential moving average of the trainable parameters, spread over processes as the parameters are."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from core.errors import UserError
from training.sharding import held_part, hold_part, part_of, whole_tensors

FILE = "average.safetensors"


class WeightAverage:
    """diffusers' EMA, in float32, of the parts of parameters that a process holds.

    Args:
        named: trainable parameters as `accelerator.prepare` left them, with their names in the bare model.
        decay: of the average; early steps decay faster, (1 + s) / (10 + s).
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]], decay: float):
        self.named = named
        # EMAModel copies what needs no gradient instead of averaging it, hence the flag on the parts.
        self.ema = EMAModel([part.float() for part in self._parts()], decay=decay, use_ema_warmup=False)

    def _parts(self) -> list[Tensor]:
        return [held_part(parameter).detach().requires_grad_() for _, parameter in self.named]

    def step(self) -> None:
        """Take the parameters' present values into the average."""
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

    def _hold(self, parts: list[Tensor], accelerator: Accelerator) -> None:
        for (_, parameter), part in zip(self.named, parts, strict=True):
            hold_part(parameter, part, accelerator)

    def whole(self, accelerator: Accelerator) -> dict[str, Tensor]:
        """Whole averaged tensors by name, on the main process; every process must call it."""
        return dict(whole_tensors(self.named, self.ema.shadow_params, accelerator))

    def save(self, folder: Path, accelerator: Accelerator) -> None:
        """Write the whole average; every process must call it."""
        tensors = self.whole(accelerator)
        if accelerator.is_main_process:
            save_file(tensors, folder / FILE, {"steps": str(self.ema.optimization_step)})

    def load(self, folder: Path, accelerator: Accelerator) -> None:
        """Read what `save` wrote, with however many processes, spread in whatever way.

        A checkpoint without an average leaves the present weights as the start of one.
        """
        if not (folder / FILE).is_file():
            self.ema.shadow_params = [part.detach().float().clone() for part in self._parts()]
            return
        with safe_open(folder / FILE, "pt") as file:
            if set(file.keys()) != {name for name, _ in self.named}:
                raise UserError(f"{folder / FILE} averages other parameters than are trained now")
            self.ema.optimization_step = int(file.metadata()["steps"])
            for (name, parameter), shadow in zip(self.named, self.ema.shadow_params, strict=True):
                shadow.copy_(part_of(parameter, file.get_tensor(name), accelerator))
