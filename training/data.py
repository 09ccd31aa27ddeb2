"""Training clips: rendered or filmed, cached with their latents, in batches."""

import logging
import os
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from core.config import check_config
from core.errors import UserError
from core.files import complete_folder
from data.clips.caches import CachedClips, FeatureCache, FeatureInputs, ensure_cache, ensure_surfaces, write_arrays
from data.clips.rendered import RenderedPeople, clip_tensor, pixel_tensor
from data.clips.videos import VideoFolder
from data.config import CROPS
from data.poses.drawing import FIGURES
from data.poses.faces import crop_faces
from data.poses.poses import Poses
from data.preparation.clips import usable_clips
from data.preparation.manifest import has_manifest
from inference.features import network_digest
from models.animators.base import Animator
from models.vae import VAE, VideoVAE, clip_encode, vae_posterior
from tpc.augmentation import calibrate_item
from tpc.config import CalibratedTrainingConfig
from training.config import DataConfig, TrainConfig
from training.distributed import ignore_stop_signals

logger = logging.getLogger(__name__)


def make_dataset(config: DataConfig, length: int) -> Dataset:
    """Data set of `length` clips; makes the cache first if there is to be one."""
    check_config(config.people, "data.people")
    if config.pose_images is not None and (config.source == "rendered" or config.cache is not None):
        raise UserError(
            f"data.pose_images={config.pose_images} needs data.source=videos, and no data.cache, which keeps "
            "keypoints alone"
        )
    if config.crop not in CROPS:
        raise UserError(f"data.crop={config.crop} is not one of {', '.join(CROPS)}")
    if config.cache is None:
        return clips(config, length)
    made = replace(config, num_frames=config.cache_frames if config.num_frames == 1 else config.num_frames)
    of_clips = ("source", "root", "split", "size", "num_frames", "stride", "seed", "cache_clips")
    of_clips += ("people",) if config.source == "rendered" else ()
    description = {name: value for name, value in asdict(made).items() if name in of_clips}
    source = clips(made, config.cache_clips)
    if isinstance(source, VideoFolder):
        description |= {"crop": config.crop, "content": source.digest()}
    folder = ensure_cache(source, description, config.cache, config.workers)
    surfaces = ensure_surfaces(folder, source, config.workers) if config.cache_surfaces else None
    return CachedClips(folder, config.num_frames, length, config.seed, surfaces=surfaces)


def clips(config: DataConfig, length: int) -> Dataset:
    """Uncached clips, each made when it is asked for."""
    size = (config.size[0], config.size[1])
    shared = {"size": size, "num_frames": config.num_frames, "stride": config.stride, "seed": config.seed}
    if config.source == "rendered":
        return RenderedPeople(split=config.split, length=length, people=config.people, **shared)
    dataset = VideoFolder(
        config.root,
        length=length,
        crop=config.crop,
        split=config.split,
        latents=FeatureCache(config.latents, "latents") if config.latents else None,
        embeddings=FeatureCache(config.embeddings, "embeddings") if config.embeddings else None,
        pose_images=config.pose_images,
        sample_margin=config.sample_margin,
        **shared,
    )
    left_out = dataset.left_out_summary()
    if left_out and os.environ.get("RANK", "0") == "0":
        logger.warning("data.root=%s: %s; `python prepare.py check` says more", config.root, left_out)
    return dataset


class ArticulatedClips(Dataset):
    """Clips with what `calibrate_item` adds, in an order and with draws that are a function of (seed, i)."""

    def __init__(self, clips: Dataset, config: CalibratedTrainingConfig, seed: int) -> None:
        self.clips, self.config, self.seed = clips, config, seed

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = self.clips[index]
        state = np.random.SeedSequence([self.seed, index]).generate_state(1, np.uint64)[0]
        return item | calibrate_item(item, self.config, torch.Generator().manual_seed(int(state)))


