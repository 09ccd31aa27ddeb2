"""Runs this project for `compare.py`, in a process of its own, so that memory is counted as a peer's is.

    python -u -m benchmarks.speed.peers.driver_ours CHECKOUT SETTINGS.json WEIGHTS_FOLDER

Weights are converted from the published files as `models.checkpoints convert` does. Inference opens the folder that it
writes, as `infer.py` does, and is the pipeline's `__call__`; a training step is that of `train.py`, with the same
functions: encoding, noise, prediction, min-SNR loss, backward pass, clipping, AdamW.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from benchmarks.speed.peers.driver_protocol import DTYPES, Driver, Job, StepTimes, read_job, serve
from benchmarks.speed.peers.weights import CLIP_SIDE, NOISE_OFFSET, STAGES
from benchmarks.speed.sizes import use_channels_last
from core.files import complete_folder
from models.animators.registry import load_pipeline
from models.checkpoints.convert import BUILDERS
from models.checkpoints.sources import ConvertConfig, Sources
from models.images import ImageBatch
from models.pipeline import AnimationPipeline
from training.build import make_scheduler, set_trainable, shrink_frozen
from training.config import NoiseConfig, TrainConfig
from training.memory import enable_gradient_checkpointing
from training.noise import sample_generators
from training.objective import diffusion_loss
from training.run import make_optimizer
from training.traits import TrainingTraits


def load(job: Job, dtype: str) -> AnimationPipeline:
    """The pipeline that `convert` would write."""
    config = ConvertConfig(job.settings["family"], output="", weights=str(job.folder), dtype=dtype)
    pipeline = BUILDERS[config.family](Sources(config))
    pipeline.set_progress_bar_config(disable=True)
    return placed(pipeline, job)


def open_saved(job: Job, dtype: str) -> AnimationPipeline:
    """The pipeline out of the folder of it, which is written at first use."""
    folder = job.folder / f"pipeline_{dtype}"
    if not folder.exists():
        with complete_folder(folder) as path:
            load(job, dtype).save_pretrained(path)
    pipeline = load_pipeline(folder, DTYPES[dtype])
    pipeline.set_progress_bar_config(disable=True)
    return placed(pipeline, job)


def placed(pipeline: AnimationPipeline, job: Job) -> AnimationPipeline:
    """On the job's device, in its memory format."""
    pipeline.to(job.device)
    if job.settings["channels_last"]:
        use_channels_last(pipeline)
    return pipeline


@dataclass(frozen=True)
class EncodedImage:
    """An image (1, 3, H, W) in [-1, 1] as `models.images.ImageBatch`, as far as image encoders ask."""

    pixels: torch.Tensor


def with_peer_rounding(pipeline: AnimationPipeline, reference: Image.Image) -> AnimationPipeline:
    """The same networks, rounding what the peers round: features of the reference to half precision, and its image
    for the image encoder to bytes, after it was resized.

    What then differs from a peer in float32 is the order of additions alone.
    """

    class Animator(pipeline.animator_cls):
        def encode_reference(self, images: ImageBatch) -> torch.Tensor:
            resized = torch.from_numpy(np.array(reference.resize((CLIP_SIDE, CLIP_SIDE)))).permute(2, 0, 1)[None]
            return super().encode_reference(EncodedImage(resized.to(images.pixels) / 127.5 - 1))

        def encode_images(
            self, images: ImageBatch, timestep: int, conditioning: torch.Tensor
        ) -> dict[str, torch.Tensor]:
            tokens = super().encode_images(images, timestep, conditioning)
            return {layer: value.half().to(value) for layer, value in tokens.items()}

    class Pipeline(type(pipeline)):
        animator_cls = Animator

    rounding = Pipeline(**pipeline.components)
    rounding.set_progress_bar_config(disable=True)
    return rounding


class Inference:
    """The pipeline, in the job's number format."""

    def __init__(self, job: Job):
        self.job = job
        self.pipeline = open_saved(job, job.settings["dtype"])
        inputs = job.tensors("inputs")
        self.reference = Image.fromarray(inputs["reference"].numpy())
        self.poses = [Image.fromarray(pose.numpy()) for pose in inputs["poses"]]
        self.times = StepTimes(job.device, [])

    def run(self, steps: int, guidance: float, peer_rounding: bool = False) -> None:
        self.times = StepTimes(self.job.device, [])
        pipeline = with_peer_rounding(self.pipeline, self.reference) if peer_rounding else self.pipeline
        pipeline(
            self.reference,
            self.poses,
            num_inference_steps=steps,
            guidance_scale=guidance,
            window_size=len(self.poses),
            generator=self.job.generator(),
            output_type="np",
            callback_on_step_end=self._note,
        )

    def _note(self, pipeline: AnimationPipeline, step: int, timestep: int, tensors: dict) -> dict:
        self.times.note(tensors["latents"])
        return tensors


class Training:
    """One of the two training stages, without data set and logging."""

    def __init__(self, job: Job, stage: str, gradient_checkpointing: bool):
        if stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}")
        self.job, self.stage, self.gradient_checkpointing = job, stage, gradient_checkpointing
        pipeline = load(job, "float32")
        noise = NoiseConfig(noise_offset=NOISE_OFFSET, condition_dropout=0.0)
        self.config = config = TrainConfig(stage=stage, output="", noise=noise)
        self.vae, self.model = pipeline.vae.requires_grad_(False).eval(), pipeline.animator
        self.parameters = set_trainable(self.model, config)
        if job.dtype != torch.float32:
            shrink_frozen(self.vae, self.model, job.dtype)
        if gradient_checkpointing:
            enable_gradient_checkpointing(self.model)
        self.model.train()
        self.optimizer = make_optimizer(self.parameters, config.optimizer)
        self.scheduler = make_scheduler(noise)
        self.traits = TrainingTraits.of(self.model, tuple(job.settings["latent_size"]))
        batch = job.tensors(f"batch_{stage}")
        self.batch = {name: batch[name].to(job.device) for name in ("reference", "frames", "poses")}

    def step(self) -> float:
        """One optimiser step; returns its loss."""
        generators = sample_generators(self.job.settings["seed"], range(len(self.batch["frames"])))
        with self.job.autocast():
            loss = diffusion_loss(
                self.model,
                self.vae,
                self.scheduler,
                self.batch,
                self.config.noise,
                self.config.augmentation.calibrated,
                self.traits,
                generators,
                self.config.vae_chunk,
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


if __name__ == "__main__":
    serve(Driver(read_job(sys.argv[1:]), Inference, Training).commands())
