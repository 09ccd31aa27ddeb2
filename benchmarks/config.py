"""Configurations of the benchmarks."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from core.config import DTYPES, LARGEST_SEED, choice, choices, device, number, numbers
from core.errors import UserError
from core.values import MANY
from evaluation.config import DRIVEN_KINDS, KINDS, MISALIGNED_SPLITS, RETARGETS
from models.config import SHIPPED_MODEL
from tpc.config import PROPAGATIONS, CalibrationConfig

SIZES = ("tiny", "half", "sd15")  # see `benchmarks.speed.sizes`
PARTS = ("machine", "inference", "training", "loading", "growth", "processes")
PEERS = ("moore", "magic_animate", "tpc_animate")  # see `benchmarks.speed.peers.session`
WORKS = ("inference", "image", "motion")
# of `benchmarks.gpu_check`, the most valuable first
GPU_PARTS = ("agreement", "attention", "inference", "training", "peer", "options", "loading", "adam8bit")


@dataclass
class KernelsConfig:
    """Time of attention's kernels on CPUs."""

    tokens: list[int] = numbers([64, 128, 256, 512, 1024], 1, 100_000, least=1)  # of a frame
    dtypes: list[str] = choices(["float32", "bfloat16"], DTYPES[1:], least=1)  # of the tokens
    frames: int = number(16, 1, 10_000)  # of a clip
    heads: int = number(4, 1, 1024)  # of attention
    channels: int = number(32, 1, 4096)  # of a head
    threads: int = number(0, 0, 1024)  # of a CPU; 0: torch's choice
    repeats: int = number(5, 1, 10_000)  # of which the fastest counts


@dataclass
class RecordingConfig:
    """Cost of recording attention."""

    model: str = str(SHIPPED_MODEL)  # pipeline folder
    frames: int = number(16, 1, 10_000)  # of the clip
    steps: int = number(10, 1, 1000)  # of denoising
    repeats: int = number(3, 1, 10_000)  # of which the fastest counts
    device: str = device()  # auto: CUDA where there is one
    dtype: str = choice("auto", DTYPES)  # auto: bfloat16 on CUDA, float32 elsewhere
    threads: int = number(1, 0, 1024)  # of a CPU; 0: torch's choice
    memory: bool = True  # measure it too
    output: str | None = None  # JSON file; null prints only


ONE_PERSON = tuple(kind for kind in KINDS if kind != "two_persons")


@dataclass
class PicturesConfig:
    """Calibrated images against the true ones."""

    split: str = choice("test", MISALIGNED_SPLITS)  # of the frozen clips
    # of clips with one person, such as identity and proportions, which another body drives
    kinds: list[str] = choices(ONE_PERSON, (*ONE_PERSON, *DRIVEN_KINDS), least=1)
    retargets: list[str] = choices((), RETARGETS)  # exact poses also brought to the reference's body, in these ways
    drawn: bool = False  # exact poses also with tpc.driving_silhouette=drawn
    clips: int = number(0, 0, MANY)  # of each kind, 0 = all
    size: int = number(128, 8, 4096)  # pixels, the shipped model's frame
    # parts of the body height, errors of the keypoints of reference and frames; 0 = exact only
    noise: float = number(0.02, 0, 1)
    seed: int = number(0, 0, LARGEST_SEED)  # of the errors
    output: str = "outputs/calibrated_pictures"  # folder for the results


@dataclass
class SegmentsConfig:
    """One calibrated reference for many frames."""

    split: str = choice("test", MISALIGNED_SPLITS)  # of the frozen clips
    clips: int = number(0, 0, MANY)  # of each kind, 0 = all
    frames: int = number(24, 1, 10_000)  # of a clip
    length: int = number(16, 2, 10_000)  # frames of a segment
    size: int = number(128, 8, 4096)  # pixels, the shipped model's frame
    output: str = "outputs/segment_references"  # folder for the results


@dataclass
class FillingConfig:
    """Ways to fill what a reference does not show."""

    side: int = number(512, 32, 4096)  # pixels of the photographs