class DrivenClips(Dataset):
    """Clips with pose images of another kind than OpenPose's, and with faces, (3, F, S, S) in [-1, 1].

    A clip in which no head is seen has black ones.
    """

    def __init__(self, clips: Dataset, kind: str | None, face_size: int | None) -> None:
        self.clips, self.kind, self.face_size = clips, kind, face_size  # kind None: the clips' own pose images

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = dict(self.clips[index])
        keypoints, size = item["keypoints"].numpy(), (item["poses"].shape[-1], item["poses"].shape[-2])
        if self.kind is not None:
            item["poses"] = drawn_poses(keypoints, size, self.kind).div_(255)
        if self.face_size is not None:
            frames = ((item["frames"] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
            poses = Poses(keypoints[:, None, :, :2], keypoints[:, None, :, 2], size, 1.0)
            faces = crop_faces(frames, poses, self.face_size)
            if faces is None:
                faces = np.zeros((len(frames), self.face_size, self.face_size, 3), np.uint8)
            item["faces"] = clip_tensor(list(faces))
        return item


def drawn_poses(keypoints: np.ndarray, size: tuple[int, int], kind: str) -> torch.Tensor:
    """Pose images (3, f, H, W) in [0, 255] of keypoints (f, 17, 3) with scores."""
    return pixel_tensor([FIGURES[kind](points[None, :, :2], points[None, :, 2], size) for points in keypoints])


def driven_clips(clips: Dataset, config: DataConfig, animator: Animator) -> Dataset:
    """The clips with what an animator is driven by."""
    kind = animator.pose_kind if animator.pose_kind != "OpenPose" and config.pose_images is None else None
    if kind is None and animator.face_size is None:
        return clips
    return DrivenClips(clips, kind, animator.face_size)


def check_pose_kind(config: DataConfig, kind: str) -> None:
    if kind not in FIGURES and config.pose_images is None:
        raise UserError(f"the model reads {kind} images; give data.pose_images=, a folder of the videos' own")


def check_features(config: TrainConfig, vae: VAE | VideoVAE, model: Animator) -> None:
    """Refuse cached features that are not what this run would compute itself.

    Raises `UserError` for another network, size, crop or video, too few clips, or settings that change the reference.
    """
    data = config.data
    given = {"latents": data.latents, "embeddings": data.embeddings}
    if not any(given.values()):
        return
    if data.source != "videos" or not has_manifest(data.root):
        raise UserError(f"data.latents= and data.embeddings= need a prepared data set; data.root={data.root} is none")
    if data.cache is not None:
        raise UserError("data.cache= keeps images, data.latents= and data.embeddings= what is made of them: use one")
    augmented = config.augmentation.composition.probability > 0 or config.augmentation.calibrated.probability > 0
    if data.embeddings and augmented:
        raise UserError(
            "data.embeddings= cannot be used with augmentation.composition or augmentation.calibrated, which change "
            "the reference or need its pixels at every step; leave it out (data.latents= may stay)"
        )
    if data.latents and isinstance(vae, VideoVAE):
        raise UserError("data.latents= holds latents of single images; a VAE of videos encodes clips, leave it out")
    if data.latents and model.alters_reference:
        raise UserError(f"data.latents= cannot be used: {type(model).__name__} takes latents of altered references")
    networks: dict[str, nn.Module] = {"latents": vae}
    if data.embeddings:
        if not model.takes_embeddings:
            raise UserError(f"data.embeddings= cannot be used: {type(model).__name__} needs the reference's image")
        networks["embeddings"] = model.image_encoder
        if any(parameter.requires_grad for parameter in model.image_encoder.parameters()):
            raise UserError(
                "data.embeddings= holds a frozen encoder's output; model.train_image_encoder must be false"
            )
    size = (data.size[0], data.size[1])
    usable, _ = usable_clips(Path(data.root), size, data.crop, data.split)
    for name, folder in given.items():
        if folder:
            digest = network_digest(networks[name])
            expected = (
                (c.clip.name, FeatureInputs.of(digest, c.clip, size, c.matrix, data.crop), c.clip.frames)
                for c in usable
            )
            FeatureCache(folder, name).require(expected, f"data.{name}")


def broken_clips(dataset: Dataset) -> int:
    """Number of damaged clips that were found while reading, and left out."""
    while isinstance(dataset, (ArticulatedClips, DrivenClips)):
        dataset = dataset.clips
    return dataset.broken_clips if isinstance(dataset, VideoFolder) else 0


def make_loader(
    dataset: Dataset, batch_size: int, workers: int, start: int = 0, pin_memory: bool = False
) -> DataLoader:
    """Batches of consecutive clips from clip `start` on; data sets are in random order already."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=range(start, len(dataset)),
        num_workers=workers,
        drop_last=True,
        pin_memory=pin_memory,
        # Its own: a seed from the global one would shift the noise of a resumed run against an unbroken one's.
        generator=torch.Generator().manual_seed(start),
        persistent_workers=workers > 0,
        worker_init_fn=ignore_stop_signals,
        prefetch_factor=4 if workers else None,
    )


def latents_folder(cache: Path, vae: VAE | VideoVAE, kind: str) -> Path:
    """Folder of the latents that this VAE makes of a clip cache's images, and a video VAE of its poses of a kind."""
    ending = f"-{kind}" if isinstance(vae, VideoVAE) else ""
    return cache / f"latents-{network_digest(vae)[:16]}{ending}"


@torch.no_grad()
def ensure_latents(clips: CachedClips, vae: VAE | VideoVAE, kind: str = "OpenPose", chunk: int = 32) -> Path:
    """Folder of the latents of a clip cache's images, which are encoded unless it exists.

    At most `chunk` images are encoded at a time, of videos as many whole clips as have about so many.
    """
    folder = latents_folder(clips.folder, vae, kind)
    if folder.is_dir():
        return folder
    count, images = clips.images.shape[:2]
    together = max(1, chunk // images)
    parts = (slice(start, start + together) for start in range(0, count, together))
    parts = tqdm(parts, desc=f"encoding cached clips, {together} at a time", total=-(-count // together))
    with complete_folder(folder) as temporary:
        if isinstance(vae, VideoVAE):
            write_arrays(temporary, count, (clip_latents(clips, part, vae, kind) for part in parts))
        else:
            write_arrays(temporary, count, (image_latents(clips, part, vae, chunk) for part in parts))
            if not np.load(temporary / "deviation.npy", mmap_mode="r").any():
                (temporary / "deviation.npy").unlink()
    return folder


def image_latents(clips: CachedClips, some: slice, vae: VAE, chunk: int) -> dict[str, np.ndarray]:
    """Mean and deviation (n, m, c, h, w) float16 of the images of some cached clips."""
    cached = clips.images[some]  # (n, m, H, W, 3)
    images = clip_tensor(cached.reshape(-1, *cached.shape[2:])).transpose(0, 1).to(vae.device)
    # On CPUs several times faster, and what a run in bfloat16 would compute.
    with torch.autocast("cpu", torch.bfloat16) if vae.device.type == "cpu" else nullcontext():
        posterior = vae_posterior(vae, images, chunk)
    parts = zip(("mean", "deviation"), posterior, strict=True)
    return {name: stored(part).reshape(*cached.shape[:2], *part.shape[1:]) for name, part in parts}


def clip_latents(clips: CachedClips, some: slice, vae: VideoVAE, kind: str) -> dict[str, np.ndarray]:
    """Mean (n, 1 + t, c, h, w) of reference and clip, and poses (n, t, c, h, w), of some cached clips, float16."""
    height, width = clips.images.shape[2:4]
    images = torch.stack([clip_tensor(list(part)) for part in clips.images[some]])  # (n, 3, 1 + f, H, W)
    drawn = [drawn_poses(points[1:], (width, height), kind) for points in clips.keypoints[some]]
    parts = images[:, :, :1], images[:, :, 1:], torch.stack(drawn).div_(127.5).sub_(1)
    reference, clip, poses = (clip_encode(vae, part.to(vae.device)).transpose(1, 2) for part in parts)
    return {"mean": stored(torch.cat([reference, clip], dim=1)), "poses": stored(poses)}


def stored(latents: torch.Tensor) -> np.ndarray:
    return latents.to(torch.float16).cpu().numpy()
