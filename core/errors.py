"""User errors: one line on standard error, exit code 2, no traceback."""

import errno
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

EXIT_CODE = 2
FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or the user's share of it


# What the user's files, folders and rights cause. A file that is not there may as well be a fault of the program.
OF_FILES = (*FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EIO)
# How writers in C++ and Rust say that the disk is full.
FULL_WORDS = ("No space left on device", "Disk quota exceeded", "inline_container")


class UserError(Exception):
    """Something the user can put right. The message names what is wrong, what was got, and what to do."""


def disk_error(error: Exception) -> str | None:
    """What a full disk made some writer raise, in words; None: it is another error."""
    if isinstance(error, OSError) and error.errno in FULL:
        return error.strerror
    said = [word for word in FULL_WORDS if word in str(error)]
    return said[0].replace(FULL_WORDS[2], "a file was cut short") if said else None


def run_command(main: Callable[[list[str]], None]) -> NoReturn:
    """Run `main(arguments)` and end the process: code 0, 2 after a `UserError` or an error `OF_FILES`, 130 after
    Ctrl-C.
    """
    try_command(main)
    sys.exit(0)


def try_command(main: Callable[[list[str]], Any]) -> None:
    """Run `main(arguments)`; end the process where it fails.

    Errors of the program itself are not caught: their traceback is what a bug report needs.
    """
    line, code = "", 0
    try:
        main(sys.argv[1:])
    except UserError as error:
        # From a loader process an error arrives with that process's traceback in front of its text.
        message = str(error).rsplit(f"{UserError.__module__}.UserError: ", 1)[-1]
        line, code = f"error: {' '.join(message.split())}", EXIT_CODE
    except ModuleNotFoundError as error:
        package = (error.name or __package__).split(".")[0]
        if find_spec(package) is not None:
            raise
        needs = "docs/installation.md says which extra or requirements file brings it"
        line, code = f"error: the package {package} is not installed; {needs}", EXIT_CODE
    except BrokenPipeError:  # nobody reads on, as of `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in OF_FILES:
            raise
        done = "could not be written" if error.errno in FULL else "cannot be used"
        line, code = f"error: {error.filename or 'a file'} {done}: {error.strerror}", EXIT_CODE
    except KeyboardInterrupt:
        line, code = "error: interrupted", 130
    if line:
        gc.collect()  # the exception's frames, whose progress bars so end their lines
        report(line)
        sys.exit(code)


def report(line: str) -> None:
    """Print the error that ends this process; torch's launcher, so accelerate's of several, repeats it as its last."""
    launcher, first = os.environ.get("TORCHELASTIC_ERROR_FILE"), os.environ.get("LOCAL_RANK", "0") == "0"
    if launcher and not first:
        time.sleep(1)  # where all fail alike the launcher ends the others when the first has, and names but that one
    if launcher:
        Path(launcher).write_text(json.dumps({"message": line, "timestamp": int(time.time())}), encoding="utf-8")
    if first or not launcher:
        print(line, file=sys.stderr)
