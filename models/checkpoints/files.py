"""Tensors of a checkpoint file, read without running its code and without a copy in memory.

Files are mapped: a network that takes the tensors as its parameters (`load_state_dict(..., assign=True)`) needs no
second copy of a file of several gigabytes.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from core.errors import UserError
from core.files import no_such_path

# Dictionaries that trainers put the tensors in, and what they put before each name.
WRAPPERS = ("state_dict", "module", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")
# First parts of the names in the files that are read here. What all names have before them is a prefix of a trainer.
ROOTS = frozenset(
    ("conv_in", "conv_out", "conv_norm_out", "time_embedding", "down_blocks", "mid_block", "up_blocks", "blocks")
    + ("controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block")
)
# Weights in a folder of diffusers or transformers, whole or as an index of shards. A variant's word stands before the
# ending, of an index also after `.index`.
FOLDER_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?P<before>\.\w+)?\.(?P<kind>safetensors|bin)"
    r"(?P<index>\.index(?P<after>\.\w+)?\.json)?"
)
SHARD = re.compile(r"\w[\w.]*-\d{5}-of-\d{5}(\.\w+)?\.(safetensors|bin)")
VARIANTS = ("", "fp32", "ema", "fp16", "bf16")  # full precision first; others come after these, such as non_ema
# Layers whose weights are matrices, or more.
MATRICES = re.compile(
    r"(^|\.)(conv\d?|conv_in|conv_out|conv_shortcut|blocks\.\d+|to_[qkv]|to_out\.0|proj_in|proj_out|linear_\d)\.weight$"
)
LFS_POINTER = b"version https://git-lfs"


def read_tensors(path: str | Path, argument: str) -> dict[str, Tensor]:
    """Name -> tensor of a checkpoint, in its dtype, on the CPU, without what trainers put around names.

    A checkpoint is a .safetensors or torch file, the JSON index of shards, or a folder of diffusers or transformers.
    A `UserError` names it as `argument` where it is missing, cut short, of another sort, or holds more than tensors.
    """
    file = weights_file(Path(path), f"{argument}={path}")
    what = f"{argument}={file}"
    tensors = without_prefixes(read_file(file, what), what, PREFIXES)
    prefix = common_prefix(list(tensors))
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def other_kind(tensors: Mapping[str, Tensor]) -> str | None:
    """What a file is in place of a network's weights, in words; None where nothing speaks against these."""
    names = ".".join(tensors)
    if empty := sum(tensor.numel() == 0 for tensor in tensors.values()):
        return (
            f"a shell of DeepSpeed's ZeRO-3, {empty} of its {len(tensors)} tensors being empty; join the weights from "
            "the shards beside it with the zero_to_fp32.py of their folder, or `python -m training.export`"
        )
    if re.search(r"\blora_|[._]lora\b|\.alpha\b|\bhada_|\blokr_", names):
        return "an adapter (LoRA), which changes a network and is none; `infer.py lora=` takes those of train.py"
    if re.search(r"\bexp_avg|\bmomentum_buffer\b", names):
        return "the state of an optimiser; the weights are in another file"
    if "flat_param" in names:
        return "parameters that FSDP has flattened; `python -m training.export` writes them as they were"
    if all(tensor.ndim == 0 for tensor in tensors.values()):
        return f"{len(tensors)} single numbers and no weights"
    flat = [name for name, tensor in tensors.items() if tensor.ndim < 2 and MATRICES.search(name)]
    if flat:
        return f"{len(flat)} weights without their shapes, first {flat[0]} {list(tensors[flat[0]].shape)}"
    return None


def weights_file(path: Path, what: str) -> Path:
    """The file itself, or the weights of a folder: of several full precision first, then whole, then safetensors."""
    if not path.exists():
        raise no_such_path(path, what.removesuffix(f"={path}"))
    if path.is_file():
        return path
    names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    found = sorted((rank, name) for name in names if (rank := weights_rank(name)) is not None)
    # Downloads of one variant bring the indices of all with them.
    whole = [name for _, name in found if not name.endswith(".json") or any_shard(path / name)]
    if whole or found:
        return path / (whole or [name for _, name in found])[0]
    if shards := [name for name in names if SHARD.fullmatch(name)]:
        kind = shards[0].rpartition(".")[2]
        raise UserError(f"{what} holds shards ({shards[0]}, ...) and not their index, *.{kind}.index.json; get it too")
    names = "diffusion_pytorch_model, model or pytorch_model, .safetensors or .bin"
    raise UserError(f"{what} is a folder without weights ({names}){folder_hint(path)}")


