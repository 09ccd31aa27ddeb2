"""Configurations of the tasks of `evaluate.py`."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from core.config import DTYPES, LARGEST_SEED, choice, choices, device, number, numbers
from core.errors import UserError
from core.values import MANY
from data.config import COCO_KEYPOINTS, RETARGET_MODES, SPLITS, PeopleConfig, PoseConfig
from inference.config import SamplingConfig
from models.config import SHIPPED_MODEL, SMALL_ANIMATORS
from tpc.config import ATTACHMENTS, KEYPOINTS, PRESETS, TRANSFORMS, CalibrationConfig

RENDERED, RENDERED_FPS = "rendered", 24.0
PROTOCOLS = ("disco-2023", "disco-fixed", "native", "tpc-2026")
FEATURES = ("published", "stand-in", "none")
MEASURES = (
    "mae", "l1_historical", "psnr", "psnr_overflow", "ssim", "flicker", "lpips_alex", "lpips_vgg", "st_lpips_alex",
    "st_lpips_vgg", "fid", "fid_vid", "fvd", "vgg_frechet", "vgg_frechet_video", "keypoint_error", "part_colour",
    "mmd_i3d", "mmd_resnet3d", "mmd_vgg", "mmd_given", "keypoint_motion", "keypoint_motion_mmd", "face_identity",
    "vgg_consistency", "vgg_consistency_truth", "vgg_smoothness", "vgg_smoothness_truth",
)  # fmt: skip
PERSON_MEASURES = ("keypoint_error", "part_colour")  # of every protocol, where poses are estimated
LPIPS = "st_lpips_alex"
MASKS, POSES = ("exact", "estimated", "drawn"), ("exact", "estimated")  # kinds that an animator can be handed
RETARGETS = (*RETARGET_MODES[1:], "exact")
MANIFESTS = Path(__file__).parents[1] / "assets" / "misalignment"
MISALIGNED_SPLITS = {"test": "heldout", "development": "development"}  # -> split of the rendered people
KINDS = ("aligned", "scale", "rotation", "temporal_scale", "temporal_rotation", "two_persons")
# of clips that another body drives, see `evaluation.misaligned_clips`
DRIVEN_KINDS = ("identity", "proportions", "proportions_scale", "proportions_rotation")


@dataclass
class ClipsConfig:
    """Where the clips come from."""

    # "rendered" (exact poses and masks); a folder that `prepare.py` made; or a folder of videos with pose files beside
    # them (name.mp4, name.npz, and masks in name_masks/). The reference of a video is one of its own frames.
    dataset: str = RENDERED
    # of rendered people, not those of training; development: those that choices between settings are made on
    split: str = choice("heldout", SPLITS[1:])
    clips: int = number(8, 0, MANY)  # number of clips, 0 = all of a folder
    frames: int = number(16, 0, MANY)  # of every clip, 0 = all of a video
    stride: int = number(2, 1, MANY)  # every stride-th frame of a clip is taken
    source: int = number(256, 32, 4096)  # pixels of the side of rendered images
    clip_seed: int = number(100, 0, LARGEST_SEED)  # other seeds are other rendered clips
    reference_frame: int = number(0, 0, MANY)  # of a video, the image that is animated
    # clothes that the shipped model knows, whole persons, cameras held upright
    people: PeopleConfig = field(
        default_factory=lambda: PeopleConfig(height=[0.7, 1.0], close_ups=0.0, tilted=0.0, plain=0.7)
    )

    def check(self) -> None:
        for name in ("frames", "clips"):  # all of rendered ones would have no end
            if self.dataset == RENDERED and getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1 of dataset={RENDERED}")


@dataclass
class TrialsConfig:
    """Seeds, device and measures of trials."""

    # of the initial noise; numbers are means and deviations over them
    seeds: list[int] = numbers([0, 1, 2], 0, LARGEST_SEED, least=1)
    device: str = device()  # auto: CUDA where there is one
    dtype: str = choice("auto", DTYPES)  # of the networks; auto: bfloat16 on CUDA, float32 elsewhere
    keep_parts: bool = True  # keep the values and features of every trial, to add seeds or clips later
    persons: bool = False  # estimate poses in the results, for the error of the pose and the colours of body parts
    pose: PoseConfig = field(default_factory=PoseConfig)
    # standard deviation of errors added to the keypoints that the animator gets, in parts of the person's height;
    # results are measured against the exact ones, attention at those with errors
    pose_noise: float = number(0.0, 0, 1)
    # Those that the animator gets of reference and frames; results are measured with the exact ones. estimated: from
    # the clip's images by `pose`.
    poses: str = choice("exact", POSES)
    # Those that the animator gets. estimated: with an estimator's errors, by the same estimator if poses are, and it
    # gives masks; drawn: around the keypoints, as for users without masks.
    masks: str = choice("exact", MASKS)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(steps=15, guidance_scale=1.0))
    tpc: CalibrationConfig = field(default_factory=CalibrationConfig)

    def check(self) -> None:
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds={self.seeds} must differ")
        if self.pose_noise and self.poses == "estimated":
            raise UserError(
                f"pose_noise={self.pose_noise} is for poses=exact; estimated poses have errors of their own"
            )


@dataclass
class ProtocolConfig:
    """Measures and their protocol."""

    # the form that images are brought to, and the measures: as DisCo's code of 2023 has them, with its errors put
    # right, or at the images' own size with standard measures (native) or also those of 2026
    protocol: str = choice("native", PROTOCOLS)
    # networks of LPIPS, FID, FID-VID and FVD: published (their files must be in `weights`), stand-in (ST-LPIPS and
    # VGG Frechet distances, fetched by `python -m metrics.weights`) or none
    features: str = choice("published", FEATURES)
    measures: list[str] | None = choices(None, MEASURES, least=1)  # instead of all measures of the protocol
    weights: str | None = None  # folder of the networks' files; null is the cache
    # ONNX file of an embedding of aligned faces (ArcFace's form: RGB of 112 x 112 in [-1, 1]), for face_identity
    face: str | None = None
    batch_size: int = number(8, 1, 100_000)  # frames at a time


@dataclass
class ThresholdConfig:
    """Thresholds above which a clip counts as misaligned."""

    # radians between the pelvis-to-nose lines above which a frame is misaligned (paper: pi/6)
    angle: float = number(math.pi / 6, 0, math.pi)
    box_iou: float = number(0.7, 0, 1)  # IoU of the persons' boxes below which it is (paper: 0.7)
    share: float = number(0.25, 0, 1)  # of a clip's compared frames that must be misaligned for the clip to be
    # of a clip's compared frames above which a kind is consistent and not temporal
    consistent_share: float = number(0.75, 0, 1)
    score: float = number(0.3, 0, 1)  # a keypoint is visible when its score is above it

    def check(self) -> None:
        if self.share > self.consistent_share:
            raise UserError("share must not be above thresholds.consistent_share")


@dataclass
class MetricsConfig(ProtocolConfig):
    """Generated clips on disk against the true ones."""

    generated: str = MISSING  # a video, a folder of frames, or a folder of clips, which are matched by name
    truth: str = MISSING  # the true ones, in the same form
    output: str = "outputs/metrics"  # folder for the results; the same command again goes on where it was stopped
    # folder with the persons' masks of each clip, 255 = person: adds foreground and background
    masks: str | None = None
    persons: bool = False  # estimate poses in both, for the error of the pose and the colours of body parts
    # poses that are known, instead of estimated ones: a pose file, or a folder of one a clip by its name
    generated_poses: str | None = None
    truth_poses: str | None = None  # likewise
    # for mmd_given: .npz of one array (windows, dimension) a clip by its name, or .npy (clips, dimension)
    generated_features: str | None = None
    truth_features: str | None = None  # likewise
    keep_parts: bool = False  # keep the values and features of every clip, some kilobytes a frame
    device: str = device()  # auto: CUDA where there is one
    pose: PoseConfig = field(default_factory=PoseConfig)

    def check(self) -> None:
        if not self.persons and (self.generated_poses or self.truth_poses):
            raise UserError("generated_poses and truth_poses are for measures of the person; add persons=true")
        if (self.generated_features is None) != (self.truth_features is None):
            raise UserError("generated_features and truth_features belong together; give both or none")


@dataclass
class SplitConfig(ClipsConfig):
    """Original and misaligned clips of a data set, after the paper's definition; it needs pose files only."""

    dataset: str = MISSING
    output: str = "outputs/split"  # folder for the results
    clips: int = 0
    frames: int = 0
    stride: int = 1
    thresholds: ThresholdConfig = field(default_factory=ThresholdConfig)


