"""Files and folders that appear under their final name only when they are complete, one writer at a time."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from core.errors import UserError


@contextmanager
def complete_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with the same suffix; rename it to `path` when the block ends well.

    When the block raises, the temporary file is removed and `path` is left as it was.
    """
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
    """Yield a temporary empty folder beside `path`; it replaces `path` when the block ends well.

    When the block raises, the temporary folder is removed and `path` is left as it was.
    """
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


def output_folder(path: str | Path, argument: str = "output") -> Path:
    """Create the folder a command writes to, or say why it cannot be one."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{argument}={path} is a file; give a folder that may be created")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{argument}={path} cannot be created: {error.strerror}") from None
    return path


@contextmanager
def locked_folder(folder: str | Path, argument: str = "output") -> Iterator[None]:
    """Within the block no other process may lock the folder. The lock ends with the process, however it ends.

    Raises:
        UserError: another process has locked it; its number is in the message.
    """
    path = Path(folder) / ".lock"
    try:
        with FileLock(path, timeout=0):
            path.write_text(str(os.getpid()), encoding="utf-8")
            yield
    except Timeout:
        owner = path.read_text(encoding="utf-8").strip() or "unknown"
        raise UserError(
            f"{argument}={folder} is being written by another run (process {owner}); wait for it, end it, or give "
            f"another folder"
        ) from None


def existing_file(path: str | Path, argument: str) -> Path:
    """`path` as a Path, or a `UserError` that names the argument."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{argument}={path} does not exist")
    if path.is_dir():
        raise UserError(f"{argument}={path} is a folder; give a file")
    return path


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinity are refused because they are not JSON."""
    with complete_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
