"""Configurations of poses, of rendered people and of the tasks of `prepare.py`; and one process's part of its work."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from omegaconf import MISSING

from core.config import check_choice, check_positive
from core.errors import UserError

Item = TypeVar("Item")
SAMPLES = Path(__file__).parents[1] / "assets" / "samples"  # made by data.people.samples
SPLITS = ("train", "heldout", "development")  # for training, for reported numbers, for choices between settings
PLAIN = 0.25  # share of fabrics without a pattern
COCO_KEYPOINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)  # fmt: skip
# Ways of fitting an image to a model's frame, see `data.transforms`.
FIT_MODES = ("cover", "contain")
# person: as large as the image allows, moved until everybody is inside; pad: the same, made smaller with black
# borders where they would not fit; centre: the middle of the image, whomever it cuts.
CROPS = ("person", "pad", "centre")
DTYPES = ("float32", "float16")


@dataclass
class PoseConfig:
    """Estimation of poses."""

    backend: str = "blazepose"  # or "dwpose", with ONNX files of your own
    weights: str | None = None  # of dwpose: "detector.onnx,pose.onnx"
    heavy: bool = False  # blazepose's heavy landmark network, about three times slower and less noisy
    max_persons: int = 1
    smoothing: float | None = None  # of estimated poses: see `Poses.smoothed`; frames, 0 is off
    threads: int = 2  # CPU threads of the networks

    def check(self) -> None:
        check_positive(self, "max_persons")
        if self.smoothing is not None and not self.smoothing >= 0:
            raise UserError(f"smoothing={self.smoothing} must be 0 or more frames")
        if self.backend not in ("blazepose", "dwpose"):
            raise UserError(f"backend={self.backend} must be blazepose or dwpose")
        if self.backend == "blazepose" and self.weights is not None:
            raise UserError("weights= belongs to pose.backend=dwpose; blazepose has its own files")


@dataclass
class PeopleConfig:
    """Looks and cameras of rendered people."""

    height: list[float] = field(default_factory=lambda: [0.55, 1.05])  # least and greatest, standing, of the image's
    close_ups: float = 0.12  # share of clips that show the upper half of the body
    tilted: float = 0.0  # share of clips whose camera is turned by up to 90 degrees either way, reference included
    plain: float = PLAIN  # share of fabrics without a pattern
    # Share of references with a person of another size, turn and place than in the clip, before the same background.
    reframed: float = 0.0

    def check(self) -> None:
        if len(self.height) != 2 or not 0 < self.height[0] <= self.height[1]:
            raise UserError(f"height={self.height} must be the least and the greatest share of the image")
        for share in ("close_ups", "tilted", "plain", "reframed"):
            if not 0 <= getattr(self, share) <= 1:
                raise UserError(f"{share}={getattr(self, share)} must be a share between 0 and 1")


@dataclass
class PrepareConfig:
    """`prepare.py`: poses and masks of the clips of a data set."""

    source: str = MISSING  # folder of the data set, or its list of clips (`*_meta.json`)
    output: str = MISSING  # folder for poses, masks, records and manifest; may be the source itself
    layout: str = "auto"  # a key of `data.preparation.layouts.LAYOUTS`; auto recognises it
    poses: str = "auto"  # auto takes keypoints that come with the data set and estimates the others; estimate: all
    masks: str = "auto"  # auto takes given ones, and estimates them where poses are estimated; estimate; none
    frame_fps: float = 30.0  # frames per second of folders of frames, which do not say so themselves
    heldout: float = 0.0  # share of the clips of a data set without parts that is kept for validation, by name
    origin: str | None = None  # words that every record carries: whose data these are, and their licence
    shard: int = 0  # this run takes every num_shards-th clip from index `shard` on, to spread work over machines;
    num_shards: int = 1  # processes of `accelerate launch` share it further
    pose: PoseConfig = field(default_factory=lambda: PoseConfig(smoothing=0.0))  # training takes poses as estimated

    def check(self) -> None:
        check_choice(self, "poses", ("auto", "estimate"))
        check_choice(self, "masks", ("auto", "estimate", "none"))
        if not self.frame_fps > 0:
            raise UserError(f"frame_fps={self.frame_fps} must be above 0")
        if not 0 <= self.heldout < 1:
            raise UserError(f"heldout={self.heldout} must be at least 0 and below 1")


@dataclass
class CheckConfig:
    """`prepare.py check`: a prepared data set, or one that has not been prepared yet."""

    dataset: str = MISSING  # prepared folder, or a folder of videos or of a known layout
    output: str | None = None  # for report.json and report.md; None: a prepared data set's own, none for others
    layout: str = "auto"  # as for preparation, where there is no manifest
    frame_fps: float = 30.0
    size: list[int] | None = None  # the model's frame, to find people who would be cut and images to be enlarged
    crop: str = "person"
    num_frames: int = 1  # of a clip in training, to find videos that are too short for it
    stride: int = 1
    decode: bool = True  # read every frame, which finds all damage; false reads headers alone
    workers: int = 1  # processes that read clips

    def check(self) -> None:
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise UserError(f"size={self.size} must be a width and a height in pixels, such as size=[512,512]")
        check_choice(self, "crop", CROPS)
        check_positive(self, "num_frames", "stride", "workers")


@dataclass
class FeatureConfig:
    """`prepare.py latents` and `prepare.py embeddings`."""

    dataset: str = MISSING  # prepared folder
    output: str | None = None  # folder of the features; None: `latents` or `embeddings` in the data set's folder
    model: str | None = None  # pipeline folder whose VAE or image encoder is used, as training's model.init
    vae: str | None = None  # a VAE folder in its place, for latents of new networks (model.vae)
    size: list[int] = field(default_factory=lambda: [512, 512])  # as data.size in training
    crop: str = "person"  # as data.crop
    batch_size: int = 8  # frames
    dtype: str = "float32"  # or float16: half the size, losses then agree to three digits
    device: str = "auto"  # takes CUDA when there is one
    shard: int = 0  # as for preparation
    num_shards: int = 1

    def check(self) -> None:
        if len(self.size) != 2 or min(self.size) < 8:
            raise UserError(f"size={self.size} must be a width and a height of at least 8 pixels")
        check_choice(self, "dtype", DTYPES)
        check_choice(self, "crop", CROPS)
        check_positive(self, "batch_size")


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`.

    No process waits for another, so none can hang when another dies; what is left is done by running again.
    """

    index: int = 0
    count: int = 1
    row: int = 0  # of this process's progress bar among those of the same machine

    def part(self, items: Sequence[Item]) -> list[Item]:
        return list(items[self.index :: self.count])

    def __str__(self) -> str:
        return f" (part {self.index + 1} of {self.count})" if self.count > 1 else ""


def process_shard(shard: int, num_shards: int) -> Shard:
    """Part of this process: shard `shard` of `num_shards`, divided among the processes of `accelerate launch`."""
    if num_shards < 1 or not 0 <= shard < num_shards:
        raise UserError(f"shard={shard} must be 0 or more and below num_shards={num_shards}")
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return Shard(shard * processes + rank, num_shards * processes, int(os.environ.get("LOCAL_RANK", "0")))
