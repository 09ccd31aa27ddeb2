"""Run a checkout of MagicAnimate in its own environment, for `compare.py`: inference, as it has no training code.

    PEER_PYTHON -u driver_magic_animate.py CHECKOUT SETTINGS.json WEIGHTS_FOLDER

Networks, attention control, pipeline and network configuration are the checkout's; weights, images and the initial
noise are given, and equal to ours. The checkout rounds features of the reference to half precision in any dtype. In
bfloat16, for which it was not made, it runs under autocast.
"""

import sys
import types
from importlib.util import find_spec

import diffusers.pipelines.pipeline_utils
import torch
from driver_protocol import Driver, Job, StepTimes, load_complete, read_job, serve
from safetensors.torch import load_file


def answer_missing_imports() -> None:
    if find_spec("diffusers.pipeline_utils") is None:  # moved after the release that the checkout names
        sys.modules["diffusers.pipeline_utils"] = diffusers.pipelines.pipeline_utils
    if find_spec("torchvision") is None:  # only its writing of video files needs it
        sys.modules["torchvision"] = types.ModuleType("torchvision")


class Inference:
    def __init__(self, job: Job):
        from diffusers import AutoencoderKL, DDIMScheduler
        from magicanimate.models.appearance_encoder import AppearanceEncoderModel
        from magicanimate.models.controlnet import ControlNetModel
        from magicanimate.models.unet_controlnet import UNet3DConditionModel
        from magicanimate.pipelines.pipeline_animation import AnimationPipeline
        from omegaconf import OmegaConf
        from transformers import CLIPTextModel, CLIPTokenizer

        class TimedScheduler(DDIMScheduler):
            """Notes every step; the pipeline takes a callback but never calls it."""

            def step(scheduler, *args, **kwargs):
                found = super().step(*args, **kwargs)
                self.times.note(found.prev_sample)
                return found

        class Pipeline(AnimationPipeline):
            """The pipeline calls `.cuda()` on the reference's latents, which lie on the right device already."""

            def images2latents(pipeline, images, dtype):
                latents = super().images2latents(images, dtype)
                return types.SimpleNamespace(cuda=lambda: latents)

        published = OmegaConf.load(job.checkout / "configs/inference/inference.yaml")
        shared, channels = job.unet_settings(), tuple(job.settings["pose_channels"])
        unet = UNet3DConditionModel(
            sample_size=64, **shared, **OmegaConf.to_container(published.unet_additional_kwargs)
        )
        path = job.folder / "temporal_attention" / "temporal_attention.ckpt"
        unet.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.appearance_encoder = AppearanceEncoderModel(sample_size=64, **shared)
        self.appearance_encoder.load_state_dict(self._weights(job, "appearance_encoder"))
        control_net = ControlNetModel(conditioning_embedding_out_channels=channels, **shared)
        control_net.load_state_dict(self._weights(job, "densepose_controlnet"))
        vae = load_complete(AutoencoderKL, job.folder / "vae")
        text_encoder = load_complete(CLIPTextModel, job.folder / "text_encoder")
        for network in (unet, self.appearance_encoder, control_net, vae, text_encoder):
            network.to(job.device, job.dtype).eval()
        words = job.folder / "tokenizer"
        tokenizer = CLIPTokenizer(
            str(words / "vocab.json"),
            str(words / "merges.txt"),
            model_max_length=text_encoder.config.max_position_embeddings,
        )
        self.job = job
        self.pipeline = Pipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            controlnet=control_net,
            scheduler=TimedScheduler(**OmegaConf.to_container(published.noise_scheduler_kwargs)),
        )
        inputs = job.tensors("inputs")
        self.reference, self.poses = inputs["reference"].numpy(), inputs["poses"].numpy()
        self.times = StepTimes(job.device, [])

    @staticmethod
    def _weights(job: Job, name: str) -> dict:
        return load_file(job.folder / name / "diffusion_pytorch_model.safetensors")

    def noise(self) -> torch.Tensor:
        """(f, c, h, w), drawn as (1, c, f, h, w)."""
        shape = (1, self.job.settings["unet"]["in_channels"], len(self.poses), *self.job.settings["latent_size"])
        drawn = torch.randn(shape, generator=self.job.generator())
        return drawn[0].transpose(0, 1).to(self.job.device, self.job.dtype)

    def run(self, steps: int, guidance: float) -> None:
        frames = len(self.poses)
        height, width = self.reference.shape[:2]
        self.times = StepTimes(self.job.device, [])
        with self.job.autocast():
            self.pipeline(
                "",
                frames,
                height,
                width,
                steps,
                guidance,
                negative_prompt="",
                init_latents=self.noise(),
                controlnet_condition=self.poses,
                context_frames=frames,
                appearance_encoder=self.appearance_encoder,
                source_image=self.reference,
            )


if __name__ == "__main__":
    job = read_job(sys.argv[1:])
    sys.path.insert(0, str(job.checkout))
    answer_missing_imports()
    serve(Driver(job, Inference).commands())
