"""Datasets and loaders from a `DataConfig`. Clip i is a function of (seed, i): resuming is starting at another i."""

import logging
import os
from dataclasses import asdict, replace

import torch
from torch.utils.data import DataLoader, Dataset

from core.config import check_config
from core.errors import UserError
from data.clips.clip_cache import CachedClips, ensure_cache, ensure_surfaces
from data.clips.feature_cache import FeatureCache
from data.clips.rendered import RenderedPeople
from data.clips.videos import VideoFolder
from data.transforms import CROPS
from training.config import DataConfig
from training.interruption import ignore_stop_signals

logger = logging.getLogger(__name__)


def make_dataset(config: DataConfig, length: int) -> Dataset:
    """The clips that `config` describes, `length` of them; makes the cache first if there is to be one.

    Raises:
        UserError: the folder is missing or holds no clip that is long enough.
    """
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
    """The clips themselves, each made when it is asked for."""
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
        **shared,
    )
    left_out = dataset.left_out_summary()
    if left_out and os.environ.get("RANK", "0") == "0":
        logger.warning("data.root=%s: %s; `python prepare.py check` says more", config.root, left_out)
    return dataset


def check_pose_kind(config: DataConfig, kind: str) -> None:
    """Refuse to train a model on drawn figures that reads other pose images.

    Args:
        kind: what the model's pose images are.
    """
    if kind != "OpenPose" and config.pose_images is None:
        raise UserError(f"the model reads {kind} images; give data.pose_images=, a folder of the videos' own")


def broken_clips(dataset: Dataset) -> int:
    """Clips of a data set that turned out to be damaged while they were read, and are left out."""
    return dataset.broken_clips if isinstance(dataset, VideoFolder) else 0


def make_loader(dataset: Dataset, batch_size: int, workers: int, start: int = 0) -> DataLoader:
    """Batches of consecutive clips from clip `start` on; the order is random already, by the data sets' design.

    The loader has a random generator of its own: taking its seed from the global one would shift the noise of a
    resumed run against that of an unbroken one.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=range(start, len(dataset)),
        num_workers=workers,
        drop_last=True,
        generator=torch.Generator().manual_seed(start),
        persistent_workers=workers > 0,
        worker_init_fn=ignore_stop_signals,
        prefetch_factor=4 if workers else None,
    )