def folder_hint(folder: Path) -> str:
    """What to give in place of a folder that has no weights or configuration of its own, as the end of a sentence."""
    if (folder / "snapshots").is_dir():
        return "; it is a cache of the hub: give the folder inside its snapshots/"
    inside = sorted(config.parent.name for config in folder.glob("*/config.json"))
    return f"; give one of the folders in it: {', '.join(inside)}" if inside else ""


def read_config(path: Path, what: str) -> dict[str, Any]:
    """The entries of a JSON file of settings; a `UserError` where it is damaged or of another sort."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{what}: {path.name} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{what}: {path.name} does not hold settings by name")
    return settings


def weights_rank(name: str) -> tuple[int, str, bool, bool] | None:
    """Order among the files of weights in a folder; None for other files."""
    match = FOLDER_WEIGHTS.fullmatch(name)
    if match is None:
        return None
    variant = (match["before"] or match["after"] or "").removeprefix(".")
    place = VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)
    return place, variant, match["index"] is not None, match["kind"] != "safetensors"


def any_shard(index: Path) -> bool:
    return any(index.with_name(name).is_file() for name in shard_names(index, str(index)))


def common_prefix(names: list[str]) -> str:
    """The parts of all names before one of `ROOTS`, such as "denoising_unet."; empty when names differ in them."""
    parts = names[0].split(".") if names else []
    roots = [index for index, part in enumerate(parts) if part in ROOTS]
    prefix = "".join(f"{part}." for part in parts[: roots[0]]) if roots else ""
    rests = [name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)]
    return prefix if len(rests) == len(names) and ROOTS.issuperset(rests) else ""


def without_prefixes(tensors: Mapping[str, Tensor], what: str, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Tensors by names without these prefixes, in any order and number."""
    stripped: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name
        while short.startswith(prefixes):
            short = short.removeprefix(next(prefix for prefix in prefixes if short.startswith(prefix)))
        if short in stripped:
            raise UserError(f"{what} names {short} twice, with and without a prefix")
        stripped[short] = tensor
    return stripped


def read_file(path: Path, what: str) -> dict[str, Tensor]:
    """Tensors of a file or of its shards, under the names they have there."""
    if path.suffix == ".json":
        return _read_shards(path, what)
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{what} is a Git LFS pointer, not the weights; run `git lfs pull`")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{what} is not a complete safetensors file: {error}") from None
    return _unwrapped(_torch_load(path, what), what)


def _unwrapped(loaded: Any, what: str) -> dict[str, Tensor]:
    """The tensors among what trainers save beside them, such as step counters and optimiser states."""
    while isinstance(loaded, Mapping):
        inner = [loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), Mapping)]
        if not inner:
            break
        loaded = inner[0]
    if not isinstance(loaded, Mapping):
        raise UserError(f"{what} holds a {type(loaded).__name__}, not named tensors")
    if {"param_groups", "optimizer_state_dict"} & loaded.keys():
        raise UserError(f"{what} is the state of an optimiser; the weights are in another file")
    tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not all(isinstance(name, str) for name in tensors):
        raise UserError(f"{what} holds tensors without names")
    if not tensors:
        raise UserError(f"{what} holds no tensors; its entries are {', '.join(map(str, list(loaded)[:5])) or 'none'}")
    return tensors


def _torch_load(path: Path, what: str) -> Any:
    """`torch.load` of tensors and plain containers only; code in the file is refused, not run."""
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        with open(path, "rb") as file:
            start = file.read(2)
        pickled = start == b"PK" or start[:1] == b"\x80"  # a zip archive, or a pickle of protocol 2 or later
        reason = "holds objects other than tensors, which could run code" if pickled else "is no checkpoint"
        detail = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "")
        raise UserError(f"{what} {reason}; it is not opened. {detail}".rstrip()) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        sentence = str(error).split("\n")[0].split(". ")[0]
        reason = sentence if sentence and not isinstance(error, KeyError) else type(error).__name__
        raise UserError(f"{what} is damaged or no checkpoint: {reason}") from None


def shard_names(index: Path, what: str) -> list[str]:
    """Names of the files that an index of shards lists."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        names = set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{what}: {index.name} is not an index of shards")
    return sorted(names)


def _read_shards(index: Path, what: str) -> dict[str, Tensor]:
    names = shard_names(index, what)
    if missing := [name for name in names if not index.with_name(name).is_file()]:
        raise UserError(f"{what}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}")
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= read_file(index.with_name(name), f"{what}: {name}")
    return tensors
