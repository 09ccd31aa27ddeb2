"""User errors: one line on standard error, exit code 2, no traceback."""

import errno
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_CODE = 2
FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or the user's share of it


class UserError(Exception):
    """Something the user can put right. The message names what is wrong, what was got, and what to do."""


def run_command(main: Callable[[list[str]], None]) -> NoReturn:
    """Run `main(arguments)` and end the process: code 0, 2 after a `UserError` or on a full disk, 130 after Ctrl-C.

    Errors of the program itself are not caught: their traceback is what a bug report needs.
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        # From a loader process an error arrives with that process's traceback in front of its text.
        message = str(error).rsplit(f"{UserError.__module__}.UserError: ", 1)[-1]
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(f"error: {error.filename or 'a file'} could not be written: {error.strerror}", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
