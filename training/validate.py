"""Validation: animate a few fixed held-out clips, with and without TPC, and measure them against the truth."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from core.config import VERSION
from core.files import complete_file
from data.poses.poses import Poses
from data.video.files import write_video
from inference.animate import for_segments
from inference.comparison import comparison_frames, comparison_strip
from metrics.image import psnr, ssim
from models.images import Words
from models.pipeline import AnimationPipeline
from tpc import Calibration, CalibrationConfig, calibrate
from tpc.augmentation import compose_references
from tpc.config import CompositionConfig
from training.build import given_embeddings, make_pipeline, trained_window
from training.config import DataConfig, ValidationConfig
from training.data import driven_clips, make_dataset
from training.distributed import SHARDED
from training.objective import sample_generators
from training.run import Run

FPS = 12.0  # of the clips shown; data sets do not say theirs
SHEET_ROWS = 3  # frames of a clip on a validation sheet


def validate(run: Run) -> None:
    """Sample held-out clips with the EMA weights, with and without TPC; write images and clips, and log them.

    Where parameters are sharded over processes, all take part.
    """
    config, accelerator, step = run.config, run.accelerator, run.progress.step
    if not accelerator.is_main_process and run.layout.strategy not in SHARDED:
        return
    model, vae = run.objective.animator, run.objective.vae
    pipeline = make_pipeline(vae, model, config.noise, trained_window(config), config.model.init)
    pipeline.set_progress_bar_config(disable=True)
    averaged = run.average.applied(accelerator) if run.average is not None else nullcontext()
    # Not accelerate's autocast: it does nothing under DeepSpeed, whose half-precision weights meet a float32 VAE.
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    autocast = torch.autocast(accelerator.device.type, half, enabled=half is not None)
    with undisturbed(model, vae), averaged, autocast:
        clips = sample_clips(pipeline, config.data, config.validation, given_embeddings(config.model))
    if not accelerator.is_main_process:
        return
    accelerator.log({f"validation/{name}": value for name, value in mean_metrics(clips).items()}, step=step)
    sheet = np.concatenate([comparison_strip(clip.columns, SHEET_ROWS) for clip in clips])
    with complete_file(run.output / "samples" / f"{step:07d}.png") as path:
        Image.fromarray(sheet).save(path)
    writer = accelerator.get_tracker("tensorboard").writer
    writer.add_image("validation/clips", sheet, step, dataformats="HWC")
    if config.validation.num_frames > 1:
        for index, clip in enumerate(clips):
            frames = list(comparison_frames(clip.columns))
            metadata = {"generator": f"TPC-Animate {VERSION}", "generated": True}
            write_video(run.output / "samples" / f"{step:07d}_clip{index}.mp4", frames, FPS, metadata)
            add_clip(writer, f"validation/clip_{index}", frames, FPS, step)


@dataclass(frozen=True)
class ValidationClip:
    """One animated clip."""

    # name -> (f, H, W, 3) uint8, or (1, H, W, 3) for the reference; in the order they are shown
    columns: dict[str, np.ndarray]
    masks: np.ndarray  # (f, H, W) bool, the person in the true frames
    misaligned: bool  # the reference was moved, turned and resized

    def metrics(self) -> dict[str, float]:
        """Means over frames, for results with and without TPC: "psnr/with_tpc", "person_ssim/without_tpc"."""
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
    """Networks in evaluation mode within the block; afterwards all modes and random states are as before."""
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
def sample_clips(
    pipeline: AnimationPipeline, data: DataConfig, config: ValidationConfig, embeddings: Mapping[str, Tensor]
) -> list[ValidationClip]:
    """The animated validation clips, the same with the same noise every time; the first have misaligned references.

    Videos of `config.root`, or of the training folder, are cut with another seed. `embeddings` as of
    `models.images.Words`.
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
    dataset = driven_clips(make_dataset(data, config.clips), data, pipeline.animator)
    misaligned = round(config.misaligned * config.clips)
    words = Words(embeddings=embeddings) if embeddings else None
    return [
        sample_clip(pipeline, dataset[index], config, index, index < misaligned, words)
        for index in range(config.clips)
    ]


def sample_clip(
    pipeline: AnimationPipeline,
    item: dict[str, Tensor],
    config: ValidationConfig,
    index: int,
    misaligned: bool,
    words: Words | None,
) -> ValidationClip:
    """One animated clip; noise and, if `misaligned`, the reference's composition are drawn from its index."""
    batch = {name: value[None] for name, value in item.items()}
    if misaligned:
        (generator,) = sample_generators(index, [index])
        batch = compose_references(batch, CompositionConfig(probability=1.0), generator=generator)
    item = {name: value[0] for name, value in batch.items()}

    def sampled(calibration: Calibration | None) -> np.ndarray:
        # Not `inference.animate`: the item is in the model's frame, and its reference need not be bytes again.
        frames = pipeline(
            item["reference"] / 2 + 0.5,
            item["poses"].transpose(0, 1),
            calibration,
            reference_mask=item["reference_mask"][0],
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=torch.Generator().manual_seed(index),
            output_type="pt",
            faces=None if "faces" not in item else item["faces"].transpose(0, 1) / 2 + 0.5,
            words=words,
        ).frames
        return as_bytes(frames.float().cpu())

    results = {"without TPC": sampled(None)}
    if config.tpc:
        tpc = for_segments(CalibrationConfig(preset=config.preset), pipeline, None, item["frames"].shape[1], 1)
        results["with TPC"] = sampled(clip_calibration(item, tpc))
    columns = {
        "reference": as_bytes(item["reference"][None] / 2 + 0.5),
        "pose": as_bytes(item["poses"].transpose(0, 1)),
        "truth": as_bytes(item["frames"].transpose(0, 1) / 2 + 0.5),
        **results,
    }
    return ValidationClip(columns, item["masks"][0].numpy() > 0.5, misaligned)


def clip_calibration(item: dict[str, Tensor], tpc: CalibrationConfig) -> Calibration:
    """Calibration of an item's reference to its frames, as `infer.py` makes it of poses and masks.

    But all frames begin from noise: calibrated images would hide what the model has learned.
    """
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
        tpc,
        reference_masks=ours,
        driving_masks=theirs,
    )


def add_clip(writer: SummaryWriter, tag: str, frames: list[np.ndarray], fps: float, step: int) -> None:
    """Log a clip of (h, w, 3) uint8 frames as a GIF, which TensorBoard plays."""
    # The writer's own `add_video` needs a package that nothing else here does.
    height, width = frames[0].shape[:2]
    images = [Image.fromarray(frame) for frame in frames]
    encoded = BytesIO()
    images[0].save(
        encoded, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0, optimize=False
    )
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded.getvalue())
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def mean_metrics(clips: list[ValidationClip]) -> dict[str, float]:
    """Means over the clips with aligned and with misaligned references: "aligned/psnr/with_tpc"."""
    values: dict[str, list[float]] = {}
    for clip in clips:
        group = "misaligned" if clip.misaligned else "aligned"
        for name, value in clip.metrics().items():
            values.setdefault(f"{group}/{name}", []).append(value)
    return {name: float(np.mean(each)) for name, each in values.items()}


def as_bytes(images: Tensor) -> np.ndarray:
    """(f, 3, H, W) in [0, 1] -> (f, H, W, 3) uint8."""
    return images.permute(0, 2, 3, 1).clamp(0, 1).mul(255).round().byte().numpy()
