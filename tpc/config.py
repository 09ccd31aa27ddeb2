"""Every choice of a calibration, and the three presets that make all of them."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from omegaconf import MISSING

from core.config import check_config
from core.errors import UserError
from core.files import existing_file
from data.config import PoseConfig

PRESETS = ("best", "paper", "release")
PROPAGATIONS = ("iterative", "hold", "off")
VISIBILITIES = ("paper", "release", "exclusive", "scene")
ATTACHMENTS = ("add", "replace")
FIXED_KEYPOINTS = ("all", "face", "torso", "trunk")  # choices of keypoints that are the same for every frame
TRAINING_TRANSFORMS = ("procrustes", "articulated")
TRAINING_FILLS = ("scene", "edge", "black")
CHOICES = {
    "transform": ("procrustes", "affine", "linear", "articulated"),
    "keypoints": ("exhaustive", "consensus", "all", "trunk", "torso", "face"),
    "back_view": ("swap", "keep", "reject"),
    "match": ("track", "given"),
    "fill": ("scene", "reference", "black", "mean"),
    "propagation": PROPAGATIONS,
    "attach": ATTACHMENTS,
    "visibility": VISIBILITIES,
}


@dataclass
class CalibrationConfig:
    """Choices of a calibration; `None` takes the preset's.

    `CalibrationConfig(preset="paper", groups=10)` is the paper's method with ten groups; `resolve` fills in the rest.
    """

    preset: str = "best"  # best: our default; paper: the published method; release: what the authors' code does

    # Step 1: the transform of every frame.
    # procrustes (similarity), affine, linear (scale and turn about the image's centre), articulated (the person's
    # similarity, bent by body part)
    transform: str | None = None
    bend_radius: float | None = None  # part of the body height over which joints bend; inf = the similarity alone
    keypoints: str | None = None  # exhaustive (silhouette IoU over all subsets), consensus, all, trunk, torso, face
    min_keypoints: int | None = None  # points: smallest subset that may serve
    score_threshold: float | None = None  # 0-1: a driving keypoint counts above it
    reference_score_threshold: float | None = None  # 0-1: a reference keypoint counts above it
    weighted: bool | None = None  # weight keypoints by the product of their two scores
    # Exhaustive, where a silhouette is drawn for want of a mask: the largest subset serves whose IoU is this close to
    # the highest. Errors of the keypoints are errors of such a silhouette, and the highest IoU would fit them.
    drawn_tolerance: float | None = None
    consensus_tolerance: float | None = None  # part of the driving person's size: how far off an agreeing point may be
    back_view: str | None = None  # one side seen from behind: swap left and right, keep them, or reject the frame

    # Which transforms are trusted, and what is done about the others.
    min_scale: float | None = None  # driving pixels per reference pixel
    max_scale: float | None = None  # driving pixels per reference pixel
    max_rotation: float | None = None  # degrees, 180 = any
    min_iou: float | None = None  # silhouette IoU below which a transform is not trusted
    max_gap: int | None = None  # frames: longest gap that is interpolated; 0 = none
    smoothing: float | None = None  # frames: standard deviation of the temporal filter of scale, angle, place; 0 = off
    match: str | None = None  # persons: track (and assign), given (slot j of both pose files)

    # What is painted around the calibrated person before it is encoded.
    fill: str | None = None  # scene (reference image without its person), reference (warped along), black, mean

    # Step 2: iterative propagation.
    propagation: str | None = None  # iterative (one random member a group and step), hold (first member), off
    groups: int | None = None  # number of groups M; 0 = groups of four frames

    # Step 3: which queries attend to which tokens.
    attach: str | None = None  # add calibrated tokens to the reference's, or replace the reference frame by frame
    visibility: str | None = None  # paper, release, exclusive, scene (needs fill=scene); see tpc.attach
    mask_threshold: float | None = None  # part of a token's pixels above which it belongs to the person; 0 = any pixel
    seed: int | None = None  # of the propagation's draws

    # Timestep of training, from 0, at which frames begin as their noised calibrated images; -1 = off, from noise
    start: int | None = None

    def check(self) -> None:
        check_choice("preset", self.preset, PRESETS)
        full = _filled(self)
        for name, allowed in CHOICES.items():
            check_choice(name, getattr(full, name), allowed)
        for name, low, high in (
            ("bend_radius", 0, float("inf")),
            ("min_keypoints", 2, 17),
            ("score_threshold", 0, 1),
            ("reference_score_threshold", 0, 1),
            ("drawn_tolerance", 0, 1),
            ("consensus_tolerance", 0, 10),
            ("min_scale", 0, full.max_scale),
            ("max_rotation", 0, 180),
            ("min_iou", 0, 1),
            ("max_gap", 0, float("inf")),
            ("smoothing", 0, 1000),
            ("groups", 0, float("inf")),
            ("mask_threshold", 0, 1),
            ("start", -1, float("inf")),
        ):
            check_range(name, getattr(full, name), low, high)
        if full.start >= 0 and full.fill != "scene":
            raise UserError(
                f"start={full.start} begins with the background of calibrated images; tpc.fill={full.fill} does not "
                "paint the scene there, fill=scene does"
            )
        if self.visibility == "scene" and full.fill != "scene":
            raise UserError(
                f"visibility=scene shows calibrated images where a person stood; tpc.fill={full.fill} does not paint "
                "that place, fill=scene does"
            )


@dataclass
class CompositionConfig:
    """Ranges from which the reference's new composition is drawn, per sample."""

    probability: float = 0.0  # that a sample is recomposed; 0 = off
    min_scale: float = 0.4  # factor on the person's size, drawn evenly in its logarithm
    max_scale: float = 1.6
    max_rotation: float = 180.0  # degrees, either way
    max_translation: float = 0.2  # parts of the image's sides, either way
    ramp_steps: int = 0  # training steps over which the ranges grow from nothing to these
    fill: str = "scene"  # scene: only the person moves; edge, black: the image does, and what is beyond it

    def check(self) -> None:
        check_range("probability", self.probability, 0, 1)
        check_range("min_scale", self.min_scale, 1e-3, self.max_scale)
        check_range("max_scale", self.max_scale, self.min_scale, 1e3)
        check_range("max_rotation", self.max_rotation, 0, 180)
        check_range("max_translation", self.max_translation, 0, 10)
        check_choice("fill", self.fill, TRAINING_FILLS)


