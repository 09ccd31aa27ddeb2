"""`AnimationPipeline`: a reference picture and pose pictures in, an animation out, with calibration as an argument.

Shapes use f = frames, i = reference images, c = channels, h, w = latent size, H, W = picture size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

from models.animate_anyone import image_context
from models.latents import decode_pictures, encode_pictures, vae_factor
from models.reference_attention import ReferenceContext
from models.unets import DenoisingUNet, PoseGuider, ReferenceNet
from models.windows import context_windows, window_weights
from tpc import Calibration
from tpc.attention import frame_visibility

# Reference and calibrated images go through VAE and ReferenceNet this many at a time, to bound memory.
ENCODE_CHUNK = 8


@dataclass
class AnimationPipelineOutput(BaseOutput):
    """Frames of one clip: list of PIL images, float32 array (f, H, W, 3) in [0, 1], tensor (f, 3, H, W) in [0, 1], or
    latents (1, c, f, h, w), by `output_type`."""

    frames: list[Image.Image] | np.ndarray | Tensor


@dataclass(frozen=True)
class ReferenceBank:
    """Everything the denoising UNet may attend to in one run.

    Attributes:
        tokens: layer -> (i, r, c). Image 0 is the reference, the others are calibrated images.
        slots: calibrated image of the `Calibration` -> its place in `tokens`.
        calibration: the calibration the images come from, or None.
    """

    tokens: dict[str, Tensor]
    slots: dict[int, int]
    calibration: Calibration | None


class AnimationPipeline(DiffusionPipeline):
    """AnimateAnyone: ReferenceNet, denoising UNet with motion modules, pose guider, image encoder, VAE, scheduler."""

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
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            image_encoder=image_encoder,
            reference_net=reference_net,
            denoising_unet=denoising_unet,
            pose_guider=pose_guider,
            scheduler=scheduler,
        )
        self.vae_scale_factor = vae_factor(self.vae)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)

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
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, pt or latent, got {output_type!r}")
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

    def encode_reference(self, reference: Tensor, context: Tensor, calibration: Calibration | None, steps: int):
        """Run the ReferenceNet once on every different image that some step attends to.

        Args:
            reference: (1, 3, H, W) in [-1, 1].
            context: image embedding, (1, tokens, channels).
            calibration: its images that `steps` denoising steps draw are encoded too; None: the reference alone.
        """
        images, slots = [reference], {}
        if calibration is not None:
            drawn = [int(image) for image in calibration.used(steps)]
            slots = {image: place for place, image in enumerate(drawn, start=1)}
            if drawn:
                calibrated = torch.from_numpy(calibration.images[drawn])
                images.append(calibrated.permute(0, 3, 1, 2).to(reference) / 127.5 - 1)
        written: dict[str, list[Tensor]] = {}
        for part in torch.cat(images).split(ENCODE_CHUNK):
            tokens = self.reference_net(encode_pictures(self.vae, part), 0, context.expand(len(part), -1, -1))
            for layer, value in tokens.items():
                written.setdefault(layer, []).append(value)
        return ReferenceBank({layer: torch.cat(parts) for layer, parts in written.items()}, slots, calibration)

    def reference_context(self, bank: ReferenceBank, frames: range, step: int, latent_size: tuple[int, int]):
        """What the frames of one window may attend to at one denoising step.

        Args:
            frames: consecutive frames of the clip.
            step: number of the denoising step, 0 first.
            latent_size: (h, w).
        """
        device = next(iter(bank.tokens.values())).device
        index = torch.zeros(len(frames), 1, dtype=torch.long, device=device)
        if bank.calibration is None:
            return ReferenceContext(bank.tokens, index)
        members = bank.calibration.index(step)[frames.start : frames.stop]  # (f, persons), -1 where uncalibrated
        slots = [[bank.slots.get(int(member), 0) for member in row] for row in members]
        index = torch.cat([index, torch.tensor(slots, device=device).reshape(len(frames), -1)], dim=1)
        grids = self.denoising_unet.attention_grids(*latent_size)
        flags = frame_visibility(bank.calibration, frames, members, latent_size, grids)
        return ReferenceContext(
            tokens=bank.tokens,
            index=index,
            query_flags={n: value.to(device) for n, value in flags.query.items()},
            key_flags={n: value.to(device) for n, value in flags.key.items()},
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
        return decode_pictures(self.vae, latents[0].transpose(0, 1), chunk_size)

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
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        decode_chunk_size: int = 8,
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
            window_size: frames denoised together; default: all, at most as many as the motion modules know.
            window_overlap: frames that neighbouring windows share at least.
            generator: source of the initial noise; a CPU generator gives the same noise on every device.
            latents: initial noise, (1, c, f, h, w), instead of drawing it.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns a tuple.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) after every step; what it
                returns replaces the tensors.
            callback_on_step_end_tensor_inputs: names of the tensors it gets.
            decode_chunk_size: frames the VAE decodes at a time.

        Returns:
            `AnimationPipelineOutput`, or a tuple of its frames.

        Raises:
            ValueError: for inputs that disagree in size or number, named.
        """
        poses = as_pictures(poses, "poses")
        if width is None or height is None:
            height, width = poses.shape[-2:]
        num_frames = len(poses)
        longest = self.denoising_unet.config.motion_max_seq_length
        window_size = min(num_frames, longest) if window_size is None else window_size
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

        reference = resize_pictures(as_pictures(reference, "reference")[:1], width, height).to(device, dtype) * 2 - 1
        poses = resize_pictures(poses, width, height).to(device, dtype)
        context = image_context(self.image_encoder, reference).to(dtype)
        bank = self.encode_reference(reference, context, calibration, num_inference_steps)
        pose_features = torch.cat(
            [self.pose_guider(part.transpose(0, 1)[None]) for part in poses.split(ENCODE_CHUNK)], dim=2
        )  # (1, c, f, h, w)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = self.prepare_latents(num_frames, (width, height), dtype, generator, latents)
        windows = context_windows(num_frames, window_size, window_overlap)
        weights = window_weights(windows, num_frames)
        with self.progress_bar(total=num_inference_steps) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                sample = self.scheduler.scale_model_input(latents, timestep)
                prediction = torch.zeros_like(latents)
                for window, weight in zip(windows, weights, strict=True):
                    part = slice(window.start, window.stop)
                    part_prediction = self.guided_prediction(
                        sample[:, :, part],
                        timestep,
                        context,
                        pose_features[:, :, part],
                        self.reference_context(bank, window, step, latents.shape[-2:]),
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
        else:
            frames = self.decode_latents(latents, decode_chunk_size)
            frames = self.video_processor.postprocess(frames, output_type)
        self.maybe_free_model_hooks()
        return AnimationPipelineOutput(frames=frames) if return_dict else (frames,)

    def guided_prediction(
        self,
        sample: Tensor,
        timestep: Tensor,
        context: Tensor,
        pose_features: Tensor,
        reference: ReferenceContext,
        guidance_scale: float,
    ) -> Tensor:
        """Prediction for one window, (1, c, f, h, w). Two calls instead of one doubled batch halve the memory."""
        conditional = self.denoising_unet(sample, timestep, context, pose_features, reference)
        if guidance_scale == 1:
            return conditional
        unconditional = self.denoising_unet(sample, timestep, torch.zeros_like(context), pose_features)
        return unconditional + guidance_scale * (conditional - unconditional)


def as_pictures(pictures: Any, argument: str) -> Tensor:
    """Any accepted form of one or more pictures -> float32 (f, 3, H, W) in [0, 1]."""
    if isinstance(pictures, Image.Image):
        pictures = [pictures]
    if isinstance(pictures, (list, tuple)):
        if not pictures:
            raise ValueError(f"{argument} is empty")
        convert = isinstance(pictures[0], Image.Image)
        pictures = np.stack([np.asarray(p.convert("RGB")) if convert else np.asarray(p) for p in pictures])
    if isinstance(pictures, np.ndarray):
        pictures = torch.from_numpy(np.ascontiguousarray(pictures))
        pictures = (pictures[None] if pictures.ndim == 3 else pictures).movedim(-1, 1)
    elif isinstance(pictures, Tensor):
        pictures = pictures[None] if pictures.ndim == 3 else pictures
    else:
        raise ValueError(f"{argument} must be PIL images, an array or a tensor, got {type(pictures).__name__}")
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not len(pictures):
        raise ValueError(f"{argument} must be RGB pictures of one size, got shape {tuple(pictures.shape)}")
    return pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures.float()


def resize_pictures(pictures: Tensor, width: int, height: int) -> Tensor:
    """(f, 3, H, W) -> (f, 3, height, width), anti-aliased; unchanged when the size is right already."""
    if tuple(pictures.shape[-2:]) == (height, width):
        return pictures
    resized = torch.nn.functional.interpolate(pictures, (height, width), mode="bicubic", antialias=True)
    return resized.clamp(0, 1)
