"""Strict loading of networks from folders of diffusers and transformers."""

from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from torch import nn

from core.errors import UserError
from models.checkpoints.files import check_readable, weights_file
from models.checkpoints.loading import Mismatch, misshapen

Module = TypeVar("Module", bound=nn.Module)


def load_folder(
    kind: type[Module],
    folder: str | Path,
    what: str,
    dtype: torch.dtype = torch.float32,
    others: tuple[str, ...] = (),
) -> Module:
    """`kind.from_pretrained` of a local folder that refuses what the library only warns of.

    The libraries give missing tensors random values and go on.

    Args:
        what: the folder as the user knows it, for errors.
        others: what the names of tensors of other networks begin with, which the folder may hold too.

    Raises:
        UserError: no such folder, or its weights do not fit its configuration.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{what} is not a folder of {kind.__name__}: it has no config.json")
    # What the libraries say of a damaged file, or of one with code in it, is not for users.
    check_readable(folder, what)
    options = {"dtype": dtype, "local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if ".fp16." in weights_file(folder, what).name:
        options["variant"] = "fp16"  # the only weights there are
    try:
        module, info = kind.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{what} cannot be loaded as {kind.__name__}: {error}") from None
    mismatch = Mismatch(
        missing=tuple(sorted(info["missing_keys"])),
        unexpected=tuple(sorted(name for name in info["unexpected_keys"] if not name.startswith(others))),
        misshapen=tuple(sorted(misshapen(*entry) for entry in info["mismatched_keys"])),
    )
    if mismatch:
        raise UserError(f"{what} does not fit {kind.__name__}: {'; '.join(mismatch.lines())}")
    return module.eval()
