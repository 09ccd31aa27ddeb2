"""Validation: animate a few fixed held-out clips and picture them beside the truth."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from models.pipeline import AnimationPipeline
from training.config import DataConfig, ValidationConfig
from training.data import make_dataset


@torch.no_grad()
def validation_sheet(
    pipeline: AnimationPipeline, data: DataConfig, config: ValidationConfig
) -> tuple[np.ndarray, float]:
    """Sample the clips and lay them out, one a row: reference, then pose, truth and result of up to three frames.

    Rendered data are drawn from held-out identities; videos from the training folder, with another seed.

    Returns:
        Sheet (h, w, 3) uint8, and the mean person PSNR in dB.
    """
    data = replace(data, split="heldout", seed=data.seed + 1, num_frames=config.num_frames, workers=0, cache=None)
    dataset = make_dataset(data, config.clips)
    rows, psnr = [], []
    for number in range(config.clips):
        clip = dataset[number]
        result = pipeline(
            clip["reference"] / 2 + 0.5,
            clip["poses"].transpose(0, 1),
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=torch.Generator().manual_seed(number),
            output_type="pt",
        ).frames
        truth = clip["frames"].transpose(0, 1) / 2 + 0.5
        psnr.append(person_psnr(result, truth, clip["masks"].transpose(0, 1)))
        shown = sorted({0, config.num_frames // 2, config.num_frames - 1})
        cells = [clip["reference"] / 2 + 0.5]
        for frame in shown:
            cells += [clip["poses"][:, frame], truth[frame], result[frame]]
        rows.append(torch.cat(cells, dim=2))
    sheet = torch.cat(rows, dim=1).permute(1, 2, 0).clamp(0, 1).mul(255).round().byte().numpy()
    return sheet, float(np.mean(psnr))


def person_psnr(result: Tensor, truth: Tensor, masks: Tensor) -> float:
    """PSNR over the person's pixels in dB; pictures (f, 3, H, W) in [0, 1], masks (f, 1, H, W)."""
    error = ((result - truth).square() * masks).sum() / (3 * masks.sum()).clamp(min=1)
    return float(-10 * torch.log10(error.clamp(min=1e-10)))
