"""Run a checkout of Moore-AnimateAnyone in its own environment, for `compare.py`.

    PEER_PYTHON -u driver_moore.py CHECKOUT SETTINGS.json WEIGHTS_FOLDER

Networks, attention control, pipeline and network configuration are the checkout's. Inference is its long pipeline's
`__call__`. Its training scripts are bound to a data set, a GPU and mlflow; a training step here does what theirs do
between two batches, on its networks: encoding with VAE and image encoder, noise, prediction, min-SNR loss, backward
pass, clipping, AdamW.

Given and equal to ours: weights, images, in training also noise, timesteps and draws of the posterior. Latents of the
reference are the posterior's mean, and no condition is dropped. The checkout rounds features of the reference to half
precision and images for the image encoder to bytes. In bfloat16, for which it was not made, it runs under autocast
and draws the initial noise in bfloat16, too.
"""

import sys

import torch
import torch.nn.functional as F
from driver_protocol import Driver, Job, StepTimes, load_complete, read_job, serve

STAGES = ("image", "motion")


def read_weights(job: Job, *names: str) -> dict:
    tensors = {}
    for name in names:
        tensors.update(torch.load(job.folder / f"{name}.pth", map_location="cpu", weights_only=True))
    return tensors


class Networks:
    """The checkout's networks with the given weights, in float32 on the job's device."""

    def __init__(self, job: Job, motion: bool = True):  # motion modules; the first stage of training is without
        from diffusers import AutoencoderKL
        from omegaconf import OmegaConf
        from src.models.pose_guider import PoseGuider
        from src.models.unet_2d_condition import UNet2DConditionModel
        from src.models.unet_3d import UNet3DConditionModel
        from transformers import CLIPVisionModelWithProjection

        published = OmegaConf.load(job.checkout / "configs/inference/inference_v2.yaml")
        self.schedule = OmegaConf.to_container(published.noise_scheduler_kwargs)
        further = {"use_motion_module": False, "unet_use_temporal_attention": False}
        files = ["denoising_unet"]
        if motion:
            further = OmegaConf.to_container(published.unet_additional_kwargs)
            files.append("motion_module")
        self.denoising_unet = UNet3DConditionModel(sample_size=64, **job.unet_settings(), **further)
        self.denoising_unet.load_state_dict(read_weights(job, *files))
        # Loaded as the scripts load it, which leaves it in evaluation mode.
        self.reference_unet = UNet2DConditionModel(sample_size=64, **job.unet_settings()).eval()
        self.reference_unet.load_state_dict(read_weights(job, "reference_unet"))
        self.pose_guider = PoseGuider(
            job.settings["unet"]["block_out_channels"][0], block_out_channels=tuple(job.settings["pose_channels"])
        )
        self.pose_guider.load_state_dict(read_weights(job, "pose_guider"))
        self.vae = load_complete(AutoencoderKL, job.folder / "vae")
        self.image_encoder = load_complete(CLIPVisionModelWithProjection, job.folder / "image_encoder")
        for network in self.all():
            network.to(job.device)

    def all(self) -> tuple[torch.nn.Module, ...]:
        return self.denoising_unet, self.reference_unet, self.pose_guider, self.vae, self.image_encoder


class Inference:
    def __init__(self, job: Job):
        from diffusers import DDIMScheduler
        from PIL import Image
        from src.pipelines.pipeline_pose2vid_long import Pose2VideoPipeline

        networks = Networks(job)
        for network in networks.all():
            network.to(job.dtype).eval()
        self.job = job
        self.pipeline = Pose2VideoPipeline(
            vae=networks.vae,
            image_encoder=networks.image_encoder,
            reference_unet=networks.reference_unet,
            denoising_unet=networks.denoising_unet,
            pose_guider=networks.pose_guider,
            scheduler=DDIMScheduler(**networks.schedule),
        )
        self.pipeline.set_progress_bar_config(disable=True)
        inputs = job.tensors("inputs")
        self.reference = Image.fromarray(inputs["reference"].numpy())
        self.poses = [Image.fromarray(pose.numpy()) for pose in inputs["poses"]]
        self.times = StepTimes(job.device, [])

    def run(self, steps: int, guidance: float) -> None:
        frames = len(self.poses)
        self.times = StepTimes(self.job.device, [])
        with self.job.autocast():
            self.pipeline(
                self.reference,
                self.poses,
                *self.reference.size,
                frames,
                steps,
                guidance,
                generator=self.job.generator(),
                callback=lambda step, timestep, latents: self.times.note(latents),
                context_frames=frames,
            )


