"""Strict loading of networks: every missing, unexpected or misshapen tensor is named and stops the load.

Tensors keep their published names but in motion modules, in AnimateDiff's scheme,

    published   down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_q.weight
    module      down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q.weight

and in the attention in the middle of a VAE, which was `query` and is `to_q`. Functions of names take name -> tensor or
name -> shape.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from torch import Tensor, nn
from transformers import PreTrainedModel

from core.errors import UserError
from models.checkpoints.files import folder_hint, read_config, read_file, weights_file

Module = TypeVar("Module", bound=nn.Module)
Shapes = Mapping[str, tuple[int, ...]]  # tensor name -> shape


@dataclass(frozen=True)
class Mismatch:
    """Differences between the tensors that are wanted and those that a file has; False when there are none."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.misshapen)

    def lines(self) -> list[str]:
        return [f"{sort} {len(names)}: {first_few(names)}" for sort, names in vars(self).items() if names]


def compare(wanted: Shapes, found: Shapes) -> Mismatch:
    return Mismatch(
        missing=tuple(name for name in wanted if name not in found),
        unexpected=tuple(name for name in found if name not in wanted),
        misshapen=tuple(
            _misshapen(name, found[name], wanted[name])
            for name in wanted
            if name in found and tuple(found[name]) != tuple(wanted[name])
        ),
    )


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def on_meta(make: Callable[..., Module], *arguments: Any, **settings: Any) -> Module:
    """A network without memory, to be given a file's tensors."""
    with torch.device("meta"):
        return make(*arguments, **settings)


def shapes_on_meta(make: Callable[..., nn.Module], *arguments: Any, **settings: Any) -> dict[str, tuple[int, ...]]:
    return shapes_of(on_meta(make, *arguments, **settings).state_dict())


def from_settings(cls: type[Module], settings: Mapping[str, Any]) -> Module:
    """A network without its weights, of what its `config.json` says but the dtype, which is torch's default."""
    # The folder that it was loaded from once is nobody's concern.
    settings = {name: value for name, value in settings.items() if name != "_name_or_path"}
    if not issubclass(cls, PreTrainedModel):
        return cls.from_config(settings)
    # transformers would build some parts in the dtype that the weights were saved in, and others not.
    return cls(cls.config_class(**{**settings, "dtype": torch.get_default_dtype()}))


def load_strictly(
    module: Module,
    tensors: Mapping[str, Tensor],
    what: str,
    dtype: torch.dtype = torch.float32,
    unused: Iterable[str] = (),
) -> Module:
    """A network `on_meta` whose parameters become `tensors`, in evaluation mode; a `UserError` if they do not fit.

    Tensors of the right dtype are not copied: they may be parts of a mapped file. Position tables are computed;
    parameters that are `unused` may be missing and are then zeros.
    """
    state = module.state_dict()
    zeros = set(unused) - tensors.keys()
    tables = {name: position_table(*value.shape[1:]) for name, value in state.items() if is_position_table(name)}
    added = tables | {name: torch.zeros(state[name].shape) for name in zeros}
    if doubled := added.keys() & tensors.keys():
        tensors = {name: tensor for name, tensor in tensors.items() if name not in doubled}
    return give_tensors(module, {**tensors, **added}, what, dtype)


def give_tensors(module: Module, tensors: Mapping[str, Tensor], what: str, dtype: torch.dtype) -> Module:
    """A network `on_meta` whose parameters become exactly these tensors; a `UserError` if they do not fit."""
    mismatch = compare(shapes_of(module.state_dict()), shapes_of(tensors))
    if mismatch:
        raise UserError(f"{what} does not fit {type(module).__name__}: {'; '.join(mismatch.lines())}")
    strange = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if strange:
        raise UserError(f"{what} holds {len(strange)} tensors that are not floating point: {first_few(strange)}")
    precise = getattr(module, "_keep_in_fp32_modules", None) or ()  # as diffusers loads them
    complete = {
        name: tensor.float() if any(part in name.split(".") for part in precise) else tensor.to(dtype)
        for name, tensor in tensors.items()
    }
    check_finite(complete, what)
    unused = module.unused_parameters() if hasattr(module, "unused_parameters") else ()
    if names := blank(complete, unused):
        raise UserError(
            f"{what} holds zeros alone in {len(names)} tensors, as after a broken download: {first_few(names)}"
        )
    module.load_state_dict(complete, strict=True, assign=True)
    return module.eval()


