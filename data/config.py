"""Configurations of poses, of rendered people and of the tasks of `prepare.py`; and one process's part of its work."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from omegaconf import MISSING

from core.config import LARGEST_SEED, LARGEST_SIDE, choice, device, number, numbers
from core.errors import UserError
from core.values import MANY

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
# What driving poses take from the reference's person, see `data.poses.retarget`.
RETARGET_MODES = ("off", "similarity", "bones")
# person: as large as the image allows, moved until everybody is inside; pad: the same, made smaller with black
# borders where they would not fit; centre: the middle of the image, whomever it cuts.
CROPS = ("person", "pad", "centre")
# Arrangements of data sets' files, see `data.preparation.layouts`; auto recognises them.
LAYOUT_NAMES = ("auto", "moore", "musepose", "tiktok", "ted", "ubc", "splits", "stableanimator", "frames", "videos")


@dataclass
class PoseConfig:
    """How poses are estimated where no pose file is given."""

    backend: str = choice("blazepose", ("blazepose", "dwpose"))  # dwpose needs ONNX files of your own, see weights
    weights: str | None = None  # of dwpose: "detector.onnx,pose.onnx"
    heavy: bool = False  # blazepose's heavy landmark network, about three times slower and less noisy
    max_persons: int = number(1, 1, 100)  # persons looked for in every image; the most prominent ones count
    # Of estimated poses: keypoints follow lines over this many frames (standard deviation); 0: off; null: 0.04 seconds
    smoothing: float | None = number(None, 0, 1000)
    threads: int = number(2, 1, 1024)  # CPU threads of the networks

    def check(self) -> None:
        if self.backend == "blazepose" and self.weights is not None:
            raise UserError("weights= belongs to pose.backend=dwpose; blazepose has its own files")


@dataclass
class DrivingPoseConfig(PoseConfig):
    """How poses are estimated, and what the driving ones take from the reference's person."""

    # bones: the lengths of its bones, at the driver's place and size; similarity: its place and size in one frame
    retarget: str = choice("off", RETARGET_MODES)
    # bones: standing height in the driver's, which two pictures do not tell; 1 = equally tall
    height_ratio: float = number(1.0, 0.01, 100)

    def check(self) -> None:
        super().check()
        if self.height_ratio != 1 and self.retarget != "bones":
            raise UserError(f"height_ratio={self.height_ratio:g} belongs to pose.retarget=bones")


@dataclass
class RetargetConfig:
    """`python -m data.poses.retarget`: pose files alone."""

    reference_poses: str = MISSING  # pose file of the reference, one frame
    driving_poses: str = MISSING  # pose file of the clip
    output: str = MISSING  # .npz, or .json for OpenPose's format
    # bones: the lengths of its bones, at the driver's place and size; similarity: its place and size in one frame
    mode: str = choice("bones", RETARGET_MODES[1:])
    height_ratio: float = number(1.0, 0.01, 100)  # bones: standing height in the driver's
    # width and height of the reference, for a file that does not state them
    reference_size: list[int] | None = numbers(None, 1, LARGEST_SIDE, length=2)
    # width and height of the frames, for a file that does not state them
    driving_size: list[int] | None = numbers(None, 1, LARGEST_SIDE, length=2)
    fps: float | None = number(None, 0.01, 1000)  # frames per second, for a clip that does not state them; null: 25

    def check(self) -> None:
        if self.height_ratio != 1 and self.mode != "bones":
            raise UserError(f"height_ratio={self.height_ratio:g} belongs to mode=bones")


@dataclass
class PeopleConfig:
    """Looks and cameras of rendered people."""

    height: list[float] = numbers([0.55, 1.05], 0.01, 10, length=2)  # least and greatest, standing, of the image's
    close_ups: float = number(0.12, 0, 1)  # share of clips that show the upper half of the body
    # Share of clips whose camera is turned by up to 90 degrees either way, reference included
    tilted: float = number(0.0, 0, 1)
    plain: float = number(PLAIN, 0, 1)  # share of fabrics without a pattern
    # Share of references with a person of another size, turn and place than in the clip, before the same background.
    reframed: float = number(0.0, 0, 1)

    def check(self) -> None:
        if self.height[0] > self.height[1]:
            raise UserError(f"height={self.height} must be the least and the greatest share of the image")


