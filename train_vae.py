"""Train a small VAE for the tiny model.

    python train_vae.py --config configs/vae_tiny.yaml output=runs/vae [key=value ...]

Writes `output/vae/` (a diffusers AutoencoderTiny folder whose `scaling_factor` makes latents of unit variance),
`output/logs/` (TensorBoard) and `output/reconstructions.png` (held-out people: picture above, reconstruction below).
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderTiny
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from core.config import load_config, save_config
from core.errors import UserError, run_command
from core.files import complete_file, complete_folder, output_folder
from training.data import make_dataset, make_loader
from training.processes import end_together
from training.vae_config import VAEConfig


def build_vae(config: VAEConfig) -> AutoencoderTiny:
    """A new autoencoder, or the one in the folder `init`."""
    if config.init:
        if not (Path(config.init) / "config.json").is_file():
            raise UserError(f"init={config.init} is not a VAE folder (no config.json)")
        return AutoencoderTiny.from_pretrained(config.init)
    widths = (config.width,) * len(config.blocks)
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=tuple(config.blocks),
        num_decoder_blocks=tuple(reversed(config.blocks)),
        latent_channels=config.latent_channels,
    )


def pictures(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """All pictures of a batch and their person masks: (n, 3, H, W) in [-1, 1] and (n, 1, H, W)."""
    frames = batch["frames"].transpose(1, 2).flatten(0, 1)
    masks = batch["masks"].transpose(1, 2).flatten(0, 1)
    return torch.cat([batch["reference"], frames]), torch.cat([batch["reference_mask"], masks])


def vae_loss(vae: AutoencoderTiny, images: Tensor, masks: Tensor, config: VAEConfig) -> tuple[Tensor, Tensor]:
    """Weighted absolute and squared error plus edges and the latents' size; returns the loss and the squared error."""
    latents = vae.encode(images).latents
    noisy = latents + config.latent_noise * torch.randn_like(latents)
    error = vae.decode(noisy).sample.float() - images
    weight = 1 + (config.person_weight - 1) * masks
    weight = weight / weight.mean()
    # Differences of neighbouring pixels keep edges and cloth patterns sharp where the plain error would blur them.
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    loss = (weight * (error.abs() + error.square())).mean() + 0.5 * edges
    return loss + config.latent_weight * latents.float().square().mean(), error.detach().square().mean()


@torch.no_grad()
def latent_scale(vae: AutoencoderTiny, images: Tensor) -> float:
    """1 / standard deviation of the latents of these pictures."""
    return 1 / vae.encode(images).latents.float().std().item()


@torch.no_grad()
def save_reconstructions(vae: AutoencoderTiny, images: Tensor, masks: Tensor, path: Path) -> tuple[float, float]:
    """Write pictures above their reconstructions; returns the mean PSNR of picture and person in dB over [0, 1]."""
    decoded = vae.decode(vae.encode(images).latents).sample.clamp(-1, 1)
    error = (decoded - images).square() / 4
    whole = -10 * error.mean(dim=(1, 2, 3)).log10()
    person = -10 * ((error * masks).sum(dim=(1, 2, 3)) / (3 * masks.sum(dim=(1, 2, 3))).clamp(min=1)).log10()
    rows = [torch.cat(list(part), dim=2) for part in (images, decoded)]
    sheet = ((torch.cat(rows, dim=1).permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    with complete_file(path) as temporary:
        Image.fromarray(np.ascontiguousarray(sheet)).save(temporary)
    return whole.mean().item(), person.mean().item()


def main(arguments: list[str]) -> None:
    config = load_config(VAEConfig, arguments, file_option="--config")
    if config.data.latents or config.data.embeddings:
        raise UserError("data.latents= and data.embeddings= are of a finished VAE; leave them out to train one")
    output = output_folder(config.output)
    accelerator = Accelerator(mixed_precision=config.mixed_precision, log_with="tensorboard", project_dir=output)
    accelerator.init_trackers("logs")
    set_seed(config.seed)
    save_config(config, output / "config.yaml")

    vae = build_vae(config)
    if config.channels_last:
        vae.to(memory_format=torch.channels_last)
    if config.freeze_encoder:
        vae.encoder.requires_grad_(False)
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    # The scheduler steps once a process and step under accelerate, hence the factor.
    processes = accelerator.num_processes
    schedule = get_scheduler(
        settings.schedule,
        optimizer,
        num_warmup_steps=settings.warmup_steps * processes,
        num_training_steps=config.max_steps * processes,
    )
    dataset = make_dataset(config.data, config.max_steps * config.batch_size * processes)
    loader = make_loader(dataset, config.batch_size, config.data.workers)
    model, optimizer, loader, schedule = accelerator.prepare(vae, optimizer, loader, schedule)
    vae = accelerator.unwrap_model(model)

    progress = tqdm(total=config.max_steps, disable=not accelerator.is_main_process)
    errors = []
    for step, batch in enumerate(loader, start=1):
        images, masks = pictures(batch)
        with accelerator.autocast():
            loss, mse = vae_loss(vae, images, masks, config)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        progress.update()
        errors.append(mse.item())
        if step % config.log_steps == 0:
            psnr = -10 * np.log10(np.mean(errors) / 4)
            errors.clear()
            progress.set_postfix(psnr=f"{psnr:.2f}")
            accelerator.log({"loss": loss.item(), "psnr": psnr, "lr": schedule.get_last_lr()[0]}, step=step)

    if accelerator.is_main_process:
        vae = vae.float().eval()
        heldout = make_dataset(replace(config.data, split="heldout", cache=None), 8)
        images, masks = pictures(default_collate([heldout[i] for i in range(8)]))
        if not config.freeze_encoder:
            vae.register_to_config(scaling_factor=latent_scale(vae, images))
        psnr, person = save_reconstructions(vae, images, masks, output / "reconstructions.png")
        accelerator.log({"heldout_psnr": psnr, "heldout_person_psnr": person}, step=config.max_steps)
        with complete_folder(output / "vae") as folder:
            vae.save_pretrained(folder)
        print(f"held-out PSNR {psnr:.2f} dB, person {person:.2f} dB; VAE in {output / 'vae'}")
    end_together(accelerator)


if __name__ == "__main__":
    run_command(main)
