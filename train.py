"""Train an animator: image stage and motion stage in one loop.

    accelerate launch train.py --config configs/train_stage1.yaml [key=value ...]
    accelerate launch train.py --config configs/train_stage1.yaml --dry-run

The same command again resumes from the newest checkpoint; SIGTERM and Ctrl-C save one first. Writes to `output`:
    checkpoint-<step>/   complete states        samples/    validation sheets
    pipeline/ or lora/   what infer.py loads    logs/       TensorBoard
    config.yaml          resolved configuration
"""

import os
from contextlib import ExitStack, nullcontext

import numpy as np
import torch
from accelerate.utils import set_seed
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from core.config import VERSION, load_config, save_config
from core.errors import UserError, run_command
from core.files import complete_file, locked_folder, output_folder
from data.video.writing import write_video
from inference.comparison import comparison_frames, comparison_strip
from models.vae import vae_scale_factor
from training.build import (
    check_precision,
    make_networks,
    make_pipeline,
    schedule_differences,
    set_trainable,
    shrink_frozen,
    trained_window,
)
from training.checkpoint import remove_leftovers, save_checkpoint
from training.config import TrainConfig
from training.data import broken_clips, check_pose_kind
from training.distributed import SHARDED, check_shared, end_together, make_accelerator, on_main, spread_batch, strategy
from training.export import export_checkpoint, export_name
from training.features import check_features
from training.interruption import StopRequest, stop_request
from training.kernels import attention_kernels
from training.logs import add_clip
from training.memory import enable_gradient_checkpointing, memory_report
from training.noise import Generators
from training.objective import compose_samples, diffusion_loss
from training.run import Batch, Run, batches, make_clips, prepare
from training.validate import FPS, mean_metrics, sample_clips, undisturbed

SHEET_ROWS = 3  # frames of a clip on a validation sheet


def train_batch(run: Run, batch: Batch, generators: Generators) -> None:
    """Forward and backward of one batch of this process; the parameters move when the accumulation is full."""
    config, accelerator = run.config, run.accelerator
    # DeepSpeed moves the parameters within `backward`, so the rate is set before.
    for group in run.optimizer.param_groups:
        group["lr"] = run.rate(run.progress.step)
    batch = compose_samples(batch, config.augmentation.composition, run.progress.step, generators)
    half = accelerator.mixed_precision == "bf16"
    with attention_kernels(accelerator.device, run.traits.most_tokens, half):
        with accelerator.autocast():
            result = diffusion_loss(
                run.model,
                run.vae,
                run.scheduler,
                batch,
                config.noise,
                config.augmentation.calibrated,
                run.traits,
                generators,
                config.vae_chunk,
                config.attention,
            )
        run.log.add(result, batch)
        if run.guard.admits(result.loss, accelerator):
            accelerator.backward(result.loss)


def move(run: Run) -> None:
    """Clip the gradients and move the parameters, unless something was not finite; then the step is left out."""
    accelerator, progress = run.accelerator, run.progress
    if not accelerator.sync_gradients:
        return
    norm = accelerator.clip_grad_norm_(run.parameters, run.config.optimizer.max_grad_norm)
    taken = run.guard.allows_step(norm, accelerator)
    if taken:
        run.optimizer.step()
        taken = not accelerator.optimizer_step_was_skipped
        run.log.norms.append(float(norm))
    run.optimizer.zero_grad(set_to_none=True)
    progress.step += 1
    progress.clips += run.clips_per_step
    run.guard.count(taken, progress.step)
    progress.skipped = run.guard.skipped
    if taken and run.average is not None:
        run.average.step()


def validate(run: Run) -> None:
    """Sample held-out clips with the averaged weights, with and without TPC; write images and clips, and log them.

    Where parameters are spread over processes, all take part.
    """
    config, accelerator, step = run.config, run.accelerator, run.progress.step
    spread = run.layout.strategy in SHARDED
    if not accelerator.is_main_process and not spread:
        return
    model = accelerator.unwrap_model(run.model)
    pipeline = make_pipeline(run.vae, model, config.noise, trained_window(config))
    pipeline.set_progress_bar_config(disable=True)
    averaged = run.average.applied(accelerator) if run.average is not None else nullcontext()
    # Not accelerate's autocast: it does nothing under DeepSpeed, whose half-precision weights meet a float32 VAE.
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    autocast = torch.autocast(accelerator.device.type, half, enabled=half is not None)
    with undisturbed(model, run.vae), averaged, autocast:
        clips = sample_clips(pipeline, config.data, config.validation)
    if not accelerator.is_main_process:
        return
    accelerator.log({f"validation/{name}": value for name, value in mean_metrics(clips).items()}, step=step)
    sheet = np.concatenate([comparison_strip(clip.columns, SHEET_ROWS) for clip in clips])
    with complete_file(run.output / "samples" / f"{step:07d}.png") as path:
        Image.fromarray(sheet).save(path)
    writer = accelerator.get_tracker("tensorboard").writer
    writer.add_image("validation/clips", sheet, step, dataformats="HWC")
    if config.validation.num_frames > 1:
        for number, clip in enumerate(clips):
            frames = list(comparison_frames(clip.columns))
            metadata = {"generator": f"TPC-Animate {VERSION}", "generated": True}
            write_video(run.output / "samples" / f"{step:07d}_clip{number}.mp4", frames, FPS, metadata)
            add_clip(writer, f"validation/clip_{number}", frames, FPS, step)


