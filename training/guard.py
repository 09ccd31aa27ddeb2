"""Steps whose loss or gradient is not finite: left out by all processes alike, counted, and too many end the run."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from core.errors import UserError


@dataclass
class StepGuard:
    """What one process knows of steps that were left out.

    Attributes:
        limit: steps left out in a row that end the run.
        skipped: steps left out in the whole run.
        streak: steps left out in a row up to now. Weights are worth a checkpoint only while it is 0: after a step that
            went wrong it takes a good one to know that they are sound.
        spoilt: whether a loss of the step under way was not finite.
    """

    limit: int
    skipped: int = 0
    streak: int = 0
    spoilt: bool = False

    def admits(self, loss: Tensor, accelerator: Accelerator) -> bool:
        """Whether all processes go backward from this loss; each must call it.

        One process's NaN would reach all of them with the gradients, so all leave the step out. DeepSpeed accumulates
        and steps inside `backward`: it always goes there, finds the NaN in the gradients, and leaves the step out.
        """
        bad = accelerator.reduce((~torch.isfinite(loss.detach())).float(), "sum").item() > 0
        self.spoilt = self.spoilt or bad
        return not bad or accelerator.distributed_type == DistributedType.DEEPSPEED

    def allows_step(self, norm: Tensor | float | None, accelerator: Accelerator) -> bool:
        """Whether the optimiser may step: losses and gradients are finite, or somebody else sees to it.

        Args:
            norm: of the gradients, the same on all processes.
        """
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            return True
        # The scaler of fp16 looks at the gradients itself, and must see infinite ones to lower its scale.
        return not self.spoilt and (accelerator.scaler is not None or bool(torch.isfinite(torch.as_tensor(norm))))

    def count(self, taken: bool, step: int) -> None:
        """Close a step.

        Args:
            taken: whether the parameters moved.
            step: number of the step, for the message.

        Raises:
            UserError: `limit` steps in a row were left out; checkpoints are as they were before the first of them.
        """
        self.spoilt = False
        self.streak = 0 if taken else self.streak + 1
        self.skipped += not taken
        if self.streak >= self.limit:
            raise UserError(
                f"loss or gradient of the last {self.streak} steps up to step {step} was not finite; the newest "
                "checkpoint is from before: lower optimizer.learning_rate, raise optimizer.epsilon, or use "
                "mixed_precision=bf16 or no"
            )
