"""One process's part of a training run: its state, and one step of it."""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter

from core.errors import UserError
from core.processes import has_own_memory
from models.animators.base import Animator
from models.vae import VAE, VideoVAE
from tpc.augmentation import misalignment
from training.build import base_digest, given_embeddings, stored_networks
from training.checkpoint import Layout, Progress, exchange_with_bare_model, layout, leave_out, resume
from training.config import OptimizerConfig, TrainConfig
from training.data import (
    ArticulatedClips,
    driven_clips,
    ensure_latents,
    latents_folder,
    make_dataset,
    make_loader,
)
from training.distributed import on_main, strategy
from training.ema import WeightAverage
from training.objective import Batch, Generators, Objective, StepLoss, compose_samples, sample_generators

# Tokens of a frame up to which writing the probabilities down is faster than recomputing them, on CPUs.
FEW_TOKENS = 128
BUCKETS = 10
MISALIGNMENT = ("reference/relative_angle_deg", "reference/box_iou")
POINTING = ("attention/loss", "attention/pointing_accuracy")


@dataclass
class StepGuard:
    """Counter of steps left out because a loss or gradient was not finite; too many in a row end the run."""

    limit: int  # steps left out in a row that end the run
    skipped: int = 0  # steps left out in the whole run
    # Steps left out in a row up to now. Weights are worth a checkpoint only while it is 0: after a step that went
    # wrong it takes a good one to know that they are sound.
    streak: int = 0

    def allows_step(self, norm: float, accelerator: Accelerator) -> bool:
        """True if the optimiser may step: the gradients are finite, or DeepSpeed or the scaler sees to it.

        `norm` is of the accumulated gradients of all processes, so all of them decide alike.
        """
        # DeepSpeed steps inside `backward`, where it finds gradients that are not finite itself. The scaler of fp16
        # does so too, and must see infinite ones to lower its scale.
        if accelerator.distributed_type == DistributedType.DEEPSPEED or accelerator.scaler is not None:
            return True
        # A loss that is not finite makes the norm so, whichever batch and process it came from.
        return math.isfinite(norm)

    def count(self, taken: bool, step: int) -> None:
        """Close a step, `taken` if the parameters moved; `UserError` after `limit` steps in a row that were not."""
        self.streak = 0 if taken else self.streak + 1
        self.skipped += not taken
        if self.streak >= self.limit:
            raise UserError(
                f"loss or gradient of the last {self.streak} steps up to step {step} was not finite; the newest "
                "checkpoint is from before: lower optimizer.learning_rate, raise optimizer.epsilon, or use "
                "mixed_precision=bf16 or no"
            )


@dataclass
class StepLog:
    """Values since the last line of the log, on one process."""

    timesteps: int  # of the noise schedule
    losses: list[Tensor] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    misaligned: list[Tensor] = field(default_factory=list)
    pointing: list[Tensor] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    seconds: float = 0.0  # spent on training since the last line
    started: float = field(default_factory=time.perf_counter)

    def resume_clock(self) -> None:
        self.started = time.perf_counter()

    def stop_clock(self) -> None:
        self.seconds += time.perf_counter() - self.started

    def add(self, result: StepLoss, batch: dict[str, Tensor]) -> None:
        self.losses.append(result.loss.detach().float())
        self.samples.append(torch.stack([result.timesteps.float(), result.errors.float()], dim=1))
        if result.pointing is not None:
            self.pointing.append(result.pointing[None].float())
        measures = misalignment(batch)
        columns = [measures["relative_angle_deg"].flatten(), measures["box_iou"].flatten()]
        self.misaligned.append(torch.stack(columns, dim=1).float())

    def write(self, accelerator: Accelerator, step: int, clips: int, values: dict[str, float]) -> float:
        """Mean loss, nan when no step was finite, of the line written to the log; every process must call it.

        `clips` counts those of all processes since the last line; `values` are further scalars.
        """
        losses, samples, misaligned, pointing = (
            accelerator.gather(torch.cat(part)).cpu() if part else None
            for part in ([loss[None] for loss in self.losses], self.samples, self.misaligned, self.pointing)
        )
        mean = math.nan if losses is None else losses.mean().item()
        scalars = {"loss": mean, "peak_memory_gib": peak_memory() / 2**30, **values}
        if self.seconds > 0:
            scalars["samples_per_second"] = clips / self.seconds
        if self.norms:
            scalars["grad_norm"] = float(np.mean(self.norms))
        if pointing is not None:
            scalars |= dict(zip(POINTING, pointing.nanmean(dim=0).tolist(), strict=True))
        if samples is not None:
            scalars |= loss_by_timestep(samples[:, 0], samples[:, 1], self.timesteps)
            # Angles and IoUs that cannot be measured are nan and do not count.
            scalars |= dict(zip(MISALIGNMENT, misaligned.nanmean(dim=0).tolist(), strict=True))
            if accelerator.is_main_process:
                add_histograms(accelerator.get_tracker("tensorboard").writer, misaligned, step)
        accelerator.log({name: value for name, value in scalars.items() if math.isfinite(value)}, step=step)
        for part in (self.losses, self.samples, self.misaligned, self.pointing, self.norms):
            part.clear()
        self.seconds = 0.0
        self.resume_clock()
        return mean


