"""Commands on published checkpoints.

python -m models.checkpoints inspect FILE ...                       what files are, and what is wrong with them
python -m models.checkpoints convert family=animate_anyone weights=FOLDER output=FOLDER
python -m models.checkpoints verify fixture=PATH/moore_tiny         known answers, see docs/checkpoints.md
"""

import sys
from dataclasses import fields
from pathlib import Path

from core.config import known_task, load_config
from core.errors import UserError, run_command
from models.config import ANIMATORS, FAMILIES, ConvertConfig, VerifyConfig

USAGE = "python -m models.checkpoints {inspect FILE ... | verify fixture=PATH | convert family=... output=FOLDER ...}"


def inspect_command(arguments: list[str]) -> None:
    """Print what each file is; end with code 1 for what is incomplete, not finite, unknown or no network's weights."""
    if {"-h", "--help"} & set(arguments):
        print(inspect_command.__doc__.strip(), f"\n\n{USAGE}")
        return
    if not arguments:
        raise UserError(f"inspect needs files: {USAGE}")
    for path in arguments:
        if not Path(path).exists():
            raise UserError(f"file={path} does not exist")
    # Networks take seconds to import, which wrong arguments need not wait for: so in every command below.
    from models.checkpoints.files import other_kind, read_tensors
    from models.checkpoints.inspect import inspect, inspect_folder
    from models.checkpoints.loading import first_few

    complete = True
    for path in arguments:
        if (cls := inspect_folder(Path(path))) is not None:
            print(f"{path}: {cls}\n  complete")
            continue
        tensors = read_tensors(path, "file")
        if kind := other_kind(tensors):
            print(f"{path}: {kind}")
            complete = False
            continue
        found = inspect(tensors, path)
        counts = f"{found.tensors} tensors, {found.elements:,} elements, {' '.join(found.dtypes)}"
        print(f"{path}: {found.kind}; {counts}" + (f"; {found.detail}" if found.detail else ""))
        lines = found.mismatch.lines() if found.mismatch else [] if found.known else ["not compared"]
        if found.not_finite:
            lines.append(f"NaN or infinity in {len(found.not_finite)}: {first_few(found.not_finite)}")
        if found.blank:
            lines.append(f"zeros alone in {len(found.blank)}: {first_few(found.blank)}")
        print("\n".join(f"  {line}" for line in lines or ["complete"]))
        faults = found.mismatch or found.not_finite or found.blank
        complete = complete and not faults and found.kind != "unknown"
    if not complete:
        sys.exit(1)


def verify_command(arguments: list[str]) -> None:
    """Print `output-name max-abs-difference tolerance` for every output; end with code 1 unless all are within.

    Column heads and verdict go to standard error, so that standard output holds the numbers alone.
    """
    config = load_config(VerifyConfig, arguments, about=verify_command.__doc__)
    from models.checkpoints.verify import read_fixture, verify

    results = verify(read_fixture(config.fixture))
    width = max(len(result.name) for result in results)
    print(f"{'output':{width}} {'largest difference':>18} {'tolerance':>10}", file=sys.stderr)
    for result in results:
        print(f"{result.name:{width}} {result.difference:18.3g} {result.tolerance:10g}", flush=True)
    failed = [result.name for result in results if not result.passed]
    if failed:
        print(f"failed: {len(failed)} of {len(results)} outputs differ: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)
    print(f"passed: all {len(results)} outputs are within their tolerances", file=sys.stderr)


def published_keys(family: str) -> type[ConvertConfig]:
    """The configuration of `convert family=...`."""
    if family in FAMILIES:
        return FAMILIES[family]
    if all(line.startswith("models.") for line in ANIMATORS.values()):
        raise UserError(f"family={family} is not one of {', '.join(FAMILIES)}; Wan-Animate's folder serves as it is")
    from models.checkpoints.convert import published_family  # of an animator that lives elsewhere

    return published_family(family).config


def convert_command(arguments: list[str]) -> None:
    """Write a pipeline folder."""
    named = [argument.removeprefix("family=") for argument in arguments if argument.startswith("family=")]
    if not named and {"-h", "--help"} & set(arguments):
        for family, schema in FAMILIES.items():
            print(f"family={family}: {' '.join(f'{key.name}=' for key in fields(schema))}")
        return
    schema = published_keys(named[-1]) if named else ConvertConfig
    config = load_config(schema, arguments, about=f"{convert_command.__doc__}\n\n{schema.__doc__}")
    from models.checkpoints.convert import convert

    notes = convert(config)
    print(f"pipeline folder: {config.output}")
    print("\n".join(f"  {note}" for note in notes), end="\n" if notes else "")


COMMANDS = {"inspect": inspect_command, "verify": verify_command, "convert": convert_command}


def main(arguments: list[str]) -> None:
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    task, *rest = arguments or [""]
    COMMANDS[known_task(task, COMMANDS)](rest)


if __name__ == "__main__":
    run_command(main)
