"""Files and folders that appear under their final name only when they are complete, one writer at a time.

Model files inside published packages are taken out, checked by SHA-256 and kept in `~/.cache/tpc-animate` or
TPC_ANIMATE_CACHE. Packages are unpacked, neither installed nor imported, so they need not fit the Python in use.
"""

import atexit
import errno
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

from core.errors import UserError, disk_error

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name


@contextmanager
def complete_file(path: str | Path) -> Iterator[Path]:
    """Temporary path of the same name; it becomes `path` when the block ends well, else it is removed."""
    path = Path(path)
    with partial_folder(path) as hidden:
        yield hidden / path.name
        give_usual_mode(hidden)
        os.replace(hidden / path.name, path)


@contextmanager
def complete_folder(path: str | Path) -> Iterator[Path]:
    """Empty temporary folder of the same name; it replaces `path` when the block ends well, else it is removed."""
    path = Path(path)
    with partial_folder(path) as hidden:
        new = hidden / path.name
        new.mkdir()
        yield new
        give_usual_mode(new)
        if path.exists():
            os.replace(path, hidden / f"{path.name}.old")
        os.replace(new, path)


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Empty hidden folder beside `path`, removed when the block ends; another writer of `path` waits for that.

    The system takes its lock away with the process: what a killed one has left goes before the block begins. Errors
    of a full disk, of whatever writer, arrive as the OSError of `path`.
    """
    hidden = _hidden(path)
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = None
        while handle is None:
            with suppress(FileExistsError):
                hidden.mkdir()
            handle = _lock(hidden, wait=True)
        for left in hidden.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        yield hidden
    except Exception as error:
        if reason := disk_error(error):
            raise OSError(errno.ENOSPC, reason, str(path)) from error
        raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        if handle >= 0:
            os.close(handle)
        _remove_empty(made)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _lock(folder: Path, wait: bool = False) -> int | None:
    """A handle that keeps other processes from locking the folder until it is closed; None: locked, or gone.

    -1 on systems that cannot lock folders.
    """
    if fcntl is None:
        return -1
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(folder)):  # else its writer has removed it meanwhile
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(handle)
    return None


def give_usual_mode(folder: str | Path) -> None:
    """Let files below a folder be read by whom the umask lets: some libraries' files are their owner's alone."""
    mode = os.stat(folder).st_mode & 0o666  # a new folder has what the umask leaves
    for path in Path(folder).rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o666 != mode:
            path.chmod(mode)


def check_room(folder: str | Path, needed: int) -> None:
    """OSError of a full disk unless it has so many bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} free", str(folder))


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


def remove_leftovers(folder: str | Path) -> None:
    """Remove what killed processes left in a folder, half-written or half-removed; what a living one writes stays."""
    for path in [*Path(folder).glob(".*.partial"), *Path(folder).glob(".*.old")]:
        remove_leftover(path)


def remove_partial(path: str | Path) -> None:
    """Remove what a killed process left of its writing of the file or folder `path`."""
    remove_leftover(_hidden(Path(path)))


def remove_leftover(hidden: Path) -> None:
    if hidden.is_dir() and (handle := _lock(hidden)) is not None:
        shutil.rmtree(hidden)
        if handle >= 0:
            os.close(handle)


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
    """Remove folders, each inside the next, as far as they are empty."""
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


def no_such_path(path: str | Path, argument: str, advice: str = "") -> UserError:
    """The error for an argument whose file or folder is not there; names of hub repositories are told as such."""
    path = str(path)
    if HUB_NAME.fullmatch(path) and not Path(path).parent.is_dir() and not Path(path).suffix:
        return UserError(
            f"{argument}={path} does not exist, and nothing is downloaded by itself: if it is a repository of Hugging "
            f"Face, `hf download {path} --local-dir FOLDER` and give {argument}=FOLDER (docs/checkpoints.md)"
        )
    return UserError(f"{argument}={path} does not exist{advice}")


def existing_file(path: str | Path, argument: str) -> Path:
    """`path` as a Path, or a `UserError` that names the argument."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{argument}={path} does not exist")
    if path.is_dir():
        raise UserError(f"{argument}={path} is a folder; give a file")
    return path


def check_paths(given: Mapping[str, str | None]) -> None:
    """Refuse files and folders, by argument, that do not exist; None: not given."""
    for argument, path in given.items():
        if path is not None and not Path(path).exists():
            raise no_such_path(path, argument)


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