@dataclass
class PrepareConfig:
    """`prepare.py`: poses and masks of the clips of a data set."""

    source: str = MISSING  # folder of the data set, or its list of clips (`*_meta.json`)
    output: str = MISSING  # folder for poses, masks, records and manifest; may be the source itself
    layout: str = choice("auto", LAYOUT_NAMES)  # how the data set's files are arranged; auto recognises it
    # auto takes keypoints that come with the data set and estimates the others; estimate: all are estimated
    poses: str = choice("auto", ("auto", "estimate"))
    # auto takes masks that come with the data set, and estimates them where poses are estimated; none: no masks
    masks: str = choice("auto", ("auto", "estimate", "none"))
    # frames per second of folders of frames, which do not say so themselves
    frame_fps: float = number(30.0, 0.01, 1000)
    # share of the clips of a data set without parts that is kept for validation, by name
    heldout: float = number(0.0, 0, 1, excluded=1)
    origin: str | None = None  # words that every record carries: whose data these are, and their licence
    # This run takes every num_shards-th clip from index `shard` on, to spread the work over machines
    shard: int = number(0, 0, MANY)
    num_shards: int = number(1, 1, MANY)  # runs that share the work; processes of `accelerate launch` share it further
    pose: PoseConfig = field(default_factory=lambda: PoseConfig(smoothing=0.0))  # training takes poses as estimated

    def check(self) -> None:
        process_shard(self.shard, self.num_shards)


@dataclass
class CheckConfig:
    """`prepare.py check`: a prepared data set, or one that has not been prepared yet."""

    dataset: str = MISSING  # prepared folder, or a folder of videos or of a known layout
    # folder for report.json and report.md; null: a prepared data set's own, and none for others
    output: str | None = None
    layout: str = choice("auto", LAYOUT_NAMES)  # as for preparation, where there is no manifest
    frame_fps: float = number(30.0, 0.01, 1000)  # frames per second of folders of frames
    # width and height of the model's frame, to find people who would be cut and images to be enlarged
    size: list[int] | None = numbers(None, 8, LARGEST_SIDE, length=2)
    # person: as large as the image allows with everybody inside; pad: smaller with borders; centre: the image's middle
    crop: str = choice("person", CROPS)
    num_frames: int = number(1, 1, MANY)  # of a clip in training, to find videos that are too short for it
    stride: int = number(1, 1, MANY)  # a clip in training takes every stride-th frame
    decode: bool = True  # read every frame, which finds all damage; false reads headers alone
    workers: int = number(1, 1, 1024)  # processes that read clips


@dataclass
class FeatureConfig:
    """`prepare.py latents` and `prepare.py embeddings`."""

    dataset: str = MISSING  # prepared folder
    output: str | None = None  # folder of the features; null: `latents` or `embeddings` in the data set's folder
    model: str | None = None  # pipeline folder whose VAE or image encoder is used, as training's model.init
    vae: str | None = None  # a VAE folder in its place, for latents of new networks (model.vae)
    size: list[int] = numbers([512, 512], 8, LARGEST_SIDE, length=2)  # width and height, as data.size in training
    crop: str = choice("person", CROPS)  # as data.crop in training
    batch_size: int = number(8, 1, 100_000)  # frames at a time
    dtype: str = choice("float32", ("float32", "float16"))  # float16: half the size, losses then agree to three digits
    device: str = device()  # auto takes CUDA when there is one
    shard: int = number(0, 0, MANY)  # as for preparation
    num_shards: int = number(1, 1, MANY)  # as for preparation

    def check(self) -> None:
        process_shard(self.shard, self.num_shards)


@dataclass
class SamplesConfig:
    """Sample inputs of the demo."""

    output: str = "assets/samples"  # folder to write to
    seed: int = number(5, 0, LARGEST_SEED)  # of persons and scenes
    rotation: float = number(100.0, -360, 360)  # of the camera of the reference, degrees
    scale: float = number(0.55, 0.05, 5)  # of the person of the reference


@dataclass
class BakeConfig:
    """Bodies of the rendered people."""

    output: str = "assets/people"  # folder to write to
    train: int = number(72, 0, 10_000)  # bodies to train on
    heldout: int = number(16, 0, 10_000)  # bodies that numbers are reported on
    development: int = number(8, 0, 10_000)  # bodies that choices between settings are made on
    seed: int = number(0, 0, LARGEST_SEED)  # of the bodies' phenotypes


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
