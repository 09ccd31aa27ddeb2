"""User errors: one line on standard error, exit code 2, no traceback."""

import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_CODE = 2


class UserError(Exception):
    """Something the user can put right. The message names what is wrong, what was got, and what to do."""


def run_command(main: Callable[[list[str]], None]) -> NoReturn:
    """Run `main(arguments)` and end the process: code 0, or 2 after a `UserError` or an interrupt by the user (130).

    Errors of the program itself are not caught: their traceback is what a bug report needs.
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
