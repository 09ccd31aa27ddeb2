"""Weights read and written one tensor at a time, for processes that have no room for a second copy of a model."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.errors import UserError
from models.checkpoints.files import read_file, shard_names, weights_file

# Names of dtypes in safetensors files, in the order in which these have them.
DTYPES = {torch.int64: "I64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
METADATA = {"format": "pt"}
SAMPLES = 8  # numbers of each tensor that a digest is of


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a file or folder by name, each read when it is asked for; no file is kept open or mapped.

    Names are those that `rename` makes of the files' own. Files of torch are mapped whole.
    """

    def __init__(self, path: str | Path, what: str, rename: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict):
        self.what, file = what, weights_file(Path(path), what)
        shards = [file.with_name(name) for name in shard_names(file, what)] if file.suffix == ".json" else [file]
        self.mapped: Mapping[str, Tensor] = {}
        self.places: Mapping[str, tuple[Path, str]] = {}  # name -> file, and the name there
        if any(shard.suffix != ".safetensors" for shard in shards):
            self.mapped = rename(read_file(file, what))
            return
        places = {}
        for shard in shards:
            with self._opened(shard) as tensors:
                places |= {name: (shard, name) for name in tensors.keys()}
        self.places = rename(places)

    def _opened(self, file: Path) -> safe_open:
        try:
            return safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.what}: {file} is not a complete safetensors file: {error}") from None

    def __getitem__(self, name: str) -> Tensor:
        if self.mapped:
            return self.mapped[name]
        file, stored = self.places[name]
        with self._opened(file) as tensors:
            return tensors.get_tensor(stored)

    def __contains__(self, name: object) -> bool:
        return name in (self.mapped or self.places)  # that of a mapping would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.mapped or self.places)

    def __len__(self) -> int:
        return len(self.mapped or self.places)

    def digest(self) -> str:
        """Digest of name, shape, dtype and a few numbers of each tensor: training or rounding changes all of them."""
        entries = [_entry(name, tensor) for name, tensor in self.mapped.items()]
        for shard in {file for file, _ in self.places.values()}:
            with self._opened(shard) as tensors:
                for name, (file, stored) in self.places.items():
                    if file == shard:
                        entries.append(_entry(name, tensors.get_tensor(stored)))
        return hashlib.sha256(b"".join(sorted(entries))).hexdigest()[:16]


def _entry(name: str, tensor: Tensor) -> bytes:
    numbers = tensor.flatten()[:: max(1, tensor.numel() // SAMPLES)].contiguous().view(torch.uint8)
    return f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode() + numbers.numpy().tobytes()


@dataclass(frozen=True)
class Written:
    """A tensor that `write_tensors` writes: `make` gives it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_tensors(file: Path, tensors: Mapping[str, Written], metadata: Mapping[str, str] = METADATA) -> None:
    """Write the safetensors file that `save_file` writes of them, making one after the other."""
    dtypes = list(DTYPES)
    order = sorted(tensors, key=lambda name: (dtypes.index(tensors[name].dtype), name))
    header, end = {"__metadata__": dict(metadata)}, 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.bytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            opened.write(_content(name, tensors[name]))  # in no variable, for the next is made while it would be held


def _content(name: str, tensor: Written) -> np.ndarray:
    made = tensor.make().to(tensor.dtype).contiguous()
    if tuple(made.shape) != tensor.shape:
        raise ValueError(f"{name} must have shape {tensor.shape}, got {tuple(made.shape)}")
    return made.flatten().view(torch.uint8).numpy()
