"""Every choice of a calibration, and the three presets that make all of them."""

import math
from dataclasses import dataclass, field, fields, replace

from omegaconf import MISSING

from core.config import LARGEST_SEED, check_config, choice, number, numbers
from core.errors import UserError
from core.values import MANY
from data.config import DrivingPoseConfig

PRESETS = ("best", "paper", "release")
PROPAGATIONS = ("iterative", "hold", "off")
VISIBILITIES = ("paper", "release", "exclusive", "scene")
ATTACHMENTS = ("add", "replace")
TRANSFORMS = ("procrustes", "affine", "linear", "articulated")
TOOLS = ("wan_animate", "scail_2", "one_to_all", "stable_animator")  # see `tpc.export.tools`
SILHOUETTES = ("mask", "drawn")
FIXED_KEYPOINTS = ("all", "trunk", "torso", "face")  # choices of keypoints that are the same for every frame
KEYPOINTS = ("exhaustive", "consensus", *FIXED_KEYPOINTS)


@dataclass
class CalibrationConfig:
    """Choices of a calibration; null takes the preset's.

    `CalibrationConfig(preset="paper", groups=10)` is the paper's method with ten groups; `resolve` fills in the rest.
    """

    # best: our default; paper: the published method; release: what the authors' code does
    preset: str = choice("best", PRESETS)

    # Step 1: the transform of every frame.

    # procrustes (similarity), affine, linear (scale and turn about the image's centre), articulated (the person's
    # similarity, bent by body part)
    transform: str | None = choice(None, TRANSFORMS)
    # articulated: part of the body height over which joints bend; inf = the similarity alone
    bend_radius: float | None = number(None, 0, math.inf)
    # exhaustive (silhouette IoU over all subsets), consensus (those that agree), all, trunk, torso, face
    keypoints: str | None = choice(None, KEYPOINTS)
    min_keypoints: int | None = number(None, 2, 17)  # points: smallest subset that may serve
    score_threshold: float | None = number(None, 0, 1)  # a driving keypoint counts above it
    reference_score_threshold: float | None = number(None, 0, 1)  # a reference keypoint counts above it
    weighted: bool | None = None  # weight keypoints by the product of their two scores
    # of the driving person: its mask, or drawn around its keypoints even so, as a driver of another build or in other
    # clothes has not the reference's outline
    driving_silhouette: str | None = choice(None, SILHOUETTES)
    # Exhaustive, where a silhouette is drawn for want of a mask: the largest subset serves whose IoU is this close to
    # the highest. Errors of the keypoints are errors of such a silhouette, and the highest IoU would fit them.
    drawn_tolerance: float | None = number(None, 0, 1)
    # consensus: part of the driving person's size, how far off an agreeing point may be
    consensus_tolerance: float | None = number(None, 0, 10)
    # one side seen from behind: swap left and right, keep them, or reject the frame
    back_view: str | None = choice(None, ("swap", "keep", "reject"))

    # Which transforms are trusted, and what is done about the others.

    min_scale: float | None = number(None, 0, 1e6)  # least driving pixels per reference pixel
    max_scale: float | None = number(None, 0, 1e6)  # most driving pixels per reference pixel
    max_rotation: float | None = number(None, 0, 180)  # degrees, 180 = any
    min_iou: float | None = number(None, 0, 1)  # silhouette IoU below which a transform is not trusted
    max_gap: int | None = number(None, 0, MANY)  # frames: longest gap that is interpolated; 0 = none
    # frames: standard deviation of the temporal filter of scale, angle, place; 0 = off
    smoothing: float | None = number(None, 0, 1000)
    # how far a person goes from its place in the uncalibrated reference (0) to the calibrated one (1)
    strength: float | None = number(None, 0, 1)
    # persons: track (and assign those of the reference), given (slot j of both pose files is the same person)
    match: str | None = choice(None, ("track", "given"))

    # What is painted around the calibrated person before it is encoded.

    # scene (reference image without its person), reference (warped along), black, mean (colour)
    fill: str | None = choice(None, ("scene", "reference", "black", "mean"))

    # Step 2: iterative propagation.

    # iterative (one random member a group and step), hold (the group's first member), off (each frame its own image)
    propagation: str | None = choice(None, PROPAGATIONS)
    groups: int | None = number(None, 0, MANY)  # number of groups M; 0 = groups of four frames

    # Step 3: which queries attend to which tokens.

    # add calibrated tokens to the reference's, or replace the reference frame by frame
    attach: str | None = choice(None, ATTACHMENTS)
    # who attends to calibrated tokens: as published, as the authors' code has it, the person alone (exclusive), or
    # also where a person stood (scene, which needs fill=scene)
    visibility: str | None = choice(None, VISIBILITIES)
    # part of a token's pixels above which it belongs to the person; 0 = any pixel
    mask_threshold: float | None = number(None, 0, 1)
    seed: int | None = number(None, 0, LARGEST_SEED)  # of the propagation's draws

    # Timestep of training, from 0, at which frames begin as their noised calibrated images; -1 = off, from noise.
    # Null with the preset best, and masks of the reference: where the model's folder says that it is best begun
    start: int | None = number(None, -1, 10_000)

    @staticmethod
    def presets() -> dict[str, "CalibrationConfig"]:
        """What null stands for, by preset."""
        return {"best": best(), "paper": paper(), "release": release()}

    def check(self) -> None:
        full = _filled(self)
        if full.min_scale > full.max_scale:
            raise UserError(f"min_scale={full.min_scale} must not be above max_scale={full.max_scale}")
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
    """Ranges from which the reference's new composition is drawn, for every sample of training."""

    probability: float = number(0.0, 0, 1)  # that a sample is recomposed; 0 = off
    min_scale: float = number(0.4, 1e-3, 1e3)  # least factor on the person's size, drawn evenly in its logarithm
    max_scale: float = number(1.6, 1e-3, 1e3)  # greatest factor
    max_rotation: float = number(180.0, 0, 180)  # degrees, either way
    max_translation: float = number(0.2, 0, 10)  # parts of the image's sides, either way
    ramp_steps: int = number(0, 0, MANY)  # training steps over which the ranges grow from nothing to these
    # scene: only the person moves; edge, black: the image does, and its edge or black is beyond it
    fill: str = choice("scene", ("scene", "edge", "black"))

    def check(self) -> None:
        if self.min_scale > self.max_scale:
            raise UserError(f"min_scale={self.min_scale} must not be above max_scale={self.max_scale}")


