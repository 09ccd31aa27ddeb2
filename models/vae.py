"""Images and videos to latents and back.

Shapes use n = images, f = frames, c = channels, t, h, w = latent frames and size, H, W = image size.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, AutoencoderTiny
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor

from core.errors import UserError
from core.processes import to_device
from models.checkpoints.files import read_config
from models.checkpoints.loading import load_folder

VAE = AutoencoderKL | AutoencoderTiny
VideoVAE = AutoencoderKLWan  # the first latent frame is of one frame, each further one of four; an image is a video
OUTPUT_TYPES = ("pil", "np", "uint8", "pt", "latent")  # of `decode_frames`


def vae_encode(vae: VAE | VideoVAE, images: Tensor, chunk: int | None = None, sample: bool = False) -> Tensor:
    """Latents (n, c, h, w), scaled to about unit variance, of images (n, 3, H, W) in [-1, 1], `chunk` at a time."""
    if isinstance(vae, VideoVAE):
        return torch.cat([clip_encode(vae, part[:, :, None])[:, :, 0] for part in images.split(chunk or 1)])
    parts = []
    for part in images.split(chunk or len(images)):
        encoded = vae.encode(part)  # `sample` draws from the posterior instead of taking its mean
        if isinstance(vae, AutoencoderTiny):
            parts.append(encoded.latents)
        else:
            parts.append(encoded.latent_dist.sample() if sample else encoded.latent_dist.mean)
    return torch.cat(parts) * vae.config.scaling_factor


def video_encode(vae: VideoVAE, frames: Tensor) -> Tensor:
    """Latents (1, c, t, h, w) of frames (f, 3, H, W) in [-1, 1] as one video, f = 4 t - 3."""
    return clip_encode(vae, frames.transpose(0, 1)[None])


def clip_encode(vae: VideoVAE, clips: Tensor) -> Tensor:
    """Latents (n, c, t, h, w) of videos (n, 3, f, H, W) in [-1, 1], f = 4 t - 3."""
    latents = vae.encode(clips.to(vae.dtype)).latent_dist.mode()
    mean, std = latent_statistics(vae, latents)
    return (latents - mean) / std


def video_decode(vae: VideoVAE, latents: Tensor) -> Tensor:
    """Frames (f, 3, H, W) in [-1, 1] of the latents (1, c, t, h, w) of a video; UserError where not finite."""
    latents = latents.to(vae.dtype)
    mean, std = latent_statistics(vae, latents)
    frames = vae.decode(latents * std + mean).sample[0].transpose(0, 1)
    if not frames.isfinite().all():
        raise UserError(f"the VAE's images are not finite; {finite_advice(vae.dtype)}")
    return frames


def latent_statistics(vae: VideoVAE, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel, (1, c, 1, 1, 1) each, as `latents` are stored."""
    both = torch.tensor([vae.config.latents_mean, vae.config.latents_std], dtype=latents.dtype)
    mean, std = to_device(both, latents.device)
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def vae_posterior(vae: VAE, images: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (n, c, h, w) each, of the scaled latents of images (n, 3, H, W) in [-1, 1]."""
    means, deviations = [], []
    for part in images.split(chunk or len(images)):
        encoded = vae.encode(part)
        if isinstance(vae, AutoencoderTiny):
            means.append(encoded.latents)
            deviations.append(torch.zeros_like(encoded.latents))
        else:
            means.append(encoded.latent_dist.mean)
            deviations.append(encoded.latent_dist.std)
    return torch.cat(means) * vae.config.scaling_factor, torch.cat(deviations) * vae.config.scaling_factor


def vae_decode(vae: VAE, latents: Tensor, chunk: int | None = None) -> Tensor:
    """Scaled latents (n, c, h, w) -> images (n, 3, H, W) in about [-1, 1], float32 on the CPU."""
    return torch.cat(list(decoded_chunks(vae, latents, chunk)))


def decoded_chunks(vae: VAE, latents: Tensor, chunk: int | None = None) -> Iterator[Tensor]:
    """The images of `vae_decode`, at most `chunk` at a time."""
    for part in latents.split(chunk or len(latents)):
        yield vae.decode(part / vae.config.scaling_factor).sample.float().cpu()


def decode_frames(vae: VAE, latents: Tensor, output_type: str, chunk: int) -> list[Image.Image] | np.ndarray | Tensor:
    """Latents (1, c, f, h, w) -> frames in the form of `output_type`, `chunk` at a time through the VAE.

    UserError where they are not finite.
    """
    if output_type == "latent":
        return latents
    images = latents[0].transpose(0, 1).to(vae.dtype)
    chunks = finite_chunks(vae, images, chunk)
    if output_type != "uint8":
        return in_form(torch.cat(list(chunks)), output_type)
    height, width = (side * vae_scale_factor(vae) for side in images.shape[-2:])
    frames = np.empty((len(images), height, width, 3), np.uint8)
    done = 0
    for part in chunks:
        frames[done : done + len(part)] = in_form(part, output_type)
        done += len(part)
    return frames


def in_form(images: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
    """Images (n, 3, H, W) in about [-1, 1] in the form of `output_type`, but latents."""
    processor = VideoProcessor()
    if output_type == "uint8":
        return (processor.postprocess(images, "np") * 255).round().astype(np.uint8)
    return processor.postprocess(images, output_type)


def joined_forms(parts: list[Any]) -> list[Image.Image] | np.ndarray | Tensor:
    """Consecutive results of `in_form`, or latents (1, c, f, h, w), as one."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, dim=2 if parts[0].ndim == 5 else 0)
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else [image for part in parts for image in part]


def finite_chunks(vae: VAE, latents: Tensor, chunk: int) -> Iterator[Tensor]:
    """`decoded_chunks`; UserError where they are not finite."""
    for part in decoded_chunks(vae, latents, chunk):
        if not part.isfinite().all():
            raise UserError(f"the VAE's images are not finite; {finite_advice(vae.dtype)}")
        yield part


def finite_advice(dtype: torch.dtype) -> str:
    """What to do about numbers that are not finite in a dtype."""
    if dtype == torch.float16:
        return "float16 ends at 65504, try dtype=bfloat16 or dtype=float32"
    if dtype == torch.bfloat16:
        return "try dtype=float32"
    return f"they are computed in {dtype}, so weights or settings of guidance are at fault, and no dtype helps"


def vae_scale_factor(vae: VAE | VideoVAE) -> int:
    """Pixels of an image's side per latent."""
    if isinstance(vae, VideoVAE):
        return vae.config.scale_factor_spatial
    return 2 ** (len(vae.config.block_out_channels) - 1)


def vae_latent_channels(vae: VAE | VideoVAE) -> int:
    return vae.config.z_dim if isinstance(vae, VideoVAE) else vae.config.latent_channels


def load_vae(folder: str | Path, argument: str = "model.vae") -> VAE | VideoVAE:
    """A VAE from its folder; UserError, naming the argument, where it is none that is known."""
    return load_folder(vae_class(folder, argument)[0], folder, f"{argument}={folder}")


def vae_class(folder: str | Path, argument: str = "model.vae") -> tuple[type[VAE | VideoVAE], dict[str, Any]]:
    """Class and configuration of the VAE in a folder; UserError, naming the argument, where there is none."""
    index = Path(folder) / "config.json"
    if not index.is_file():
        raise UserError(f"{argument}={folder} is not a VAE folder (no config.json)")
    settings = read_config(index, f"{argument}={folder}")
    classes = {cls.__name__: cls for cls in (AutoencoderKL, AutoencoderTiny, AutoencoderKLWan)}
    if (name := settings.get("_class_name")) not in classes:
        raise UserError(f"{argument}={folder} is a {name}; {', '.join(classes)} are known")
    return classes[name], settings
