"""`--dry-run`: sizes, trainable parameters and an estimate of the memory that training takes."""

import copy

import torch
from torch import Tensor, nn

from models.animate_anyone import AnimateAnyone
from training.config import TrainConfig


def saved_activation_bytes(model: AnimateAnyone, config: TrainConfig, factor: int) -> int:
    """Bytes that one training step keeps for the backward pass, counted on the meta device, where nothing runs.

    Args:
        factor: pixels a latent, of the VAE.
    """
    meta = copy.deepcopy(model).to("meta")
    width, height = config.data.size
    batch, frames = config.batch_size, config.data.num_frames
    channels = model.denoising_unet.config.in_channels
    latent = (height // factor, width // factor)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(meta)
    half = config.mixed_precision in ("bf16", "fp16")
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        if not isinstance(tensor, nn.Parameter):
            total += tensor.numel() * (2 if half and tensor.dtype == torch.float32 else tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        meta(
            torch.empty(batch, channels, frames, *latent, device="meta"),
            torch.empty(batch, dtype=torch.long, device="meta"),
            torch.empty(batch, channels, *latent, device="meta"),
            torch.empty(batch, 3, height, width, device="meta"),
            torch.empty(batch, 3, frames, height, width, device="meta"),
            torch.empty(batch, dtype=torch.bool, device="meta"),
        )
    return total


def enable_gradient_checkpointing(model: AnimateAnyone) -> None:
    """Recompute blocks in the backward pass, motion modules included."""
    model.reference_net.enable_gradient_checkpointing()
    model.denoising_unet.enable_gradient_checkpointing()


def memory_report(model: AnimateAnyone, trainable: list[nn.Parameter], config: TrainConfig, factor: int) -> str:
    """A table of parameters by part and of memory by purpose, for one process that holds everything (DDP)."""
    lines = [f"{'part':<18}{'parameters':>14}{'trainable':>14}"]
    for name, part in model.named_children():
        every = sum(p.numel() for p in part.parameters())
        train = sum(p.numel() for p in part.parameters() if p.requires_grad)
        lines.append(f"{name:<18}{every:>14,}{train:>14,}")
    count = sum(p.numel() for p in trainable)
    purposes = {
        "weights": 4 * sum(p.numel() for p in model.parameters()),
        "gradients": 4 * count,
        "optimizer (AdamW)": 8 * count,
        "EMA": 4 * count if config.ema_decay else 0,
        "activations": saved_activation_bytes(model, config, factor),
    }
    purposes["sum"] = sum(purposes.values())
    lines.append("memory of one process without sharding:")
    lines += [f"  {name:<18}{size / 2**30:>10.2f} GiB" for name, size in purposes.items()]
    return "\n".join(lines)