@dataclass
class CalibratedTrainingConfig:
    """Calibrated images for training samples, for every sample."""

    probability: float = number(0.0, 0, 1)  # that a sample is calibrated; 0 = off
    transform: str = choice(
        "procrustes", ("procrustes", "articulated")
    )  # articulated: bent by body part, by the loader
    keypoints: str = choice("trunk", FIXED_KEYPOINTS)  # those that the transform is fitted to
    score_threshold: float = number(0.3, 0, 1)  # a keypoint counts above it
    # standard deviation of errors added to the keypoints, parts of the image's height, as estimators have
    noise: float = number(0.01, 0, 1)
    images: int = number(1, 1, 10**6)  # calibrated images a clip; its frames share them in consecutive groups
    # part of the calibrated samples whose frames are noised from their calibrated images, as tpc.start begins, on the
    # way to the true ones; 0 = none
    start: float = number(0.0, 0, 1)
    visibility: str = choice("scene", VISIBILITIES)  # who attends to calibrated tokens, as tpc.visibility
    mask_threshold: float = number(0.0, 0, 1)  # part of a token's pixels above which it belongs to the person


@dataclass
class CommandConfig:
    """`python -m tpc`: reference, driving clip and options."""

    reference: str = MISSING  # image
    output: str = MISSING  # folder for the results
    driving: str | None = None  # video; not needed beside driving_poses
    reference_poses: str | None = None  # pose file of the reference, instead of estimating
    driving_poses: str | None = None  # pose file of the driving video, instead of estimating
    reference_mask: str | None = None  # 8-bit image, 255 = person, or a folder with p0.png, p1.png, ...
    driving_masks: str | None = None  # folder with 000000.png, or 000000_p0.png for several persons
    # pixels of the longer side of the calibrated images; 0 = those of the driving video
    max_side: int = number(0, 0, 100_000)
    fps: float | None = number(
        None, 1e-3, 1000
    )  # to which the driving video is resampled; null: the tool's, or its own
    max_frames: int | None = number(None, 1, MANY)  # frames to use; null: all
    stride: int = number(1, 1, MANY)  # use every stride-th frame
    # first frames of new shots, counted as the results'; null: found, []: none
    cuts: list[int] | None = numbers(None, 0, MANY)

    # One calibrated reference for many frames, for models that take one.

    # clip: one for all frames; 77, 81 or another number: one for each segment of so many frames; null: none, or clip
    # with a tool
    segments: str | None = None
    # frames that a segment repeats of the one before; null: the tool's, or 0
    segment_overlap: int | None = number(None, 0, MANY)
    segment_videos: bool = False  # also the driving video and its drawn poses, cut into the same segments
    tool: str | None = choice(None, TOOLS)  # sizes, frame rate and names of files as this tool takes them

    pose: DrivingPoseConfig = field(default_factory=DrivingPoseConfig)
    tpc: CalibrationConfig = field(default_factory=CalibrationConfig)

    def check(self) -> None:
        self.segment_length()
        if self.segment_overlap is not None and self.segments is None and self.tool is None:
            raise UserError(f"segment_overlap={self.segment_overlap} is of segments; give segments= too")

    def segment_length(self) -> int | None:
        """Frames of a segment; None: all of the clip, or no segments at all."""
        if self.segments in (None, "clip"):
            return None
        if not (self.segments.isdecimal() and int(self.segments) > 0):
            raise UserError(f"segments={self.segments} must be clip, or a number of frames such as 77 or 81")
        return int(self.segments)


