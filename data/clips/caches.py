"""Clips kept on disk: rendered or decoded once, read at random ever after.

A cache is a folder of memory-mapped arrays for n clips of m images (the reference first, then the frames):

    pictures.npy (n, m, H, W, 3) uint8      masks.npy  (n, m, H, W) uint8, 0 or 1
    keypoints.npy  (n, m, 17, 3) float32      cache.json what it was made from
    latents-DIGEST/  latents of the images by one VAE: mean.npy and, where there is one, deviation.npy
                     (n, m, c, h, w) float16; by a VAE of videos mean.npy (n, 1 + t, c, h, w) of reference and clip,
                     and poses.npy (n, t, c, h, w) of pose images
    surfaces/        surface maps of rendered people: surfaces.npy (n, m, h, w, 3) float16

It is reused only when `cache.json` says it was made from the same description; otherwise it is made anew.

Features of filmed clips by frozen networks are one safetensors file a clip, with a row for every frame:

    latents      mean (frames, c, h, w) and, where the VAE has a posterior, deviation (frames, c, h, w); scaled
    embeddings   embedding (frames, channels)

Its metadata say what it was computed from; a file counts only while all of that is unchanged.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from core.errors import UserError
from core.files import complete_file, complete_folder
from core.terminal import ignore_interrupts
from data.clips.rendered import RenderedPeople, check_index, latent_item
from data.people.renderer import render_surface
from data.poses.drawing import draw_pose
from data.preparation.manifest import Clip

INDEX = "cache.json"


def ensure_cache(clips: Dataset, description: dict[str, Any], folder: str | Path, workers: int) -> Path:
    """Make the cache of all clips of a data set in `folder`, unless one of this description is there already.

    The description holds everything the items depend on, as JSON values.
    """
    folder = Path(folder)
    index = folder / INDEX
    if index.is_file() and json.loads(index.read_text(encoding="utf-8")) == description:
        return folder
    print(f"making the cache {folder} of {len(clips)} clips, once", flush=True)
    with complete_folder(folder) as temporary:
        write_arrays(temporary, len(clips), _packed(clips, pack_clip, "caching clips", workers))
        (temporary / INDEX).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return folder


def write_arrays(folder: Path, count: int, parts: Iterable[dict[str, np.ndarray]]) -> None:
    """Write a file NAME.npy of `count` rows for every name, of parts that follow each other, (n, ...) each."""
    arrays: dict[str, np.memmap] = {}
    row = 0
    for part in parts:
        for name, rows in part.items():
            if name not in arrays:
                shape = (count, *rows.shape[1:])
                arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", rows.dtype, shape)
            arrays[name][row : row + len(rows)] = rows
        row += len(rows)
    for array in arrays.values():
        array.flush()


def _packed(
    items: Dataset, pack: Callable[[Any], dict[str, np.ndarray]], title: str, workers: int
) -> Iterator[dict[str, np.ndarray]]:
    """What `pack` makes of every item, one row at a time."""
    loader = DataLoader(items, batch_size=None, num_workers=workers, worker_init_fn=ignore_interrupts)
    for item in tqdm(loader, desc=title, total=len(items)):
        yield {name: value[None] for name, value in pack(item).items()}


def pack_clip(item: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Arrays of a cache for one item of a data set, without the leading axis."""
    frames = torch.cat([item["reference"][:, None], item["frames"]], dim=1)  # (3, m, H, W)
    masks = torch.cat([item["reference_mask"][:, None], item["masks"]], dim=1)  # (1, m, H, W)
    return {
        "pictures": ((frames + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy(),
        "masks": masks[0].byte().numpy(),
        "keypoints": torch.cat([item["reference_keypoints"][None], item["keypoints"]]).numpy(),
    }


class CachedClips(Dataset):
    """Clips of a cache, in an order and with references that are a function of (seed, i).

    Items are those of `data.clips.rendered`, plus "clip" (index of the cached clip) and "images" (indices of the
    reference and the frames among its images), int64.

    A `num_frames` of 1 pairs two different images of a cached clip at random; otherwise it is as was cached. The cache
    is walked through again and again, each time in another order. With the file `surfaces`, items also have "surfaces"
    (3, F, h, w) and "reference_surface" (3, h, w), see `data.people.renderer.render_surface`.
    """

    def __init__(
        self, folder: str | Path, num_frames: int, length: int, seed: int = 0, surfaces: Path | None = None
    ) -> None:
        self.folder, self.num_frames, self.length, self.seed = Path(folder), num_frames, length, seed
        self.images = np.load(self.folder / "pictures.npy", mmap_mode="r")
        self.masks = np.load(self.folder / "masks.npy", mmap_mode="r")
        self.keypoints = np.load(self.folder / "keypoints.npy", mmap_mode="r")
        self.latents: dict[str, np.ndarray] = {}
        self.surfaces = None if surfaces is None else np.load(surfaces, mmap_mode="r")
        cached = self.images.shape[1] - 1
        if num_frames not in (1, cached):
            raise ValueError(f"num_frames must be 1 or {cached}, the number that was cached; got {num_frames}")

    def with_latents(self, folder: Path) -> "CachedClips":
        """Copy of the data set with the images' latents, whose items also have those of `latent_item`."""
        clips = copy(self)
        clips.latents = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
        return clips

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        check_index(index, self.length)
        clip, chosen = self.choose(index)
        height, width = self.images.shape[2:4]
        # (3, 1 + F, H, W), (1 + F, H, W) and (1 + F, 17, 3)
        images = torch.from_numpy(self.images[clip][chosen]).permute(3, 0, 1, 2).float() / 127.5 - 1
        masks = torch.from_numpy(self.masks[clip][chosen]).float()
        keypoints = self.keypoints[clip][chosen]
        video = "poses" in self.latents  # whose latents are of the clip as a whole
        latents = {
            name: torch.from_numpy(array[clip].copy() if video else array[clip][chosen])
            for name, array in self.latents.items()
        }
        pose_latents = latents.pop("poses", None)
        poses = [draw_pose(points[None, :, :2], points[None, :, 2], (width, height)) for points in keypoints[1:]]
        item = {
            "reference": images[:, 0],
            "frames": images[:, 1:],
            "poses": torch.from_numpy(np.stack(poses)).permute(3, 0, 1, 2).float() / 255,
            "reference_mask": masks[:1],
            "masks": masks[None, 1:],
            "reference_keypoints": torch.from_numpy(keypoints[0]),
            "keypoints": torch.from_numpy(keypoints[1:]),
            "clip": torch.tensor(clip),
            "images": torch.from_numpy(chosen),
        }
        if latents:
            item |= latent_item(**latents)
        if pose_latents is not None:
            item["pose_latents"] = pose_latents.transpose(0, 1).float()  # (c, t, h, w)
        if self.surfaces is not None:
            maps = torch.from_numpy(self.surfaces[clip][chosen]).permute(3, 0, 1, 2).float()
            item |= {"reference_surface": maps[:, 0], "surfaces": maps[:, 1:]}
        return item

    def choose(self, index: int) -> tuple[int, np.ndarray]:
        """Index of the cached clip of item `index`, and indices of the reference and the frames among its images."""
        clips, images = self.images.shape[:2]
        epoch, position = divmod(index, clips)
        clip = int(np.random.default_rng([self.seed, epoch]).permutation(clips)[position])
        if self.num_frames > 1:
            return clip, np.arange(images)
        return clip, np.random.default_rng([self.seed, epoch, position]).permutation(images)[:2]


class SurfaceMaps(Dataset):
    """Surface maps of the clips of `RenderedPeople`, (1 + frames, h, w, 3) float16, half as large as the images."""

    def __init__(self, clips: RenderedPeople) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> np.ndarray:
        scene = self.clips.scene(index)
        size = (scene.size[0] // 2, scene.size[1] // 2)
        seen = [(scene.reference_pose, scene.reference_camera or scene.camera)]
        seen += [(pose, scene.camera) for pose in scene.poses]
        return np.stack([render_surface(scene.person, pose, camera, size) for pose, camera in seen]).astype(np.float16)


def ensure_surfaces(cache: Path, clips: RenderedPeople, workers: int) -> Path:
    """File of the surface maps of all clips of a cache that was made of `clips`, made unless it is there already."""
    folder = cache / "surfaces"
    if not folder.is_dir():
        with complete_folder(folder) as temporary:
            maps = SurfaceMaps(clips)
            rows = _packed(maps, lambda item: {"surfaces": item.numpy()}, "surface maps", workers)
            write_arrays(temporary, len(maps), rows)
    return folder / "surfaces.npy"


KINDS = ("latents", "embeddings")


@dataclass(frozen=True)
class FeatureInputs:
    """Inputs of the features of a clip, as text; messages name the field that has changed."""

    network: str  # digest of the network's weights and settings
    video: str  # digest of the video's content
    size: str  # width x height of the model's frame
    crop: str  # how the video is cut to it

    @classmethod
    def of(cls, network: str, clip: Clip, size: tuple[int, int], matrix: np.ndarray, crop: str) -> "FeatureInputs":
        """Inputs of a prepared clip's features; `matrix` (3, 3) maps the clip's pixels to the model's frame."""
        numbers = " ".join(f"{value:.6f}" for value in (matrix[0, 0], *matrix[:2, 2]))
        # The mode of cropping decides what lies beyond the image's edge.
        border = "black" if crop == "pad" else "none"
        return cls(network, clip.fingerprint.sha256, f"{size[0]}x{size[1]}", f"{numbers} border {border}")


class FeatureCache:
    """A folder of features of one kind, "latents" or "embeddings"; it need not exist."""

    def __init__(self, folder: str | Path, kind: str):
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        self.folder, self.kind = Path(folder), kind

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def problem(self, name: str, inputs: FeatureInputs, frames: int) -> str | None:
        """Reason why the features of a clip cannot be used, such as "other size"; None when they can."""
        try:
            with safe_open(self.path(name), "pt") as file:
                stored = file.metadata() or {}
        except FileNotFoundError:
            return "missing"
        except (SafetensorError, OSError):
            return "damaged"
        if stored.get("kind") != self.kind:
            return f"no {self.kind}"
        changed = [key for key, value in asdict(inputs).items() if stored.get(key) != value]
        if not changed and stored.get("frames") != str(frames):
            changed = ["number of frames"]
        return f"other {changed[0]}" if changed else None

    def write(self, name: str, features: dict[str, Tensor], inputs: FeatureInputs) -> None:
        """Write the features of a clip, tensors with a row for each frame; the file appears when it is complete."""
        frames = {len(value) for value in features.values()}
        if len(frames) != 1:
            raise ValueError(f"features must have a row for each frame, got {sorted(frames)} rows")
        metadata = {"kind": self.kind, "frames": str(frames.pop()), **asdict(inputs)}
        with complete_file(self.path(name)) as temporary:
            # Written by ourselves: the library's own writing leaves a file that others may not read.
            temporary.write_bytes(save({key: value.contiguous().cpu() for key, value in features.items()}, metadata))

    def read(self, name: str, frames: Sequence[int]) -> dict[str, Tensor]:
        """Features of some frames of a clip, in this order; `UserError` when the file is missing or damaged."""
        try:
            with safe_open(self.path(name), "pt") as file:
                found = {}
                for key in file.keys():  # noqa: SIM118 - the file is no dictionary
                    rows = file.get_slice(key)  # the others are not read
                    found[key] = torch.cat([rows[frame : frame + 1] for frame in frames])
                return found
        except (FileNotFoundError, SafetensorError, OSError) as error:
            raise UserError(f"{self.path(name)} cannot be read as {self.kind}: {error}") from None

    def require(self, clips: Iterator[tuple[str, FeatureInputs, int]], argument: str) -> None:
        """Refuse a cache that some of the clips (name, inputs and number of frames of each) cannot use."""
        reasons: dict[str, list[str]] = {}
        clips = list(clips)
        for name, inputs, frames in clips:
            problem = self.problem(name, inputs, frames)
            if problem is not None:
                reasons.setdefault(problem, []).append(name)
        if reasons:
            told = "; ".join(f"{reason}: {len(names)} ({names[0]})" for reason, names in reasons.items())
            raise UserError(
                f"{argument}={self.folder} does not serve {sum(map(len, reasons.values()))} of {len(clips)} clips "
                f"as they are now: {told}; run `python prepare.py {self.kind}` again with this model, "
                f"dataset, size and crop"
            )
