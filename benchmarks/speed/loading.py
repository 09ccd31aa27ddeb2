"""Whether the loader of rendered people keeps the training of the small model busy."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate import Accelerator

from benchmarks.speed.measuring import Measured
from core.config import load_config
from train import move, train_batch
from training.build import make_networks, set_trainable
from training.config import TrainConfig
from training.data import make_dataset
from training.run import Run, batches, prepare

RECIPE = Path(__file__).parents[2] / "configs" / "train_stage1_tiny.yaml"


def training_config(vae: str, workers: int, batch_size: int, steps: int) -> TrainConfig:
    """The small model's recipe with people rendered while it trains, without a cache."""
    config = load_config(
        TrainConfig, ["--config", str(RECIPE), "output=unused"], file_option="--config", flags=("dry_run",)
    )
    config.model.vae = vae
    config.data = replace(config.data, cache=None, cache_latents=False, workers=workers)
    return replace(config, batch_size=batch_size, max_steps=steps)


def measure_loading(vae: str, workers: list[int], batch_size: int, steps: int) -> dict[str, Measured]:
    """Training steps with people rendered on the fly: how long they wait for their batches.

    Args:
        vae: folder of the VAE.
        workers: numbers of loader processes, one run each; 0 renders in the training process itself.
        steps: of each run, after three that fill the queue.

    Returns:
        By "<n> workers": seconds of a step, and of waiting and computing within it; busy: share of the time in which
        the model computes.
    """
    return {f"{number} workers": _one(training_config(vae, number, batch_size, steps + 3)) for number in workers}


def _one(config: TrainConfig) -> Measured:
    vae, model = make_networks(config)
    set_trainable(model, config)
    accelerator = Accelerator(cpu=True, mixed_precision=config.mixed_precision)
    with TemporaryDirectory() as folder:
        run = prepare(config, Path(folder), accelerator, vae, model)
        measured = Measured(parts={"waiting": [], "computing": []})
        for number, (waited, computed) in enumerate(_steps(run)):
            if number >= 3:
                measured.seconds.append(waited + computed)
                measured.parts["waiting"].append(waited)
                measured.parts["computing"].append(computed)
    waiting, computing = (sum(values) for values in measured.parts.values())
    measured.facts["busy"] = computing / (waiting + computing)
    return measured


def _steps(run: Run) -> Iterator[tuple[float, float]]:
    """Seconds that each step waited for its batch, and computed."""
    clips = make_dataset(run.config.data, run.config.max_steps * run.clips_per_step)
    run.model.train()
    started = time.perf_counter()
    for batch, generators in batches(run, clips):
        got = time.perf_counter()
        with run.accelerator.accumulate(run.model):
            train_batch(run, batch, generators)
            move(run)
        done = time.perf_counter()
        yield got - started, done - got
        started = time.perf_counter()