def save(run: Run) -> None:
    """Write a checkpoint of the present step."""
    save_checkpoint(run.accelerator, run.output, run.progress, run.layout, run.average, run.config.keep_checkpoints)


def train(run: Run, clips: Dataset, request: StopRequest, bar: tqdm) -> bool:
    """Train until the last step, or until a signal asks to stop; either way the last step is saved.

    Args:
        bar: progress, in optimiser steps.

    Returns:
        Whether the run was stopped early.
    """
    config, accelerator, progress = run.config, run.accelerator, run.progress
    written = saved = progress.step
    stopping = False
    run.model.train()
    for batch, generators in batches(run, clips):
        with accelerator.accumulate(run.model):
            train_batch(run, batch, generators)
            move(run)
        if not accelerator.sync_gradients:
            continue
        bar.update()
        run.log.stop_clock()
        if progress.step % config.log_steps == 0:
            values = {"learning_rate": run.rate(progress.step - 1), "skipped_steps": progress.skipped}
            values["broken_clips"] = broken_clips(clips)
            clips_seen = (progress.step - written) * run.clips_per_step
            loss = run.log.write(accelerator, progress.step, clips_seen, values)
            bar.set_postfix(loss=f"{loss:.4f}")
            written = progress.step
        if config.validation.steps and progress.step % config.validation.steps == 0:
            validate(run)
        if progress.step % config.checkpoint_steps == 0 and run.guard.streak == 0:
            save(run)
            saved = progress.step
        run.log.resume_clock()
        # Whichever process was signalled, all of them must stop at the same step.
        if request.signal is not None:
            accelerator.set_trigger()
        if stopping := accelerator.check_trigger():
            break
    if run.guard.streak:
        raise UserError(
            f"loss or gradient of the last {run.guard.streak} steps up to step {progress.step} was not finite, so "
            "these are not saved; the same command goes on from the newest checkpoint"
        )
    if progress.step > saved:
        save(run)
    return stopping and progress.step < config.max_steps


def main(arguments: list[str]) -> None:
    config = load_config(TrainConfig, arguments, file_option="--config", flags=("dry_run",))
    check_precision(config)
    if config.dry_run:
        print(memory_report(config))
        return
    output = output_folder(config.output)
    config = spread_batch(config)

    # Model: a frozen VAE, and one module of which each stage trains its part. New networks are the same on every rank.
    set_seed(config.seed)
    vae, model = make_networks(config)
    model.check_size(vae_scale_factor(vae), tuple(config.data.size))
    check_pose_kind(config.data, model.pose_kind)
    set_trainable(model, config)
    check_features(config, vae, model)
    # DeepSpeed makes all of the model half-precision, and has no autocast for the VAE beside it.
    if config.frozen_dtype == "bfloat16" and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        shrink_frozen(vae, model, torch.bfloat16)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
        vae.to(memory_format=torch.channels_last)

    accelerator = make_accelerator(config, output)
    set_seed(config.seed, device_specific=True)
    with ExitStack() as stack:
        on_main(accelerator, lambda: stack.enter_context(locked_folder(output)))
        if accelerator.is_main_process:
            remove_leftovers(output)
            save_config(config, output / "config.yaml")
            if differences := schedule_differences(config):
                print(f"note: not the noise schedule of model.init: {'; '.join(differences)}")
        check_shared(accelerator, config, output / "config.yaml")
        if config.validation.steps and strategy(accelerator) == "fsdp":
            raise UserError(
                f"validation.steps={config.validation.steps} cannot sample under FSDP; set it to 0, and animate with "
                "what `python -m training.export` makes of a checkpoint"
            )
        run = prepare(config, output, accelerator, vae, model)
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
            print(f"trained {step} steps; {result.name} in {result}")
        end_together(accelerator)


if __name__ == "__main__":
    run_command(main)
