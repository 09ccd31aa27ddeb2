"""Configurations of the tasks of `evaluate.py`."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from core.config import check_choice
from core.errors import UserError
from data.config import COCO_KEYPOINTS, SPLITS, PeopleConfig, PoseConfig
from inference.config import SamplingConfig
from models.config import SHIPPED_MODEL, SMALL_ANIMATORS
from tpc.config import CalibrationConfig

RENDERED, RENDERED_FPS = "rendered", 24.0
PROTOCOLS = ("disco-2023", "disco-fixed", "native")
FEATURES = ("published", "stand-in", "none")
PERSON_MEASURES = ("keypoint_error", "part_colour")
LPIPS = "st_lpips_alex"
MASKS, POSES = ("exact", "estimated", "drawn"), ("exact", "estimated")  # kinds that an animator can be handed
MANIFESTS = Path(__file__).parents[1] / "assets" / "misalignment"
MISALIGNED_SPLITS = {"test": "heldout", "development": "development"}  # -> split of the rendered people
KINDS = ("aligned", "scale", "rotation", "temporal_scale", "temporal_rotation", "two_persons")


@dataclass
class ClipsConfig:
    """Source of clips.

    dataset: "rendered" (exact poses and masks); a folder that `prepare.py` made; or a folder of videos with pose files
        beside them (name.mp4, name.npz, and masks in name_masks/). The reference of a video is one of its own frames.
    """

    dataset: str = RENDERED
    split: str = "heldout"  # of rendered people; "development": those that choices between settings are made on
    clips: int = 8  # number of clips, 0 = all of a folder
    frames: int = 16  # of every clip, 0 = all of a video
    stride: int = 2  # of frames
    source: int = 256  # pixels of the side of rendered images
    clip_seed: int = 100  # other seeds are other rendered clips
    reference_frame: int = 0  # of a video, the image that is animated
    # clothes that the shipped model knows, whole persons, cameras held upright
    people: PeopleConfig = field(
        default_factory=lambda: PeopleConfig(height=[0.7, 1.0], close_ups=0.0, tilted=0.0, plain=0.7)
    )

    def check(self) -> None:
        check_choice(self, "split", SPLITS[1:])  # not the people of training
        some = int(self.dataset == RENDERED)  # "all" of rendered clips would have no end
        lowest = {"frames": some, "stride": 1, "source": 32, "reference_frame": 0, "clips": some}
        for name, value in lowest.items():
            if getattr(self, name) < value:
                raise UserError(f"{name}={getattr(self, name)} must be at least {value}")


@dataclass
class TrialsConfig:
    """Seeds, device and measures of trials."""

    # of the initial noise; numbers are means and deviations over them
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    device: str = "auto"  # "auto", "cpu", "cuda", ...
    dtype: str = "auto"  # "auto" (bfloat16 on CUDA, float32 elsewhere), "float32", ...
    keep_parts: bool = True  # keep the values and features of every trial, to add seeds or clips later
    persons: bool = False  # estimate poses in the results, for the error of the pose and the colours of body parts
    pose: PoseConfig = field(default_factory=PoseConfig)
    # standard deviation of errors added to the keypoints that the animator gets, in parts of the person's height;
    # results are measured against the exact ones, attention at those with errors
    pose_noise: float = 0.0
    # What the animator gets of reference and frames; results are measured with the exact ones. Poses "exact", or
    # "estimated" from the clip's images by `pose`. Masks "exact"; "estimated" with an estimator's errors, by the same
    # estimator if poses are, and it gives masks; "drawn" around the keypoints, as for users without masks.
    poses: str = "exact"
    masks: str = "exact"
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(steps=15, guidance_scale=1.0))
    tpc: CalibrationConfig = field(default_factory=CalibrationConfig)

    def check(self) -> None:
        if self.pose_noise < 0:
            raise UserError(f"pose_noise={self.pose_noise} must not be negative")
        check_choice(self, "poses", POSES)
        check_choice(self, "masks", MASKS)
        if self.pose_noise and self.poses == "estimated":
            raise UserError(
                f"pose_noise={self.pose_noise} is for poses=exact; estimated poses have errors of their own"
            )


@dataclass
class ProtocolConfig:
    """Measures and their protocol."""

    protocol: str = "native"  # "disco-2023", "disco-fixed" or "native"
    # networks of LPIPS, FID, FID-VID and FVD: "published" (their files must be in `weights`), "stand-in" (ST-LPIPS and
    # VGG Frechet distances, fetched by `python -m metrics.weights`) or "none"
    features: str = "published"
    measures: list[str] | None = None  # names instead of all measures of the protocol
    weights: str | None = None  # folder of the networks' files; null is the cache
    batch_size: int = 8  # frames at a time

    def check(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise UserError(f"protocol={self.protocol} must be one of {', '.join(PROTOCOLS)}")
        if self.features not in FEATURES:
            raise UserError(f"features={self.features} must be one of {', '.join(FEATURES)}")
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1")


@dataclass
class ThresholdConfig:
    """Thresholds above which a clip counts as misaligned."""

    # radians between the pelvis-to-nose lines above which a frame is misaligned (paper: pi/6)
    angle: float = math.pi / 6
    box_iou: float = 0.7  # IoU of the persons' boxes below which it is (paper: 0.7)
    share: float = 0.25  # of a clip's compared frames that must be misaligned for the clip to be
    consistent_share: float = 0.75  # of a clip's compared frames above which a kind is consistent and not temporal
    score: float = 0.3  # a keypoint is visible when its score is above it

    def check(self) -> None:
        for name, high in (("angle", math.pi), ("box_iou", 1), ("share", 1), ("consistent_share", 1), ("score", 1)):
            value = getattr(self, name)
            if not 0 <= value <= high:
                raise UserError(f"{name}={value} must be in 0 to {high:.4g}")
        if self.share > self.consistent_share:
            raise UserError("share must not be above thresholds.consistent_share")


@dataclass
class MetricsConfig(ProtocolConfig):
    """Folders to compare; `ProtocolConfig` has everything about measures."""

    generated: str = MISSING  # a video, a folder of frames, or a folder of clips, which are matched by name
    truth: str = MISSING  # the same
    output: str = "outputs/metrics"  # folder for the results; the same command again goes on where it was stopped
    # folder with the persons' masks of each clip, 255 = person: adds foreground and background
    masks: str | None = None
    persons: bool = False  # estimate poses in both, for the error of the pose and the colours of body parts
    keep_parts: bool = False  # keep the values and features of every clip, some kilobytes a frame
    device: str = "auto"  # "auto", "cpu", "cuda", ...
    pose: PoseConfig = field(default_factory=PoseConfig)


@dataclass
class SplitConfig(ClipsConfig):
    """Clips to split; `ClipsConfig` says where they come from. A folder needs pose files only."""

    dataset: str = MISSING
    output: str = "outputs/split"  # folder for the results
    clips: int = 0
    frames: int = 0
    stride: int = 1
    thresholds: ThresholdConfig = field(default_factory=ThresholdConfig)


@dataclass
class SweepConfig(ClipsConfig, TrialsConfig):
    """Rendered clips whose reference is turned and scaled; `ClipsConfig` and `TrialsConfig` say which and how."""

    output: str = "outputs/sweep"  # folder for the results
    model: str = str(SHIPPED_MODEL)  # pipeline folder
    clips: int = 8
    frames: int = 4
    stride: int = 6
    angles: int = 12  # number of angles of the reference over a full turn; 0 leaves angles out
    # factors on the person's size in the reference, and 1 beside them; [] leaves them out
    scales: list[float] = field(default_factory=lambda: [0.3, 0.42, 0.6, 0.77, 1.0, 1.3, 1.7, 2.2, 3.0])

    def check(self) -> None:
        ClipsConfig.check(self)
        TrialsConfig.check(self)
        if self.angles < 0 or any(not scale > 0 for scale in self.scales):
            raise UserError(f"angles={self.angles} must not be negative and scales={self.scales} must be positive")
        if len({f"{scale:g}" for scale in self.scales}) < len(self.scales):
            raise UserError(f"scales={self.scales} must differ")


@dataclass
class AblationConfig(ClipsConfig, TrialsConfig, ProtocolConfig):
    """Every transform with every propagation and every choice of keypoints, and a run without TPC.

    The first of each are what the other conditions are compared with.
    """

    output: str = "outputs/ablation"  # folder for the results
    model: str = str(SHIPPED_MODEL)  # pipeline folder
    split: str = "development"  # what is compared here is chosen between
    features: str = "stand-in"
    measures: list[str] | None = field(default_factory=lambda: ["psnr", "ssim", "flicker", "vgg_frechet_video"])
    # of procrustes, affine, linear
    transforms: list[str] = field(default_factory=lambda: ["procrustes", "affine", "linear"])
    # "off" (each frame its own image), "hold" (the group's first), or the number of groups M of iterative propagation,
    # 0 = groups of four frames
    propagations: list[str] = field(default_factory=lambda: ["off", "hold", "2", "4", "8"])
    # rules that choose keypoints: exhaustive, consensus, all, trunk, torso, face
    subsets: list[str] = field(default_factory=lambda: ["exhaustive", "all"])
    # add calibrated images to the reference, or replace it by them
    attachments: list[str] = field(default_factory=lambda: ["add"])

    def check(self) -> None:
        for base in (ClipsConfig, TrialsConfig, ProtocolConfig):
            base.check(self)


@dataclass
class TableConfig(ClipsConfig, TrialsConfig, ProtocolConfig):
    """Models to compare."""

    output: str = "outputs/table"  # folder for the results
    models: list[str] = field(default_factory=lambda: [str(SHIPPED_MODEL)])  # pipeline folders
    names: list[str] | None = None  # of the models in the table; null: their folders' names
    features: str = "stand-in"
    seeds: list[int] = field(default_factory=lambda: list(range(10)))
    thresholds: ThresholdConfig = field(default_factory=ThresholdConfig)  # above which a clip is misaligned

    def check(self) -> None:
        for base in (ClipsConfig, TrialsConfig, ProtocolConfig):
            base.check(self)


@dataclass
class AttentionTaskConfig(ClipsConfig, TrialsConfig):
    """Clips to animate without and with TPC, and how their attention is measured.

    output: folder for the results; model: pipeline folder.
    layers: that are measured, null: all that read the reference.
    radius: within which attention counts as right, in body heights of the person in the attended image.
    radii: of the PCK curve.
    keypoints: for the image of Figure 2: the first of them that is visible.
    columns: denoising steps in that image.
    thresholds: what makes a clip misaligned.
    """

    output: str = "outputs/attention"
    model: str = str(SHIPPED_MODEL)
    clips: int = 12
    frames: int = 4
    stride: int = 6
    layers: list[str] | None = None
    radius: float = 0.15
    radii: list[float] = field(default_factory=lambda: [0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5])
    keypoints: list[str] = field(default_factory=lambda: ["right_elbow", "left_elbow", "right_knee", "left_knee"])
    columns: int = 5
    thresholds: ThresholdConfig = field(default_factory=ThresholdConfig)

    def check(self) -> None:
        ClipsConfig.check(self)
        TrialsConfig.check(self)
        if not self.radius > 0 or not self.radii or min(self.radii) < 0:
            raise UserError(f"radius={self.radius} must be positive and radii={self.radii} not negative")
        if self.columns < 1:
            raise UserError(f"columns={self.columns} must be at least 1")
        for name in self.keypoints:
            if name not in COCO_KEYPOINTS:
                raise UserError(f"keypoints: {name!r} is none of {', '.join(COCO_KEYPOINTS)}")


@dataclass
class MisalignedTrialsConfig(TrialsConfig):
    """Trials of the frozen clips, and the measures beside PSNR and SSIM of person and background."""

    split: str = "test"  # clips that numbers are reported on, or "development", on which settings are chosen
    # also vary TPC on the clips of split=test, for numbers to report of settings that were chosen elsewhere
    variants_on_test: bool = False
    kinds: list[str] = field(default_factory=lambda: list(KINDS))  # of clips
    clips: int = 0  # of each kind, the first ones, 0: all
    seeds: list[int] = field(default_factory=lambda: list(range(5)))
    flicker: bool = False  # also the error of the change from frame to frame
    lpips: bool = False  # also ST-LPIPS, a stand-in for LPIPS that `python -m metrics.weights` fetches
    weights: str | None = None  # folder of ST-LPIPS's network; null: the cache

    def check(self) -> None:
        super().check()
        check_choice(self, "split", tuple(MISALIGNED_SPLITS))
        if self.split == "test" and not self.variants_on_test and (varied := self.varied()):
            raise UserError(
                f"{varied} would be a choice on the test clips; choose with split=development "
                "(variants_on_test=true measures a finished choice)"
            )

    def varied(self) -> str | None:
        """What of TPC is varied beside its presets, or None. Whole presets and attachments are published choices."""
        preset = CalibrationConfig(preset=self.tpc.preset)
        found = [f"tpc.{name}={value}" for name, value in vars(self.tpc).items() if value != getattr(preset, name)]
        return found[0] if found else None

    def protocol(self) -> ProtocolConfig:
        measures = ["psnr", "ssim", *(["flicker"] if self.flicker else []), *([LPIPS] if self.lpips else [])]
        measures += PERSON_MEASURES if self.persons else ()
        features = "stand-in" if self.lpips else "none"
        return ProtocolConfig(protocol="native", features=features, measures=measures, weights=self.weights)


@dataclass
class MisalignmentConfig(MisalignedTrialsConfig):
    """Presets and variants to measure; `MisalignedTrialsConfig` says on which clips."""

    output: str = "outputs/misalignment"  # folder for the results
    model: str = str(SHIPPED_MODEL)  # pipeline folder
    # of TPC, in the order of the tables
    presets: list[str] = field(default_factory=lambda: ["best", "paper", "release"])
    # of TPC beside the presets, each some settings of it such as "propagation=iterative groups=2"; others as in `tpc`
    variants: list[str] = field(default_factory=list)
    strips: int = 1  # clips of each kind that strips.png shows; 0: no image

    def varied(self) -> str | None:
        return f"variants={self.variants}" if self.variants else super().varied()

    def check(self) -> None:
        super().check()
        if self.strips < 0:
            raise UserError(f"strips={self.strips} must not be negative")


@dataclass
class AnimatorsConfig(MisalignedTrialsConfig):
    """Models to compare; `MisalignedTrialsConfig` says on which clips."""

    output: str = "outputs/animators"  # folder for the results
    # pipeline folders; without, the four small ones that are shipped
    models: list[str] = field(default_factory=lambda: [str(folder) for folder in SMALL_ANIMATORS])
    names: list[str] | None = None  # of the models in the table; null: those of their classes
    # of TPC: "add" gives calibrated tokens beside the reference's, "replace" in their place
    attachments: list[str] = field(default_factory=lambda: ["add", "replace"])
    strips: bool = True  # draw strips.png, the last frame of the first clip of each kind


@dataclass
class ManifestSplitConfig:
    """clips: of each kind; seed: other seeds are other clips."""

    clips: int
    seed: int


@dataclass
class ManifestConfig:
    test: ManifestSplitConfig = field(default_factory=lambda: ManifestSplitConfig(20, 20))
    development: ManifestSplitConfig = field(default_factory=lambda: ManifestSplitConfig(10, 21))
    output: str = str(MANIFESTS)


TASKS = {
    "metrics": MetricsConfig,
    "split": SplitConfig,
    "sweep": SweepConfig,
    "ablation": AblationConfig,
    "table": TableConfig,
    "attention": AttentionTaskConfig,
    "misalignment": MisalignmentConfig,
    "animators": AnimatorsConfig,
}
