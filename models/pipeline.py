"""`AnimationPipeline`: a reference picture and pose pictures in, an animation out, with calibration as an argument.

Shapes use f = frames, i = reference images, c = channels, h, w = latent size, H, W = picture size.
"""

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

from models.animate_anyone import AnimateAnyone
from models.animator import Animator
from models.attention_recording import AttentionRecording
from models.attention_run import AttentionRun, attention_run
from models.latents import decode_pictures, decoded_chunks, vae_factor
from models.pictures import PictureSequence, as_pictures, picture_tensor, resize_pictures
from models.reference_attention import ReferenceContext
from models.reference_bank import ReferenceImages
from models.unets import DenoisingUNet, PoseGuider, ReferenceNet
from models.windows import context_windows, step_shift, window_weights
from tpc import Calibration


@dataclass
class AnimationPipelineOutput(BaseOutput):
    """Frames of one clip, by `output_type`: list of PIL images, array (f, H, W, 3) of float32 in [0, 1] or of uint8,
    tensor (f, 3, H, W) in [0, 1], or latents (1, c, f, h, w)."""

    frames: list[Image.Image] | np.ndarray | Tensor


class AnimationPipeline(DiffusionPipeline):
    """AnimateAnyone: ReferenceNet, denoising UNet with motion modules, pose guider, image encoder, VAE, scheduler.

    Subclasses have the components of another animator and say in `animator` how the denoising loop uses them.

    Attributes:
        pose_kind: what its pose pictures are; figures of OpenPose can be drawn from keypoints.

    Args:
        window_size: frames that the model was trained on, the default of `__call__`; None: all that its motion
            modules know.
    """

    pose_kind = "OpenPose"
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
        self.vae_scale_factor = vae_factor(self.vae)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)

    def animator(self) -> Animator:
        """The components as the denoising loop uses them."""
        return AnimateAnyone(self.reference_net, self.denoising_unet, self.pose_guider, self.image_encoder)

    @property
    def size_multiple(self) -> int:
        """Pixels that width and height must be multiples of: the VAE's factor, as the UNet takes odd latents."""
        return self.vae_scale_factor

    def check_inputs(
        self,
        num_frames: int,
        size: tuple[int, int],
        num_inference_steps: int,
        window_size: int,
        window_overlap: int,
        decode_chunk_size: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
        calibration: Calibration | None,
    ) -> None:
        """Raise ValueError naming the argument, what was got, and what is allowed."""
        width, height = size
        if width % self.size_multiple or height % self.size_multiple:
            raise ValueError(f"size must be multiples of {self.size_multiple} pixels, got {width}x{height}")
        for name, value in (("num_inference_steps", num_inference_steps), ("decode_chunk_size", decode_chunk_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        longest = self.denoising_unet.config.motion_max_seq_length
        if not 1 <= window_size <= longest:
            raise ValueError(f"window_size must be 1 to {longest}, the motion modules' length, got {window_size}")
        if not 0 <= window_overlap < window_size:
            raise ValueError(f"window_overlap must be 0 to {window_size - 1}, got {window_overlap}")
        if output_type not in ("pil", "np", "uint8", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, uint8, pt or latent, got {output_type!r}")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback tensor inputs must be of {self._callback_tensor_inputs}, got {sorted(unknown)}"
            )
        if calibration is not None:
            if calibration.frames != num_frames:
                raise ValueError(f"calibration has {calibration.frames} frames, poses have {num_frames}")
            if tuple(calibration.size) != (width, height):
                raise ValueError(f"calibration is for {calibration.size}, pictures are {width}x{height}")

    def attention_run(
        self, num_frames: int, size: tuple[int, int], num_inference_steps: int, calibration: Calibration | None = None
    ) -> AttentionRun:
        """What `__call__` with these arguments will be to `AttentionRecording.estimate`; size: (width, height)."""
        width, height = size
        return attention_run(
            self.denoising_unet,
            (height // self.vae_scale_factor, width // self.vae_scale_factor),
            (width, height),
            num_frames,
            num_inference_steps,
            1 if calibration is None else 1 + calibration.persons,
            self.animator().reading_layers(),
        )

    def prepare_latents(
        self, num_frames: int, size: tuple[int, int], dtype: torch.dtype, generator: Any, latents: Tensor | None
    ) -> Tensor:
        """Noise (1, c, f, h, w) at the scheduler's first noise level, or the given latents on the right device."""
        width, height = size
        shape = (
            1,
            self.denoising_unet.config.in_channels,
            num_frames,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        return latents.to(self._execution_device, dtype) * self.scheduler.init_noise_sigma

    def decode_latents(self, latents: Tensor, chunk_size: int) -> Tensor:
        """Latents (1, c, f, h, w) -> frames (f, 3, H, W) in [-1, 1] on the CPU, a few frames at a time."""
        return decode_pictures(self.vae, latents[0].transpose(0, 1).to(self.vae.dtype), chunk_size)

    def decode_bytes(self, latents: Tensor, chunk_size: int) -> np.ndarray:
        """Latents (1, c, f, h, w) -> frames (f, H, W, 3) uint8, a quarter of the memory of `decode_latents`."""
        num_frames, height, width = latents.shape[2:]
        frames = np.empty((num_frames, height * self.vae_scale_factor, width * self.vae_scale_factor, 3), np.uint8)
        done = 0
        for chunk in decoded_chunks(self.vae, latents[0].transpose(0, 1).to(self.vae.dtype), chunk_size):
            pictures = self.video_processor.postprocess(chunk, "np")
            frames[done : done + len(chunk)] = (pictures * 255).round()
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
        guidance_scale: float = 3.5,
        window_size: int | None = None,
        window_overlap: int = 4,
        shift_windows: bool = False,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        decode_chunk_size: int = 8,
        attention: AttentionRecording | None = None,
    ) -> AnimationPipelineOutput | tuple:
        """Animate the person of `reference` with `poses`.

        Args:
            reference: a picture: PIL image, array (H, W, 3) in [0, 1] or uint8, or tensor (3, H, W) in [0, 1].
            poses: pose pictures of f frames: list of PIL images, array (f, H, W, 3), or tensor (f, 3, H, W), in [0, 1]
                or uint8; see `data.drawing.draw_pose`.
            calibration: result of `tpc.calibrate` for these frames at this size; None runs without TPC.
            width, height: of the result in pixels; default: those of the first pose picture.
            num_inference_steps: denoising steps.
            guidance_scale: 1 switches classifier-free guidance off; its unconditional half sees neither reference
                nor calibrated images, and keeps the pose.
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
            decode_chunk_size: frames the VAE decodes at a time.
            attention: records what frames look at in the reference and in calibrated images, in the conditional half
                of guidance; the result stays the same, bit for bit.

        Returns:
            `AnimationPipelineOutput`, or a tuple of its frames.

        Raises:
            ValueError: for inputs that disagree in size or number, named.
        """
        poses = picture_tensor(poses, "poses")
        if width is None or height is None:
            height, width = poses.shape[-2:]
        num_frames = len(poses)
        longest = self.denoising_unet.config.motion_max_seq_length
        window_size = min(num_frames, self.config.window_size or longest) if window_size is None else window_size
        window_overlap = min(window_overlap, window_size - 1)
        self.check_inputs(
            num_frames,
            (width, height),
            num_inference_steps,
            window_size,
            window_overlap,
            decode_chunk_size,
            output_type,
            callback_on_step_end_tensor_inputs,
            calibration,
        )
        device, dtype = self._execution_device, self.denoising_unet.dtype
        if attention is not None:
            attention.begin(self.attention_run(num_frames, (width, height), num_inference_steps, calibration))

        animator = self.animator()
        reference = resize_pictures(as_pictures(reference, "reference")[:1], width, height).to(device, dtype) * 2 - 1
        context = animator.encode_context(reference)
        images = ReferenceImages(animator, self.vae, reference, context, calibration, num_inference_steps)
        condition = animator.pose_condition(PictureSequence(poses, (width, height), device, dtype), context)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        # The scheduler's many small steps, and the same noise for every number format, want single precision.
        latents = self.prepare_latents(
            num_frames, (width, height), torch.promote_types(dtype, torch.float32), generator, latents
        )
        latent_size = tuple(latents.shape[-2:])
        grids = self.denoising_unet.attention_grids(*latent_size)
        with self.progress_bar(total=num_inference_steps) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                sample = self.scheduler.scale_model_input(latents, timestep).to(dtype)
                prediction = torch.zeros_like(latents)
                at_step = condition.at_step(sample, timestep)
                shift = step_shift(step) if shift_windows else 0.0
                windows = context_windows(num_frames, window_size, window_overlap, shift)
                weights = window_weights(windows, num_frames)
                for number, (window, weight) in enumerate(zip(windows, weights, strict=True)):
                    part = slice(window.start, window.stop)
                    bank = images.bank(step, int(timestep), window)
                    seen = images.seen_by(bank, window, step, latent_size, grids)
                    if attention is not None:
                        seen = replace(seen, probe=attention.probe(step, int(timestep), windows, number))
                    part_prediction = self.guided_prediction(
                        animator,
                        sample[:, :, part],
                        timestep,
                        context,
                        at_step.window(window),
                        seen,
                        guidance_scale,
                    )
                    prediction[:, :, part] += part_prediction * weight.to(latents)[:, None, None]
                latents = self.scheduler.step(prediction, timestep, latents).prev_sample
                if callback_on_step_end is not None:
                    tensors = {}
                    for name in callback_on_step_end_tensor_inputs:
                        tensors[name] = locals()[name]
                    latents = callback_on_step_end(self, step, int(timestep), tensors).pop("latents", latents)
                progress.update()

        if output_type == "latent":
            frames = latents
        elif output_type == "uint8":
            frames = self.decode_bytes(latents, decode_chunk_size)
        else:
            frames = self.decode_latents(latents, decode_chunk_size)
            frames = self.video_processor.postprocess(frames, output_type)
        self.maybe_free_model_hooks()
        return AnimationPipelineOutput(frames=frames) if return_dict else (frames,)

    def guided_prediction(
        self,
        animator: Animator,
        sample: Tensor,
        timestep: Tensor,
        context: Tensor,
        pose: Any,
        reference: ReferenceContext,
        guidance_scale: float,
    ) -> Tensor:
        """Prediction for one window, (1, c, f, h, w). Two calls instead of one doubled batch halve the memory."""
        conditional = animator.predict(sample, timestep, context, pose, reference)
        if guidance_scale == 1:
            return conditional
        unconditional = animator.predict(sample, timestep, animator.null_context(context), pose, None)
        return unconditional + guidance_scale * (conditional - unconditional)
