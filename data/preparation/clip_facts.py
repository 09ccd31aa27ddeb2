"""What is known of the clips of a data set, and what to look for: values that checks fill and reports show."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from core.errors import UserError
from data.crops import CROPS


@dataclass
class CheckConfig:
    """`prepare.py check`: a prepared data set, or one that has not been prepared yet.

    dataset: prepared folder, or a folder of videos or of a known layout.
    output: folder for report.json and report.md; without it a prepared data set's own, and none for others.
    layout, frame_fps: as for preparation, where there is no manifest.
    size, crop: the model's frame, to find people who would be cut and images that would be enlarged.
    num_frames, stride: a clip of training, to find videos that are too short for it.
    decode: read every frame, which finds all damage; false looks at headers alone.
    workers: processes that read clips.
    """

    dataset: str = MISSING
    output: str | None = None
    layout: str = "auto"
    frame_fps: float = 30.0
    size: list[int] | None = None
    crop: str = "person"
    num_frames: int = 1
    stride: int = 1
    decode: bool = True
    workers: int = 1

    def check(self) -> None:
        """Refuse values that cannot work, naming them."""
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise UserError(f"size={self.size} must be a width and a height in pixels, such as size=[512,512]")
        if self.crop not in CROPS:
            raise UserError(f"crop={self.crop} is not one of {', '.join(CROPS)}")
        for name in ("num_frames", "stride", "workers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class Finding:
    """Something about a clip.

    Attributes:
        severity: "error": training leaves the clip out, or should; "warning": look at it; "note": good to know.
        kind: short name, the same for all findings of a sort.
        message: what was found. advice: what to do.
    """

    severity: str
    kind: str
    message: str
    advice: str


@dataclass
class ClipFacts:
    """What is known of a clip; None where it could not be found out.

    Attributes:
        size: (width, height) in pixels.
        missing_joints: share of joints of present persons that are not seen; absent_frames: share without anybody.
    """

    name: str
    video: str
    split: str | None = None
    frames: int | None = None
    fps: float | None = None
    size: tuple[int, int] | None = None
    persons: int | None = None
    missing_joints: float | None = None
    absent_frames: float | None = None
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """Facts of all clips of a data set; `found` counts the clips of its source, `layout` says what was found there."""

    dataset: str
    layout: str
    found: int
    clips: list[ClipFacts]

    @property
    def errors(self) -> int:
        """Clips with an error."""
        return sum(any(finding.severity == "error" for finding in clip.findings) for clip in self.clips)