def loss_by_timestep(timesteps: Tensor, errors: Tensor, count: int, buckets: int = BUCKETS) -> dict[str, float]:
    """Mean error of each range of timesteps that occurs; `count` is the schedule's length, inputs are (n,)."""
    bucket = (timesteps.long() * buckets) // count
    width = len(str(count - 1))
    found = {}
    for index in bucket.unique().tolist():
        first, last = math.ceil(index * count / buckets), math.ceil((index + 1) * count / buckets) - 1
        found[f"loss_by_timestep/{first:0{width}d}-{last:0{width}d}"] = errors[bucket == index].mean().item()
    return found


def add_histograms(writer: SummaryWriter, misaligned: Tensor, step: int) -> None:
    """Distributions of relative angle and box IoU, (n, 2)."""
    for name, column in zip(("relative_angle_deg", "box_iou"), misaligned.T, strict=True):
        known = column[torch.isfinite(column)]
        if len(known):
            writer.add_histogram(f"reference/{name}_distribution", known.cpu(), step)


def peak_memory() -> int:
    """Greatest memory of this process in bytes: allocated on its GPU, or resident without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class Run:
    """The state of a run in this process."""

    config: TrainConfig
    output: Path  # folder of checkpoints, logs and the pipeline
    accelerator: Accelerator
    objective: Objective
    model: nn.Module  # the animator as `accelerator.prepare` wrapped it; `objective.animator` is the bare one
    trainable: list[tuple[str, nn.Parameter]]  # names in the bare model and parameters, as prepared
    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]  # learning rate of a step, counted from 0
    average: WeightAverage | None  # EMA of the trainable parameters, or None
    layout: Layout  # what checkpoints must agree with
    progress: Progress
    guard: StepGuard
    log: StepLog

    @property
    def clips_per_step(self) -> int:
        """Batch size of an optimiser step, over all processes."""
        return self.config.batch_size * self.config.gradient_accumulation * self.accelerator.num_processes


def prepare(config: TrainConfig, output: Path, accelerator: Accelerator, vae: VAE | VideoVAE, model: Animator) -> Run:
    """Optimiser, strategy and state of a run: a new one's, or that of its newest checkpoint."""
    if accelerator.device.type == "mps" and config.augmentation.needs_float64():
        raise UserError(
            "augmentation.composition and augmentation.calibrated are computed in float64, which device mps does not "
            "have; set ACCELERATE_USE_CPU=true, take calibrated.transform=articulated, or set their probability to 0"
        )
    vae.to(accelerator.device)
    frames, (width, height) = config.data.num_frames, config.data.size
    with encoding(accelerator, config):
        constant = model.constant_inputs(vae, (frames, height, width), given_embeddings(config.model))
    constant = {name: value.to(accelerator.device) for name, value in constant.items()}
    objective = Objective(model, vae, config, constant)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], config.optimizer)
    exchange_with_bare_model(accelerator)
    model, optimizer = accelerator.prepare(model, optimizer)
    convert_buffers(accelerator, model)
    objective.animator = accelerator.unwrap_model(model)
    trainable = [(name, p) for name, p in objective.animator.named_parameters() if p.requires_grad]
    average = WeightAverage(trainable, config.ema_decay) if config.ema_decay else None
    base = None
    if config.model.init:
        base = base_digest(config.model.init)
        stored = stored_networks(config, vae, objective.animator).values()
        leave_out(objective.animator, {name for network in stored for name in network})
    arrangement = layout(accelerator, trainable, base)
    progress = resume(accelerator, output, arrangement, average)
    return Run(
        config=config,
        output=output,
        accelerator=accelerator,
        objective=objective,
        model=model,
        trainable=trainable,
        optimizer=optimizer,
        rate=learning_rate(config.optimizer, config.max_steps),
        average=average,
        layout=arrangement,
        progress=progress,
        guard=StepGuard(config.max_skipped_steps, skipped=progress.skipped),
        log=StepLog(objective.scheduler.config.num_train_timesteps),
    )


def encoding(accelerator: Accelerator, config: TrainConfig) -> AbstractContextManager:
    """What frozen networks encode in beside the steps: autocast where their layers are of several dtypes."""
    return accelerator.autocast() if config.frozen_dtype == "bfloat16" else nullcontext()


def convert_buffers(accelerator: Accelerator, model: nn.Module) -> None:
    """Make buffers half-precision under DeepSpeed, which makes parameters so and leaves buffers.

    Position tables would turn activations into float32, which half-precision layers refuse; but rotary ones, whose
    angles half precision would spoil, do not.
    """
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if strategy(accelerator).startswith("zero") and half is not None:
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point() and ".rope." not in name:
                buffer.data = buffer.data.to(half)