@dataclass
class CalibratedTrainingConfig:
    """Calibrated images for training samples, per sample."""

    probability: float = 0.0  # that a sample is calibrated; 0 = off
    transform: str = "procrustes"  # or articulated: bent by body part, by the loader
    keypoints: str = "trunk"  # all, trunk, torso, face
    score_threshold: float = 0.3  # a keypoint counts above it
    noise: float = 0.01  # standard deviation of the keypoints, parts of the image's height, as estimators have
    images: int = 1  # calibrated images a clip; its frames share them in consecutive groups
    visibility: str = "scene"  # paper, release, exclusive, scene
    mask_threshold: float = 0.0  # part of a token's pixels above which it belongs to the person

    def check(self) -> None:
        check_range("probability", self.probability, 0, 1)
        check_choice("transform", self.transform, TRAINING_TRANSFORMS)
        check_range("images", self.images, 1, 10**6)
        check_choice("keypoints", self.keypoints, FIXED_KEYPOINTS)
        check_choice("visibility", self.visibility, VISIBILITIES)


@dataclass
class CommandConfig:
    """Reference, driving clip and options."""

    reference: str = MISSING  # image
    output: str = MISSING  # folder for the results
    driving: str | None = None  # video
    reference_poses: str | None = None  # pose file, instead of estimating
    driving_poses: str | None = None  # the same
    reference_mask: str | None = None  # 8-bit image, 255 = person, or a folder with p0.png, p1.png, ...
    driving_masks: str | None = None  # folder with 000000.png, or 000000_p0.png for several persons
    max_side: int = 0  # pixels of the longer side of the calibrated images; 0 = those of the driving video
    max_frames: int | None = None  # frames to use
    stride: int = 1  # use every stride-th frame
    cuts: list[int] | None = None  # first frames of new shots, counted as the results'; null: found, []: none
    pose: PoseConfig = field(default_factory=PoseConfig)
    tpc: CalibrationConfig = field(default_factory=CalibrationConfig)

    def check(self) -> None:
        for name in ("reference", "driving", "reference_poses", "driving_poses", "reference_mask", "driving_masks"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_dir():
                existing_file(path, name)
        if self.driving is None and self.driving_poses is None:
            raise UserError("driving= or driving_poses= is required")
        for name, least in (("max_side", 0), ("stride", 1), ("max_frames", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}={value} must be at least {least}")


def best() -> CalibrationConfig:
    """Our default, chosen on the misalignment benchmark; see docs/misalignment.md."""
    return CalibrationConfig(
        preset="best",
        transform="procrustes",
        bend_radius=0.05,
        keypoints="exhaustive",
        min_keypoints=3,
        score_threshold=0.3,
        reference_score_threshold=0.3,
        weighted=True,
        drawn_tolerance=0.02,
        consensus_tolerance=0.08,
        back_view="swap",
        min_scale=0.02,
        max_scale=50.0,
        max_rotation=180.0,
        min_iou=0.1,
        max_gap=8,
        smoothing=2.0,
        match="track",
        fill="scene",
        propagation="off",
        groups=0,
        attach="add",
        visibility="scene",
        mask_threshold=0.0,
        seed=0,
        start=-1,
    )


def paper() -> CalibrationConfig:
    """The method as published: unweighted points, best silhouette IoU, r stays visible to all, iterative propagation.

    The paper screens the background of calibrated images but does not say what it shows: here, as in the authors'
    code, the reference warped along. It gives 30 groups for clips of about 120 frames and no number for others:
    here groups of four frames at any length.
    """
    return replace(
        best(),
        preset="paper",
        drawn_tolerance=0.0,
        weighted=False,
        back_view="keep",
        min_scale=1e-3,
        max_scale=1e3,
        min_iou=0.0,
        max_gap=0,
        smoothing=0.0,
        fill="reference",
        propagation="iterative",
        visibility="paper",
    )


def release() -> CalibrationConfig:
    """The authors' code: five points of the face, every fourth frame held, exclusive masks.

    Its errors are left out: a face of three points is fitted like any other, and the image keeps its aspect ratio.
    """
    return replace(
        paper(),
        preset="release",
        keypoints="face",
        min_keypoints=2,
        reference_score_threshold=0.0,
        propagation="hold",
        visibility="release",
        mask_threshold=0.001,
    )


def resolve(config: CalibrationConfig | None) -> CalibrationConfig:
    """The configuration with every `None` filled from its preset; UserError for an unknown choice or value."""
    config = config or CalibrationConfig()
    check_config(config, "tpc")
    full = _filled(config)
    if full.visibility == "scene" and full.fill != "scene":
        full.visibility = "exclusive"
    return full


def _filled(config: CalibrationConfig) -> CalibrationConfig:
    preset = {"best": best, "paper": paper, "release": release}[config.preset]()
    given = {field.name: getattr(config, field.name) for field in fields(CalibrationConfig)}
    return replace(preset, **{name: value for name, value in given.items() if value is not None})


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """UserError when a value is none of those allowed."""
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """UserError when a value is not within its limits, or nan."""
    if not low <= value <= high:
        raise UserError(f"{name} must be in {low:g} to {high:g}; got {value!r}")
