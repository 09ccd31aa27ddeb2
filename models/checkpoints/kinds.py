"""What a checkpoint file is: the closest of the known kinds, and what it lacks or has too much."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPVisionModelWithProjection

from models.animators.disco.checkpoint import recognise_disco
from models.animators.dream_pose.checkpoint import recognise_adapter, recognise_unet
from models.checkpoints.autoencoder import recognise_autoencoder
from models.checkpoints.files import without_prefixes
from models.checkpoints.folders import load_folder
from models.checkpoints.loading import Mismatch, compare, shapes_of
from models.checkpoints.manifests import (
    animated_unet_manifest,
    appearance_encoder_manifest,
    control_net_manifest,
    motion_manifest,
    pose_guider_manifest,
    reference_unet_manifest,
    unet_manifest,
)
from models.checkpoints.names import MOTION, is_position_table, module_names
from models.checkpoints.networks import EMBEDDING, UNET_PREFIXES
from models.checkpoints.recognised import Recognised, joined, unet_detail
from models.checkpoints.sizes import MotionSizes, Shapes, UNetSizes, motion_sizes, pose_guider_channels, unet_sizes

# What names in Stability's own single-file format begin with.
SINGLE_FILE = "model.diffusion_model."
# Kinds that are recognised by a name and not taken apart.
OTHER_KINDS = {
    "vision_model.": "CLIP image encoder",
    "text_model.": "CLIP text encoder",
    SINGLE_FILE: "single-file Stable Diffusion; convert it to a diffusers folder first",
}
# Folders whose configuration defines the network.
FOLDER_KINDS = {kind.__name__: kind for kind in (AutoencoderKL, CLIPTextModel, CLIPVisionModelWithProjection)}


UNET_KINDS: dict[str, Callable[[UNetSizes], Shapes]] = {
    "Stable Diffusion UNet (AnimateAnyone denoising_unet)": unet_manifest,
    "AnimateAnyone reference_unet": reference_unet_manifest,
    "MagicAnimate appearance_encoder": appearance_encoder_manifest,
}


@dataclass(frozen=True)
class Inspection:
    """A file's kind, counts, and difference from what its kind should hold; None where that is not known."""

    kind: str
    tensors: int
    elements: int
    dtypes: tuple[str, ...]
    detail: str
    mismatch: Mismatch | None

    @property
    def known(self) -> bool:
        """Whether the tensors of this kind are known, so that a file can be found complete."""
        return self.mismatch is not None


def inspect(tensors: dict[str, Tensor], what: str) -> Inspection:
    """Recognise a file from its tensors' names and shapes."""
    found = next(filter(None, (recognise(shapes_of(tensors)) for recognise in RECOGNISERS)), None)
    if found is None:
        tensors = without_prefixes(tensors, what, UNET_PREFIXES)
        shapes = shapes_of(tensors)
        found = next(filter(None, (recognise(shapes) for recognise in NETWORK_RECOGNISERS)), None)
    found = found or Recognised("unknown", f"first names {', '.join(list(tensors)[:3])}")
    return Inspection(
        kind=found.kind,
        tensors=len(tensors),
        elements=sum(tensor.numel() for tensor in tensors.values()),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        detail=found.detail,
        mismatch=found.mismatch,
    )


