"""Train AnimateAnyone: image stage and motion stage in one loop.

    accelerate launch train.py --config configs/train_stage1.yaml [key=value ...]
    accelerate launch train.py --config configs/train_stage1.yaml --dry-run

The same command again resumes from the newest checkpoint. Writes to `output`:
    checkpoint-<step>/   complete states        samples/    validation sheets
    pipeline/            what infer.py loads    logs/       TensorBoard
    config.yaml          resolved configuration
"""

import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm import tqdm

from core.config import config_dict, load_config, save_config
from core.errors import UserError, run_command
from core.files import complete_file, output_folder
from models.latents import vae_factor
from tpc.augmentation import compose_references, misalignment
from training.build import check_size, make_networks, make_pipeline, make_scheduler, set_trainable
from training.checkpoint import resume, save_checkpoint
from training.config import TrainConfig, check_train_config
from training.data import make_dataset, make_loader
from training.export import averaged_weights, export_pipeline
from training.memory import enable_gradient_checkpointing, memory_report
from training.objective import check_schedule, diffusion_loss
from training.validate import validation_sheet


def make_accelerator(config: TrainConfig, output: Path) -> Accelerator:
    """Accelerate's front end; without CUDA several processes talk over gloo, which DeepSpeed must be told."""
    launched = "RANK" in os.environ or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    handlers = [InitProcessGroupKwargs(backend="gloo")] if launched and not torch.cuda.is_available() else []
    return Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation,
        mixed_precision=config.mixed_precision,
        log_with="tensorboard",
        project_dir=output,
        kwargs_handlers=handlers,
    )


def validate(accelerator, pipeline, ema, trainable, config: TrainConfig, output: Path, step: int) -> None:
    """Sample held-out clips with the averaged weights; write the sheet and log it."""
    with averaged_weights(ema, trainable):
        sheet, psnr = validation_sheet(pipeline, config.data, config.validation)
    with complete_file(output / "samples" / f"{step:07d}.png") as path:
        Image.fromarray(sheet).save(path)
    accelerator.log({"validation/person_psnr": psnr}, step=step)
    writer = accelerator.get_tracker("tensorboard").writer
    writer.add_image("validation/clips", sheet, step, dataformats="HWC")


def main(arguments: list[str]) -> None:
    config = load_config(TrainConfig, arguments, file_option="--config", flags=("dry_run",))
    check_train_config(config)
    check_schedule(config.noise)
    output = output_folder(config.output)

    # Model: a frozen VAE, and one module of which each stage trains its part.
    vae, model = make_networks(config)
    check_size(vae, config.data.size)
    scheduler = make_scheduler(config.noise)
    trainable = set_trainable(model, config)
    if config.dry_run:
        print(memory_report(model, trainable, config, vae_factor(vae)))
        return
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
        vae.to(memory_format=torch.channels_last)

    accelerator = make_accelerator(config, output)
    set_seed(config.seed, device_specific=True)
    if accelerator.is_main_process:
        save_config(config, output / "config.yaml")
    accelerator.init_trackers("logs")

    # Optimiser and schedule. The schedule steps once a process under accelerate, hence the factor.
    settings, processes = config.optimizer, accelerator.num_processes
    optimizer = torch.optim.AdamW(
        trainable,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    schedule = get_scheduler(
        settings.schedule,
        optimizer,
        num_warmup_steps=settings.warmup_steps * processes,
        num_training_steps=config.max_steps * processes,
    )

    # Data: clip i is a function of (seed, i), so a resumed run simply starts at the first clip not yet seen.
    clips_per_step = config.batch_size * config.gradient_accumulation * processes
    dataset = make_dataset(config.data, config.max_steps * clips_per_step)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    vae.to(accelerator.device)
    ema = EMAModel(trainable, decay=config.ema_decay, use_ema_warmup=False) if config.ema_decay else None
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    step = resume(accelerator, output)
    loader = make_loader(dataset, config.batch_size, config.data.workers, start=step * clips_per_step)
    loader = accelerator.prepare(loader)
    window_size = config.data.num_frames if config.stage == "motion" else None
    pipeline = make_pipeline(vae, accelerator.unwrap_model(model), config.noise, window_size)
    pipeline.set_progress_bar_config(disable=True)

    factor = vae_factor(vae)
    grids = pipeline.denoising_unet.attention_grids(config.data.size[1] // factor, config.data.size[0] // factor)

    progress = tqdm(total=config.max_steps, initial=step, disable=not accelerator.is_main_process)
    losses: list[float] = []
    started, first = time.perf_counter(), step
    model.train()
    for batch in loader:
        batch = compose_references(batch, config.augmentation.composition, step)
        with accelerator.accumulate(model):
            with accelerator.autocast():
                loss = diffusion_loss(
                    model, vae, scheduler, batch, config.noise, config.augmentation.calibrated, grids
                )
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(trainable, settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise UserError(f"the loss is {losses[-1]} at step {step}; lower optimizer.learning_rate or use bf16")
        if not accelerator.sync_gradients:
            continue

        step += 1
        progress.update()
        if ema is not None:
            ema.step(trainable)
        if step % config.log_steps == 0:
            mean = accelerator.gather(torch.tensor(np.mean(losses), device=accelerator.device)).mean().item()
            losses.clear()
            values = {
                "loss": mean,
                "learning_rate": schedule.get_last_lr()[0],
                "grad_norm": float(norm),
                "samples_per_second": (step - first) * clips_per_step / (time.perf_counter() - started),
            }
            # What the references really are against their targets: the paper's two measures of misalignment.
            values |= {f"reference/{name}": x.nanmean().item() for name, x in misalignment(batch).items()}
            if torch.cuda.is_available():
                values["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            accelerator.log(values, step=step)
            progress.set_postfix(loss=f"{mean:.4f}")
        if config.validation.steps and step % config.validation.steps == 0 and accelerator.is_main_process:
            model.eval()
            with accelerator.autocast():
                validate(accelerator, pipeline, ema, trainable, config, output, step)
            model.train()
        if step % config.checkpoint_steps == 0 or step == config.max_steps:
            save_checkpoint(accelerator, output, step, config.keep_checkpoints)

    if accelerator.is_main_process:
        export_pipeline(pipeline, ema, trainable, output / "pipeline", config.export_dtype)
        print(f"trained {step} steps; pipeline in {output / 'pipeline'}")
    accelerator.log({"configuration_steps": config_dict(config)["max_steps"]}, step=step)
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
