"""Run this project for `compare.py`, in a process of its own, so that memory is counted as a peer's is.

python -u -m benchmarks.speed.peers.driver_ours CHECKOUT SETTINGS.json WEIGHTS_FOLDER
"""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.speed.peers.driver_protocol import Driver, Job, StepTimes, read_job, serve
from benchmarks.speed.peers.weights import CLIP_SIDE, NOISE, STAGES
from benchmarks.speed.training import TrainingStep
from core.files import complete_folder
from models.animators.registry import load_pipeline
from models.checkpoints.convert import Sources, convert_config
from models.images import ImageBatch
from models.pipeline import AnimationPipeline
from training.config import TrainConfig


def load(job: Job, dtype: str) -> AnimationPipeline:
    """The pipeline that `convert` would write, on the job's device."""
    sources = Sources(convert_config(job.settings["family"], output="", weights=str(job.folder), dtype=dtype))
    pipeline = sources.family.make(sources)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(job.device)


def with_peer_rounding(pipeline: AnimationPipeline, reference: Image.Image) -> AnimationPipeline:
    """The same networks, rounding what the peers round: features of the reference to half precision, and its resized
    image for the image encoder to bytes. What then differs in float32 is the order of additions alone."""

    class Animator(pipeline.animator_cls):
        def encode_reference(self, images: ImageBatch) -> torch.Tensor:
            resized = torch.from_numpy(np.array(reference.resize((CLIP_SIDE, CLIP_SIDE)))).permute(2, 0, 1)[None]
            # Image encoders ask for nothing but pixels (1, 3, H, W) in [-1, 1].
            return super().encode_reference(SimpleNamespace(pixels=resized.to(images.pixels) / 127.5 - 1))

        def encode_images(self, *inputs: Any) -> dict[str, torch.Tensor]:
            tokens = super().encode_images(*inputs)
            return {layer: value.half().to(value) for layer, value in tokens.items()}

    class Pipeline(type(pipeline)):
        animator_cls = Animator

    rounding = Pipeline(**pipeline.components)
    rounding.set_progress_bar_config(disable=True)
    return rounding


class Inference:
    """Runs of the pipeline's folder, which is written at first use."""

    def __init__(self, job: Job):
        self.job = job
        folder = job.folder / f"pipeline_{job.settings['dtype']}"
        if not folder.exists():
            with complete_folder(folder) as path:
                load(job, job.settings["dtype"]).save_pretrained(path)
        self.pipeline = load_pipeline(folder, job.dtype).to(job.device)
        self.pipeline.set_progress_bar_config(disable=True)
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
    """Steps of one of the two training stages."""

    def __init__(self, job: Job, stage: str, gradient_checkpointing: bool):
        if stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}")
        self.job = job
        batch = job.tensors(f"batch_{stage}")
        self.training = TrainingStep(
            load(job, "float32"),
            TrainConfig(stage=stage, output="", noise=NOISE, gradient_checkpointing=gradient_checkpointing),
            {name: batch[name].to(job.device) for name in ("reference", "frames", "poses")},
            job.dtype,
            job.settings["seed"],
        )

    def step(self) -> float:
        """Loss of one optimiser step."""
        loss = self.training.loss(self.job.autocast())
        loss.backward()
        self.training.move()
        return loss.item()


if __name__ == "__main__":
    serve(Driver(read_job(sys.argv[1:]), Inference, Training).commands())