def inspect_folder(folder: Path) -> str | None:
    """The class of a folder that its own configuration defines, after a check that its weights fit; None for others.

    Raises:
        UserError: the weights do not fit.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = config.get("_class_name") or config["architectures"][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    if name not in FOLDER_KINDS:
        return None
    load_folder(FOLDER_KINDS[name], folder, str(folder))
    return name


def motion_modules(shapes: Shapes) -> Recognised | None:
    motion = [name for name in shapes if MOTION in name]
    if 2 * len(motion) <= len(shapes) or "conv_in.weight" in shapes:
        return None
    sizes, motion_part = motion_file_sizes(shapes)
    wanted = motion_manifest(sizes, motion_part)
    kind = f"motion modules ({motion_version(motion_part)})"
    return Recognised(kind, _motion_detail(motion_part), compare(wanted, shapes))


def animated_unet(shapes: Shapes) -> Recognised | None:
    if not any(MOTION in name for name in shapes):
        return None
    sizes = motion_sizes(_renamed(shapes), _length(shapes))
    wanted = animated_unet_manifest(unet_sizes(shapes), sizes)
    kind = "denoising UNet with motion modules (MagicAnimate temporal_attention)"
    return Recognised(kind, f"{unet_detail(unet_sizes(shapes))}, {_motion_detail(sizes)}", compare(wanted, shapes))


def control_net(shapes: Shapes) -> Recognised | None:
    embedding = {name.removeprefix(EMBEDDING): shape for name, shape in shapes.items() if name.startswith(EMBEDDING)}
    if not embedding:
        return None
    wanted = control_net_manifest(unet_sizes(shapes), pose_guider_channels(embedding))
    return Recognised("ControlNet", unet_detail(unet_sizes(shapes)), compare(wanted, shapes))


def pose_guider(shapes: Shapes) -> Recognised | None:
    if not any(name.startswith("blocks.") for name in shapes):
        return None
    channels = pose_guider_channels(shapes)
    width = shapes.get("conv_out.weight", UNetSizes().block_out_channels)[0]
    wanted = pose_guider_manifest(width, channels)
    return Recognised("pose guider", f"widths {joined(channels)}", compare(wanted, shapes))


def unet(shapes: Shapes) -> Recognised | None:
    if not any(name.startswith("up_blocks.") for name in shapes):
        return None
    sizes = unet_sizes(shapes)
    candidates = [
        Recognised(kind, unet_detail(sizes), compare(make(sizes), shapes)) for kind, make in UNET_KINDS.items()
    ]
    return min(candidates, key=lambda candidate: len(candidate.mismatch))


def other(shapes: Shapes) -> Recognised | None:
    for prefix, kind in OTHER_KINDS.items():
        if any(name.startswith(prefix) for name in shapes):
            return Recognised(kind)
    return None


def motion_version(motion: MotionSizes) -> str:
    """Release of AnimateDiff that motion modules of this form come from."""
    if motion.mid_block:
        return "AnimateDiff v2, AnimateAnyone, MusePose, Champ"
    return "AnimateDiff v1, MagicAnimate" if motion.max_seq_length <= 24 else "AnimateDiff v3"


def _renamed(shapes: Shapes) -> Shapes:
    return shapes_of(module_names({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}))


def _length(shapes: Shapes) -> int:
    lengths = [shape[1] for name, shape in shapes.items() if is_position_table(name) and len(shape) == 3]
    return lengths[0] if lengths else MotionSizes().max_seq_length


def _motion_detail(motion: MotionSizes) -> str:
    return f"{motion.max_seq_length} frames, {'with' if motion.mid_block else 'no'} middle block"


def motion_file_sizes(shapes: Shapes) -> tuple[UNetSizes, MotionSizes]:
    """Sizes from a file that holds motion modules alone."""
    renamed = _renamed(shapes)
    widths, level = [], 0
    while f"down_blocks.{level}.motion_modules.0.proj_in.weight" in renamed:
        widths.append(renamed[f"down_blocks.{level}.motion_modules.0.proj_in.weight"][0])
        level += 1
    layers = len({name.split(".")[3] for name in renamed if name.startswith("down_blocks.0.motion_modules.")})
    motion = motion_sizes(renamed, _length(shapes))
    if not widths:
        return UNetSizes(), motion
    attention = (True,) * (level - 1) + (False,)
    sizes = replace(UNetSizes(), block_out_channels=tuple(widths), attention=attention, layers_per_block=layers)
    return sizes, motion


# The first that recognises a file names it. Those of the first tuple see the names as they are in the file, the others
# without `module.` and `unet.`. A new family puts a function of its own before them.
RECOGNISERS: tuple[Callable[[Shapes], Recognised | None], ...] = (recognise_disco,)
NETWORK_RECOGNISERS: tuple[Callable[[Shapes], Recognised | None], ...] = (
    motion_modules,
    animated_unet,
    control_net,
    pose_guider,
    recognise_adapter,
    recognise_autoencoder,
    recognise_unet,
    unet,
    other,
)