def optimizer_class(config: OptimizerConfig) -> Callable[..., torch.optim.Optimizer]:
    """AdamW with moments of four bytes or of one; `UserError` where the package of the latter is missing."""
    if config.name == "adamw":
        return partial(torch.optim.AdamW, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit  # not among the requirements
    except ImportError as error:
        raise UserError(
            f"optimizer.name=adamw8bit needs bitsandbytes ({error}): pip install bitsandbytes, or take "
            "optimizer.name=adamw, for which `--dry-run` says the memory"
        ) from None
    return AdamW8bit


def make_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    return optimizer_class(config)(
        parameters,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )


def learning_rate(config: OptimizerConfig, max_steps: int) -> Callable[[int], float]:
    """Learning rate of step i, counted from 0, by diffusers' schedule of that name; never 0.

    A function of the step alone: nothing needs saving, and a run may go on with another `max_steps`.
    """
    # The schedule's factors are all that is wanted; diffusers gives none without an optimiser.
    any_optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(
        config.schedule, any_optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=max_steps
    )
    warmup = config.warmup_steps

    def rate(step: int) -> float:
        # diffusers' warm-up begins at 0, a step that moves nothing.
        at = (step + 1) * warmup / (warmup + 1) if step < warmup else step
        return config.learning_rate * schedule.lr_lambdas[0](at)

    return rate


def make_clips(run: Run) -> Dataset:
    """The clips from the first one not yet seen to the last; a cache is made by the main process alone."""
    left = max(run.config.max_steps - run.progress.step, 0) * run.clips_per_step
    length = max(run.progress.clips + left, 1)
    made = []
    on_main(run.accelerator, lambda: made.append(make_dataset(run.config.data, length)))
    clips = made[0] if made else make_dataset(run.config.data, length)
    kind = run.objective.animator.pose_kind
    if run.config.data.cache_latents:
        vae = run.objective.vae
        with encoding(run.accelerator, run.config):
            on_main(run.accelerator, lambda: ensure_latents(clips, vae, kind))
        clips = clips.with_latents(latents_folder(clips.folder, vae, kind))
    clips = driven_clips(clips, run.config.data, run.objective.animator)
    calibrated = run.config.augmentation.calibrated
    if calibrated.probability > 0 and calibrated.transform == "articulated":
        return ArticulatedClips(clips, calibrated, run.config.seed)
    return clips


def batches(run: Run, clips: Dataset) -> Iterator[tuple[Batch, Generators]]:
    """This process's batches, each with one random generator a clip.

    Processes take consecutive batches in turn; a clip's generator follows from its position in the whole run.
    """
    config, accelerator = run.config, run.accelerator
    first = run.progress.clips
    loader = make_loader(clips, config.batch_size, config.data.workers, first, has_own_memory(accelerator.device))
    loader = accelerator.prepare(loader)
    for index, batch in enumerate(loader):
        position = first + (index * accelerator.num_processes + accelerator.process_index) * config.batch_size
        yield batch, sample_generators(config.seed, range(position, position + config.batch_size))


def accumulate_gradients(run: Run, batch: Batch, generators: Generators) -> None:
    config, accelerator = run.config, run.accelerator
    # DeepSpeed moves the parameters within `backward`, so the rate is set before.
    for group in run.optimizer.param_groups:
        group["lr"] = run.rate(run.progress.step)
    batch = compose_samples(batch, config.augmentation.composition, run.progress.step, generators)
    half = accelerator.mixed_precision == "bf16"
    with attention_kernels(accelerator.device, run.objective.most_tokens, half):
        with accelerator.autocast():
            result = run.objective.loss(run.model, batch, generators)
        run.log.add(result, batch)
        accelerator.backward(result.loss)


@contextmanager
def attention_kernels(device: torch.device, tokens: int, half: bool) -> Iterator[None]:
    """Attention kernels for a pass: torch's choice, but two products and a softmax for few tokens in bf16 on CPUs.

    That takes half the time of torch's fused kernel up to 128 tokens, as much at 256, and more beyond or in float32;
    `python -m benchmarks.attention_kernels` measures it. `tokens` are a frame's, in the layer that has most.
    """
    if device.type != "cpu" or not half or tokens > FEW_TOKENS:
        yield
        return
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # despite its name, of CPUs too
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)


def move_parameters(run: Run) -> None:
    """Clip the gradients and move the parameters, unless something was not finite."""
    accelerator, progress = run.accelerator, run.progress
    # The one value of a step that the program waits for.
    norm = float(accelerator.clip_grad_norm_([p for _, p in run.trainable], run.config.optimizer.max_grad_norm))
    taken = run.guard.allows_step(norm, accelerator)
    if taken:
        run.optimizer.step()
        taken = not accelerator.optimizer_step_was_skipped
        run.log.norms.append(norm)
    run.optimizer.zero_grad(set_to_none=True)
    progress.step += 1
    progress.clips += run.clips_per_step
    run.guard.count(taken, progress.step)
    progress.skipped = run.guard.skipped
    if taken and run.average is not None:
        run.average.step()
