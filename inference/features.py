"""Making and checking cached features: VAE latents and image embeddings of every frame of a prepared data set."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from core.config import check_config
from core.errors import UserError
from core.files import remove_partial
from core.processes import choose_device
from data.clips.caches import FeatureCache, FeatureInputs
from data.clips.rendered import clip_tensor
from data.config import FeatureConfig, Shard
from data.preparation.clips import UsableClip, usable_clips
from data.preparation.manifest import has_manifest
from data.transforms import apply_fit
from data.video.files import VideoReader
from models.animators.animate_anyone.model import image_context
from models.animators.registry import component_classes, load_component, read_index
from models.pipeline import AnimationPipeline
from models.vae import VideoVAE, load_vae, vae_posterior, vae_scale_factor

# What of a VAE the latents do not depend on.
_DECODER = ("decoder.", "post_quant_conv.")
_SETTINGS = ("_class_name", "scaling_factor", "image_size", "patch_size", "hidden_act")
Features = dict[str, Tensor]


@dataclass
class FeaturesMade:
    """Numbers of clips by outcome."""

    folder: Path
    current: int = 0
    made: int = 0
    again: Counter = field(default_factory=Counter)  # of those made, by the reason why older features were outdated
    left_out: dict[str, str] = field(default_factory=dict)  # reason by name


def make_features(kind: str, config: FeatureConfig, shard: Shard) -> FeaturesMade:
    """Compute missing and outdated "latents" or "embeddings" of the clips of a prepared data set."""
    check_config(config)
    dataset, size = Path(config.dataset), (config.size[0], config.size[1])
    if not has_manifest(dataset):
        raise UserError(f"dataset={dataset} is not prepared; run `python prepare.py source=... output=...` first")
    network = load_network(kind, config)
    if kind == "latents" and (size[0] % vae_scale_factor(network) or size[1] % vae_scale_factor(network)):
        raise UserError(f"size={config.size} must be multiples of {vae_scale_factor(network)}, the VAE's factor")
    digest = network_digest(network)
    network.to(choose_device(config.device, "float32", shard.row)[0])
    root = dataset if dataset.is_dir() else dataset.parent
    cache = FeatureCache(config.output or root / kind, kind)
    clips, left_out = usable_clips(dataset, size, config.crop)
    if not clips:
        raise UserError(f"dataset={dataset} has no clip that can be used: {next(iter(left_out.values()))}")
    made = FeaturesMade(cache.folder, left_out=dict(left_out))
    frames = sum(usable.clip.frames for usable in shard.part(clips))
    print(f"{kind} of {frames} frames of {size[0]} x {size[1]} pixels, in {cache.folder}{shard}", flush=True)
    encode = _encoder(kind, network, getattr(torch, config.dtype))
    for usable in tqdm(shard.part(clips), desc=f"making {kind}", unit="clip", position=shard.row):
        clip = usable.clip
        inputs = FeatureInputs.of(digest, clip, size, usable.matrix, config.crop)
        problem = cache.problem(clip.name, inputs, clip.frames)
        if problem is None:
            made.current += 1
            continue
        try:
            features = clip_features(usable, size, config.crop, config.batch_size, encode)
        except UserError as error:
            made.left_out[clip.name] = str(error)
            continue
        try:
            remove_partial(cache.path(clip.name))
            cache.write(clip.name, features, inputs)
        except OSError as error:
            raise UserError(f"{cache.folder} cannot be written ({error.strerror}); the same command goes on") from None
        made.made += 1
        if problem != "missing":
            made.again[problem] += 1
    return made


@torch.inference_mode()
def clip_features(
    usable: UsableClip, size: tuple[int, int], crop: str, batch_size: int, encode: Callable[[Tensor], Features]
) -> Features:
    """Features of all frames of a clip, cut as training cuts them; `encode` takes (n, 3, H, W) in [-1, 1]."""
    clip, parts = usable.clip, []
    border = "zero" if crop == "pad" else "replicate"
    with VideoReader(clip.video, clip.fps if clip.video.is_dir() else None) as reader:
        frames = (apply_fit(frame, usable.matrix, size, border) for frame in reader)
        while images := list(islice(frames, batch_size)):
            parts.append(encode(clip_tensor(images).transpose(0, 1)))
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    rows = len(next(iter(found.values())))
    if rows != clip.frames:
        raise UserError(f"{clip.video} has {rows} frames, its poses {clip.frames}; prepare it again")
    return found


def load_network(kind: str, config: FeatureConfig) -> nn.Module:
    """The VAE or the image encoder, float32, frozen."""
    if kind == "latents" and config.vae is not None:
        return load_vae(config.vae, "vae").requires_grad_(False)
    if config.model is None:
        raise UserError("model= (a pipeline folder) is required" + (" or vae=, a VAE folder" * (kind == "latents")))
    folder, name = Path(config.model), {"latents": "vae", "embeddings": "image_encoder"}[kind]
    classes = component_classes(AnimationPipeline, name)
    network = load_component(folder, name, read_index(folder).get(name), classes, torch.float32)
    return network.requires_grad_(False).eval()


def network_digest(network: nn.Module) -> str:
    """SHA-256 over the weights as float32 and the settings that features depend on; a VAE's decoder does not count."""
    digest = hashlib.sha256()
    settings = {name: getattr(network.config, name, None) for name in _SETTINGS}
    if isinstance(network, VideoVAE):  # whose latents are shifted and scaled channel by channel
        settings |= {name: network.config[name] for name in ("latents_mean", "latents_std")}
    digest.update(json.dumps({**settings, "class": type(network).__name__}, sort_keys=True).encode())
    for name, value in sorted(network.state_dict().items()):
        if not name.startswith(_DECODER):
            digest.update(name.encode())
            digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _encoder(kind: str, network: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Features]:
    device = next(network.parameters()).device

    def latents(images: Tensor) -> Features:
        mean, deviation = vae_posterior(network, images.to(device))
        found = {"mean": mean.to("cpu", dtype)}
        return found | ({"deviation": deviation.to("cpu", dtype)} if deviation.any() else {})

    def embeddings(images: Tensor) -> Features:
        return {"embedding": image_context(network, images.to(device))[:, 0].to("cpu", dtype)}

    return latents if kind == "latents" else embeddings
