"""`AnimationPipeline`: a reference image and pose images in, an animation out, with calibration as an argument.

Shapes use f = frames, c = channels, h, w = latent size, H, W = image size.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from data.transforms import frame_size
from models.animators.animate_anyone.model import AnimateAnyone
from models.animators.base import Animator
from models.attention.layers import joint_layers
from models.attention.recording import AttentionRecording, AttentionRun
from models.config import EVERY_LEVEL, ModelSizes
from models.denoising import Denoising, WindowPredictions
from models.images import CalibratedClip, ImageSequence, Words, image_tensor
from models.reference_images import ReferenceImages
from models.run_inputs import RunInputs
from models.sampling import context_windows, guidance_at, step_shift, with_solver
from models.segments import Segment, SegmentImages
from models.start import StartedSolver, start_latents, started_frames, started_timesteps
from models.vae import VAE, VideoVAE, decode_frames, in_form, joined_forms, vae_scale_factor, video_decode

# The VAE's layers at full resolution are large. A GPU wants a few frames to be busy; a CPU is faster with one, whose
# layers stay in its caches longer.
DECODED_BY_GPU, DECODED_BY_CPU = 8, 1


@dataclass
class AnimationPipelineOutput(BaseOutput):
    """Frames of one clip in the form of `output_type`."""

    # PIL images, array (f, H, W, 3) in [0, 1] or uint8, tensor (f, 3, H, W) in [0, 1], latents (1, c, f, h, w)
    frames: list[Image.Image] | np.ndarray | Tensor


def animated_by(animator_cls: type[Animator]) -> Callable[[type], type]:
    """Decorator of a pipeline class, whose constructor takes what the animator's does, a VAE and a scheduler."""

    def own(
        self: Any,
        vae: VAE,
        scheduler: SchedulerMixin,
        window_size: int | None = None,
        sampling: dict[str, Any] | None = None,
    ) -> None: ...

    this, vae, scheduler, window_size, sampling = inspect.signature(own).parameters.values()
    networks, settings = animator_cls.constructor_parameters()
    # diffusers reads from it which components and settings a pipeline saves.
    vae = vae.replace(annotation=animator_cls.vae_class)
    signature = inspect.Signature([this, vae, *networks, scheduler, *settings, window_size, sampling])

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        AnimationPipeline.set_components(**given.arguments)

    def decorate(cls: type) -> type:
        __init__.__signature__ = signature
        __init__.__annotations__ = {name: argument.annotation for name, argument in signature.parameters.items()}
        cls.animator_cls, cls.__init__ = animator_cls, __init__
        return cls

    return decorate


