"""`--dry-run`: sizes, trainable parameters, and an estimate of training memory under each strategy.

A step runs on PyTorch's fake tensors, and every storage alive is counted; a full-size step takes seconds.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.animators.base import Animator, CalibratedImages
from models.attention.context import ReferenceContext
from models.attention.layers import token_levels
from models.attention.masking import Visibility
from models.vae import VAE, VideoVAE, vae_scale_factor
from tpc.trajectory import group_of_frames
from training.build import check_length, describe_networks, save_memory, set_trainable
from training.config import TrainConfig
from training.objective import encode_frames, encode_reference

GIB = 2**30
RESERVE = GIB  # CUDA's context, workspaces and what the allocator cannot use: assumed, not computed
# DeepSpeed's defaults, in elements: a bucket of gradients on their way, and gathered weights that may be alive.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
FLAGS = 3  # channels of visibility in calibrated training


def memory_report(config: TrainConfig) -> tuple[str, float]:
    """Tables of parameters by part and of memory by strategy, and the bytes that one process takes by itself."""
    vae, model, step = estimate(config)
    width, height = config.data.size
    lines = [f"{'part':<18}{'parameters':>14}{'trainable':>14}"]
    for name, part in (("vae", vae), *model.named_children()):
        every = sum(p.numel() for p in part.parameters())
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        lines.append(f"{name:<18}{every:>14,}{trained:>14,}")
    lines += [
        "",
        f"one step of {config.batch_size} x {config.data.num_frames} frames at {width} x {height}: "
        f"{step.training / GIB:.1f} GiB in forward and backward pass, {step.encoding / GIB:.1f} GiB in the VAE",
        "",
        "estimated GiB of a process, by strategy; host: main memory of all processes of a machine",
    ]
    names = [field.name for field in fields(Need)]
    lines.append(f"{'':<24}" + "".join(f"{name:>12}" for name in (*names[:-1], "sum", names[-1])))
    every = needs(amounts(vae, model, config, step), config.dry_run_processes)
    for strategy, need in every.items():
        values = [*astuple(need)[:-1], need.gpu, need.host]
        lines.append(f"{strategy:<24}" + "".join(f"{value / GIB:>12.2f}" for value in values))
    return "\n".join(lines), every["one GPU"].gpu


# Memory of a step


@dataclass(frozen=True)
class StepMemory:
    """Peaks in bytes."""

    encoding: int  # while the VAE encodes the batch
    training: int  # in forward and backward pass, without gradients of parameters


class LiveStorages(TorchDispatchMode):
    """Bytes of storages made while it is active and still alive, without the networks' own.

    torch's own `MemTracker` cannot: it hooks gradients of all parameters, and fails on frozen ones.
    """

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        own = (tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))
        self.known = {tensor.untyped_storage()._cdata for tensor in own}

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.notice(leaf.untyped_storage())
        return result

    def notice(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


def estimate(config: TrainConfig) -> tuple[VAE | VideoVAE, Animator, StepMemory]:
    """VAE and animator without weights, frozen as in training, and the memory of a step."""
    vae, model = describe_networks(config)
    vae.requires_grad_(False)
    model.check_size(vae_scale_factor(vae), tuple(config.data.size))
    check_length(model, config)
    with torch.device("meta"):
        set_trainable(model, config)
    save_memory(vae, model, config)
    return vae, model, step_memory(vae, model, config)


def step_memory(vae: VAE | VideoVAE, model: Animator, config: TrainConfig) -> StepMemory:
    """Memory of one batch's step on one process; the networks, on the meta device, are changed."""
    width, height = config.data.size
    batch, frames, factor = config.batch_size, config.data.num_frames, vae_scale_factor(vae)
    index = context_index(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for network in (vae, model):
            network.to_empty(device="cpu")
            widen_norms(network)
        clip = torch.empty(batch, 3, frames, height, width)
        with counted(config, vae) as live:
            encode_frames(vae, clip, config.vae_chunk)
            encode_reference(vae, clip[:, :, 0], config.vae_chunk)
        encoding = live.peak
        inputs = step_inputs(model, config, (height // factor, width // factor), index)
        free_gradients(model)
        model.train()
        with counted(config, model) as live:
            model(**inputs).float().square().mean().backward()
    return StepMemory(encoding, live.peak)


def widen_norms(network: nn.Module) -> None:
    """Normalise in float32, as autocast does on GPUs; on the CPU, where the step is imitated, it does not."""
    for module in network.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.register_forward_pre_hook(lambda module, inputs: tuple(tensor.float() for tensor in inputs))


@contextmanager
def counted(config: TrainConfig, *networks: nn.Module) -> Iterator[LiveStorages]:
    """Count storages within the block, under the run's autocast."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision)
    live = LiveStorages(*networks)
    with live, torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
        yield live


def calibrated_count(config: TrainConfig) -> int:
    """Calibrated images of a clip."""
    calibrated = config.augmentation.calibrated
    return min(calibrated.images, config.data.num_frames) if calibrated.probability > 0 else 0


def context_index(config: TrainConfig) -> Tensor:
    """The images that each frame of a batch attends to, (b*f, 2), as `objective.calibrated_reference` gives them."""
    batch, frames, images = config.batch_size, config.data.num_frames, max(calibrated_count(config), 1)
    clip = torch.arange(batch).repeat_interleave(frames)
    own = torch.from_numpy(group_of_frames(frames, images)).repeat(batch)
    return torch.stack([clip, batch + clip * images + own], dim=1)


def step_inputs(model: Animator, config: TrainConfig, latent: tuple[int, int], index: Tensor) -> dict[str, object]:
    """Arguments of the model for one batch, calibrated images included where they are trained with.

    `index` is of numbers that the model may read, unlike those of imitated tensors.
    """
    width, height = config.data.size
    batch, frames = config.batch_size, config.data.num_frames
    channels = model.latent_channels
    images = calibrated_count(config)
    context = shown = None
    if images:
        levels = token_levels(model.attention_layers(latent))
        keys = {level.tokens: level.tokens * level.keys.own + 2 * level.keys.tokens for level in levels}
        context = ReferenceContext(
            tokens={},
            index=index,
            visibility=Visibility(
                {n: torch.empty(batch * frames, n, FLAGS) for n in keys},
                {n: torch.empty(batch * frames, count, FLAGS) for n, count in keys.items()},
            ),
        )
        count = batch * images
        shown = CalibratedImages(torch.empty(count, 3, height, width), torch.empty(count, 1, height, width))
    encoded = images if model.calibrated_latents else 0
    return {
        "noisy_latents": torch.empty(batch, channels, model.latent_frames(frames), *latent),
        "timestep": torch.zeros(batch, dtype=torch.long),
        "reference_latents": torch.empty(batch * (1 + encoded), channels, *latent),
        "reference_image": torch.empty(batch, 3, height, width),
        "poses": torch.empty(batch, 3, frames, height, width),
        "dropped": torch.zeros(batch, dtype=torch.long),
        "reference": context,
        "reference_mask": torch.empty(batch, 1, height, width) if model.needs_mask else None,
        "calibrated": shown,
        "inputs": model.empty_inputs(batch, frames, latent),
    }


def free_gradients(model: nn.Module) -> None:
    """Free every parameter's gradient as soon as it is there: gradients are counted by themselves."""

    def forget(parameter: nn.Parameter) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(forget)


# Memory by strategy. DeepSpeed's own estimators take every parameter for trained, without EMA and 8-bit moments.


@dataclass(frozen=True)
class Amounts:
    """Sizes of everything that is held, in bytes unless said otherwise."""

    trained: int  # parameters of the model
    frozen: int
    frozen_bytes: int  # of the model's frozen parameters, as the configuration keeps them
    vae: int  # of the VAE, which every process holds
    moments: float  # of the optimiser's two moments of one parameter
    average: int  # of the EMA of one parameter; 0 without
    half: bool  # DeepSpeed keeps weights and gradients in two bytes
    unit: int  # of the largest of the blocks that FSDP gathers at a time
    outside: int  # of what is in no block, which FSDP keeps gathered for all of a step
    step: int  # peak of one step beside all this


@dataclass(frozen=True)
class Need:
    """Bytes of one process on its GPU, by purpose; `host`: main memory of all processes of a machine."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    buffers: float
    activations: float
    host: float = 0.0

    @property
    def gpu(self) -> float:
        return sum(astuple(self)) - self.host


def amounts(vae: VAE | VideoVAE, model: Animator, config: TrainConfig, step: StepMemory) -> Amounts:
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    blocks = [module for module in model.modules() if type(module).__name__ in model.blocks]
    within = {id(parameter) for block in blocks for parameter in block.parameters()}
    return Amounts(
        trained=sum(p.numel() for p in trained),
        frozen=sum(p.numel() for p in frozen),
        frozen_bytes=sum(p.numel() * p.element_size() for p in frozen),
        vae=sum(p.numel() * p.element_size() for p in vae.parameters()),
        # The 8-bit ones have a factor in float32 for every 256 values.
        moments=8 if config.optimizer.name == "adamw" else 2 * (1 + 4 / 256),
        average=4 if config.ema_decay else 0,
        half=config.mixed_precision in ("bf16", "fp16"),
        unit=max(sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks),
        outside=sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in within),
        step=max(step.encoding, step.training),
    )


def needs(a: Amounts, processes: int) -> dict[str, Need]:
    """Memory by strategy, with `processes` GPUs in one machine.

    One GPU and DDP hold float32 weights; DeepSpeed half-precision ones, and float32 masters spread over processes.
    """
    t, f, n = a.trained, a.frozen, processes
    small = 2 if a.half else 4
    bucket = small * REDUCE_BUCKET
    alive = small * min(LIVE_PARAMETERS, t + f)
    whole = Need(4 * t + a.frozen_bytes + a.vae, 4 * t, a.moments * t, a.average * t, RESERVE, a.step)
    states = (4 + a.moments) * t  # masters and moments
    weights = small * (t + f) + a.vae
    host = (states + 4 * t) / n  # gradients go there too
    sharded = Need(
        small * (t + f) / n + a.vae, small * t / n, states / n, a.average * t / n, alive + bucket + RESERVE, a.step
    )
    return {
        "one GPU": whole,
        f"DDP, {n} GPUs": whole,
        f"ZeRO-2, {n} GPUs": Need(weights, small * t / n, states / n, a.average * t, bucket + RESERVE, a.step),
        f"ZeRO-2 offload, {n} GPUs": Need(weights, 0, 0, a.average * t, bucket + RESERVE, a.step, host * n),
        f"ZeRO-3, {n} GPUs": sharded,
        f"ZeRO-3 offload, {n} GPUs": replace(
            sharded, weights=a.vae, gradients=0, optimizer=0, host=host * n + small * (t + f)
        ),
        f"FSDP, {n} GPUs": Need(
            (4 * t + a.frozen_bytes) / n + a.vae,
            4 * t / n,
            a.moments * t / n,
            a.average * t / n,
            # The block at work and the one fetched meanwhile.
            RESERVE + a.outside + 2 * a.unit,
            a.step,
        ),
    }
