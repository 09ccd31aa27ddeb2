"""Configurations of sampling and of `infer.py`."""

from dataclasses import dataclass, field

from core.config import check_choice
from core.errors import UserError
from data.config import FIT_MODES, PoseConfig
from models.config import EVERY_LEVEL, check_sampling
from tpc.config import CalibrationConfig


@dataclass
class SamplingConfig:
    """Settings of sampling."""

    size: list[int] | None = None  # width and height in pixels; null: the video's shape at the model's resolution
    num_frames: int | None = None  # null: all
    stride: int = 1  # use every stride-th frame of the driving video
    seed: int = 0  # of the initial noise
    steps: int = 20  # with tpc.start from there on
    guidance_scale: float = 2.0  # 1 switches classifier-free guidance off and halves the time
    guidance_scales: list[float] | None = None  # one for each kind of guidance, where a model has several
    window_size: int | None = None  # frames denoised together; null: as many as the model knows
    window_overlap: int = 4  # frames
    shift_windows: bool = False  # at every step, so that no frame is always at a window's end
    compare: bool = True  # also sample without TPC
    reference_fit: str = "contain"  # all of the reference, its scene painted on around it; cover: cut to the frame
    # Noise levels [low, high] with guidance, from 0 (none) to 1 (nothing else); elsewhere its conditional half alone.
    guidance_interval: list[float] = field(default_factory=lambda: list(EVERY_LEVEL))
    solver: str | None = None  # ddim, dpm++ or unipc (DPM-Solver++, UniPC, of second order); null: the model's own

    def check(self) -> None:
        for name in ("steps", "stride", "num_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise UserError(f"size={self.size} must be a width and a height in pixels, such as size=[128,128]")
        if min([self.guidance_scale, *(self.guidance_scales or [])]) < 0:
            raise UserError(f"guidance_scale={self.guidance_scales or self.guidance_scale} must not be negative")
        check_choice(self, "reference_fit", FIT_MODES)
        check_sampling(self.guidance_interval, self.solver)


@dataclass
class TPCOptions(CalibrationConfig):
    """Calibration, which `enabled` switches on."""

    enabled: bool = True


@dataclass
class InferConfig(SamplingConfig):
    """Inputs, model and calibration; `SamplingConfig` has everything about sampling."""

    reference: str | None = None  # image; without it and `driving`: the shipped samples
    driving: str | None = None  # video
    output: str = "outputs/demo"
    pairs: str | None = None  # file with a JSON object a line that overrides any of `PAIR_KEYS`
    model: str | None = None  # saved pipeline folder; null: the shipped small model
    lora: str | None = None  # folder of `train.py lora.export=separate`; the model folder's own `lora` needs no name
    lora_scale: float = 1.0  # weight of the adapters; 1 as trained
    reference_poses: str | None = None
    driving_poses: str | None = None
    # Video or folder of pose images as the model takes them, one for each driving frame: DensePose for MagicAnimate,
    # which needs them; null: OpenPose figures are drawn. Without TPC they are enough.
    pose_images: str | None = None
    reference_mask: str | None = None
    driving_masks: str | None = None
    upscale: str | None = None  # "source" brings animation.mp4 to the driving video's size
    cuts: list[int] | None = None  # first frames of new shots, counted as the results'; null: found, []: none
    device: str = "auto"  # or "cpu", "cuda", ...
    dtype: str = "auto"  # bfloat16 on CUDA, float32 elsewhere; or "float32", ...
    pose: PoseConfig = field(default_factory=PoseConfig)
    tpc: TPCOptions = field(default_factory=TPCOptions)

    def check(self) -> None:
        super().check()
        check_choice(self, "upscale", (None, "source"))


PAIR_KEYS = ("reference", "driving", "output", "reference_poses", "driving_poses", "pose_images")
PAIR_KEYS += ("reference_mask", "driving_masks")
