"""How one call of the pipeline samples, with defaults from the animator, checked before anything runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from models.animators.base import Animator
from tpc import Calibration

OUTPUT_TYPES = ("pil", "np", "uint8", "pt", "latent")
# Frames that do not see each other are denoised this many at a time.
FRAMES_AT_A_TIME = 8
# The VAE's layers at full resolution are large. A GPU wants a few frames to be busy; a CPU is faster with one, whose
# layers stay in its caches longer.
DECODED_BY_GPU, DECODED_BY_CPU = 8, 1


@dataclass(frozen=True)
class RunSettings:
    """What `AnimationPipeline.__call__` was asked for.

    Attributes:
        num_frames: of the clip; size: (width, height) in pixels.
        steps: of denoising.
        window_size, window_overlap: frames denoised together, and shared by neighbours.
        shift_windows: move the windows at every step.
        decode_chunk_size: frames that the VAE decodes at a time; None: as many as suit the device.
        output_type: one of `OUTPUT_TYPES`.
    """

    num_frames: int
    size: tuple[int, int]
    steps: int
    window_size: int | None
    window_overlap: int
    shift_windows: bool
    decode_chunk_size: int | None
    output_type: str

    def filled(self, animator: Animator, trained_window: int | None, device: str) -> "RunSettings":
        """With the windows that suit an animator, and the chunks that suit a device, where none were asked for.

        Args:
            trained_window: frames that the model was trained on; None: all that it knows.
            device: its type, such as "cpu".
        """
        if self.decode_chunk_size is None:
            decoded = DECODED_BY_CPU if device == "cpu" else DECODED_BY_GPU
            return replace(self, decode_chunk_size=decoded).filled(animator, trained_window, device)
        size = self.window_size
        if size is None:
            apart = self.num_frames if animator.joint_frames else FRAMES_AT_A_TIME
            size = min(self.num_frames, trained_window or animator.longest_window or apart)
        if not animator.joint_frames:
            return replace(self, window_size=size, window_overlap=0, shift_windows=False)
        return replace(self, window_size=size, window_overlap=min(self.window_overlap, size - 1))

    def check(self, animator: Animator, factor: int, calibration: Calibration | None) -> None:
        """Raise ValueError naming the argument, what was got, and what is allowed.

        Args:
            factor: pixels of an image's side per latent.
        """
        width, height = self.size
        multiple = factor * animator.latent_multiple
        if width % multiple or height % multiple:
            raise ValueError(f"size must be multiples of {multiple} pixels, got {width}x{height}")
        only = animator.latent_size
        if only is not None and (height // factor, width // factor) != only:
            raise ValueError(f"size must be {only[1] * factor}x{only[0] * factor}, the model's, got {width}x{height}")
        for name, value in (("num_inference_steps", self.steps), ("decode_chunk_size", self.decode_chunk_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        longest = animator.longest_window or max(self.num_frames, self.window_size)
        if not 1 <= self.window_size <= longest:
            raise ValueError(f"window_size must be 1 to {longest}, what the model knows, got {self.window_size}")
        if not 0 <= self.window_overlap < self.window_size:
            raise ValueError(f"window_overlap must be 0 to {self.window_size - 1}, got {self.window_overlap}")
        if self.output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {self.output_type!r}")
        if calibration is not None:
            if calibration.frames != self.num_frames:
                raise ValueError(f"calibration has {calibration.frames} frames, poses have {self.num_frames}")
            if tuple(calibration.size) != (width, height):
                raise ValueError(f"calibration is for {calibration.size}, images are {width}x{height}")


def check_callback(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError when a callback asks for tensors that there are not."""
    unknown = set(names) - set(known)
    if unknown:
        raise ValueError(f"callback tensor inputs must be of {list(known)}, got {sorted(unknown)}")
