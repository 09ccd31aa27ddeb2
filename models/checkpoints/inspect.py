"""Recognition of checkpoint files: the closest of the known ones, and what a file lacks or has too much."""

import json
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTextModel, CLIPVisionModel, CLIPVisionModelWithProjection

from core.errors import UserError
from models.checkpoints.convert import SINGLE_FILE, PublishedModel, Recognised, families, published_models
from models.checkpoints.files import SHARD, read_tensors, shard_names, without_prefixes
from models.checkpoints.loading import (
    MOTION,
    VAE_NAMES,
    Shapes,
    blank,
    compare,
    current_names,
    load_folder,
    not_finite,
    old_names,
    on_meta,
    shapes_of,
)
from models.checkpoints.networks import (
    EMBEDDING,
    UNET_PREFIXES,
    UNetSizes,
    control_net_manifest,
    embedding_channels,
    has,
    joined,
    make_autoencoder,
    unet_manifest,
    unet_sizes,
)

# Files that are known by a name and not taken apart.
OTHER_FILES = {
    "vision_model.": "CLIP image encoder",
    "text_model.": "CLIP text encoder",
    "encoder.block.": "T5 text encoder",
    "decoder.conv_in.": "autoencoder of videos, whose sizes its folder says",
    SINGLE_FILE: "single-file Stable Diffusion; convert it to a diffusers folder first",
}
CONV_IN = "encoder.conv_in.weight"  # of five axes in autoencoders of videos
WEIGHTS = (".pth", ".pt", ".ckpt", ".safetensors", ".bin")
MOST_FILES = 8  # of a folder, that are opened to find out what it is
# Folders whose configuration defines the network.
FOLDER_CLASSES = {
    cls.__name__: cls
    for cls in (AutoencoderKL, AutoencoderKLWan, CLIPTextModel, CLIPVisionModel, CLIPVisionModelWithProjection)
}


@dataclass(frozen=True)
class Inspection(Recognised):
    """A recognised file and its contents."""

    tensors: int = 0
    elements: int = 0
    dtypes: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()  # names of tensors with NaN or infinity
    blank: tuple[str, ...] = ()  # names of tensors of zeros that no network has

    @property
    def known(self) -> bool:
        return self.mismatch is not None


def closest(tensors: dict[str, Tensor], what: str) -> tuple[Recognised, PublishedModel | None]:
    """The known file that is closest in its tensors' names and shapes, of several equally close ones the first.

    With it the model that its like belongs to, None where it may be of several.
    """
    recognisers = [(model, recognise) for model in published_models().values() for recognise in model.recognisers]
    recognisers += [(None, recognise) for recognise in SHARED_RECOGNISERS]
    plain = without_prefixes(tensors, what, UNET_PREFIXES)
    named = [shapes_of(plain)] if plain.keys() == tensors.keys() else [shapes_of(tensors), shapes_of(plain)]
    candidates = []
    for model, recognise in recognisers:
        for shapes in named:
            with suppress(ValueError):  # there is no network of such sizes
                candidates.append((recognise(shapes), model))
    known = [candidate for candidate in candidates if candidate[0] is not None]
    if known:
        return min(known, key=lambda candidate: len(candidate[0].mismatch))
    others = [kind for prefix, kind in OTHER_FILES.items() if has(plain, prefix)]
    if others:
        return Recognised(others[0]), None
    return Recognised("unknown", f"first names {', '.join(list(plain)[:3])}"), None


def inspect(tensors: dict[str, Tensor], what: str) -> Inspection:
    """What a file holds, and what is wrong with it; of a shard, with the network that it is a part of.

    `what` is the file's path.
    """
    whole, lost = all_shards(Path(what))
    recognised = closest(whole or tensors, what)[0]
    if whole:
        detail, mismatch = f"shard of {len(whole) + len(lost)} tensors", recognised.mismatch
        detail = f"{recognised.detail}; {detail}" if recognised.detail else detail
        if mismatch is not None:
            mismatch = replace(mismatch, missing=tuple(dict.fromkeys((*mismatch.missing, *lost))))
        recognised = replace(recognised, detail=detail, mismatch=mismatch)
    return Inspection(
        **vars(recognised),
        tensors=len(tensors),
        elements=sum(tensor.numel() for tensor in tensors.values()),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        not_finite=not_finite(tensors),
        blank=blank(tensors),
    )