@dataclass
class SweepConfig(ClipsConfig, TrialsConfig):
    """Fidelity of the person against the reference's angle and scale (Figures 1b and 9), on rendered clips."""

    output: str = "outputs/sweep"  # folder for the results
    model: str = str(SHIPPED_MODEL)  # pipeline folder
    clips: int = 8
    frames: int = 4
    stride: int = 6
    angles: int = number(12, 0, 360)  # number of angles of the reference over a full turn; 0 leaves angles out
    # factors on the person's size in the reference, and 1 beside them; [] leaves them out
    scales: list[float] = numbers([0.3, 0.42, 0.6, 0.77, 1.0, 1.3, 1.7, 2.2, 3.0], 0.01, 100)

    def check(self) -> None:
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
    measures: list[str] | None = choices(["psnr", "ssim", "flicker", "vgg_frechet_video"], MEASURES, least=1)
    # see tpc.transform
    transforms: list[str] = choices(["articulated", "procrustes", "affine", "linear"], TRANSFORMS, least=1)
    # "off" (each frame its own image), "hold" (the group's first), or the number of groups M of iterative propagation,
    # 0 = groups of four frames
    propagations: list[str] = choices(["off", "hold", "2", "4", "8"], (), least=1)
    subsets: list[str] = choices(["exhaustive", "all"], KEYPOINTS, least=1)  # rules that choose keypoints
    # add calibrated images to the reference, or replace it by them
    attachments: list[str] = choices(["add"], ATTACHMENTS, least=1)

    def check(self) -> None:
        for name in self.propagations:
            if name not in ("off", "hold") and not (name.isdecimal() and int(name) <= MANY):
                raise UserError(f"propagations has {name!r}, which is neither off, hold nor a number of groups")


