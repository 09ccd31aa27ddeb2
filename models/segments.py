"""Segments of a clip: frames that are denoised and decoded before the next ones begin, which carry on from them.

Shapes use f = frames, k = carried frames, H, W = image size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from models.images import ImageSequence


@dataclass(frozen=True)
class Segment:
    """Frames of a clip that are denoised together; of the shots they belong to."""

    frames: range  # those beyond the end of the shot are denoised and thrown away
    shot: range
    carried: int = 0  # first frames that the segment before has made

    @property
    def inside(self) -> range:
        """The frames that the clip has."""
        return range(self.frames.start, min(self.frames.stop, self.shot.stop))

    @property
    def new(self) -> range:
        """The frames that no segment before has made."""
        return self.inside[self.carried :]

    def latents(self, frames_per_latent: int) -> list[int]:
        """The latent of each of the `new` frames."""
        spans = latent_spans(len(self.frames), frames_per_latent)
        of_frame = [latent for latent, span in enumerate(spans) for _ in span]
        return [of_frame[frame - self.frames.start] for frame in self.new]

    def image_frames(self, frames_per_latent: int) -> list[int]:
        """The frame of the clip whose images each of the `new` frames attends to, the middle one of its latent."""
        spans = latent_spans(len(self.frames), frames_per_latent)
        middles = [self.frames.start + middle(spans[latent]) for latent in self.latents(frames_per_latent)]
        return [min(frame, self.inside[-1]) for frame in middles]

    def sources(self) -> list[int]:
        """The frame of the clip that stands for each: beyond the end those before it, backwards and forwards."""
        length = len(self.shot)
        period = max(2 * (length - 1), 1)
        phases = [(frame - self.shot.start) % period for frame in self.frames]
        return [self.shot.start + min(phase, period - phase) % length for phase in phases]


class SegmentImages(ImageSequence):
    """Pose images of a segment, and what else drives it."""

    def __init__(self, poses: ImageSequence, segment: Segment, faces: ImageSequence | None, decoded: Tensor | None):
        super().__init__(poses.images, poses.size, poses.device, poses.dtype)
        self.faces = faces  # of the same frames; None: there are none
        if (frames := segment.sources()) != list(range(len(poses))):  # else all of a clip, which needs no copy
            self.images = poses.images[frames]
            if faces is not None:
                self.faces = ImageSequence(faces.images[frames], faces.size, faces.device, faces.dtype)
        # (k, 3, H, W) in [-1, 1], the last frames of the segment before; None: the segment begins a shot
        self.carried = decoded[-segment.carried :] if segment.carried else None


def latent_spans(num_frames: int, frames_per_latent: int) -> list[range]:
    """The frames of each latent of a segment, the first of which is of one."""
    spans = [range(1)]
    while spans[-1].stop < num_frames:
        spans.append(range(spans[-1].stop, spans[-1].stop + frames_per_latent))
    return spans


def middle(frames: range) -> int:
    """The middle frame, which stands for those of a latent."""
    return frames[len(frames) // 2]


def clip_segments(num_frames: int, size: int, carried: int, cuts: Sequence[int] = ()) -> list[Segment]:
    """Segments of `size` frames, each but the first of a shot with the last `carried` frames of the one before.

    `cuts` are the first frames of shots after the first. ValueError for numbers that cannot be.
    """
    if num_frames < 1 or not 0 <= carried < size:
        raise ValueError(f"{num_frames} frames cannot be segments of {size} frames that share {carried}")
    segments = []
    for shot in (range(*bounds) for bounds in pairwise([0, *cuts, num_frames])):
        segments.append(Segment(range(shot.start, shot.start + size), shot))
        while segments[-1].frames.stop < shot.stop:
            start = segments[-1].frames.stop - carried
            segments.append(Segment(range(start, start + size), shot, carried))
    return segments