def load_folder(cls: type[Module], folder: str | Path, what: str, dtype: torch.dtype = torch.float32) -> Module:
    """A network of diffusers or transformers from its folder in any layout of the hub, as strict as `load_strictly`.

    A folder of all of CLIP has the networks of both its halves.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{what} is not a folder of {cls.__name__}: it has no config.json{folder_hint(folder)}")
    settings = read_config(folder / "config.json", what)
    tensors = read_file(weights_file(folder, what), what)
    try:
        if issubclass(cls, PreTrainedModel):
            make = partial(cls, cls.config_class.from_pretrained(folder, local_files_only=True, dtype=dtype))
        else:
            make = partial(cls.from_config, settings)
        module = on_meta(make)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{what} cannot be made a {cls.__name__} from its config.json: {error}") from None
    give_tensors(module, network_names(tensors, module), what, dtype)
    absent = [name for name, buffer in module.named_buffers() if buffer.is_meta]  # files do not hold them
    computed = {}
    if any(not name.endswith(POSITION_IDS) for name in absent):
        with init_empty_weights(include_buffers=False):  # which spares the parameters alone
            computed = dict(make().named_buffers())
    for name in absent:
        owner, _, own = name.rpartition(".")
        # CLIP's are the numbers of its positions.
        value = computed[name] if computed else torch.arange(module.get_buffer(name).shape[-1])[None]
        setattr(module.get_submodule(owner), own, value)
    return module


def not_finite(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the tensors that hold NaN or infinity."""
    names = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            # Extremes carry NaN along and are found in a tenth of the time of a look at each number; 8-bit formats
            # do not know them.
            extremes = torch.stack(torch.aminmax(tensor if tensor.element_size() > 1 else tensor.half()))
            if not extremes.isfinite().all():
                names.append(name)
    return tuple(names)


def blank(tensors: Mapping[str, Tensor], unused: Iterable[str] | None = None) -> tuple[str, ...]:
    """Names of the tensors that are zero and never are in a trained network: norms' weights, and most matrices.

    Single layers start as zero and may have stayed so, so matrices count only where they are more than half of all.
    Parameters that are `unused` are left out; where these are not known (None) so are all norms.
    """
    norms, matrices, total, left_out = [], [], 0, set(unused or ())
    for name, tensor in tensors.items():
        if tensor.is_meta or not tensor.numel() or name in left_out or (unused is None and tensor.ndim < 2):
            continue
        total += tensor.ndim > 1
        scale = tensor.ndim == 1 and name.endswith("weight")
        # The first number tells nearly every tensor from a zero one without a look at the rest.
        if (scale or tensor.ndim > 1) and tensor.view(-1)[0] == 0 and not tensor.any():
            (norms if scale else matrices).append(name)
    return tuple(norms + (matrices if 2 * len(matrices) > total else []))


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise a `UserError` that names the tensors with NaN or infinity."""
    if names := not_finite(tensors):
        dtype = str(tensors[names[0]].dtype).removeprefix("torch.")
        hint = "; numbers above 65504 become infinity in it, but not with dtype=bfloat16" if dtype == "float16" else ""
        raise UserError(f"{what} holds NaN or infinity in {len(names)} tensors of {dtype}: {first_few(names)}{hint}")


def _misshapen(name: str, found: Iterable[int], wanted: Iterable[int]) -> str:
    return f"{name} {list(found)} instead of {list(wanted)}"


def first_few(names: Iterable[str], shown: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


Entry = TypeVar("Entry")

MOTION = ".motion_modules."
# published -> module, inside a motion module
MOTION_NAMES = (
    (".temporal_transformer.", "."),
    (".attention_blocks.0.", ".attn1."),
    (".attention_blocks.1.", ".attn2."),
    (".norms.0.", ".norm1."),
    (".norms.1.", ".norm2."),
    (".ff_norm.", ".norm3."),
)
# files up to diffusers 0.14 -> today
VAE_NAMES = tuple(
    (f".mid_block.attentions.0.{old}.", f".mid_block.attentions.0.{new}.")
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
)
POSITIONS = ".pos_encoder.pe"
# Parts of a whole CLIP, of which each of its networks has some, and a buffer that files of older releases hold.
CLIP_PARTS = {"text_model", "vision_model", "text_projection", "visual_projection", "logit_scale"}
POSITION_IDS = "position_ids"


def replaced(entries: Mapping[str, Entry], pairs: Iterable[tuple[str, str]], within: str = "") -> dict[str, Entry]:
    """Entries with parts of those names replaced that have `within`."""
    renamed = {}
    for name, entry in entries.items():
        if within in name:
            for old, new in pairs:
                name = name.replace(old, new)
        renamed[name] = entry
    return renamed


def module_names(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Published names -> names of `models.unets`, without position tables."""
    kept = {name: entry for name, entry in entries.items() if not is_position_table(name)}
    return replaced(kept, MOTION_NAMES, MOTION)


