"""Commands on published checkpoints.

python -m models.checkpoints verify fixture=PATH/moore_tiny
"""

import sys
from dataclasses import dataclass

from omegaconf import MISSING

from core.config import load_config
from core.errors import UserError, run_command
from models.checkpoints.verify import read_fixture, verify

USAGE = "python -m models.checkpoints {inspect FILES... | verify fixture=PATH | convert family=... output=DIR ...}"


@dataclass
class VerifyConfig:
    """`verify`: fixture is the path of a fixture without suffix."""

    fixture: str = MISSING


def verify_command(arguments: list[str]) -> None:
    """Print `output-name max-abs-difference tolerance` for every output; end with code 1 unless all are within."""
    config = load_config(VerifyConfig, arguments)
    results = verify(read_fixture(config.fixture))
    for result in results:
        print(f"{result.name} {result.difference:.3g} {result.tolerance:g}")
    if not all(result.passed for result in results):
        sys.exit(1)


COMMANDS = {"verify": verify_command}


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in COMMANDS:
        raise UserError(f"usage: {USAGE}")
    COMMANDS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    run_command(main)
