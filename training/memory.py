"""`--dry-run`: sizes, trainable parameters, and an estimate of the memory that training takes under each strategy."""

from dataclasses import astuple, dataclass, fields

import torch
from diffusers import ModelMixin
from torch import nn

from models.animators.base import Animator
from models.vae import VAE, vae_scale_factor
from training.activations import StepMemory, step_memory
from training.build import set_trainable, shrink_frozen
from training.config import TrainConfig
from training.describe import describe_networks

GIB = 2**30
RESERVE = GIB  # CUDA's context, workspaces and what the allocator cannot use: assumed, not computed
# DeepSpeed's defaults, in elements: a bucket of gradients on their way, and gathered weights that may be alive.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class Amounts:
    """What is to be held, in bytes unless said otherwise.

    Attributes:
        trained, frozen: numbers of parameters of the model.
        frozen_bytes: of the model's frozen parameters, as the configuration keeps them.
        vae: of the VAE, which every process holds.
        moments: of the optimiser's two moments of one parameter.
        average: of the moving average of one parameter; 0 without.
        half: whether DeepSpeed keeps weights and gradients in two bytes.
        unit: of the largest part of the model that FSDP gathers at a time.
        step: peak of one step beside all this.
    """

    trained: int
    frozen: int
    frozen_bytes: int
    vae: int
    moments: float
    average: int
    half: bool
    unit: int
    step: int


@dataclass(frozen=True)
class Need:
    """Memory of one process on its GPU, by purpose, and of all processes of a machine in its main memory; bytes."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    buffers: float
    activations: float
    host: float = 0.0

    @property
    def gpu(self) -> float:
        """The sum on the GPU."""
        return sum(astuple(self)) - self.host


def amounts(vae: VAE, model: Animator, config: TrainConfig, step: StepMemory) -> Amounts:
    """The amounts of a configuration; networks may be on the meta device."""
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    blocks = (
        block
        for network in model.children()
        if hasattr(network, "down_blocks")
        for level in (*network.down_blocks, network.mid_block, *getattr(network, "up_blocks", ()))
        for block in level.children()
    )
    return Amounts(
        trained=sum(p.numel() for p in trained),
        frozen=sum(p.numel() for p in frozen),
        frozen_bytes=sum(p.numel() * p.element_size() for p in frozen),
        vae=sum(p.numel() * p.element_size() for p in vae.parameters()),
        # The 8-bit ones have a factor in float32 for every 256 values.
        moments=8 if config.optimizer.name == "adamw" else 2 * (1 + 4 / 256),
        average=4 if config.ema_decay else 0,
        half=config.mixed_precision in ("bf16", "fp16"),
        unit=max(4 * sum(p.numel() for p in block.parameters()) for block in blocks),
        step=step.peak,
    )


def needs(a: Amounts, processes: int) -> dict[str, Need]:
    """Memory by strategy, with `processes` GPUs in one machine.

    One GPU and DDP hold weights in float32 and compute in half precision; DeepSpeed holds half-precision weights and
    float32 masters, the masters with gradients and moments on one process each.
    """
    t, f, n = a.trained, a.frozen, processes
    small = 2 if a.half else 4
    bucket = small * REDUCE_BUCKET
    alive = small * min(LIVE_PARAMETERS, t + f)
    whole = Need(4 * t + a.frozen_bytes + a.vae, 4 * t, a.moments * t, a.average * t, RESERVE, a.step)
    states = (4 + a.moments) * t  # masters and moments
    weights = small * (t + f) + a.vae
    host = (states + 4 * t) / n  # gradients go there too
    return {
        "one GPU": whole,
        f"DDP, {n} GPUs": whole,
        f"ZeRO-2, {n} GPUs": Need(weights, small * t / n, states / n, a.average * t, bucket + RESERVE, a.step),
        f"ZeRO-2 offload, {n} GPUs": Need(weights, 0, 0, a.average * t, bucket + RESERVE, a.step, host * n),
        f"ZeRO-3, {n} GPUs": Need(
            small * (t + f) / n + a.vae, small * t / n, states / n, a.average * t / n, alive + bucket + RESERVE, a.step
        ),
        f"ZeRO-3 offload, {n} GPUs": Need(
            a.vae, 0, 0, a.average * t / n, alive + bucket + RESERVE, a.step, host * n + small * (t + f)
        ),
        f"FSDP, {n} GPUs": Need(
            (4 * t + a.frozen_bytes) / n + a.vae,
            4 * t / n,
            a.moments * t / n,
            a.average * t / n,
            # The unit at work and the one fetched meanwhile.
            RESERVE + 2 * a.unit,
            a.step,
        ),
    }


def enable_gradient_checkpointing(model: Animator) -> None:
    """Recompute blocks of UNets and ControlNets in the backward pass, motion modules included."""
    for network in model.children():
        if isinstance(network, ModelMixin) and network._supports_gradient_checkpointing:
            network.enable_gradient_checkpointing()


def estimate(config: TrainConfig) -> tuple[VAE, Animator, StepMemory]:
    """The configuration's networks without weights, what is trained chosen, and the memory of a step."""
    vae, model = describe_networks(config)
    vae.requires_grad_(False)
    model.check_size(vae_scale_factor(vae), tuple(config.data.size))
    with torch.device("meta"):
        set_trainable(model, config)
    if config.frozen_dtype == "bfloat16":
        shrink_frozen(vae, model, torch.bfloat16)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return vae, model, step_memory(vae, model, config)


def memory_report(config: TrainConfig) -> str:
    """Tables of parameters by part and of memory by strategy."""
    vae, model, step = estimate(config)
    held = amounts(vae, model, config, step)
    width, height = config.data.size
    lines = [f"{'part':<18}{'parameters':>14}{'trainable':>14}"]
    lines += [part_line(name, part) for name, part in (("vae", vae), *model.named_children())]
    lines += [
        "",
        f"one step of {config.batch_size} x {config.data.num_frames} frames at {width} x {height}: "
        f"{step.training / GIB:.1f} GiB in forward and backward pass, {step.encoding / GIB:.1f} GiB in the VAE",
        "",
        "estimated GiB of a process, by strategy; host: main memory of all processes of a machine",
    ]
    names = [field.name for field in fields(Need)]
    lines.append(f"{'':<24}" + "".join(f"{name:>12}" for name in (*names[:-1], "sum", names[-1])))
    for strategy, need in needs(held, config.dry_run_processes).items():
        values = [*astuple(need)[:-1], need.gpu, need.host]
        lines.append(f"{strategy:<24}" + "".join(f"{value / GIB:>12.2f}" for value in values))
    return "\n".join(lines)


def part_line(name: str, part: nn.Module) -> str:
    """A part's parameters and how many of them are trained."""
    every = sum(p.numel() for p in part.parameters())
    train = sum(p.numel() for p in part.parameters() if p.requires_grad)
    return f"{name:<18}{every:>14,}{train:>14,}"