def all_shards(shard: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a shard and of those beside it, without their numbers; empty for what is no such shard.

    With them the names that their index lists and no shard has.
    """
    whole, listed, index = {}, [], shard.with_name(f"{shard.name.partition('-0')[0]}.safetensors.index.json")
    if SHARD.fullmatch(shard.name) and shard.suffix == ".safetensors" and index.is_file():
        files = [shard.with_name(name) for name in shard_names(index, str(index))]
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for file in files:
            with safe_open(file, "pt") if file.is_file() else nullcontext({}) as tensors:
                for name in tensors.keys():
                    whole[name] = torch.empty(tensors.get_slice(name).get_shape(), device="meta")
    return whole, [name for name in listed if name not in whole]


def published_weights(path: Path) -> tuple[str, PublishedModel | None] | None:
    """What a file or folder of published weights is, in words, and of which model; None: nothing is known of it."""
    folder = path if path.is_dir() else path.parent
    names = {name: known.found_in(folder) for name, known in families().items()}
    likeliest, kind, model = max(names, key=names.get), "", None
    if path.is_file() or names[likeliest] < 2:
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in WEIGHTS)
        for file in files[:MOST_FILES]:
            with suppress(UserError):
                found, model = closest(read_tensors(file, "file"), "file")
                kind = "" if found.kind == "unknown" else found.kind
            if model:
                break
    if names[likeliest] > (1 if model else 0):
        model = families()[likeliest]
    return (kind or "weights", model) if kind or model else None


def inspect_folder(folder: Path) -> str | None:
    """The class of a folder that its own configuration defines and its weights must fit; None for others."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = config.get("_class_name") or config["architectures"][0]
        cls = FOLDER_CLASSES[name]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    load_folder(cls, folder, str(folder))
    return name


def control_net(shapes: Shapes) -> Recognised | None:
    if not has(shapes, EMBEDDING):
        return None
    sizes = unet_sizes(shapes)
    wanted = control_net_manifest(sizes, embedding_channels(shapes, EMBEDDING))
    return Recognised("ControlNet", str(sizes), compare(wanted, shapes))


def autoencoder(shapes: Shapes) -> Recognised | None:
    if not has(shapes, "decoder.", "encoder.down_blocks.", "encoder.conv_in.") or len(shapes.get(CONV_IN, ())) == 5:
        return None
    network = on_meta(make_autoencoder, current_names(shapes))
    wanted = shapes_of(network.state_dict())
    old = any(name in found for found in shapes for name, _ in VAE_NAMES)
    detail = f"widths {joined(network.config.block_out_channels)}, names of {'older releases' if old else 'today'}"
    return Recognised("autoencoder", detail, compare(old_names(wanted) if old else wanted, shapes))


def image_unet(kind: str, manifest: Callable[[UNetSizes], Shapes]) -> Callable[[Shapes], Recognised | None]:
    """Recogniser of files that hold an image UNet, or most of one, with the names and shapes of `manifest`."""

    def recognise(shapes: Shapes) -> Recognised | None:
        if any(MOTION in name for name in shapes) or not has(shapes, "up_blocks."):
            return None
        sizes = unet_sizes(shapes)
        return Recognised(kind, str(sizes), compare(manifest(sizes), shapes))

    return recognise


SHARED_RECOGNISERS = (
    control_net,
    autoencoder,
    image_unet("Stable Diffusion UNet (AnimateAnyone denoising_unet)", unet_manifest),
)
