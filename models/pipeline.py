"""`AnimationPipeline`: a reference image and pose images in, an animation out, with calibration as an argument.

Shapes use f = frames, i = reference images, c = channels, h, w = latent size, H, W = image size.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from core.errors import UserError
from data.transforms import frame_size
from models.animators.animate_anyone.model import AnimateAnyone
from models.animators.base import Animator, Condition
from models.attention.recording import AttentionRecording
from models.attention.run import AttentionRun
from models.images import ImageSequence, as_images, as_mask, image_tensor, resize_images
from models.pipeline_settings import RunSettings, check_callback
from models.reference_images import ReferenceImages
from models.schedules import EVERY_LEVEL, check_sampling, guidance_at, with_solver
from models.unets import DenoisingUNet, PoseGuider, ReferenceNet
from models.vae import decoded_chunks, vae_decode, vae_scale_factor
from models.windows import context_windows, step_shift, window_weights
from tpc import Calibration


@dataclass
class AnimationPipelineOutput(BaseOutput):
    """Frames of one clip, by `output_type`: list of PIL images, array (f, H, W, 3) of float32 in [0, 1] or of uint8,
    tensor (f, 3, H, W) in [0, 1], or latents (1, c, f, h, w).
    """

    frames: list[Image.Image] | np.ndarray | Tensor


class AnimationPipeline(DiffusionPipeline):
    """AnimateAnyone: ReferenceNet, denoising UNet with motion modules, pose guider, image encoder, VAE, scheduler.

    Subclasses have the components of another animator, by the names of its arguments, and name its class. Everything
    that depends on the model is asked of the animator; see `models.animators.base` and `docs/animators.md`.

    Attributes:
        animator_kind: class of the animator.

    Args:
        window_size: frames that the model was trained on, the default of `__call__`; None: all that its motion
            modules know.
    """

    animator_kind: type[Animator] = AnimateAnyone
    model_cpu_offload_seq = "image_encoder->reference_net->pose_guider->denoising_unet->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        image_encoder: CLIPVisionModelWithProjection,
        reference_net: ReferenceNet,
        denoising_unet: DenoisingUNet,
        pose_guider: PoseGuider,
        scheduler: DDIMScheduler,
        window_size: int | None = None,
    ):
        super().__init__()
        self.set_components(
            window_size,
            vae=vae,
            image_encoder=image_encoder,
            reference_net=reference_net,
            denoising_unet=denoising_unet,
            pose_guider=pose_guider,
            scheduler=scheduler,
        )

    def set_components(self, window_size: int | None, **components: Any) -> None:
        """Register the components and derive what every animator's pipeline has; for constructors."""
        self.register_modules(**components)
        self.register_to_config(window_size=window_size)
        self.vae_scale_factor = vae_scale_factor(self.vae)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)

    def animator(self) -> Animator:
        """The components as the denoising loop uses them."""
        names = list(inspect.signature(self.animator_kind.__init__).parameters)[1:]
        return self.animator_kind(
            **{name: getattr(self, name) if name in self.components else self.config[name] for name in names}
        )

    @property
    def pose_kind(self) -> str:
        """What its pose images are; figures of OpenPose can be drawn from keypoints."""
        return self.animator().pose_kind

    @property
    def size_multiple(self) -> int:
        """Pixels that width and height must be multiples of."""
        return self.vae_scale_factor * self.animator().latent_multiple

    def default_size(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(width, height) that the model is best at, of about the proportions of `shape`, where it leaves a choice."""
        animator, factor = self.animator(), self.vae_scale_factor
        if animator.latent_size is not None:
            return animator.latent_size[1] * factor, animator.latent_size[0] * factor
        return frame_size(shape, (animator.latent_side * factor) ** 2, factor * animator.latent_multiple)

    def attention_run(
        self,
        num_frames: int,
        size: tuple[int, int],
        num_inference_steps: int,
        calibration: Calibration | None = None,
    ) -> AttentionRun:
        """What `__call__` with these arguments will be to `AttentionRecording.estimate`; size: (width, height)."""
        width, height = size
        latent_size = height // self.vae_scale_factor, width // self.vae_scale_factor
        persons = 0 if calibration is None else calibration.persons
        replaces = persons > 0 and calibration.config.attach == "replace"
        return AttentionRun(
            self.animator().attention_layers(latent_size),
            size,
            num_frames,
            num_inference_steps,
            images=persons if replaces else 1 + persons,
            replaced=replaces,
        )

    def initial_noise(
        self, animator: Animator, num_frames: int, size: tuple[int, int], generator: Any, latents: Tensor | None
    ) -> Tensor:
        """Noise (1, c, f, h, w): the given one, or drawn, the same for all frames where the animator wants it so."""
        factor, device = self.vae_scale_factor, self._execution_device
        shape = (1, animator.latent_channels, num_frames, size[1] // factor, size[0] // factor)
        # The scheduler's many small steps, and the same noise for every number format, want single precision.
        dtype = torch.promote_types(animator.dtype, torch.float32)
        if latents is None:
            drawn = (*shape[:2], 1, *shape[3:]) if animator.shared_noise else shape
            latents = randn_tensor(drawn, generator=generator, device=device, dtype=dtype)
            return latents.expand(shape).contiguous()
        if latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        return latents.to(device, dtype)

    def decode_latents(self, latents: Tensor, chunk_size: int) -> Tensor:
        """Latents (1, c, f, h, w) -> frames (f, 3, H, W) in [-1, 1] on the CPU, a few frames at a time."""
        return vae_decode(self.vae, latents[0].transpose(0, 1).to(self.vae.dtype), chunk_size)

    def decode_bytes(self, latents: Tensor, chunk_size: int) -> np.ndarray:
        """Latents (1, c, f, h, w) -> frames (f, H, W, 3) uint8, a quarter of the memory of `decode_latents`."""
        num_frames, height, width = latents.shape[2:]
        frames = np.empty((num_frames, height * self.vae_scale_factor, width * self.vae_scale_factor, 3), np.uint8)
        done = 0
        for chunk in decoded_chunks(self.vae, latents[0].transpose(0, 1).to(self.vae.dtype), chunk_size):
            images = self.video_processor.postprocess(chunk, "np")
            frames[done : done + len(chunk)] = (images * 255).round()
            done += len(chunk)
        return frames

    @torch.no_grad()
    def __call__(
        self,
        reference: Any,
        poses: Any,
        calibration: Calibration | None = None,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float | Sequence[float] = 3.5,
        window_size: int | None = None,
        window_overlap: int = 4,
        shift_windows: bool = False,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        decode_chunk_size: int | None = None,
        attention: AttentionRecording | None = None,
        reference_mask: Any = None,
        guidance_interval: Sequence[float] = EVERY_LEVEL,
        solver: str | None = None,
    ) -> AnimationPipelineOutput | tuple:
        """Animate the person of `reference` with `poses`.

        Args:
            reference: an image: PIL image, array (H, W, 3) in [0, 1] or uint8, or tensor (3, H, W) in [0, 1].
            poses: pose images of f frames: list of PIL images, array (f, H, W, 3), or tensor (f, 3, H, W), in [0, 1]
                or uint8; see `data.poses.drawing.draw_pose`.
            calibration: result of `tpc.calibrate` for these frames at this size; None runs without TPC.
            width, height: of the result in pixels; default: those of the first pose image.
            num_inference_steps: denoising steps.
            guidance_scale: 1 switches classifier-free guidance off; its unconditional half sees neither reference
                nor calibrated images, and keeps the pose. Models with several scales take one number for all, or a
                sequence.
            window_size: frames denoised together; default: what the model was trained on, at most all.
            window_overlap: frames that neighbouring windows share at least.
            shift_windows: move the windows at every step, so that no frame is always at a window's end; one more
                window a step.
            generator: source of the initial noise; a CPU generator gives the same noise on every device.
            latents: initial noise, (1, c, f, h, w), instead of drawing it.
            output_type: "pil", "np", "uint8", "pt" or "latent"; "uint8" takes least memory, for long clips.
            return_dict: False returns a tuple.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) after every step; what it
                returns replaces the tensors.
            callback_on_step_end_tensor_inputs: names of the tensors it gets.
            decode_chunk_size: frames the VAE decodes at a time; default: one on CPUs, 8 elsewhere.
            attention: records what frames look at in the reference and in calibrated images, in the conditional half
                of guidance; the result stays the same, bit for bit.
            reference_mask: where the reference's persons are, for models that take them apart from the background:
                array or tensor (H, W) in [0, 1] or uint8, or PIL image; default: as the calibration has it.
            guidance_interval: noise levels (low, high]; elsewhere the conditional half of guidance runs alone. Levels
                are the share of noise in the noisy latents, 0 to 1, see `models.schedules.noise_level`.
            solver: of `models.schedules.SOLVERS`, in place of the pipeline's own scheduler.

        Returns:
            `AnimationPipelineOutput`, or a tuple of its frames.

        Raises:
            ValueError: for inputs that disagree in size or number, named.
            UserError: the model needs a mask and there is none; or a solver or an interval that does not fit.
        """
        poses = image_tensor(poses, "poses")
        if width is None or height is None:
            height, width = poses.shape[-2:]
        num_frames, size, animator = len(poses), (width, height), self.animator()
        run = RunSettings(
            num_frames,
            size,
            num_inference_steps,
            window_size,
            window_overlap,
            shift_windows,
            decode_chunk_size,
            output_type,
        ).filled(animator, self.config.window_size, self._execution_device.type)
        run.check(animator, self.vae_scale_factor, calibration)
        check_callback(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        check_sampling(guidance_interval, solver)
        scheduler = self.scheduler if solver is None else with_solver(self.scheduler, solver)
        scales = animator.guidance_scales(guidance_scale)
        device, dtype = self._execution_device, animator.dtype
        if attention is not None:
            attention.begin(self.attention_run(num_frames, size, num_inference_steps, calibration))

        reference = resize_images(as_images(reference, "reference")[:1], width, height).to(device, dtype) * 2 - 1
        if animator.needs_mask and reference_mask is None and (calibration is None or not calibration.persons):
            raise UserError(
                f"{type(animator).__name__} takes person and background of the reference apart: give reference_mask="
            )
        mask = None if reference_mask is None else as_mask(reference_mask, width, height).to(device, dtype)
        images = ReferenceImages(animator, self.vae, reference, calibration, num_inference_steps, mask)
        condition = animator.pose_condition(ImageSequence(poses, size, device, dtype), images.conditioning)

        scheduler.set_timesteps(num_inference_steps, device=device)
        noise = self.initial_noise(animator, num_frames, size, generator, latents)
        latents = animator.initial_latents(noise, scheduler, lambda: images.start_latents().to(noise).expand_as(noise))
        with self.progress_bar(total=num_inference_steps) as progress:
            for step, timestep in enumerate(scheduler.timesteps):
                sample = scheduler.scale_model_input(latents, timestep).to(dtype)
                prediction = torch.zeros_like(latents)
                step_scales = guidance_at(scales, guidance_interval, scheduler, timestep)
                at_step = condition.at_step(sample, timestep)
                shift = step_shift(step) if run.shift_windows else 0.0
                windows = context_windows(num_frames, run.window_size, run.window_overlap, shift)
                weights = window_weights(windows, num_frames)
                for number, (window, weight) in enumerate(zip(windows, weights, strict=True)):
                    part = slice(window.start, window.stop)
                    seen = images.context_of(images.bank(step, int(timestep), window), window, step)
                    if attention is not None:
                        seen = replace(seen, probe=attention.probe(step, int(timestep), windows, number))
                    part_prediction = animator.predict(
                        sample[:, :, part],
                        timestep,
                        Condition(images.conditioning, at_step.window(window), seen),
                        step_scales,
                    )
                    prediction[:, :, part] += part_prediction * weight.to(latents)[:, None, None]
                latents = scheduler.step(prediction, timestep, latents).prev_sample
                if callback_on_step_end is not None:
                    tensors = {}
                    for name in callback_on_step_end_tensor_inputs:
                        tensors[name] = locals()[name]
                    latents = callback_on_step_end(self, step, int(timestep), tensors).pop("latents", latents)
                progress.update()

        if output_type == "latent":
            frames = latents
        elif output_type == "uint8":
            frames = self.decode_bytes(latents, run.decode_chunk_size)
        else:
            frames = self.decode_latents(latents, run.decode_chunk_size)
            frames = self.video_processor.postprocess(frames, output_type)
        self.maybe_free_model_hooks()
        return AnimationPipelineOutput(frames) if return_dict else (frames,)