@dataclass
class AccuracyConfig:
    """Accuracy of the calibration's transforms on rendered people."""

    pairs: int = number(300, 1, MANY)  # of a reference and a frame
    clips: int = number(12, 0, MANY)  # of 30 frames
    noise: float = number(2.0, 0, 100)  # pixels of standard deviation, on all keypoints
    pose_noise: float = number(0.02, 0, 1)  # the same in parts of the person's standing height, as an estimator errs
    seed: int = number(0, 0, LARGEST_SEED)  # of the people and the errors
    output: str = "outputs/calibration_accuracy"  # folder for the results


@dataclass
class CalibrationSpeedConfig:
    """Time and memory of the calibration."""

    pairs: int = number(40, 0, MANY)  # searches to time; 0: none
    frames: int = number(93, 0, MANY)  # of the clip that is timed; 0: none
    long_frames: int = number(2000, 1, MANY)  # of the clip whose memory is measured
    # of a video of 1920 x 1080 pixels, 30 frames a second, that `python -m tpc` calibrates to; 0: none
    video_seconds: int = number(60, 0, 100_000)
    seed: int = number(0, 0, LARGEST_SEED)  # of the people


@dataclass
class CostConfig:
    """Operations of inference, with and without TPC."""

    groups: int = number(30, 0, MANY)  # of calibrated images, see `tpc.config`
    propagation: str = choice("iterative", PROPAGATIONS)  # see `tpc.config`
    output: str | None = None  # JSON file; null prints only


@dataclass
class MemoryConfig:
    """Memory of the measures of long clips."""

    frames: int = number(10_000, 1, MANY)  # in all clips
    clips: int = number(10, 1, MANY)  # number of clips
    side: int = number(64, 8, 8192)  # pixels
    output: str | None = None  # JSON file; null prints only


@dataclass
class JitterConfig:
    """Jitter and lag of filters of estimated keypoints."""

    clips: int = number(6, 1, MANY)  # rendered clips
    frames: int = number(90, 2, MANY)  # of a clip
    seed: int = number(3, 0, LARGEST_SEED)  # of the clips


@dataclass
class RetargetingConfig:
    """Retargeted poses of rendered people against those of the reference's own."""

    motions: int = number(40, 1, MANY)  # of every row
    frames: int = number(24, 1, MANY)  # of a motion, 8 a second
    noise: float = number(0.0, 0, 1)  # parts of the standing height, errors of all keypoints
    seed: int = number(0, 0, LARGEST_SEED)  # of motions, people and cameras
    picture: str | None = None  # draw examples to this file instead of measuring


@dataclass
class PublishedConfig:
    """Weights of published format and size."""

    output: str = MISSING  # folder for the results
    size: str = choice("sd15", SIZES)  # of the networks
    side: int = number(512, 64, 4096)  # pixels of images
    dtype: str = choice("float16", DTYPES[1:])  # of the converted weights


@dataclass
class StrategiesConfig:
    """Speed and memory of strategies of accelerate."""

    config: str = MISSING  # of `train.py`
    overrides: str | None = None  # further arguments of `train.py`, as one text
    # files of `configs/accelerate/`
    strategies: list[str] = choices(["cpu", "ddp", "zero2", "zero2_offload", "zero3", "zero3_offload"], (), least=1)
    steps: int = number(6, 2, MANY)  # the first one, which allocates, is left out of the speed