class Training:
    """Steps of one of the two training stages."""

    def __init__(self, job: Job, stage: str, gradient_checkpointing: bool):
        from diffusers import DDIMScheduler
        from diffusers.utils.import_utils import is_xformers_available
        from src.models.mutual_self_attention import ReferenceAttentionControl
        from transformers import CLIPImageProcessor

        if stage not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}")
        self.job, self.stage = job, stage
        self.networks = networks = Networks(job, motion=stage == "motion")
        # What both training scripts set over the configuration of inference.
        self.scheduler = DDIMScheduler(**{**networks.schedule, "beta_schedule": "scaled_linear"})
        self.parameters = self.choose_parameters()
        sides = {"do_classifier_free_guidance": False, "fusion_blocks": "full"}
        self.writer = ReferenceAttentionControl(networks.reference_unet, mode="write", **sides)
        self.reader = ReferenceAttentionControl(networks.denoising_unet, mode="read", **sides)
        for network in (networks.reference_unet, networks.denoising_unet):
            # As its configuration has it.
            if job.device.type == "cuda" and is_xformers_available():
                network.enable_xformers_memory_efficient_attention()
            if gradient_checkpointing:
                network.enable_gradient_checkpointing()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        self.batch = {name: value.to(job.device) for name, value in job.tensors(f"batch_{stage}").items()}
        # Its data set hands on images of the reference as the image encoder takes them.
        images = [(image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0) for image in self.batch["reference"].cpu()]
        pixels = CLIPImageProcessor()([(255 * image).round().byte().numpy() for image in images])
        self.clip_images = torch.stack([torch.as_tensor(part) for part in pixels.pixel_values]).to(job.device)

    def choose_parameters(self) -> list[torch.nn.Parameter]:
        """What the stage trains; the rest is frozen, in the number format of the job."""
        networks, job = self.networks, self.job
        frozen = [networks.vae, networks.image_encoder]
        if self.stage == "image":
            for name, parameter in networks.reference_unet.named_parameters():
                parameter.requires_grad_("up_blocks.3" not in name)
        else:
            frozen += [networks.reference_unet, networks.pose_guider]
            for name, parameter in networks.denoising_unet.named_parameters():
                parameter.requires_grad_("motion_modules" in name)
        for network in frozen:
            network.requires_grad_(False).to(job.dtype)
        return [p for network in networks.all() for p in network.parameters() if p.requires_grad]

    def latents_of(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the scaled latents, all images at once."""
        found = self.networks.vae.encode(images.to(self.networks.vae.dtype)).latent_dist
        return found.mean.float() * 0.18215, found.std.float() * 0.18215

    def step(self) -> float:
        """Loss of one optimiser step."""
        networks, batch, job = self.networks, self.batch, self.job
        timesteps, noise = batch["timesteps"], batch["noise"]
        with torch.no_grad():
            mean, deviation = self.latents_of(batch["frames"].transpose(1, 2).flatten(0, 1))
            mean, deviation = (x.unflatten(0, (len(timesteps), -1)).transpose(1, 2) for x in (mean, deviation))
            latents = mean + deviation * batch["posterior"]
            reference = self.latents_of(batch["reference"])[0]
            context = networks.image_encoder(self.clip_images.to(job.dtype)).image_embeds.unsqueeze(1)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        with job.autocast():
            pose = networks.pose_guider(batch["poses"])
            networks.reference_unet(
                reference, torch.zeros_like(timesteps), encoder_hidden_states=context, return_dict=False
            )
            self.reader.update(self.writer, self.features_dtype)
            prediction = networks.denoising_unet(
                noisy, timesteps, pose_cond_fea=pose, encoder_hidden_states=context
            ).sample
        errors = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3, 4))
        loss = (errors * self.weights(timesteps)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.reader.clear()
        self.writer.clear()
        return loss.item()

    @property
    def features_dtype(self) -> torch.dtype:
        """Half precision, the default that its scripts rely on, which no other half-precision format mixes with."""
        return torch.bfloat16 if self.job.dtype == torch.bfloat16 else torch.float16

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Its min-SNR weights, min(snr + 1, 5) / (snr + 1)."""
        cumulative = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = cumulative / (1 - cumulative) + 1
        return snr.clamp(max=5.0) / snr


if __name__ == "__main__":
    job = read_job(sys.argv[1:])
    sys.path.insert(0, str(job.checkout))
    serve(Driver(job, Inference, Training).commands())
