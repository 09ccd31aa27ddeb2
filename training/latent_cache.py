"""Latents of the images of a clip cache, so that training does not encode them again and again."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from core.files import complete_folder
from data.clips.rendered import clip_tensor
from models.vae import VAE, vae_posterior
from training.features import network_digest

IMAGES = 32  # encoded at a time


def latents_folder(cache: Path, vae: VAE) -> Path:
    """Where the latents of a cache lie that this VAE makes."""
    return cache / f"latents-{network_digest(vae)[:16]}"


@torch.no_grad()
def ensure_latents(cache: Path, vae: VAE, chunk: int = IMAGES) -> Path:
    """Encode all images of a cache, unless it has been done; the folder of the latents.

    Args:
        cache: folder of a `data.clips.clip_cache`.
        chunk: images at a time.
    """
    folder = latents_folder(cache, vae)
    if folder.is_dir():
        return folder
    cached = np.load(cache / "pictures.npy", mmap_mode="r")
    flat = cached.reshape(-1, *cached.shape[2:])
    device = next(vae.parameters()).device
    # The storage format is not finer than bfloat16 arithmetic is on the way there, which is several times faster.
    autocast = torch.autocast(device.type, torch.bfloat16) if device.type == "cpu" else nullcontext()
    with complete_folder(folder) as temporary, autocast:
        arrays: dict[str, np.ndarray] = {}
        for start in tqdm(range(0, len(flat), chunk), desc="encoding cached images"):
            images = clip_tensor(flat[start : start + chunk]).transpose(0, 1).to(device)
            for name, part in zip(("mean", "deviation"), vae_posterior(vae, images), strict=True):
                if name not in arrays:
                    shape = (*cached.shape[:2], *part.shape[1:])
                    arrays[name] = np.lib.format.open_memmap(temporary / f"{name}.npy", "w+", np.float16, shape)
                arrays[name].reshape(len(flat), *part.shape[1:])[start : start + chunk] = _stored(part)
        for array in arrays.values():
            array.flush()
        if not arrays["deviation"].any():
            (temporary / "deviation.npy").unlink()
    return folder


def _stored(part: Tensor) -> np.ndarray:
    return part.to(torch.float16).cpu().numpy()
