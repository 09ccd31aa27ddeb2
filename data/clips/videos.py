"""Clips of filmed people for training: a folder that `prepare.py` has prepared, or videos with pose files beside them.

Items are those of `data.clips.rendered`. With cached features (`data.clips.caches`) images that nothing else
needs are not decoded: latents add `latent_mean` and `latent_deviation` (c, F, h, w) and `reference_latents` (c, h, w)
and take `frames` away, embeddings add `reference_context` (1, channels), and both together take `reference` away.
"""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from core.errors import UserError
from data.clips.caches import FeatureCache
from data.clips.rendered import LabelledImage, check_index, check_positive, clip_item, latent_item, pixel_tensor
from data.config import CROPS
from data.poses.poses import Poses
from data.preparation.clips import UsableClip, read_frames, read_union, summarize, usable_clips
from data.preparation.layouts import video_named
from data.preparation.manifest import Clip, Fingerprint
from data.transforms import apply_fit, resize_matrix
from data.video.files import VideoReader
from data.video.images import list_images

logger = logging.getLogger(__name__)


class VideoFolder(Dataset):
    """Clips of a folder of filmed people. Item i is a function of the arguments, the files and i alone.

    Without a manifest, `name.mp4` (any format that can be read) goes with `name.npz` (`data.poses.poses.Poses`) and,
    if there is one, with the folder `name_masks`. With several persons in a video, all are in the images and masks,
    and the keypoints are those of the first.

    Clips and references are taken from frames in which somebody is visible. Clips that are too short, have changed,
    cannot be read, or show people who do not fit into the crop are left out; `left_out` says why.

    Args:
        root: the folder, or its manifest; videos may lie in folders below it.
        length: number of items, a walk through all clips again and again, each time in another order; None: as many
            as there are clips.
        sample_margin: least distance in frames from the reference to the clip, as far as possible in shorter videos;
            0: any frame but the clip's.
        split: "train" leaves out clips that are held out, "heldout" takes only them, if there are any; None: all.
        latents, embeddings: features to read in place of images.
        pose_images: folder of the clips' pose images by another tool, see `pose_images_of`; None: figures are drawn.
    """

    def __init__(
        self,
        root: str | Path,
        size: tuple[int, int] = (512, 512),
        num_frames: int = 1,
        stride: int = 1,
        seed: int = 0,
        length: int | None = None,
        crop: str = "person",
        split: str | None = None,
        latents: FeatureCache | None = None,
        embeddings: FeatureCache | None = None,
        pose_images: str | Path | None = None,
        sample_margin: int = 0,
    ) -> None:
        check_positive(num_frames=num_frames, stride=stride, length=1 if length is None else length, size=min(size))
        if crop not in CROPS:
            raise ValueError(f"crop must be one of {CROPS}, got {crop!r}")
        self.root, self.size, self.num_frames, self.stride, self.seed = Path(root), size, num_frames, stride, seed
        self.crop, self.latents, self.embeddings, self.sample_margin = crop, latents, embeddings, sample_margin
        self.pose_images = None if pose_images is None else Path(pose_images)
        clips, self.left_out = usable_clips(self.root, size, crop, split)
        self.clips: list[UsableClip] = []
        for usable in clips:
            if usable.clip.frames < self.span:
                self.left_out[usable.clip.name] = f"too short: below {self.span} frames"
            elif self.pose_images is not None and pose_images_of(self.pose_images, usable.clip) is None:
                self.left_out[usable.clip.name] = f"without pose images: none in {self.pose_images}"
            else:
                self.clips.append(usable)
        if not self.clips:
            raise self._nothing_usable(max((usable.clip.frames for usable in clips), default=0))
        self.length = len(self.clips) if length is None else length
        # A clip that turns out to be damaged is left out from then on, by all loader processes.
        self._broken = torch.zeros(len(self.clips), dtype=torch.bool).share_memory_()

    @property
    def span(self) -> int:
        """Number of frames from the first to the last of an item's clip."""
        return (self.num_frames - 1) * self.stride + 1

    @property
    def broken_clips(self) -> int:
        """Number of clips found to be damaged while they were read, by this or any loader process."""
        return int(self._broken.sum())

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        check_index(index, self.length)
        problem = None
        for chosen in self._candidates(index):
            if self._broken[chosen]:
                continue
            usable = self.clips[chosen]
            try:
                return self._item(usable, np.random.default_rng([self.seed, index, chosen]))
            except UserError as error:
                problem = error
                self._broken[chosen] = True
                left_out = (usable.clip.name, self.broken_clips, len(self.clips))
                logger.warning("clip %s is left out from now on (%d of %d are): %s", *left_out, error)
        raise UserError(
            f"root={self.root}: none of {len(self.clips)} clips can be read, the last because {problem}; "
            f"`python prepare.py check dataset={self.root}` lists what to do"
        )

    def digest(self) -> str:
        digest = hashlib.sha256()
        for usable in self.clips:
            clip = usable.clip
            video = clip.fingerprint or Fingerprint.of(clip.video)
            digest.update(f"{clip.name} {video.sha256} {usable.matrix.tolist()}\n".encode())
        return digest.hexdigest()

    def left_out_summary(self) -> str | None:
        """One line about the clips that are left out, or None without any."""
        return summarize(self.left_out, len(self.clips) + len(self.left_out)) if self.left_out else None

    def _candidates(self, index: int) -> Iterator[int]:
        """Index of the clip whose turn it is, then the others in an order of their own, should it be broken."""
        epoch, position = divmod(index, len(self.clips))  # every epoch in another order
        yield int(np.random.default_rng([self.seed, epoch]).permutation(len(self.clips))[position])
        yield from np.random.default_rng([self.seed, epoch, position]).permutation(len(self.clips)).tolist()

    def _item(self, usable: UsableClip, rng: np.random.Generator) -> dict[str, Tensor]:
        clip = usable.clip
        poses = Poses.load(clip.poses)
        if poses.frames != clip.frames or poses.size != clip.size:
            raise UserError(f"{clip.poses} is not of its video any more; prepare it again")
        chosen = self._choose(poses, rng)  # the reference, then the frames
        poses = poses[chosen].mapped(usable.matrix, self.size).clipped()
        masks = [read_union(clip.masks, frame, clip.size) for frame in chosen]
        border = "zero" if self.crop == "pad" else "replicate"  # of the frame beyond the image
        masks = [apply_fit(mask, usable.matrix, self.size, border) > 127 for mask in masks]
        # Latents take the place of the frames, latents and embeddings together that of the reference too.
        wanted = chosen if self.latents is None else chosen[:1] if self.embeddings is None else []
        images = [apply_fit(image, usable.matrix, self.size, border) for image in read_frames(clip, wanted)]
        missing = [None] * (len(chosen) - len(images))
        columns = ([*images, *missing], masks, poses.keypoints, poses.scores)
        labelled = [LabelledImage(*labels) for labels in zip(*columns, strict=True)]
        item = clip_item(labelled[0], labelled[1:])
        if self.pose_images is not None:
            source = pose_images_of(self.pose_images, clip)
            item["poses"] = read_pose_images(source, clip, chosen[1:], usable.matrix, self.size)
        if self.latents is not None:
            item |= latent_item(**self.latents.read(clip.name, chosen))
        if self.embeddings is not None:
            item["reference_context"] = self.embeddings.read(clip.name, chosen[:1])["embedding"]
        return item

    def _choose(self, poses: Poses, rng: np.random.Generator) -> list[int]:
        """Indices of a reference and the frames of a clip, at random among those in which somebody is visible."""
        visible = poses.present(0.3).any(axis=1)  # as pose images show it
        offsets = np.arange(0, self.span, self.stride)
        windows = np.arange(poses.frames - self.span + 1)[:, None] + offsets  # (starts, num_frames)
        starts = np.flatnonzero(visible[windows].all(axis=1))
        if not len(starts):
            raise UserError(f"no {self.num_frames} frames at stride {self.stride} show somebody throughout")
        shown = np.flatnonzero(visible)
        farthest = np.maximum(starts - shown[0], shown[-1] - (starts + offsets[-1]))  # of references, in frames
        if (farthest >= self.sample_margin).any():
            starts = starts[farthest >= self.sample_margin]
        frames = (starts[rng.integers(len(starts))] + offsets).tolist()
        distance = np.maximum(frames[0] - shown, shown - frames[-1])  # below 0 within the clip
        margin = min(self.sample_margin, distance.max())
        others = shown[distance >= margin] if margin > 0 else np.setdiff1d(shown, frames)
        others = others.tolist() or frames
        return [others[rng.integers(len(others))], *frames]

    def _nothing_usable(self, longest: int) -> UserError:
        text = f"root={self.root} holds no clip that can be used: {summarize(self.left_out, len(self.left_out))}"
        if any(reason.startswith("too short") for reason in self.left_out.values()):
            text += (
                f"; num_frames={self.num_frames} at stride={self.stride} needs {self.span} frames, "
                f"the longest clip has {longest}"
            )
        if any("does not fit" in reason for reason in self.left_out.values()):
            text += "; crop=pad shows them whole, or choose a size of the videos' shape"
        return UserError(text)


