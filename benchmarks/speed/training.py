"""Training steps of `train.py` on batches that lie ready: of each stage, and with people rendered meanwhile."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.speed.measuring import Measured, counting, peak_memory, timed
from core.config import load_config
from data.clips.rendered import RenderedPeople
from models.pipeline import AnimationPipeline
from training.build import enable_gradient_checkpointing, make_networks, set_trainable, shrink_frozen
from training.config import TrainConfig
from training.data import make_dataset
from training.objective import Objective, sample_generators
from training.run import Run, accumulate_gradients, batches, make_optimizer, move_parameters, prepare

RECIPE = Path(__file__).parents[2] / "configs" / "train_stage1_tiny.yaml"
UNMEASURED = 3  # steps that fill the loader's queue


class TrainingStep:
    """Loss, backward pass and optimiser of `train.py`, without data set and logging."""

    def __init__(
        self,
        pipeline: AnimationPipeline,  # float32, on its device; its networks are trained
        config: TrainConfig,
        batch: dict[str, Tensor],  # "reference", "frames" and "poses", see `training.objective.Objective.loss`
        frozen: torch.dtype = torch.float32,  # of what the stage does not train
        seed: int = 0,
    ):
        self.config, self.batch, self.seed = config, batch, seed
        self.vae, self.model = pipeline.vae.requires_grad_(False).eval(), pipeline.animator
        self.parameters = set_trainable(self.model, config)
        if frozen != torch.float32:
            shrink_frozen(self.vae, self.model, frozen)
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(self.model)
        self.model.train()
        self.optimizer = make_optimizer(self.parameters, config.optimizer)
        height, width = batch["frames"].shape[-2:]
        config = replace(config, data=replace(config.data, size=[width, height]))
        self.objective = Objective(self.model, self.vae, config)

    def loss(self, autocast: AbstractContextManager) -> Tensor:
        """Encoding, noise, prediction and min-SNR loss; the draws are those of the seed, every time."""
        generators = sample_generators(self.seed, range(len(self.batch["frames"])))
        with autocast:
            return self.objective.loss(self.model, self.batch, generators).loss

    def move(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def noise_batch(clips: int, frames: int, size: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    """Images (width, height) of noise, which cost as much as any others."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(clips, 3, 1 + frames, *size[::-1], generator=generator)
    poses = torch.rand(clips, 3, frames, *size[::-1], generator=generator)
    batch = {"reference": images[:, :, 0] * 2 - 1, "frames": images[:, :, 1:] * 2 - 1, "poses": poses}
    return {name: value.to(device) for name, value in batch.items()}


def measure_training(step: TrainingStep, half: torch.dtype | None, repeats: int) -> Measured:
    """Steps as published, VAE and image encoder included; autocast computes in `half`, if given."""
    device = step.batch["frames"].device
    losses: list[Tensor] = []

    def forward() -> None:
        losses[:] = [step.loss(torch.autocast(device.type, half, enabled=half is not None))]

    works = {"forward": forward, "backward": lambda: losses[0].backward(), "optimiser": step.move}
    measured = Measured(parts={name: [] for name in works})
    for repeat in range(repeats + 1):
        with peak_memory(device) as peak:
            taken = {name: timed(work, device) for name, work in works.items()}
            if repeat == 0:  # the first step also sets things up
                continue
            measured.peak_bytes = max(measured.peak_bytes, peak())
        measured.seconds.append(sum(taken.values()))
        for name, seconds in taken.items():
            measured.parts[name].append(seconds)
    with counting() as counted:
        for work in works.values():
            work()
        measured.operations = counted()
    measured.facts["trained_parameters"] = sum(parameter.numel() for parameter in step.parameters)
    return measured


def measure_rendering(side: int, clips: int) -> Measured:
    """Training clips of two images (reference and frame), with poses and masks, drawn by this process alone."""
    dataset = RenderedPeople(size=(side, side), num_frames=1, stride=1, seed=0, split="train", length=clips + 1)
    dataset[clips]
    cpu = torch.device("cpu")
    measured = Measured([timed(lambda clip=clip: dataset[clip], cpu) for clip in range(clips)])
    measured.facts["images_per_second"] = 2 / measured.typical
    return measured


def measure_loading(vae: str, workers: list[int], batch_size: int, steps: int) -> dict[str, Measured]:
    """Training steps of the small model with people rendered on the fly, by number of loader processes."""
    arguments = ["output=unused", f"model.vae={vae}", f"batch_size={batch_size}", f"max_steps={steps + UNMEASURED}"]
    arguments += ["data.cache=null", "data.cache_latents=false"]
    found = {}
    for number in workers:
        config = load_config(TrainConfig, [*arguments, f"data.workers={number}"], files=[RECIPE])
        found[f"{number} workers"] = _measure_waiting(config)
    return found


def _measure_waiting(config: TrainConfig) -> Measured:
    vae, model = make_networks(config)
    set_trainable(model, config)
    accelerator = Accelerator(cpu=True, mixed_precision=config.mixed_precision)
    with TemporaryDirectory() as folder:
        steps = list(_steps(prepare(config, Path(folder), accelerator, vae, model)))[UNMEASURED:]
    waiting, computing = map(list, zip(*steps, strict=True))
    measured = Measured([sum(step) for step in steps], parts={"waiting": waiting, "computing": computing})
    # The share of the time in which the model computes and does not wait for its batch.
    measured.facts["busy"] = sum(computing) / sum(measured.seconds)
    return measured


def _steps(run: Run) -> Iterator[tuple[float, float]]:
    """Seconds that each step waited for its batch, and computed."""
    clips = make_dataset(run.config.data, run.config.max_steps * run.clips_per_step)
    run.model.train()
    started = time.perf_counter()
    for batch, generators in batches(run, clips):
        got = time.perf_counter()
        with run.accelerator.accumulate(run.model):
            accumulate_gradients(run, batch, generators)
            move_parameters(run)
        done = time.perf_counter()
        yield got - started, done - got
        started = time.perf_counter()
