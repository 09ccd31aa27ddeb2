"""What a checkpoint file is: the closest of the known kinds, and what it lacks or has too much."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPVisionModelWithProjection

from models.checkpoints.files import without_prefixes
from models.checkpoints.folders import load_folder
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
from models.checkpoints.sizes import MotionSizes, Shapes, UNetSizes, motion_sizes, pose_guider_channels, unet_sizes
from models.checkpoints.strict import Mismatch, compare, shapes_of

# What names in Stability's own single-file format begin with.
SINGLE_FILE = "model.diffusion_model."
# Kinds that are recognised by a name and not taken apart.
OTHER_KINDS = {
    "decoder.": "autoencoder",
    "vision_model.": "CLIP image encoder",
    "text_model.": "CLIP text encoder",
    SINGLE_FILE: "single-file Stable Diffusion; convert it to a diffusers folder first",
}
# Folders whose configuration defines the network.
FOLDER_KINDS = {kind.__name__: kind for kind in (AutoencoderKL, CLIPTextModel, CLIPVisionModelWithProjection)}


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
    tensors = without_prefixes(tensors, what, UNET_PREFIXES)
    shapes = shapes_of(tensors)
    kind, detail, mismatch = _recognised(shapes)
    return Inspection(
        kind=kind,
        tensors=len(tensors),
        elements=sum(tensor.numel() for tensor in tensors.values()),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        detail=detail,
        mismatch=mismatch,
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


def _recognised(shapes: Shapes) -> tuple[str, str, Mismatch | None]:
    motion = [name for name in shapes if MOTION in name]
    if motion and 2 * len(motion) > len(shapes) and "conv_in.weight" not in shapes:
        sizes, motion_part = motion_file_sizes(shapes)
        kind = f"motion modules ({motion_version(motion_part)})"
        return kind, _motion_detail(motion_part), compare(motion_manifest(sizes, motion_part), shapes)
    if motion:
        sizes = motion_sizes(_renamed(shapes), _length(shapes))
        wanted = animated_unet_manifest(unet_sizes(shapes), sizes)
        kind = "denoising UNet with motion modules (MagicAnimate temporal_attention)"
        return kind, f"{_detail(unet_sizes(shapes))}, {_motion_detail(sizes)}", compare(wanted, shapes)
    if any(name.startswith(EMBEDDING) for name in shapes):
        embedding = {name.removeprefix(EMBEDDING): shapes[name] for name in shapes if name.startswith(EMBEDDING)}
        wanted = control_net_manifest(unet_sizes(shapes), pose_guider_channels(embedding))
        return "ControlNet", _detail(unet_sizes(shapes)), compare(wanted, shapes)
    if any(name.startswith("blocks.") for name in shapes):
        channels = pose_guider_channels(shapes)
        width = shapes.get("conv_out.weight", UNetSizes().block_out_channels)[0]
        return "pose guider", f"widths {_joined(channels)}", compare(pose_guider_manifest(width, channels), shapes)
    if any(name.startswith("up_blocks.") for name in shapes):
        sizes = unet_sizes(shapes)
        candidates = [(kind, compare(make(sizes), shapes)) for kind, make in UNET_KINDS.items()]
        kind, mismatch = min(candidates, key=lambda candidate: len(candidate[1]))
        return kind, _detail(sizes), mismatch
    for prefix, kind in OTHER_KINDS.items():
        if any(name.startswith(prefix) for name in shapes):
            return kind, "", None
    return "unknown", f"first names {', '.join(list(shapes)[:3])}", None


UNET_KINDS: dict[str, Callable[[UNetSizes], Shapes]] = {
    "Stable Diffusion UNet (AnimateAnyone denoising_unet)": unet_manifest,
    "AnimateAnyone reference_unet": reference_unet_manifest,
    "MagicAnimate appearance_encoder": appearance_encoder_manifest,
}


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


def _detail(sizes: UNetSizes) -> str:
    return f"widths {_joined(sizes.block_out_channels)}, context {sizes.cross_attention_dim}"


def _motion_detail(motion: MotionSizes) -> str:
    return f"{motion.max_seq_length} frames, {'with' if motion.mid_block else 'no'} middle block"


def _joined(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))


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