def pose_images_of(folder: Path, clip: Clip) -> Path | None:
    """Video or folder under the clip's name of pose images by another tool, such as DensePose; None: there is none."""
    path = folder / clip.name
    if path.is_dir() and list_images(path):
        return path
    return video_named(path)


def read_pose_images(
    source: Path, clip: Clip, frames: list[int], matrix: np.ndarray, size: tuple[int, int]
) -> torch.Tensor:
    """Pose images of some frames, (3, f, H, W) in [0, 1]; 0 beyond the image.

    They are cut as the clip's own images are: the matrix (3, 3) maps the clip's pixels to those of the result, of
    (width, height). `UserError` for another number of images than frames, or another shape.
    """
    with VideoReader(source, clip.fps if source.is_dir() else None, "pose_images") as reader:
        width, height = reader.size
        if len(reader) != clip.frames or abs(width / height * clip.size[1] / clip.size[0] - 1) > 0.02:
            raise UserError(
                f"{source} has {len(reader)} pose images of {width}x{height}, {clip.name} has {clip.frames} frames "
                f"of {clip.size[0]}x{clip.size[1]}"
            )
        images = reader.get(frames)
    matrix = (matrix @ resize_matrix((width, height), clip.size))[:2]
    # Nearest, not averaged: pixels may hold coordinates on the body.
    return pixel_tensor([cv2.warpAffine(image, matrix, size, flags=cv2.INTER_NEAREST) for image in images]).div_(255)