@dataclass
class SpeedConfig:
    """Speed and memory of inference and training."""

    size: str = choice("tiny", SIZES)  # of networks with random weights
    model: str | None = None  # pipeline folder to measure in their place
    parts: list[str] = choices(PARTS, PARTS, least=1)  # what is measured
    dtypes: list[str] = choices(["float32", "bfloat16"], DTYPES[1:], least=1)  # in training bfloat16 is autocast
    frames: int | None = number(None, 1, 10_000)  # of a clip, in place of those of `size`
    side: int | None = number(None, 8, 8192)  # pixels, in place of that of `size`
    steps: int | None = number(None, 2, 1000)  # of denoising, in place of those of `size`
    batch: int | None = number(None, 1, 10_000)  # of training, in place of that of `size`
    clip_frames: int | None = number(None, 2, 10_000)  # of training, in place of those of `size`
    persons: list[int] = numbers([1, 2], 1, 100)  # of runs with TPC
    guidance_scale: float = number(3.5, 0, 100)  # of inference
    vae: str = str(SHIPPED_MODEL / "vae")  # of training that loads rendered people
    batch_size: int = number(16, 1, 10_000)  # of training that loads rendered people
    workers: list[int] = numbers([0, 1], 0, 1024)  # of training that loads rendered people
    loading_steps: int = number(10, 1, MANY)  # of training that loads rendered people
    clips: int = number(6, 1, MANY)  # animated in every number of `processes`
    processes: list[int] = numbers([1, 2], 1, 1024, least=1)  # that share the clips
    threads: int = number(0, 0, 1024)  # of a CPU; 0: torch's choice
    repeats: int = number(3, 1, 10_000)  # of which the median counts
    device: str = device()  # auto: CUDA where there is one
    output: str = "outputs/speed"  # folder for the results
    tpc: CalibrationConfig = field(default_factory=CalibrationConfig)

    def check(self) -> None:
        if "processes" in self.parts and self.clips <= max(self.processes):
            raise UserError(f"clips={self.clips} must be more than processes={self.processes}")


@dataclass
class GPUCheckConfig:
    """What a GPU has to answer, in a few minutes."""

    parts: list[str] = choices(GPU_PARTS, GPU_PARTS, least=1)  # what is measured
    # sd15: networks of published size with random weights; tiny: a small model and images, to try the check
    size: str = choice("sd15", ("sd15", "tiny"))
    device: str = choice("cuda", ("cuda", "cpu"))  # cpu: to try the check
    minutes: float = number(8.0, 0, 1000)  # in all; a part that takes longer than what is left of them is skipped
    peer: str | None = None  # checkout of Moore-AnimateAnyone, to be measured in the same minutes
    peer_python: str = "python"  # interpreter of an environment in which it runs
    output: str = "outputs/gpu_check"  # folder for the results


@dataclass
class CompareConfig:
    """Another project's code beside this one's, on the same machine."""

    # Moore-AnimateAnyone, MagicAnimate, or another checkout of this project
    peer: str = choice("moore", PEERS)
    checkout: str = MISSING  # folder of the peer's code
    python: str = MISSING  # interpreter of an environment in which it runs
    size: str = choice("tiny", SIZES)  # of networks with random weights
    side: int | None = number(None, 64, 8192)  # pixels, in place of that of `size`
    frames: int | None = number(None, 1, 10_000)  # of a clip, in place of those of `size`
    # inference, or training steps of either stage; null: all
    works: list[str] | None = choices(None, WORKS, least=1)
    dtypes: list[str] = choices(["float32", "bfloat16"], DTYPES[1:], least=1)  # training keeps float32 weights
    # [false,true] measures training both ways
    checkpointing: list[bool] = choices([False], (), least=1)
    rounds: int = number(3, 1, 10_000)  # after one run of each side that sets things up
    steps: int = number(4, 2, 1000)  # of denoising
    # the peers' attention control takes it for granted that it is above 1
    guidance: float = number(3.5, 1, 100, excluded=1)
    device: str = choice("cpu", ("cpu", "cuda"))  # of both sides
    threads: int | None = number(None, 1, 1024)  # of each side; null: all processors
    weights: str | None = None  # folder that keeps the random weights for the next time; null: a temporary one
    output: str | None = None  # folder; null prints the table only

    def check(self) -> None:
        known = WORKS if self.peer != "magic_animate" else WORKS[:1]
        for work in self.works or ():
            if work not in known:
                raise UserError(f"works has {work}; of {self.peer} there are {', '.join(known)}")
        if self.side is not None and self.side % 64:
            raise UserError(f"side={self.side} must be a multiple of 64 pixels, as VAE and UNets halve it")
