"""One writer a folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has none; two runs in one folder then go unnoticed
    fcntl = None

NAME = ".lock"


@contextmanager
def locked_folder(folder: str | Path, argument: str = "output") -> Iterator[None]:
    """Within the block no other process may lock the folder. The lock ends with the process, however it ends.

    Raises:
        UserError: another process has locked it; its number is in the message.
    """
    if fcntl is None:
        yield
        return
    path = Path(folder) / NAME
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise UserError(
                f"{argument}={folder} is being written by another run (process {owner}); wait for it, end it, or "
                f"give another folder"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