def best() -> CalibrationConfig:
    """Our default, chosen on the misalignment benchmark; see docs/misalignment.md."""
    return CalibrationConfig(
        preset="best",
        transform="articulated",
        bend_radius=0.05,
        keypoints="exhaustive",
        min_keypoints=3,
        score_threshold=0.3,
        reference_score_threshold=0.3,
        weighted=True,
        driving_silhouette="mask",
        drawn_tolerance=0.02,
        consensus_tolerance=0.08,
        back_view="swap",
        min_scale=0.02,
        max_scale=50.0,
        max_rotation=180.0,
        min_iou=0.1,
        max_gap=8,
        smoothing=2.0,
        strength=1.0,
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
        transform="procrustes",
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


def resolve(config: CalibrationConfig | None, masked: bool = True) -> CalibrationConfig:
    """The configuration with every `None` filled from its preset; UserError for an unknown choice or value.

    Where the reference has no masks (`masked`), `best` bends nobody: silhouettes drawn around keypoints cut clothes
    and hair off, and parts of them fit together badly.
    """
    config = config or CalibrationConfig()
    check_config(config, "tpc")
    if not masked and config.preset == "best" and config.transform is None:
        config = replace(config, transform="procrustes")
    full = _filled(config)
    if full.visibility == "scene" and full.fill != "scene":
        full.visibility = "exclusive"
    return full


def _filled(config: CalibrationConfig) -> CalibrationConfig:
    preset = config.presets()[config.preset]
    given = {field.name: getattr(config, field.name) for field in fields(CalibrationConfig)}
    return replace(preset, **{name: value for name, value in given.items() if value is not None})
