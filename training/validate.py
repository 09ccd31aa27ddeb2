"""Validation: animate a few fixed held-out clips, with and without TPC, and measure them against the truth."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from data.poses.poses import Poses
from metrics.image import psnr, ssim
from models.pipeline import AnimationPipeline
from tpc import Calibration, CalibrationConfig, calibrate
from tpc.augmentation import CompositionConfig, compose_references
from training.config import DataConfig, ValidationConfig
from training.data import make_dataset
from training.noise import sample_generators
from training.objective import sample

FPS = 12.0  # of the clips shown; data sets do not say theirs


@dataclass(frozen=True)
class ValidationClip:
    """One animated clip.

    Attributes:
        columns: name -> (f, H, W, 3) uint8, or (1, H, W, 3) for the reference; in the order they are shown.
        masks: (f, H, W) bool, the person in the true frames.
        misaligned: whether the reference was moved, turned and resized.
    """

    columns: dict[str, np.ndarray]
    masks: np.ndarray
    misaligned: bool

    def metrics(self) -> dict[str, float]:
        """Means over the frames, for the results with and without TPC: "psnr/with_tpc", "person_ssim/without_tpc"."""
        truth = self.columns["truth"]
        values = {}
        for name in ("without TPC", "with TPC"):
            if (frames := self.columns.get(name)) is None:
                continue
            for measure, function in (("psnr", psnr), ("ssim", ssim)):
                for region, masks in ((measure, [None] * len(truth)), (f"person_{measure}", self.masks)):
                    each = [function(*pair, mask) for *pair, mask in zip(frames, truth, masks, strict=True)]
                    if not np.isnan(each).all():
                        values[f"{region}/{name.replace(' ', '_').lower()}"] = float(np.nanmean(each))
        return values


@contextmanager
def undisturbed(*networks: nn.Module) -> Iterator[None]:
    """Within the block the networks are in evaluation mode; afterwards every module's mode and all random states of
    this process are what they were."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    states = random.getstate(), np.random.get_state()
    for network in networks:
        network.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(states[0])
        np.random.set_state(states[1])


@torch.no_grad()
def sample_clips(pipeline: AnimationPipeline, data: DataConfig, config: ValidationConfig) -> list[ValidationClip]:
    """Animate the validation clips; the same ones with the same noise every time.

    Rendered data are drawn from held-out identities. Videos are those of `config.root`, or of the training folder,
    cut with another seed. The first clips are those with misaligned references.
    """
    data = replace(
        data,
        split="heldout",
        root=config.root or data.root,
        seed=data.seed + 1,
        num_frames=config.num_frames,
        workers=0,
        cache=None,
        latents=None,
        embeddings=None,
    )
    dataset = make_dataset(data, config.clips)
    misaligned = round(config.misaligned * config.clips)
    return [
        sample_clip(pipeline, dataset[number], config, number, number < misaligned) for number in range(config.clips)
    ]


def sample_clip(
    pipeline: AnimationPipeline, item: dict[str, Tensor], config: ValidationConfig, number: int, misaligned: bool
) -> ValidationClip:
    """Animate one clip of a data set.

    Args:
        number: of the clip, from which its noise and its reference's composition are drawn.
        misaligned: whether the reference is recomposed.
    """
    batch = {name: value[None] for name, value in item.items()}
    if misaligned:
        (generator,) = sample_generators(number, [number])
        batch = compose_references(batch, CompositionConfig(probability=1.0), generator=generator)
    item = {name: value[0] for name, value in sample(batch, 0).items()}
    results = {"without TPC": animate(pipeline, item, None, config, number)}
    if config.tpc:
        results["with TPC"] = animate(pipeline, item, clip_calibration(item, config.preset), config, number)
    columns = {
        "reference": as_bytes(item["reference"][None] / 2 + 0.5),
        "pose": as_bytes(item["poses"].transpose(0, 1)),
        "truth": as_bytes(item["frames"].transpose(0, 1) / 2 + 0.5),
        **results,
    }
    return ValidationClip(columns, item["masks"][0].numpy() > 0.5, misaligned)


def animate(
    pipeline: AnimationPipeline,
    item: dict[str, Tensor],
    calibration: Calibration | None,
    config: ValidationConfig,
    seed: int,
) -> np.ndarray:
    """(f, H, W, 3) uint8; the same noise for the same seed, with calibration or without."""
    frames = pipeline(
        item["reference"] / 2 + 0.5,
        item["poses"].transpose(0, 1),
        calibration,
        reference_mask=item["reference_mask"][0],
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).frames
    return as_bytes(frames.float().cpu())


def clip_calibration(item: dict[str, Tensor], preset: str) -> Calibration:
    """Calibrate the reference of a data set's item to its frames, as `infer.py` would with these poses and masks."""
    size = (item["frames"].shape[-1], item["frames"].shape[-2])
    reference, driving = item["reference_keypoints"][None, None].numpy(), item["keypoints"][:, None].numpy()
    masks = item["reference_mask"], item["masks"].transpose(0, 1)
    # Videos without mask files have masks of the whole image, which say nothing about the person.
    ours, theirs = ((mask > 0.5).numpy() if not (mask > 0.5).all() else None for mask in masks)
    return calibrate(
        as_bytes(item["reference"][None] / 2 + 0.5)[0],
        Poses(reference[..., :2], reference[..., 2], size, FPS),
        Poses(driving[..., :2], driving[..., 2], size, FPS),
        size,
        CalibrationConfig(preset=preset),
        reference_masks=ours,
        driving_masks=theirs,
    )


def mean_metrics(clips: list[ValidationClip]) -> dict[str, float]:
    """Means over the clips with aligned and with misaligned references: "aligned/psnr/with_tpc"."""
    values: dict[str, list[float]] = {}
    for clip in clips:
        kind = "misaligned" if clip.misaligned else "aligned"
        for name, value in clip.metrics().items():
            values.setdefault(f"{kind}/{name}", []).append(value)
    return {name: float(np.mean(each)) for name, each in values.items()}


def as_bytes(images: Tensor) -> np.ndarray:
    """(f, 3, H, W) in [0, 1] -> (f, H, W, 3) uint8."""
    return images.permute(0, 2, 3, 1).clamp(0, 1).mul(255).round().byte().numpy()
