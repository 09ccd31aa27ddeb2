"""What a run is given, checked and prepared.

Shapes use f = frames, c = channels, h, w = latent size, H, W = image size.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from core.errors import UserError
from models.animators.base import Animator
from models.config import check_sampling
from models.images import (
    REFERENCE,
    CalibratedClip,
    ImageBatch,
    ImageSequence,
    Words,
    as_images,
    as_mask,
    image_tensor,
    resize_images,
)
from models.sampling import is_flow, with_solver
from models.segments import Segment, clip_segments
from models.vae import OUTPUT_TYPES

# Frames that do not attend to each other are denoised this many at a time.
FRAMES_AT_A_TIME = 8
WINDOW_OVERLAP = 4


class RunInputs(DiffusionPipeline):
    """Checks and preparation of the arguments of `AnimationPipeline`."""

    animator_cls: type[Animator]
    animator: Animator
    vae_scale_factor: int  # pixels of an image's side per latent
    _callback_tensor_inputs = ["latents"]

    @property
    def size_multiple(self) -> int:
        """Pixels that width and height must be multiples of."""
        return self.vae_scale_factor * self.animator.latent_multiple

    def default_window(self, num_frames: int, window_size: int | None, overlap: int | None) -> tuple[int, int]:
        """Size and overlap of windows or segments that suit the animator, where none were asked for.

        Those of segments are 1 more than a multiple of the frames of a latent, as near as can be to what was asked.
        UserError for segments without new frames.
        """
        animator = self.animator
        if animator.segment_frames is not None:
            step = animator.frames_per_latent
            longest = self.config.window_size or animator.segment_frames
            size = (window_size or min(longest, -(-(num_frames - 1) // step) * step + 1)) // step * step + 1
            overlap = min(animator.carried_frames, size - 1) if overlap is None else overlap
            if not 0 <= overlap < size:
                raise UserError(f"window_overlap={overlap} must be 0 to {size - 1}, less than a segment has frames")
            return size, overlap and min(overlap // step * step + 1, size - step)
        if window_size is None:
            apart = num_frames if animator.joint_frames else FRAMES_AT_A_TIME
            window_size = min(num_frames, self.config.window_size or animator.longest_window or apart)
        overlap = WINDOW_OVERLAP if overlap is None else overlap
        return window_size, min(overlap, window_size - 1) if animator.joint_frames else 0

    def segments(self, num_frames: int, window_size: int, overlap: int, cuts: Sequence[int]) -> list[Segment]:
        """What is denoised one after the other: segments, or all of a clip."""
        if self.animator.segment_frames is None:
            return [Segment(range(num_frames), range(num_frames))]
        return clip_segments(num_frames, window_size, overlap, cuts)

    def attended_calibration(
        self,
        calibration: CalibratedClip,
        window_size: int | None = None,
        overlap: int | None = None,
        cuts: Sequence[int] = (),
    ) -> CalibratedClip:
        """The calibration whose `index` is what frames attend to, in models of segments the images that these hold."""
        animator = self.animator
        if animator.segment_frames is None or calibration.replaces_reference:
            return calibration
        index = np.full_like(calibration.index(0), REFERENCE)
        window = self.default_window(calibration.frames, window_size, overlap)
        for segment in self.segments(calibration.frames, *window, cuts):
            held = calibration.held(segment.inside, animator.images_of_segment).index(0)
            index[list(segment.new)] = held[segment.image_frames(animator.frames_per_latent)]
        return calibration.attending(index)

    def check_size(self, num_frames: int, size: tuple[int, int], calibration: CalibratedClip | None) -> None:
        """Raise ValueError for a size that the model cannot take, or another clip's calibration."""
        width, height = size
        factor, multiple = self.vae_scale_factor, self.size_multiple
        if width % multiple or height % multiple:
            raise ValueError(f"size must be multiples of {multiple} pixels, got {width}x{height}")
        only = self.animator.latent_size
        if only is not None and (height // factor, width // factor) != only:
            raise ValueError(f"size must be {only[1] * factor}x{only[0] * factor}, the model's, got {width}x{height}")
        if calibration is not None:
            if calibration.frames != num_frames:
                raise ValueError(f"calibration has {calibration.frames} frames, poses have {num_frames}")
            if tuple(calibration.size) != size:
                raise ValueError(f"calibration is for {calibration.size}, images are {width}x{height}")

    def check_counts(self, num_frames: int, window_size: int, overlap: int, **counts: int) -> None:
        """Raise ValueError for numbers that cannot be, naming the argument."""
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        longest = self.animator.longest_window or max(num_frames, window_size)
        if not 1 <= window_size <= longest:
            raise ValueError(f"window_size must be 1 to {longest}, what the model knows, got {window_size}")
        if not 0 <= overlap < window_size:
            raise ValueError(f"window_overlap must be 0 to {window_size - 1}, got {overlap}")

    def check_choices(
        self, output_type: str, callback_inputs: Sequence[str], guidance_interval: Sequence[float], solver: str | None
    ) -> None:
        """Raise ValueError or UserError for what does not exist, naming the argument."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        unknown = set(callback_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback tensor inputs must be of {self._callback_tensor_inputs}, got {sorted(unknown)}"
            )
        check_sampling(guidance_interval, solver)

    def check_wanted(
        self,
        guidance_scale: float | Sequence[float],
        solver: str | None = None,
        words: Words | None = None,
        attach: str | None = None,
        start: int | None = None,
    ) -> None:
        """Raise UserError for what this model cannot do, as far as its settings tell before anything is computed.

        `attach` and `start` as of `tpc.CalibrationConfig`.
        """
        guided = any(scale != 1 for scale in self.animator.guidance_scales(guidance_scale))
        self.animator.check_words(words or Words(), guided)
        if solver is not None:
            with_solver(self.scheduler, solver)
        known = self.animator.attachments
        if attach is not None and attach not in known:
            raise UserError(
                f"tpc.attach={attach} is none of {', '.join(known)}, which {self.animator_cls.__name__} has"
            )
        if start is not None and start >= 0 and is_flow(self.scheduler):
            raise UserError(f"tpc.start={start} is for diffusion; the model's is flow matching, leave it null")

    def prepare_images(
        self, reference: Any, mask: Any, calibration: CalibratedClip | None, size: tuple[int, int], words: Words | None
    ) -> ImageBatch:
        """Images of a run, the reference resized to (width, height); UserError without a mask that is needed."""
        device, dtype = self._execution_device, self.animator.dtype
        pixels = resize_images(as_images(reference, "reference")[:1], *size).to(device, dtype) * 2 - 1
        if self.animator.needs_mask and mask is None and (calibration is None or not calibration.persons):
            name = self.animator_cls.__name__
            raise UserError(f"{name} tells person and background of the reference by a mask: give reference_mask=")
        mask = None if mask is None else as_mask(mask, *size).to(device, dtype)
        if words is not None and not self.animator.takes_words:
            raise ValueError(f"words are of no use to {self.animator_cls.__name__}")
        return ImageBatch(self.vae, pixels, mask, calibration, words=words or Words())

    def prepare_faces(self, faces: Any, num_frames: int) -> ImageSequence | None:
        """Face images at the animator's size; ValueError for what it does not take, or another count."""
        side = self.animator.face_size
        if faces is None:
            return None
        if side is None:
            raise ValueError(f"faces are of no use to {self.animator_cls.__name__}")
        images = image_tensor(faces, "faces")
        if len(images) != num_frames:
            raise ValueError(f"faces are {len(images)} images, poses {num_frames}")
        return ImageSequence(images, (side, side), self._execution_device, self.animator.dtype)

    def noise_shape(self, num_frames: int, size: tuple[int, int]) -> tuple[int, ...]:
        """(1, c, f, h, w) of the latents of frames that are denoised together."""
        animator, factor = self.animator, self.vae_scale_factor
        return 1, animator.latent_channels, animator.latent_frames(num_frames), size[1] // factor, size[0] // factor

    def given_noises(
        self, latents: Tensor | None, segments: Sequence[Segment], size: tuple[int, int]
    ) -> Sequence[Tensor | None]:
        """The noise that was given, segment by segment; None: none was. ValueError for another shape."""
        if latents is None:
            return [None] * len(segments)
        one = self.noise_shape(len(segments[0].frames), size)
        shape = (*one[:2], one[2] * len(segments), *one[3:])
        if latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        return latents.split(one[2], dim=2)

    def prepare_noise(self, num_frames: int, size: tuple[int, int], generator: Any, given: Tensor | None) -> Tensor:
        """Noise (1, c, f, h, w): the given one, or drawn, the same for all frames where the animator wants it so."""
        shape, device = self.noise_shape(num_frames, size), self._execution_device
        # The scheduler's many small steps, and the same noise for every dtype, want single precision.
        dtype = torch.promote_types(self.animator.dtype, torch.float32)
        if given is not None:
            return given.to(device, dtype)
        drawn = (*shape[:2], 1, *shape[3:]) if self.animator.shared_noise else shape
        noise = randn_tensor(drawn, generator=generator, device=device, dtype=dtype)
        return noise.expand(shape).contiguous()
