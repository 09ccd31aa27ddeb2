"""Everything that only a GPU can answer, within minutes and without downloads.

    make gpu-check                                                                what follows, in 8 minutes
    python -m benchmarks.gpu_check [parts=[agreement,training,...]] [minutes=8]
    python -m benchmarks.gpu_check peer=DIR peer_python=PYTHON                    Moore-AnimateAnyone beside it
    python -m benchmarks.gpu_check size=tiny device=cpu                           to try it without a GPU

Agreement with the CPU, kernels of attention, steps of inference and training with their memory, options of inference,
the loader, 8-bit moments. Writes results.json and table.md after every part; the exit code is 1 if one of them failed.
"""

from benchmarks.config import GPUCheckConfig
from core.config import check_first

check_first(__name__, GPUCheckConfig, __doc__)


import time
from dataclasses import asdict
from functools import partial

import torch

from benchmarks.gpu_check.parts import MACHINE, SECONDS, rows_of
from benchmarks.gpu_check.worker import Part, Row, Worker
from core.config import config_dict, load_config
from core.errors import UserError, run_command
from core.files import complete_file, output_folder, write_json

SHORTEST_LIMIT = 120.0  # seconds that every part may take, and twice its usual ones, if so many are left


def table(parts: dict[str, Part]) -> str:
    """Markdown with a table a part, under the machine's."""
    blocks = []
    for name, part in parts.items():
        said = [f"**failed**: {part.error}"] if part.error else [f"skipped: {part.skipped}"] if part.skipped else []
        blocks.append("\n\n".join([f"## {name} ({part.seconds:.0f} s)", *rows_table(part.rows), *said]))
    return "\n\n".join(blocks) + "\n"


def rows_table(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([cell(row.get(column, "")) for column in columns] for row in rows)]
    return ["\n".join(f"| {' | '.join(line)} |" for line in lines)]


def cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def main(arguments: list[str]) -> None:
    config = load_config(GPUCheckConfig, arguments, about=__doc__)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch finds no GPU here; device=cpu size=tiny tries the check itself")
    output, end = output_folder(config.output), time.monotonic() + 60 * config.minutes
    parts: dict[str, Part] = {}
    worker = Worker(partial(rows_of, config))
    try:
        for name in (MACHINE, *config.parts):
            left, needed = end - time.monotonic(), SECONDS[name]
            if left < needed:
                reason = f"takes about {needed} s, and {max(left, 0):.0f} are left of minutes={config.minutes:g}"
                parts[name] = Part(skipped=reason)
            else:
                print(f"measuring {name} ...", flush=True)
                earlier = {done: part.rows for done, part in parts.items()}
                parts[name] = worker.measure(name, earlier, min(left, max(2 * needed, SHORTEST_LIMIT)))
            found = {name: asdict(part) for name, part in parts.items()}
            write_json(output / "results.json", {"config": config_dict(config), "parts": found})
            with complete_file(output / "table.md") as path:
                path.write_text(table(parts), encoding="utf-8")
    finally:
        worker.close()
    print(f"\n{table(parts)}\n{output / 'table.md'}, {output / 'results.json'}")
    if any(part.error for part in parts.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
