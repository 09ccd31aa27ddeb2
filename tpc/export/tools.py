"""What other animators read: sizes, frame rates, segments and names of files, from their public code.

| tool | source |
|---|---|
| wan_animate | Wan-Video/Wan2.2: `wan/modules/animate/preprocess`, `wan/animate.py` |
| scail_2 | zai-org/SCAIL-2: README and `sample_video.py`; masks as in its animation mode |
| one_to_all | ssj9596/One-to-All-Animation: `video-generation/infer_preprocess.py`, `inference_14b.py` |
| stable_animator | Francis-Rings/StableAnimator: README and `inference_basic.py` |
"""

from dataclasses import dataclass

from core.errors import UserError
from data.transforms import frame_size


@dataclass(frozen=True)
class Tool:
    """Sizes are (width, height) in pixels; of `area`, `short_side` and `sizes` one is given."""

    multiple: int = 1  # of which both sides are
    area: int | None = None  # of a frame
    short_side: int | None = None  # at most
    sizes: tuple[tuple[int, int], ...] = ()  # all that there are
    fps: float | None = None  # to which it resamples the driving video; None: it takes the video's
    overlap: int = 0  # frames that a segment repeats of the one before
    reference: str = "reference.png"
    driving: str | None = None  # video, or images where the name has a place for their number
    driving_copy: str | None = None  # the driving video once more
    # Persons in `COLOURS`: of the reference on white, of the driving video on black
    reference_mask: str | None = None
    driving_mask: str | None = None

    def size(self, driving: tuple[int, int], max_side: int) -> tuple[int, int]:
        """The size of frames for a driving video of (width, height); `max_side` > 0 limits the longer side."""
        if self.sizes:
            size = min(self.sizes, key=lambda s: abs(s[0] / s[1] - driving[0] / driving[1]))
            if 0 < max_side < max(size):
                known = " and ".join(f"{width} x {height}" for width, height in self.sizes)
                raise UserError(f"max_side={max_side} is less than this tool's frames have; it knows {known}")
            return size
        area = self.area
        if area is None:
            scale = min(1.0, self.short_side / min(driving))
            area = round(driving[0] * driving[1] * scale**2)
        if max_side > 0:
            area = min(area, round(max_side**2 * min(driving) / max(driving)))
        return frame_size(driving, area, self.multiple)


TOOLS = {
    "wan_animate": Tool(16, area=1280 * 720, fps=30, overlap=1, reference="image.png", driving="video.mp4"),
    "scail_2": Tool(
        32,
        area=1280 * 704,
        overlap=5,
        reference="ref.png",
        driving="driving.mp4",
        driving_copy="rendered_v2.mp4",
        reference_mask="ref_mask.png",
        driving_mask="rendered_mask_v2.mp4",
    ),
    "one_to_all": Tool(16, short_side=576, overlap=5, reference="image.png", driving="video.mp4"),
    "stable_animator": Tool(sizes=((512, 512), (576, 1024)), driving="target_images/frame_{}.png"),
}
# Saturated, in the order that SCAIL-2 was trained on.
COLOURS = ((0, 0, 255), (255, 0, 0), (0, 255, 0), (255, 0, 255), (0, 255, 255), (255, 255, 0))
