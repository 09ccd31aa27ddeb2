"""Configurations of sampling and of `infer.py`."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from core.config import DTYPES, LARGEST_SEED, LARGEST_SIDE, choice, device, number, numbers
from core.errors import UserError
from core.values import MANY
from data.config import FIT_MODES, DrivingPoseConfig
from models.config import EVERY_LEVEL, SOLVER_NAMES, ModelSizes, check_sampling
from tpc.config import CalibrationConfig


@dataclass
class SamplingConfig:
    """How a clip is sampled."""

    # width and height in pixels; null: the driving video's shape at the resolution that the model's folder says
    size: list[int] | None = numbers(None, 8, LARGEST_SIDE, length=2)
    num_frames: int | None = number(None, 1, MANY)  # of the animation; null: all of the driving video
    stride: int = number(1, 1, MANY)  # use every stride-th frame of the driving video
    seed: int = number(0, 0, LARGEST_SEED)  # of the initial noise; other seeds give other results
    steps: int = number(20, 1, 1000)  # denoising steps; with tpc.start from there on
    # how strongly the reference and the poses count; 1 switches classifier-free guidance off and halves the time
    guidance_scale: float = number(2.0, 0, 100)
    # one scale for each kind of guidance, where a model has several, in place of guidance_scale
    guidance_scales: list[float] | None = numbers(None, 0, 100)
    window_size: int | None = number(None, 1, MANY)  # frames denoised together; null: as many as the model knows
    # frames that neighbouring windows share; null: 4, or what the model's segments carry on from
    window_overlap: int | None = number(None, 0, MANY)
    shift_windows: bool = False  # at every step, so that no frame is always at a window's end
    # Passes of the UNet, over windows and branches of guidance, in one batch: more keep a GPU busy with small images,
    # and take memory.
    passes_at_a_time: int = number(1, 1, MANY)
    compare: bool = True  # also sample without TPC, for the comparison; false halves the time
    # contain: all of the reference, its scene painted on around it; cover: cut to the frame
    reference_fit: str = choice("contain", FIT_MODES)
    # Noise levels [low, high] with guidance, from 0 (none) to 1 (nothing else); elsewhere its conditional half alone.
    guidance_interval: list[float] = numbers(EVERY_LEVEL, 0, 1, length=2)
    # DDIM, DPM-Solver++ or UniPC, the latter two of second order, for fewer steps; null: the model's own
    solver: str | None = choice(None, SOLVER_NAMES)

    def check(self) -> None:
        check_sampling(self.guidance_interval, self.solver)
        if self.window_size is not None and (self.window_overlap or 0) >= self.window_size:
            raise UserError(f"window_overlap={self.window_overlap} must be below window_size={self.window_size}")
        if self.guidance_scales is not None and not self.guidance_scales:
            raise UserError(
                "guidance_scales=[] must hold a scale for each kind of guidance; null takes guidance_scale"
            )


def check_model_sizes(sampling: SamplingConfig, sizes: ModelSizes) -> None:
    """Refuse a size or a window that a model cannot take."""
    size, window = sampling.size, sampling.window_size
    if size is not None and any(side % sizes.multiple for side in size):
        raise UserError(f"size=[{size[0]},{size[1]}] must be multiples of {sizes.multiple}, the model's factor")
    if size is not None and sizes.only is not None and tuple(size) != sizes.only:
        raise UserError(f"size=[{size[0]},{size[1]}] must be [{sizes.only[0]},{sizes.only[1]}], the model's only one")
    if window is not None and sizes.longest_window is not None and window > sizes.longest_window:
        raise UserError(
            f"window_size={window} must be at most {sizes.longest_window}, the frames that the model knows"
        )


@dataclass
class TPCOptions(CalibrationConfig):
    """Calibration, which `enabled` switches on."""

    enabled: bool = True  # calibrate the reference to the driving video; false animates as the model would alone


@dataclass
class InferConfig(SamplingConfig):
    """Inputs, model and calibration; `SamplingConfig` has everything about sampling."""

    reference: str | None = None  # image of the person; without it and `driving`: the shipped samples
    driving: str | None = None  # video that the person of the reference shall move like
    output: str = "outputs/demo"  # folder for the results
    pairs: str | None = None  # file with a JSON object a line that overrides any of the keys of inputs and output
    model: str | None = None  # saved pipeline folder; null: the shipped small model
    # denoising steps; with tpc.start from there on; null: as the model's folder says, else 20
    steps: int | None = number(None, 1, 1000)
    # how strongly the reference and the poses count; 1 switches classifier-free guidance off and halves the time;
    # null: as the model's folder says, else 2.0
    guidance_scale: float | None = number(None, 0, 100)
    lora: str | None = None  # folder of `train.py lora.export=separate`; the model folder's own `lora` needs no name
    lora_scale: float = number(1.0, -10, 10)  # weight of the adapters; 1 as trained
    reference_poses: str | None = None  # pose file of the reference, instead of estimating
    driving_poses: str | None = None  # pose file of the driving video, instead of estimating; does without the video
    # Video or folder of pose images as the model takes them, one for each driving frame: DensePose for MagicAnimate,
    # which needs them; null: OpenPose figures are drawn. Without TPC they are enough.
    pose_images: str | None = None
    reference_mask: str | None = None  # 8-bit image, 255 = person, or a folder with p0.png, p1.png, ...
    driving_masks: str | None = None  # folder with 000000.png, or 000000_p0.png for several persons
    prompt: str | None = None  # what the result shows, for models that take text; null: the model's own
    negative_prompt: str | None = None  # what guidance leads away from, likewise
    # safetensors file with prompt, negative_prompt or image, in place of what the model's encoders make of them, which
    # are then not loaded
    embeddings: str | None = None
    upscale: str | None = choice(None, ("source",))  # source: bring animation.mp4 to the driving video's size
    # first frames of new shots, counted as the results'; null: found, []: none
    cuts: list[int] | None = numbers(None, 0, MANY)
    device: str = device()  # auto: CUDA where there is one
    dtype: str = choice("auto", DTYPES)  # of the networks; auto: bfloat16 on CUDA, float32 elsewhere
    # Let torch compile UNets or transformer: the first run of every size takes minutes longer, those after it less.
    compile: bool = False
    # Of several pairs: read, estimate and calibrate the next one, and write the last, while the model animates.
    prefetch: bool = False
    channels_last: bool = False  # memory format of convolutions, which GPUs prefer in half precision
    pose: DrivingPoseConfig = field(default_factory=DrivingPoseConfig)
    tpc: TPCOptions = field(default_factory=TPCOptions)

    @property
    def has_words(self) -> bool:
        """A prompt or embeddings are given."""
        return (self.prompt, self.negative_prompt, self.embeddings) != (None, None, None)

    def check(self) -> None:
        super().check()
        if self.pose.retarget != "off" and self.pose_images is not None:
            raise UserError(
                f"pose.retarget={self.pose.retarget} moves keypoints, of which figures are drawn; those of "
                "pose_images= cannot be moved: give one of the two"
            )


@dataclass
class EmbeddingsConfig:
    """Embeddings for `infer.py embeddings=`; `size` and `reference_fit` as of that run."""

    model: str = MISSING  # pipeline folder, of which model_index.json and the encoders are read
    output: str = MISSING  # the safetensors file to write
    prompt: str | None = None  # what the result shows; null: the model's own
    negative_prompt: str | None = None  # what guidance leads away from; null: a prompt without words
    reference: str | None = None  # image whose embedding is written, too
    # width and height of the result in pixels, which the reference is fitted to
    size: list[int] | None = numbers(None, 8, LARGEST_SIDE, length=2)
    # contain: all of the reference, its scene painted on around it; cover: cut to the frame
    reference_fit: str = choice("contain", FIT_MODES)
    device: str = device()  # auto: CUDA where there is one
    dtype: str = choice("auto", DTYPES)  # of the encoders; auto: bfloat16 on CUDA, float32 elsewhere

    def check(self) -> None:
        if self.reference is not None and self.size is None:
            raise UserError("size= is required beside reference=: the width and height that infer.py is given")


PAIR_KEYS = ("reference", "driving", "output", "reference_poses", "driving_poses", "pose_images")
PAIR_KEYS += ("reference_mask", "driving_masks")
