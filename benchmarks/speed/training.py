"""One training step of each stage on rendered-size noise: forward, backward and optimiser."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.speed.measuring import Measured, counting, peak_memory, timed
from models.pipeline import AnimationPipeline
from models.vae import vae_scale_factor
from training.build import make_scheduler, set_trainable
from training.config import OptimizerConfig, TrainConfig
from training.memory import enable_gradient_checkpointing
from training.noise import sample_generators
from training.objective import diffusion_loss
from training.run import make_optimizer
from training.traits import TrainingTraits

VAE_CHUNK = 8


@dataclass(frozen=True)
class StepSize:
    """A training step.

    Attributes:
        stage: "image" or "motion".
        batch: clips; frames: of each.
        side: of the images in pixels.
        mixed: whether autocast computes in bfloat16; weights and moments are float32.
        gradient_checkpointing: compute UNet blocks twice and keep less of them.
        channels_last: memory format of convolutions.
    """

    stage: str
    batch: int
    frames: int
    side: int
    mixed: bool
    gradient_checkpointing: bool = False
    channels_last: bool = False


def noise_batch(size: StepSize, device: torch.device) -> dict[str, Tensor]:
    """Images of noise, which cost as much as any others."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(size.batch, 3, 1 + size.frames, size.side, size.side, generator=generator)
    poses = torch.rand(size.batch, 3, size.frames, size.side, size.side, generator=generator)
    batch = {"reference": images[:, :, 0] * 2 - 1, "frames": images[:, :, 1:] * 2 - 1, "poses": poses}
    return {name: value.to(device) for name, value in batch.items()}


def measure_training(pipeline: AnimationPipeline, size: StepSize, repeats: int) -> Measured:
    """Steps of the stage as published, VAE and image encoder included.

    Args:
        pipeline: float32, on its device; its networks are trained and are not what they were afterwards.
    """
    config = TrainConfig(stage=size.stage, output="", optimizer=OptimizerConfig())
    model, vae, device = pipeline.animator, pipeline.vae, pipeline.device
    vae.requires_grad_(False)
    parameters = set_trainable(model, config)
    if size.channels_last:
        model.to(memory_format=torch.channels_last)
        vae.to(memory_format=torch.channels_last)
    if size.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    model.train()
    side = size.side // vae_scale_factor(vae)
    traits, scheduler = TrainingTraits.of(model, (side, side)), make_scheduler(config.noise)
    optimizer = make_optimizer(parameters, config.optimizer)
    batch, generators = noise_batch(size, device), sample_generators(0, range(size.batch))
    losses: list[Tensor] = []

    def forward() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=size.mixed):
            found = diffusion_loss(
                model,
                vae,
                scheduler,
                batch,
                config.noise,
                config.augmentation.calibrated,
                traits,
                generators,
                VAE_CHUNK,
            )
        losses[:] = [found.loss]

    def move() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    works = {"forward": forward, "backward": lambda: losses[0].backward(), "optimiser": move}
    measured = Measured(parts={name: [] for name in works})
    for repeat in range(repeats + 1):
        with peak_memory(device) as peak:
            taken = {name: timed(work, device) for name, work in works.items()}
            if repeat:  # the first step also sets things up
                measured.peak_bytes = max(measured.peak_bytes, peak())
        if repeat:
            measured.seconds.append(sum(taken.values()))
            for name, seconds in taken.items():
                measured.parts[name].append(seconds)
    with counting() as counted:
        for work in works.values():
            work()
        measured.operations = counted()
    measured.facts["trained_parameters"] = int(np.sum([parameter.numel() for parameter in parameters]))
    return measured
