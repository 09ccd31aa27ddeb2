"""The training loop, from a configuration to the exported result."""

import os
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import torch
from accelerate.utils import set_seed
from torch.utils.data import Dataset
from tqdm import tqdm

from core.config import check_config, save_config
from core.errors import UserError
from core.files import locked_folder, output_folder, remove_leftovers
from models.animators.base import Animator
from models.vae import VAE, VideoVAE, vae_scale_factor
from training.build import (
    check_length,
    check_precision,
    make_networks,
    save_memory,
    schedule_differences,
    set_trainable,
    with_schedule,
)
from training.checkpoint import save_checkpoint
from training.config import TrainConfig
from training.data import broken_clips, check_features, check_pose_kind
from training.distributed import (
    StopRequest,
    check_shared,
    check_validation,
    end_together,
    make_accelerator,
    on_main,
    spread_batch,
    stop_request,
)
from training.export import export_checkpoint, export_name
from training.memory import memory_report
from training.run import Run, accumulate_gradients, batches, make_clips, move_parameters, optimizer_class, prepare
from training.validate import validate

TIMED_STEPS = 3  # of `dry_run`, after one that does not count


def build(config: TrainConfig) -> tuple[VAE | VideoVAE, Animator]:
    """The frozen VAE, and the animator of which each stage trains its part."""
    set_seed(config.seed)  # new networks are the same on every rank
    vae, model = make_networks(config)
    model.check_size(vae_scale_factor(vae), tuple(config.data.size))
    check_length(model, config)
    check_pose_kind(config.data, model.pose_kind)
    set_trainable(model, config)
    check_features(config, vae, model)
    save_memory(vae, model, config)
    return vae, model


def save(run: Run) -> None:
    save_checkpoint(run.accelerator, run.output, run.progress, run.layout, run.average, run.config.keep_checkpoints)


def train(run: Run, clips: Dataset, request: StopRequest, bar: tqdm) -> bool:
    """True if a signal ended training before the last step; the last step taken is saved."""
    config, accelerator, progress = run.config, run.accelerator, run.progress
    written = saved = progress.step
    stopping = False
    run.model.train()
    for batch, generators in batches(run, clips):
        with accelerator.accumulate(run.model):
            accumulate_gradients(run, batch, generators)
            if not accelerator.sync_gradients:
                continue
            move_parameters(run)
        bar.update()
        run.log.stop_clock()
        if progress.step % config.log_steps == 0:
            values = {"learning_rate": run.rate(progress.step - 1), "skipped_steps": progress.skipped}
            values["broken_clips"] = broken_clips(clips)
            trained = (progress.step - written) * run.clips_per_step
            loss = run.log.write(accelerator, progress.step, trained, values)
            bar.set_postfix(loss=f"{loss:.4f}")
            written = progress.step
        if config.validation.steps and progress.step % config.validation.steps == 0:
            validate(run)
        if progress.step % config.checkpoint_steps == 0 and run.guard.streak == 0:
            save(run)
            saved = progress.step
        run.log.resume_clock()
        if stopping := request.agreed(accelerator):
            break
    if run.guard.streak:
        raise UserError(
            f"loss or gradient of the last {run.guard.streak} steps up to step {progress.step} was not finite, so "
            "these are not saved; the same command goes on from the newest checkpoint"
        )
    if progress.step > saved:
        save(run)
    return stopping and progress.step < config.max_steps


def training_plan(run: Run, parameters: str) -> str:
    """What will be trained, from where on, and where to watch it."""
    config, done, data, output = run.config, run.progress.step, run.config.data, run.output
    if done >= config.max_steps:
        return f"{output} has all {config.max_steps} steps; max_steps= asks for more"
    batch = f"{run.clips_per_step} {f'clips of {data.num_frames} frames' if data.num_frames > 1 else 'images'}"
    size, begun = f"{data.size[0]} x {data.size[1]}", f"goes on from {output / f'checkpoint-{done}'}"
    return (
        f"stage {config.stage}: trains {parameters} parameters for {config.max_steps} steps of {batch} "
        f"at {size} pixels; {begun if done else 'begins anew'}\n"
        f"checkpoints every {config.checkpoint_steps} steps in {output}; watch: tensorboard --logdir {output / 'logs'}"
    )


