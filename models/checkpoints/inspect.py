"""Recognition of checkpoint files: the closest of the known ones, and what a file lacks or has too much."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPVisionModelWithProjection

from core.errors import UserError
from models.checkpoints.convert import SINGLE_FILE, Recognised, families
from models.checkpoints.files import read_tensors, without_prefixes
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
    SINGLE_FILE: "single-file Stable Diffusion; convert it to a diffusers folder first",
}
WEIGHTS = (".pth", ".pt", ".ckpt", ".safetensors", ".bin")
MOST_FILES = 8  # of a folder, that are opened to find out what it is
# Folders whose configuration defines the network.
FOLDER_CLASSES = {cls.__name__: cls for cls in (AutoencoderKL, CLIPTextModel, CLIPVisionModelWithProjection)}


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


def closest(tensors: dict[str, Tensor], what: str) -> tuple[Recognised, str]:
    """The known file that is closest in its tensors' names and shapes, of several equally close ones the first.

    With it the family that its like belongs to, "" where it may be of several.
    """
    recognisers = [(family.name, recognise) for family in families().values() for recognise in family.recognisers]
    recognisers += [("", recognise) for recognise in SHARED_RECOGNISERS]
    plain = without_prefixes(tensors, what, UNET_PREFIXES)
    named = [shapes_of(plain)] if plain.keys() == tensors.keys() else [shapes_of(tensors), shapes_of(plain)]
    candidates = []
    for family, recognise in recognisers:
        for shapes in named:
            with suppress(ValueError):  # there is no network of such sizes
                candidates.append((recognise(shapes), family))
    known = [candidate for candidate in candidates if candidate[0] is not None]
    if known:
        return min(known, key=lambda candidate: len(candidate[0].mismatch))
    others = [kind for prefix, kind in OTHER_FILES.items() if has(plain, prefix)]
    if others:
        return Recognised(others[0]), ""
    return Recognised("unknown", f"first names {', '.join(list(plain)[:3])}"), ""


def inspect(tensors: dict[str, Tensor], what: str) -> Inspection:
    """What a file holds, and what is wrong with it."""
    return Inspection(
        **vars(closest(tensors, what)[0]),
        tensors=len(tensors),
        elements=sum(tensor.numel() for tensor in tensors.values()),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        not_finite=not_finite(tensors),
        blank=blank(tensors),
    )


def published_weights(path: Path) -> tuple[str, str] | None:
    """What a file or folder of published weights is, in words, and its family; None where nothing is known of it."""
    folder = path if path.is_dir() else path.parent
    names = {name: known.found_in(folder) for name, known in families().items()}
    likeliest, kind, family = max(names, key=names.get), "", ""
    if path.is_file() or names[likeliest] < 2:
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in WEIGHTS)
        for file in files[:MOST_FILES]:
            with suppress(UserError):
                found, family = closest(read_tensors(file, "file"), "file")
                kind = "" if found.kind == "unknown" else found.kind
            if family:
                break
    if names[likeliest] > (1 if family else 0):
        family = likeliest
    return (kind or "weights", family) if kind or family else None


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
    if not has(shapes, "decoder.", "encoder.down_blocks.", "encoder.conv_in."):
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