@dataclass
class TableConfig(ClipsConfig, TrialsConfig, ProtocolConfig):
    """Models without and with TPC on original and misaligned clips (Table 1)."""

    output: str = "outputs/table"  # folder for the results
    models: list[str] = choices([str(SHIPPED_MODEL)], (), least=1)  # pipeline folders
    names: list[str] | None = None  # of the models in the table; null: their folders' names
    features: str = "stand-in"
    seeds: list[int] = field(default_factory=lambda: list(range(10)))
    thresholds: ThresholdConfig = field(default_factory=ThresholdConfig)  # above which a clip is misaligned


@dataclass
class AttentionTaskConfig(ClipsConfig, TrialsConfig):
    """Where keypoints attend in the reference, aligned and misaligned, without and with TPC (Figure 2)."""

    output: str = "outputs/attention"  # folder for the results
    model: str = str(SHIPPED_MODEL)  # pipeline folder
    clips: int = 12
    frames: int = 4
    stride: int = 6
    layers: list[str] | None = choices(None, (), least=1)  # that are measured; null: all that read the reference
    # within which attention counts as right, in body heights of the person in the attended image
    radius: float = number(0.15, 0, 100, excluded=0)
    radii: list[float] = numbers([0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5], 0, 100, least=1)  # of the PCK curve
    # for the image of Figure 2: the first of them that is visible
    keypoints: list[str] = choices(["right_elbow", "left_elbow", "right_knee", "left_knee"], COCO_KEYPOINTS, least=1)
    columns: int = number(5, 1, 1000)  # denoising steps in that image
    # from noise, as without TPC, so that both are recorded at the same noise levels, and with the reference in sight
    tpc: CalibrationConfig = field(default_factory=lambda: CalibrationConfig(start=-1, attach="add"))
    thresholds: ThresholdConfig = field(default_factory=ThresholdConfig)  # above which a clip is misaligned

    def check(self) -> None:
        if self.tpc.attach != "add":  # null is "replace" for some models
            raise UserError(
                f"tpc.attach={self.tpc.attach} may show no reference beside calibrated images; tpc.attach=add does"
            )