def published_names(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Names of `models.unets` -> published names, with the position table that each published attention has."""
    renamed = {}
    for name, entry in entries.items():
        names = [name]
        if MOTION in name:
            name = re.sub(r"(\.motion_modules\.\d+\.)", r"\1temporal_transformer.", name)
            for published, module in MOTION_NAMES[1:]:
                name = name.replace(module, published)
            block, table, _ = name.partition(".pos_embed.pe")
            names = [f"{block}.attention_blocks.{index}{POSITIONS}" for index in (0, 1)] if table else [name]
        renamed |= dict.fromkeys(names, entry)
    return renamed


def current_names(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Entries of a VAE under the names of today, from those of any release."""
    return replaced(entries, VAE_NAMES)


def old_names(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Entries of a VAE under the names of the published files."""
    return replaced(entries, [(new, old) for old, new in VAE_NAMES])


def network_names(entries: Mapping[str, Entry], network: nn.Module) -> Mapping[str, Entry]:
    """Entries of a folder's weights under the names of its network."""
    if isinstance(network, PreTrainedModel):
        found = clip_names(entries, network)
        # Files hold one of several parameters that are one.
        tied = getattr(network, "_tied_weights_keys", None) or {}
        return found | {name: found[source] for name, source in tied.items() if name not in found and source in found}
    if isinstance(network, AutoencoderKL):
        return current_names(entries)
    unused = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()  # of earlier releases of its class
    return {name: entry for name, entry in entries.items() if not any(re.search(part, name) for part in unused)}


def clip_names(entries: Mapping[str, Entry], network: nn.Module) -> dict[str, Entry]:
    """Entries of a CLIP, whole or a half of it, under the names of one of its networks, without those of others."""
    parts = {name.partition(".")[0] for name in network.state_dict()}
    half = network.config.model_type.removeprefix("clip_")  # "vision_model", "text_model"
    own = f"{half}." if half in parts else ""  # before the names of a half by itself there may be its own
    kept = {}
    for name, entry in entries.items():
        if name.partition(".")[0] in CLIP_PARTS - {half} - parts or name.endswith(f".{POSITION_IDS}"):
            continue
        outside = name.partition(".")[0] in CLIP_PARTS - {half}
        kept[name if outside else own + name.removeprefix(f"{half}.")] = entry
    return kept


def is_position_table(name: str) -> bool:
    return name.endswith((POSITIONS, ".pos_embed.pe"))


def table_length(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Frames of the first position table, 32 where there is none."""
    return next((shape[1] for name, shape in shapes.items() if is_position_table(name) and len(shape) == 3), 32)


def position_length(tensors: Mapping[str, Tensor], what: str) -> int:
    """Frames that the motion modules of a file know; a `UserError` unless its tables are the sinusoidal ones."""
    tables = {name: tensor for name, tensor in tensors.items() if is_position_table(name)}
    if not tables:
        raise UserError(f"{what} has no position tables (*{POSITIONS}): its motion modules are missing or incomplete")
    lengths = {tensor.shape[1] for tensor in tables.values() if tensor.ndim == 3}
    if len(lengths) != 1:
        raise UserError(f"{what} has position tables of different lengths: {sorted(lengths)}")
    for name, tensor in tables.items():
        if tensor.is_meta:
            continue
        expected = position_table(*tensor.shape[1:])
        # Half precision keeps three digits of numbers up to one.
        if tensor.shape != expected.shape or not tensor.float().allclose(expected, atol=5e-3):
            raise UserError(f"{what}: {name} is not the sinusoidal table; other tables are not supported")
    return lengths.pop()


def position_table(length: int, channels: int) -> Tensor:
    """Sine on even and cosine on odd channels, (1, length, channels), as diffusers computes it."""
    return SinusoidalPositionalEmbedding(channels, max_seq_length=length).pe