@animated_by(AnimateAnyone)
class AnimationPipeline(RunInputs):
    """An animator with VAE and scheduler; of AnimateAnyone, and the base of other animators' pipelines.

    `window_size`: frames that the model was trained on; None: all that its motion modules know.
    `sampling`: the settings it is best sampled with, "steps", "guidance_scale", "size" (width, height) and "start" (of
    `tpc.start`), as far as they are known; None: none.
    """

    # `animator` has the networks as the denoising loop uses them; all that depends on the model is asked of it.
    model_cpu_offload_seq = "image_encoder->reference_net->pose_guider->denoising_unet->vae"

    def set_components(
        self,
        vae: VAE | VideoVAE,
        scheduler: SchedulerMixin,
        window_size: int | None,
        sampling: dict[str, Any] | None,
        **arguments: Any,
    ) -> None:
        """Build the animator from the further arguments and register everything; the body of constructors."""
        super().__init__()
        animator = self.animator_cls(**arguments)
        others = {p.name: arguments[p.name] for p in animator.constructor_parameters()[0]}
        self.register_modules(vae=vae, **(dict(animator.named_children()) | others), scheduler=scheduler)
        self.register_to_config(**animator.settings(), window_size=window_size, sampling=sampling)
        self.animator = animator
        self.notes: list[str] = []  # sentences for the user about what the pipeline was loaded from
        self.vae_scale_factor = vae_scale_factor(self.vae)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # A network that is exchanged, by a compiled one for example, is the animator's, too.
        animator = self.__dict__.get("animator")
        if animator is not None and name in dict(animator.named_children()):
            setattr(animator, name, value)

    @property
    def pose_kind(self) -> str:
        """Of its pose images; figures of OpenPose can be drawn from keypoints."""
        return self.animator.pose_kind

    @property
    def sizes(self) -> ModelSizes:
        only, factor = self.animator.latent_size, self.vae_scale_factor
        only = None if only is None else (only[1] * factor, only[0] * factor)
        return ModelSizes(self.size_multiple, self.animator.longest_window, only)

    def default_size(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(width, height) that the model is best at, of about the proportions of `shape`, where it leaves a choice."""
        animator, factor = self.animator, self.vae_scale_factor
        if animator.latent_size is not None:
            return animator.latent_size[1] * factor, animator.latent_size[0] * factor
        side = animator.latent_side * factor
        return frame_size(shape, math.prod(self.sampling.get("size", (side, side))), factor * animator.latent_multiple)

    @property
    def sampling(self) -> dict[str, Any]:
        """Settings that the model is best sampled with, as far as its folder knows them."""
        return {**self.animator.published_sampling, **(self.config.sampling or {})}

    def attention_run(
        self,
        num_frames: int,
        size: tuple[int, int],
        num_inference_steps: int,
        calibration: CalibratedClip | None = None,
        window_size: int | None = None,
    ) -> AttentionRun:
        """The layers and sizes of a `__call__` with these arguments, for `AttentionRecording.estimate`."""
        animator, (width, height) = self.animator, size
        layers = animator.attention_layers((height // self.vae_scale_factor, width // self.vae_scale_factor))
        persons = 0 if calibration is None else calibration.persons
        replaces = persons > 0 and calibration.replaces_reference
        images = persons if replaces else 1 + persons
        if animator.segment_frames is not None:
            window_size, _ = self.default_window(num_frames, window_size, None)
            layers = joint_layers(layers, animator.latent_frames(window_size) - animator.context_latents)
            images = 1 if replaces else images  # one image stands for everybody
        steps = self.denoising_steps(num_inference_steps, calibration)
        return AttentionRun(layers, size, num_frames, steps, images, replaces)

    def denoising_steps(self, num_inference_steps: int, calibration: CalibratedClip | None = None) -> int:
        """Steps of a `__call__` with these arguments, see `started_timesteps`."""
        started = started_frames(calibration)
        if started is None:
            return num_inference_steps
        trained = self.scheduler.config.num_train_timesteps
        return len(started_timesteps(calibration.start_timestep, num_inference_steps, trained, bool(started.all())))

    @torch.no_grad()
    def __call__(
        self,
        reference: Any,
        poses: Any,
        calibration: CalibratedClip | None = None,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        window_size: int | None = None,
        window_overlap: int | None = None,
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
        cuts: Sequence[int] = (),
        passes_at_a_time: int = 1,
        words: Words | None = None,
        faces: Any = None,
    ) -> AnimationPipelineOutput | tuple:
        """Animate the person of `reference` with `poses`.

        Args:
            reference: image: PIL, array (H, W, 3) in [0, 1] or uint8, or tensor (3, H, W) in [0, 1].
            poses: pose images: f PIL images, array (f, H, W, 3) or tensor (f, 3, H, W), in [0, 1] or uint8.
            calibration: result of `tpc.calibrate` for these frames at this size; None: without TPC. With a
                `start_timestep` frames begin there from their calibrated images.
            width, height: of the result in pixels; default: those of the first pose image.
            num_inference_steps: denoising steps; with a `start_timestep` from there on; default: the model's, or 25.
            guidance_scale: 1: no classifier-free guidance; one number, or one for each scale of the model; default:
                the model's, or 3.5.
            window_size: frames denoised together; default: what the model was trained on.
            window_overlap: frames that neighbouring windows share at least; default: 4, or what the model's segments
                carry on from. Of segments both become numbers that the model knows, see `default_window`.
            shift_windows: move the windows at every step, which takes one more of them.
            generator: of the initial noise; a CPU generator draws the same on every device.
            latents: initial noise (1, c, f, h, w), instead of drawing it; of segments one after the other.
            output_type: "pil", "np", "uint8" (least memory), "pt" or "latent".
            return_dict: False returns a tuple.
            callback_on_step_end: (pipeline, step, timestep, {"latents": ...}) -> tensors that replace these.
            callback_on_step_end_tensor_inputs: names of the tensors it gets.
            decode_chunk_size: frames the VAE decodes at a time; default: one on CPUs, 8 elsewhere.
            attention: records attention to images in the conditional half of guidance; frames stay the same.
            reference_mask: (H, W) in [0, 1] or uint8, or PIL: the persons; default: the calibration's.
            guidance_interval: noise levels (low, high] of 0 to 1 that are guided, see `models.sampling.noise_level`.
            solver: of `models.sampling.SOLVERS`, in place of the pipeline's scheduler.
            cuts: first frames of the clip's shots after the first; no window of frames spans one.
            passes_at_a_time: passes of the UNet, over windows and branches of guidance, that one batch may hold.
            words: prompts and embeddings, for animators that take them.
            faces: square images of the driving person's face, f as `poses`, for animators that take them.

        Raises:
            ValueError: inputs that disagree in size or count.
            UserError: a mask, encoder or embedding that the model needs is missing; a solver, interval, attachment or
                start that does not fit; a result that is not finite.
        """
        animator, device, dtype = self.animator, self._execution_device, self.animator.dtype
        poses = image_tensor(poses, "poses")
        if width is None or height is None:
            height, width = poses.shape[-2:]
        num_frames, size = len(poses), (width, height)
        window_size, window_overlap = self.default_window(num_frames, window_size, window_overlap)
        if num_inference_steps is None:
            num_inference_steps = self.sampling.get("steps", 25)
        if guidance_scale is None:
            guidance_scale = self.sampling.get("guidance_scale", 3.5)
        if decode_chunk_size is None:
            decode_chunk_size = DECODED_BY_CPU if device.type == "cpu" else DECODED_BY_GPU
        self.check_size(num_frames, size, calibration)
        counts = {"num_inference_steps": num_inference_steps, "passes_at_a_time": passes_at_a_time}
        self.check_counts(num_frames, window_size, window_overlap, decode_chunk_size=decode_chunk_size, **counts)
        self.check_choices(output_type, callback_on_step_end_tensor_inputs, guidance_interval, solver)
        attach = start = None
        if calibration is not None and calibration.persons:
            attach = "replace" if calibration.replaces_reference else "add"
            start = calibration.start_timestep
        self.check_wanted(guidance_scale, None, words, attach, start)
        scales = animator.guidance_scales(guidance_scale)
        scheduler = self.scheduler if solver is None else with_solver(self.scheduler, solver)
        segments = self.segments(num_frames, window_size, window_overlap, cuts)
        faces = self.prepare_faces(faces, num_frames)
        if attention is not None:
            attention.begin(self.attention_run(num_frames, size, num_inference_steps, calibration, window_size))

        steps, started = self.denoising_steps(num_inference_steps, calibration), started_frames(calibration)
        if started is not None:
            scheduler = StartedSolver(
                scheduler, calibration.start_timestep, num_inference_steps, started, device=device
            )
        images = self.prepare_images(reference, reference_mask, calibration, size, words)
        if not animator.takes_batches:
            passes_at_a_time = 1
        references = ReferenceImages(animator, images, steps, null_image=passes_at_a_time > 1)
        poses = ImageSequence(poses, size, device, dtype)

        def windows(step: int) -> list[range]:
            if animator.segment_frames is not None:
                return [range(animator.latent_frames(window_size))]  # all of a segment
            shift = step_shift(step) if shift_windows and animator.joint_frames else 0.0
            return context_windows(num_frames, window_size, window_overlap, shift, cuts)

        def after_step(step: int, timestep: int, latents: Tensor) -> Tensor:
            if callback_on_step_end is not None:
                tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                latents = callback_on_step_end(self, step, timestep, tensors).pop("latents", latents)
            progress.update()
            return latents

        results, frames = [], None  # of the segments so far, and of the last one as it was decoded
        noises = self.given_noises(latents, segments, size)
        with self.progress_bar(total=steps * len(segments)) as progress:
            for segment, noise in zip(segments, noises, strict=True):
                if started is None:  # solvers of higher order remember steps, those of the segment before too
                    scheduler.set_timesteps(num_inference_steps, device=device)
                # For the program and the solver; a GPU would have to be waited for to read its own.
                timesteps = scheduler.timesteps.cpu()
                step_scales = [guidance_at(scales, guidance_interval, scheduler, timestep) for timestep in timesteps]
                driving = SegmentImages(poses, segment, faces, frames)
                pose_condition = animator.pose_condition(driving, references.conditioning)
                predictions = WindowPredictions(
                    animator, references, pose_condition, attention, passes_at_a_time, segment
                )
                noise = self.prepare_noise(len(segment.frames), size, generator, noise)
                latents = animator.initial_latents(
                    noise, scheduler, lambda noise=noise: references.start_latents().to(noise).expand_as(noise)
                )
                if started is not None:
                    latents = scheduler.begin(latents, noise, start_latents(images, started))
                latents = Denoising(scheduler, timesteps, step_scales, windows, after_step)(latents, predictions)
                frames, result = self.decoded(latents, segment, output_type, decode_chunk_size)
                results.append(result)

        result = results[0] if len(results) == 1 else joined_forms(results)
        self.maybe_free_model_hooks()
        return AnimationPipelineOutput(result) if return_dict else (result,)

    def decoded(self, latents: Tensor, segment: Segment, output_type: str, chunk: int) -> tuple[Tensor | None, Any]:
        """Frames (f, 3, H, W) of a segment, if another may carry on from it, and its result in form."""
        if self.animator.segment_frames is None:
            return None, decode_frames(self.vae, latents, output_type, chunk)
        latents = latents[:, :, self.animator.context_latents :]
        frames = video_decode(self.vae, latents)
        if output_type == "latent":
            return frames, latents
        return frames, in_form(frames[segment.carried : len(segment.inside)].float().cpu(), output_type)