@dataclass
class MisalignedTrialsConfig(TrialsConfig):
    """Trials of the frozen clips, and the measures beside PSNR and SSIM of person and background."""

    # test: clips that numbers are reported on; development: those on which settings are chosen
    split: str = choice("test", MISALIGNED_SPLITS)
    # also vary TPC on the clips of split=test, for numbers to report of settings that were chosen elsewhere
    variants_on_test: bool = False
    # of clips; identity, proportions, proportions_scale and proportions_rotation are those that another body drives
    kinds: list[str] = choices(KINDS, (*KINDS, *DRIVEN_KINDS), least=1)
    clips: int = number(0, 0, MANY)  # of each kind, the first ones, 0: all
    seeds: list[int] = field(default_factory=lambda: list(range(5)))
    # Each condition also with the driving poses brought to the reference's body: as by pose.retarget, or
    # exact: the poses and masks of the true frames, which a retargeting without errors would give
    retargets: list[str] = choices((), RETARGETS)
    flicker: bool = False  # also the error of the change from frame to frame
    lpips: bool = False  # also ST-LPIPS, a stand-in for LPIPS that `python -m metrics.weights` fetches
    weights: str | None = None  # folder of ST-LPIPS's network; null: the cache

    def check(self) -> None:
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
    """Cost of misaligned references, and the share of it that TPC wins back, on the frozen clips."""

    output: str = "outputs/misalignment"  # folder for the results
    model: str = str(SHIPPED_MODEL)  # pipeline folder
    # of TPC, in the order of the tables
    presets: list[str] = choices(PRESETS, PRESETS)
    # of TPC beside the presets, each some settings of it such as "propagation=iterative groups=2"; others as in `tpc`
    variants: list[str] = field(default_factory=list)
    strips: int = number(1, 0, 1000)  # clips of each kind that strips.png shows; 0: no image

    def varied(self) -> str | None:
        return f"variants={self.variants}" if self.variants else super().varied()


@dataclass
class AnimatorsConfig(MisalignedTrialsConfig):
    """Animators without and with TPC on the frozen clips (Table 1)."""

    output: str = "outputs/animators"  # folder for the results
    # pipeline folders; without, the small ones that are shipped, one of each animator
    models: list[str] = choices([str(folder) for folder in SMALL_ANIMATORS], (), least=1)
    names: list[str] | None = None  # of the models in the table; null: those of their classes
    # of TPC: "add" gives calibrated tokens beside the reference's, "replace" in their place
    attachments: list[str] = choices(ATTACHMENTS, ATTACHMENTS)
    strips: bool = True  # draw strips.png, the last frame of the first clip of each kind


@dataclass
class ManifestSplitConfig:
    """Clips of a split."""

    clips: int = number(MISSING, 0, 10_000)  # of each kind
    seed: int = number(MISSING, 0, LARGEST_SEED)  # other seeds are other clips


@dataclass
class ManifestConfig:
    """`python -m evaluation.misaligned_clips`."""

    test: ManifestSplitConfig = field(default_factory=lambda: ManifestSplitConfig(20, 20))
    development: ManifestSplitConfig = field(default_factory=lambda: ManifestSplitConfig(10, 21))
    output: str = str(MANIFESTS)  # folder of the manifests


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
