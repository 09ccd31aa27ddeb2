"""One of two processes that shard a small model with FSDP2 over gloo; run by test_training_processes.py."""

import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from training.distributed import end_together
from training.ema import WeightAverage, held_part, part_of, whole


def small_model() -> nn.Module:
    """Sizes that two processes cannot divide evenly."""
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


@torch.no_grad()
def move(model: nn.Module, shift: int) -> None:
    """What stands for a training step."""
    for parameter in model.parameters():
        parameter.add_(shift)


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = fully_shard(small_model(), mesh=init_device_mesh("cpu", (2,)))
    named = list(model.named_parameters())
    assert sum(held_part(parameter).numel() for _, parameter in named) < 66
    average = WeightAverage(named, 0.9)
    for shift in range(3):
        move(model, shift)
        average.step()
    for _, parameter in named:
        full = whole(parameter, held_part(parameter), accelerator)
        assert full.shape == parameter.shape
        assert torch.equal(part_of(parameter, full, accelerator), held_part(parameter))
    before = [held_part(parameter).clone() for _, parameter in named]
    with average.applied(accelerator):
        shadow = average.ema.shadow_params
        assert all(torch.equal(held_part(p), part) for (_, p), part in zip(named, shadow, strict=True))
    assert all(torch.equal(held_part(p), part) for (_, p), part in zip(named, before, strict=True))
    average.save(folder, accelerator)
    accelerator.wait_for_everyone()
    again = WeightAverage(named, 0.9)
    again.load(folder, accelerator)
    assert again.ema.optimization_step == 3
    assert all(torch.equal(*pair) for pair in zip(again.ema.shadow_params, average.ema.shadow_params, strict=True))
    # As accelerate stores sharded weights.
    distributed_checkpoint.save({"model": model.state_dict()}, checkpoint_id=str(folder / "pytorch_model_fsdp_0"))
    end_together(accelerator)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
