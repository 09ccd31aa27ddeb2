"""One process's part of a training run, from the configuration to the first batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.utils.data import Dataset

from core.errors import UserError
from models.animators.base import Animator
from models.vae import VAE, vae_scale_factor
from training.build import make_scheduler
from training.checkpoint import Layout, Progress, exchange_with_bare_model, layout, resume
from training.config import OptimizerConfig, TrainConfig
from training.data import make_dataset, make_loader
from training.distributed import on_main, strategy
from training.ema import WeightAverage
from training.guard import StepGuard
from training.latent_cache import ensure_latents, latents_folder
from training.logs import StepLog
from training.noise import Generators, sample_generators
from training.traits import TrainingTraits

Batch = dict[str, Tensor]


@dataclass
class Run:
    """What a training step needs.

    Attributes:
        output: folder of checkpoints, logs and the pipeline.
        model: the animator as `accelerator.prepare` wrapped it.
        trainable: names in the bare model and parameters, as prepared.
        rate: learning rate of a step, counted from 0.
        average: moving average of the trainable parameters, or None.
        traits: of the model.
        layout: what checkpoints must agree with.
        progress: how far the run has come.
        guard: leaves out steps that are not finite.
        log: what the next line of the log will say.
    """

    config: TrainConfig
    output: Path
    accelerator: Accelerator
    vae: VAE
    model: nn.Module
    trainable: list[tuple[str, nn.Parameter]]
    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]
    average: WeightAverage | None
    scheduler: DDIMScheduler
    traits: TrainingTraits
    layout: Layout
    progress: Progress
    guard: StepGuard
    log: StepLog

    @property
    def clips_per_step(self) -> int:
        """Clips that all processes together see in one optimiser step."""
        return self.config.batch_size * self.config.gradient_accumulation * self.accelerator.num_processes

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        return [parameter for _, parameter in self.trainable]


def prepare(config: TrainConfig, output: Path, accelerator: Accelerator, vae: VAE, model: Animator) -> Run:
    """Optimiser, strategy and state of a run: a new one's, or that of its newest checkpoint.

    Args:
        vae, model: on the CPU; the model's trainable parameters are those that require gradients.
    """
    factor = vae_scale_factor(vae)
    traits = TrainingTraits.of(model, (config.data.size[1] // factor, config.data.size[0] // factor))
    if config.attention.weight > 0:
        traits.check_supervised()
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], config.optimizer)
    exchange_with_bare_model(accelerator)
    model, optimizer = accelerator.prepare(model, optimizer)
    convert_buffers(accelerator, model)
    vae.to(accelerator.device)
    trainable = [(name, p) for name, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad]
    average = WeightAverage(trainable, config.ema_decay) if config.ema_decay else None
    arrangement = layout(accelerator, trainable)
    progress = resume(accelerator, output, arrangement, average)
    return Run(
        config=config,
        output=output,
        accelerator=accelerator,
        vae=vae,
        model=model,
        trainable=trainable,
        optimizer=optimizer,
        rate=learning_rate(config.optimizer, config.max_steps),
        average=average,
        scheduler=make_scheduler(config.noise),
        traits=traits,
        layout=arrangement,
        progress=progress,
        guard=StepGuard(config.max_skipped_steps, skipped=progress.skipped),
        log=StepLog(config.noise.num_train_timesteps),
    )


def convert_buffers(accelerator: Accelerator, model: nn.Module) -> None:
    """Make buffers half-precision under DeepSpeed, which makes parameters so and leaves buffers.

    The motion modules' position tables would turn activations into float32, which half-precision layers refuse.
    """
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if strategy(accelerator).startswith("zero") and half is not None:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(half)


def make_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, with moments of four bytes or of one.

    Raises:
        UserError: 8-bit moments without the package that has them.
    """
    settings = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"optimizer.name=adamw8bit needs bitsandbytes ({error}): pip install bitsandbytes, or take "
            "optimizer.name=adamw, for which `--dry-run` says the memory"
        ) from None
    return AdamW8bit(parameters, **settings)


def learning_rate(config: OptimizerConfig, max_steps: int) -> Callable[[int], float]:
    """The learning rate of step i, counted from 0, by diffusers' schedule of that name.

    A function of the step alone: nothing of it needs saving, and a run may go on with another `max_steps`.
    """
    # The schedule's factors are all that is wanted; diffusers gives none without an optimiser.
    any_optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(
        config.schedule, any_optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=max_steps
    )
    return lambda step: config.learning_rate * schedule.lr_lambdas[0](step)


def make_clips(run: Run) -> Dataset:
    """The clips from the first one not yet seen to the last; a cache is made by the main process alone."""
    left = max(run.config.max_steps - run.progress.step, 0) * run.clips_per_step
    length = max(run.progress.clips + left, 1)
    made = []
    on_main(run.accelerator, lambda: made.append(make_dataset(run.config.data, length)))
    clips = made[0] if made else make_dataset(run.config.data, length)
    if not run.config.data.cache_latents:
        return clips
    on_main(run.accelerator, lambda: ensure_latents(clips.folder, run.vae))
    return clips.with_latents(latents_folder(clips.folder, run.vae))


def batches(run: Run, clips: Dataset) -> Iterator[tuple[Batch, Generators]]:
    """This process's batches, each with one random generator a clip.

    Processes take consecutive batches in turn. What is drawn for a clip follows its position in the whole run, so it
    is the same on whatever process and in whatever batch the clip is.
    """
    config, accelerator = run.config, run.accelerator
    first = run.progress.clips
    loader = accelerator.prepare(make_loader(clips, config.batch_size, config.data.workers, start=first))
    for number, batch in enumerate(loader):
        position = first + (number * accelerator.num_processes + accelerator.process_index) * config.batch_size
        yield batch, sample_generators(config.seed, range(position, position + config.batch_size))