def report_costs(config: TrainConfig) -> None:
    """Print parameters, memory by strategy, and the time of training on this device."""
    tables, need = memory_report(config)
    print(tables, flush=True)
    try:
        check_config(replace(config, dry_run=False))
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("one process is measured, without a launcher of several")
        if need > (free := free_memory()):
            raise UserError(f"a step takes {need / 2**30:.1f} GiB, of which {free / 2**30:.1f} are free here")
        print(f"\nmeasuring {TIMED_STEPS} steps of one process ...", flush=True)
        device, batch, update = measured_seconds(config)
    except UserError as error:
        print(f"\ntime is not measured: {error}")
        return
    accumulation = spread_batch(config).gradient_accumulation
    seconds = batch * accumulation + update
    parts = f"{accumulation} x {batch:.3g} s for {config.batch_size} samples, {update:.2g} s for the optimiser"
    print(
        f"{seconds:.3g} s a step ({parts}) on {device}: {seconds * config.max_steps / 3600:.3g} hours for "
        f"{config.max_steps} steps of one process, without validation and checkpoints"
    )


def free_memory() -> int:
    """Bytes that this process may take where it would train."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def measured_seconds(config: TrainConfig) -> tuple[str, float, float]:
    """Device, and means over a few real steps: seconds for one batch, its loading included, and for the optimiser.

    They are taken in a temporary folder, a cache of a few clips included, and after a first one that does not count.
    """
    with TemporaryDirectory() as folder:
        output = Path(folder)
        data = config.data
        if data.cache:
            count = min(data.cache_clips, (1 + TIMED_STEPS) * config.batch_size)
            data = replace(data, cache=str(output / "cache"), cache_clips=count)
        config = replace(config, output=folder, data=data, gradient_accumulation=1, total_batch_size=None)
        vae, model = build(config)
        run = prepare(config, output, make_accelerator(config, output), vae, model)
        device, moments = run.accelerator.device, []

        def note() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            moments.append(time.perf_counter())

        run.model.train()
        for batch, generators in islice(batches(run, make_clips(run)), 1 + TIMED_STEPS):
            with run.accelerator.accumulate(run.model):
                accumulate_gradients(run, batch, generators)
                note()
                move_parameters(run)
                note()
    spans = np.diff(moments[1:])
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"a CPU with {torch.get_num_threads()} threads"
    )
    return name, float(spans[::2].mean()), float(spans[1::2].mean())


def run_training(config: TrainConfig) -> None:
    """Train as configured, or print what `dry_run` asks for."""
    check_precision(config)
    if config.dry_run:
        if int(os.environ.get("RANK", 0)) == 0:
            report_costs(config)
        return
    optimizer_class(config.optimizer)  # that its package is missing is said before anything is loaded
    output = output_folder(config.output)
    differences = schedule_differences(config)
    config = with_schedule(spread_batch(config))
    vae, model = build(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    every = sum(p.numel() for p in model.parameters()) / 1e6
    accelerator = make_accelerator(config, output)
    set_seed(config.seed, device_specific=True)
    with ExitStack() as stack:
        on_main(accelerator, lambda: stack.enter_context(locked_folder(output)))
        if accelerator.is_main_process:
            for folder in (output, output / "samples"):
                remove_leftovers(folder)
            save_config(config, output / "config.yaml")
            if differences:
                print(f"note: not the noise schedule of model.init: {'; '.join(differences)}")
        check_shared(accelerator, config, output / "config.yaml")
        check_validation(accelerator, config)
        run = prepare(config, output, accelerator, vae, model)
        on_main(accelerator, lambda: print(training_plan(run, f"{trained:.3g} of {every:.3g} million"), flush=True))
        # What a killed run logged after its last checkpoint is logged again.
        accelerator.init_trackers("logs", init_kwargs={"tensorboard": {"purge_step": run.progress.step + 1}})
        clips = make_clips(run)
        bar = tqdm(total=config.max_steps, initial=run.progress.step, disable=not accelerator.is_main_process)
        with bar, stop_request() as request:
            stopped = train(run, clips, request, bar)
        step, newest = run.progress.step, output / f"checkpoint-{run.progress.step}"
        result = output / export_name(config)
        if not stopped:
            on_main(accelerator, lambda: export_checkpoint(config, newest, result))
        if accelerator.is_main_process and stopped:
            print(f"stopped after step {step} of {config.max_steps}, saved {newest}; the same command goes on")
        elif accelerator.is_main_process:
            print(f"trained {step} steps; {result.name} in {result}, the last state in {newest}")
            if config.validation.steps:
                print(f"validation sheets in {output / 'samples'}")
            base = "model" if result.name == "pipeline" else f"model={config.model.init} lora"
            words = f" embeddings={config.model.embeddings}" if config.model.embeddings else ""
            print(f"animate with it: python infer.py {base}={result}{words}")
        end_together(accelerator)
