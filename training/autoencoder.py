"""Training of a VAE, from a configuration to its folder."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, AutoencoderKLWan, AutoencoderTiny
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate
from tqdm import tqdm

from core.config import save_config
from core.errors import UserError
from core.files import complete_file, complete_folder, output_folder
from core.processes import has_own_memory
from models.checkpoints.loading import load_folder
from models.compiling import use_channels_last
from models.vae import VAE, VideoVAE, vae_class, vae_decode, vae_encode, video_decode, video_encode
from training.config import FRAMES_PER_LATENT, LENGTHS, VAEConfig
from training.data import make_dataset, make_loader
from training.distributed import end_together, make_accelerator
from training.run import learning_rate, make_optimizer, optimizer_class

SHOWN_FRAMES = 4  # of a video, every so many frames are shown


def build_vae(config: VAEConfig) -> VAE | VideoVAE:
    if config.init:
        cls, _ = vae_class(config.init, "init")
        if cls is AutoencoderKL and not config.freeze_encoder:
            raise UserError(
                f"init={config.init} is an AutoencoderKL: only its decoder is trained, add freeze_encoder=true"
            )
        if cls is AutoencoderKLWan and (config.data.num_frames - 1) % FRAMES_PER_LATENT:
            raise UserError(f"init={config.init} is of videos: {LENGTHS.format(config.data.num_frames)}")
        return load_folder(cls, config.init, f"init={config.init}").train()
    if config.multiples is not None:
        halvings = len(config.multiples) - 1
        vae = AutoencoderKLWan(
            base_dim=config.width,
            z_dim=config.latent_channels,
            dim_mult=list(config.multiples),
            num_res_blocks=1,
            # The finest images are halved alone, the two coarsest steps halve time as well.
            temperal_downsample=[False] * (halvings - 2) + [True, True],
            latents_mean=[0.0] * config.latent_channels,
            latents_std=[1.0] * config.latent_channels,
            scale_factor_spatial=2**halvings,
        )
        keep_signals(vae)
        return vae
    widths = (config.width,) * len(config.blocks)
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=tuple(config.blocks),
        num_decoder_blocks=tuple(reversed(config.blocks)),
        latent_channels=config.latent_channels,
    )


def keep_signals(vae: VideoVAE) -> None:
    """Draw weights anew so that signals keep their size from layer to layer, and blocks begin as no change.

    As torch draws them, biases drown the image before it is decoded, and hundreds of steps pass before it is seen.
    """
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    for name, module in vae.named_modules():
        if name.endswith((".conv2", ".proj")):
            nn.init.zeros_(module.weight)


def images_and_masks(batch: dict[str, Tensor], video: bool) -> tuple[Tensor, Tensor]:
    """All images (n, 3, H, W) of a batch in [-1, 1], and their person masks (n, 1, H, W).

    `video`: its clips (b, 3, f, H, W), and (b, 1, f, H, W).
    """
    if video:
        return batch["frames"], batch["masks"]
    frames = batch["frames"].transpose(1, 2).flatten(0, 1)
    masks = batch["masks"].transpose(1, 2).flatten(0, 1)
    return torch.cat([batch["reference"], frames]), torch.cat([batch["reference_mask"], masks])


def random_crops(images: Tensor, masks: Tensor, part: float) -> tuple[Tensor, Tensor]:
    """Images or clips, and masks, of which up to `part` of each side is cut off, the rest resized to their size."""
    if part == 0:
        return images, masks
    height, width = images.shape[-2:]
    cropped = []
    for both in torch.cat([images, masks.to(images)], dim=1):
        # One factor for both sides keeps the proportions.
        kept = 1 - part * torch.rand(()).item()
        size = round(height * kept), round(width * kept)
        top, left = (
            int(torch.randint(whole - rest + 1, ())) for whole, rest in zip((height, width), size, strict=True)
        )
        window = both[..., top : top + size[0], left : left + size[1]]
        resized = F.interpolate(window.flatten(0, -3)[None], (height, width), mode="bilinear", antialias=True)
        cropped.append(resized.view(both.shape))
    return torch.stack(cropped).split([3, 1], dim=1)


def latents_of(vae: VAE | VideoVAE, images: Tensor) -> Tensor:
    """Unscaled latents of images, or clips; of AutoencoderKL drawn from the posterior."""
    encoded = vae.encode(images)
    if isinstance(vae, VideoVAE):
        return encoded.latent_dist.mode()  # as everybody encodes with it
    return encoded.latents if isinstance(vae, AutoencoderTiny) else encoded.latent_dist.sample()


def vae_loss(vae: VAE | VideoVAE, images: Tensor, masks: Tensor, config: VAEConfig) -> tuple[Tensor, Tensor]:
    """The loss, and the mean squared error of the reconstructions, of images or clips."""
    latents = latents_of(vae, images)
    noisy = latents + config.latent_noise * torch.randn_like(latents)
    error = vae.decode(noisy).sample.float() - images
    if config.loss == "squares":
        loss = error.square().mean()
        return loss, loss.detach()
    weight = 1 + (config.person_weight - 1) * masks
    weight = weight / weight.mean()
    # Differences of neighbouring pixels keep edges and cloth patterns sharp where the plain error would blur them.
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    loss = (weight * (error.abs() + error.square())).mean() + 0.5 * edges
    return loss + config.latent_weight * latents.float().square().mean(), error.detach().square().mean()


class VAELoss(nn.Module):
    """`vae_loss` as a module's forward, which DDP needs to average gradients."""

    def __init__(self, vae: VAE | VideoVAE, config: VAEConfig):
        super().__init__()
        self.vae, self.config = vae, config

    def forward(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        return vae_loss(self.vae, images, masks, self.config)


def reconstructed(vae: VAE | VideoVAE, images: Tensor) -> Tensor:
    """Images (n, 3, H, W), or clips (b, 3, f, H, W), through the VAE and back, on the CPU in [-1, 1]."""
    if not isinstance(vae, VideoVAE):
        return vae_decode(vae, vae_encode(vae, images.to(vae.device), chunk=1), chunk=1).clamp(-1, 1)
    clips = (video_decode(vae, video_encode(vae, clip.to(vae.device).transpose(0, 1))) for clip in images)
    return torch.stack([clip.transpose(0, 1).float().cpu() for clip in clips])


@torch.no_grad()
def save_reconstructions(vae: VAE | VideoVAE, images: Tensor, masks: Tensor, path: Path) -> tuple[float, float]:
    """Mean PSNR of image and person in dB, of the images written above their reconstructions, of clips a few frames.

    Shapes as of `reconstructed`.
    """
    decoded = reconstructed(vae, images)
    if images.ndim == 5:  # clips to images
        images, decoded, masks = (part.transpose(1, 2).flatten(0, 1) for part in (images, decoded, masks))
    error = (decoded - images).square() / 4
    whole = -10 * error.mean(dim=(1, 2, 3)).log10()
    person = -10 * ((error * masks).sum(dim=(1, 2, 3)) / (3 * masks.sum(dim=(1, 2, 3))).clamp(min=1)).log10()
    shown = slice(None, None, SHOWN_FRAMES if isinstance(vae, VideoVAE) else None)
    rows = [torch.cat(list(part[shown]), dim=2) for part in (images, decoded)]
    sheet = ((torch.cat(rows, dim=1).permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    with complete_file(path) as temporary:
        Image.fromarray(np.ascontiguousarray(sheet)).save(temporary)
    return whole.mean().item(), person.mean().item()


def train(vae: VAE | VideoVAE, config: VAEConfig, accelerator: Accelerator) -> None:
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(parameters, config.optimizer)
    rate = learning_rate(config.optimizer, config.max_steps)
    processes = accelerator.num_processes
    batches = config.max_steps * config.gradient_accumulation
    dataset = make_dataset(config.data, batches * config.batch_size * processes)
    loader = make_loader(
        dataset, config.batch_size, config.data.workers, pin_memory=has_own_memory(accelerator.device)
    )
    model, optimizer, loader = accelerator.prepare(VAELoss(vae, config), optimizer, loader)
    # Crops and noise of every process are its own; the weights above are the same on all.
    set_seed(config.seed, device_specific=True)

    progress = tqdm(total=config.max_steps, disable=not accelerator.is_main_process)
    errors, step = [], 0
    for batch in loader:
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        images, masks = random_crops(*images_and_masks(batch, isinstance(vae, VideoVAE)), config.crop)
        with accelerator.accumulate(model):
            with accelerator.autocast():
                loss, mse = model(images, masks)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, config.optimizer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        errors.append(mse)
        if not accelerator.sync_gradients:
            continue
        step += 1
        progress.update()
        if step % config.log_steps == 0:
            psnr = -10 * np.log10(np.mean([error.item() for error in errors]) / 4)
            errors.clear()
            progress.set_postfix(psnr=f"{psnr:.2f}")
            accelerator.log({"loss": loss.item(), "psnr": psnr, "lr": rate(step - 1)}, step=step)


@torch.no_grad()
def finish(vae: VAE | VideoVAE, config: VAEConfig, accelerator: Accelerator, output: Path) -> None:
    """Scale the latents of a new VAE, measure it on held-out people, and write its folder."""
    heldout = make_dataset(replace(config.data, split="heldout", cache=None), 8)
    images, masks = images_and_masks(default_collate([heldout[i] for i in range(8)]), isinstance(vae, VideoVAE))
    if not config.freeze_encoder:
        # Latents of unit variance.
        latents = latents_of(vae, images.to(vae.device)).float()
        if isinstance(vae, VideoVAE):  # which keeps a mean and a deviation of every channel
            channels = latents.transpose(0, 1).flatten(1)
            vae.register_to_config(
                latents_mean=channels.mean(dim=1).tolist(), latents_std=channels.std(dim=1).tolist()
            )
        else:
            vae.register_to_config(scaling_factor=1 / latents.std().item())
    psnr, person = save_reconstructions(vae, images, masks, output / "reconstructions.png")
    accelerator.log({"heldout_psnr": psnr, "heldout_person_psnr": person}, step=config.max_steps)
    with complete_folder(output / "vae") as folder:
        vae.save_pretrained(folder)
    print(f"held-out PSNR {psnr:.2f} dB, person {person:.2f} dB; VAE in {output / 'vae'}")
    print(f"images beside their reconstructions in {output / 'reconstructions.png'}")


def train_vae(config: VAEConfig) -> None:
    if any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("DEEPSPEED", "FSDP")):
        raise UserError(
            "training/vae.py keeps a whole autoencoder on every GPU; take configs/accelerate/ddp.yaml or gpu.yaml"
        )
    optimizer_class(config.optimizer)  # that its package is missing is said before anything is loaded
    output = output_folder(config.output)
    accelerator = make_accelerator(config, output)
    accelerator.init_trackers("logs")
    set_seed(config.seed)
    if accelerator.is_main_process:
        save_config(config, output / "config.yaml")

    vae = build_vae(config)
    if config.channels_last:
        use_channels_last(vae)
    if config.freeze_encoder:
        vae.requires_grad_(False)
        vae.decoder.requires_grad_(True)
    if accelerator.is_main_process:
        trained = sum(p.numel() for p in vae.parameters() if p.requires_grad) / 1e6
        print(
            f"trains {trained:.3g} million parameters of an autoencoder for {config.max_steps} steps, without resuming"
        )
        print(f"VAE at the end in {output / 'vae'}; watch: tensorboard --logdir {output / 'logs'}", flush=True)
    train(vae, config, accelerator)
    if accelerator.is_main_process:
        finish(vae.float().eval(), config, accelerator, output)
    end_together(accelerator)
