"""The output folder of a task: parts of long work, tables in Markdown and LaTeX, and result files.

A part is a folder that appears when it is complete, so a stopped run goes on where it was. Parts are shared out over
the processes of `accelerate launch`; what is made of them is computed from all parts in their order, by one process,
so the numbers do not depend on how many processes there were.
"""

import json
import math
import platform
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from core.config import VERSION, config_dict, save_config
from core.errors import UserError
from core.files import complete_file, complete_folder, write_json
from evaluation.measure import Number
from evaluation.metric_suite import MetricSuite, split_name
from evaluation.statistics import FEWEST, LEVEL, Interval, Values, mean_interval
from metrics.protocols import MEASURES

RUN_FILE, RESULTS_FILE, PARTS_FOLDER, INPUTS_FILE = "run.json", "results.json", "parts", "inputs.json"
ARROWS = {"higher": "↑", "lower": "↓"}
INTERVALS_NOTE = (
    f"[low, high] are bootstrap intervals of {LEVEL:.0%} over clips, each the mean over its seeds; with fewer than "
    f"{FEWEST} clips there is none"
)
DIFFERENCES_NOTE = f"{INTERVALS_NOTE}; bold where they exclude 0"
LATEX_SYMBOLS = {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "±": r"$\pm$", "×": r"$\times$"}


def claim_output(
    output: Path, settings: dict[str, Any], state: PartialState, inputs: dict[str, Any] | None = None
) -> None:
    """Write down what an output folder is for; UserError when it was begun with other settings.

    Settings are everything that decides the numbers. Inputs may change while the run is not finished: `run_parts` does
    the parts concerned again.
    """
    if state.is_main_process:
        path = output / RUN_FILE
        finished = (output / RESULTS_FILE).is_file()
        content = json.loads(json.dumps({"settings": settings, "inputs": inputs or {}}))
        if path.is_file():
            begun = json.loads(path.read_text(encoding="utf-8"))
            differing = _differing(begun["settings"], content["settings"])
            differing += _differing(begun["inputs"], content["inputs"]) if finished else []
            if differing:
                raise UserError(
                    f"output={output} was begun with other {', '.join(differing)}; give another folder, or delete it"
                )
        write_json(path, content)
    state.wait_for_everyone()


def _differing(begun: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return sorted(key for key in {*begun, *wanted} if begun.get(key) != wanted.get(key))


def run_parts(
    names: Sequence[str],
    work: Callable[[str, Path], None],
    output: Path,
    state: PartialState,
    description: str,
    inputs: dict[str, Any] | None = None,
) -> list[Path]:
    """Do the parts that are not there yet and return the folders of all, in the order of `names`.

    Args:
        names: of the parts, each fit for a folder name; work: gets one and the folder to write to.
        inputs: by name, what describes a part's inputs; a part that was made of others is done again.
    """
    folders = [output / PARTS_FOLDER / name for name in names]
    if len(set(folders)) < len(folders):
        raise ValueError(f"names of parts must differ, got {sorted(names)}")
    # Neighbouring parts go to the same process, as they often share what they need.
    first, last = (len(names) * (state.process_index + k) // state.num_processes for k in (0, 1))
    mine = list(zip(names, folders, strict=True))[first:last]
    made_of = {name: json.loads(json.dumps((inputs or {}).get(name))) for name, _ in mine}
    files = {name: folder / INPUTS_FILE for name, folder in mine}
    there = {n for n, file in files.items() if file.is_file() and json.loads(file.read_text("utf-8")) == made_of[n]}
    if state.is_main_process:
        before = f", {len(there)} of them before" if there else ""
        print(
            f"{description}: {len(mine)} parts{before}; goes on where it is stopped; results in {output}", flush=True
        )
    bar = tqdm(total=len(mine), initial=len(there), desc=description, disable=not state.is_local_main_process)
    with bar:
        for name, folder in mine:
            if name in there:
                continue
            with complete_folder(folder) as temporary:
                work(name, temporary)
                write_json(temporary / INPUTS_FILE, made_of[name])
            bar.update()
    state.wait_for_everyone()
    return folders


def close_output(output: Path, keep_parts: bool) -> None:
    """Say what a finished run wrote, pictures first, and remove its parts unless they are kept."""
    if not keep_parts:
        shutil.rmtree(output / PARTS_FOLDER, ignore_errors=True)
    files = sorted(path for path in output.iterdir() if path.is_file() and path.name != RUN_FILE)
    names = [path.name for path in sorted(files, key=lambda path: path.suffix not in (".png", ".pdf"))]
    print(f"in {output}: {', '.join(names)}")


@dataclass(frozen=True)
class Cell:
    """A number of a table, over seeds or with an interval over clips."""

    mean: float | None  # None when there is nothing
    deviation: float | None = None  # sample standard deviation over seeds; None for a single one
    bold: bool = False
    interval: Interval | None = None

    def plain(self) -> dict[str, float | int | None]:
        if self.interval is not None:
            return self.interval.plain()
        return {"mean": self.mean, "deviation": self.deviation}


@dataclass(frozen=True)
class Table:
    """Rows of cells with a label each."""

    corner: str  # header of the labels
    columns: tuple[str, ...]  # headers
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]  # label and cells
    caption: str  # what the numbers are

    def plain(self) -> dict[str, dict[str, Any]]:
        """Row -> column -> numbers of the cell, as in JSON."""
        return {
            label: {column: cell.plain() for column, cell in zip(self.columns, cells, strict=True)}
            for label, cells in self.rows
        }


def over_seeds(values: Sequence[float | None]) -> Cell:
    """Mean and deviation of one number over seeds; None when any seed lacks it."""
    if not values or any(value is None for value in values):
        return Cell(None)
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Cell(float(np.mean(values)), deviation)


def interval_cell(interval: Interval) -> Cell:
    """A number with its interval, in bold where that excludes 0; `DIFFERENCES_NOTE` says so to readers."""
    return Cell(interval.value, bold=interval.excludes_zero, interval=interval)


def comparison_table(
    corner: str,
    columns: Sequence[tuple[str, Sequence[str], str]],
    pairs: Iterable[tuple[str, str, str]],
    values: Values,
) -> Table:
    """Variants compared clip by clip.

    Args:
        columns: header prefix, kinds of clips and measured name of each.
        pairs: label of a row, and the names of the variants whose difference, first minus second, it has.
    """
    rows = tuple(
        (
            label,
            tuple(interval_cell(mean_interval(*values.differences(kinds, *two, name))) for _, kinds, name in columns),
        )
        for label, *two in pairs
    )
    return Table(corner, tuple(prefix + measure_label(name) for prefix, _, name in columns), rows, DIFFERENCES_NOTE)


def measure_numbers(runs: Sequence[dict[str, Number]], seeds: Sequence[int]) -> dict[str, Any]:
    """Every measure over seeds: mean, deviation, each seed's value, samples and warnings, as in JSON."""
    described = {}
    for name in runs[0]:
        of_seeds = [run[name] for run in runs]
        described[name] = over_seeds([number.value for number in of_seeds]).plain() | {
            "by_seed": {str(seed): number.value for seed, number in zip(seeds, of_seeds, strict=True)},
            "samples": of_seeds[0].samples,
            "warnings": sorted({number.warning for number in of_seeds if number.warning}),
        }
    return described


def measure_label(name: str) -> str:
    """Header of a measured name: "foreground SSIM ↑", "PSNR (dB) ↑"."""
    region, measure = split_name(name)
    about = MEASURES[measure]
    unit = f" ({about.unit})" if about.unit else ""
    return f"{region} {about.label}{unit} {ARROWS[about.better]}".lstrip()


def best_table(
    corner: str,
    columns: Sequence[tuple[str, str]],
    labels: Iterable[str],
    cells: Sequence[Sequence[Cell]],
    caption: str,
) -> Table:
    """A table with the best cell of every column (header prefix, measured name) in bold."""
    cells = with_best(cells, [MEASURES[split_name(name)[1]].better for _, name in columns])
    headers = tuple(prefix + measure_label(name) for prefix, name in columns)
    return Table(corner, headers, tuple(zip(labels, map(tuple, cells), strict=True)), caption)


def with_best(rows: Sequence[Sequence[Cell]], directions: Sequence[str]) -> list[list[Cell]]:
    """The rows with the best cell of every column marked; directions are "higher" or "lower"."""
    marked = [list(row) for row in rows]
    for column, direction in enumerate(directions):
        known = [row[column].mean for row in marked if row[column].mean is not None]
        if len(set(known)) < 2:
            continue
        best = max(known) if direction == "higher" else min(known)
        for row in marked:
            row[column] = replace(row[column], bold=row[column].mean == best)
    return marked


def format_number(cell: Cell, plus_minus: str) -> str:
    """Mean with three significant digits, deviation with as many decimals; an interval's widest number has three."""
    if cell.mean is None:
        return "-"
    if cell.interval is not None and cell.interval.low is not None:
        numbers = cell.mean, cell.interval.low, cell.interval.high
        widest = max(map(abs, numbers)) or 1.0
        value, low, high = (f"{number:.{max(0, 2 - math.floor(math.log10(widest)))}f}" for number in numbers)
        return f"{value} [{low}, {high}]"
    if cell.mean == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(cell.mean))))
    form = f".{digits}f" if abs(cell.mean) >= 1e-3 else ".2e"
    text = f"{cell.mean:{form}}"
    return text if cell.deviation is None else f"{text}{plus_minus}{cell.deviation:{form}}"


def markdown(table: Table) -> str:
    lines = ["| " + " | ".join((table.corner, *table.columns)) + " |", "|---" * (len(table.columns) + 1) + "|"]
    for label, cells in table.rows:
        shown = [format_number(cell, " ± ") for cell in cells]
        shown = [f"**{text}**" if cell.bold else text for text, cell in zip(shown, cells, strict=True)]
        lines.append("| " + " | ".join((label, *shown)) + " |")
    return "\n".join(lines) + "\n"


def latex(table: Table) -> str:
    """A table as LaTeX, for the package booktabs."""
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escape(table.caption)}}}",
        rf"\begin{{tabular}}{{l{'c' * len(table.columns)}}}",
        r"\toprule",
        " & ".join(map(_escape, (table.corner, *table.columns))) + r" \\",
        r"\midrule",
    ]
    for label, cells in table.rows:
        shown = [format_number(cell, r"\,$\pm$\,") for cell in cells]
        shown = [rf"\textbf{{{text}}}" if cell.bold else text for text, cell in zip(shown, cells, strict=True)]
        lines.append(" & ".join((_escape(label), *shown)) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def _escape(text: str) -> str:
    for symbol in "&%$#_{}":
        text = text.replace(symbol, "\\" + symbol)
    for symbol, code in LATEX_SYMBOLS.items():
        text = text.replace(symbol, code)
    return text


def heading(metric_suite: MetricSuite, *facts: str) -> str:
    """The protocol, further facts and the networks as a list, for above a table."""
    lines = [*metric_suite.protocol.lines(), *facts]
    measures: dict[str, list[str]] = {}  # of each network
    for name, network in metric_suite.networks().items():
        dimension = f" ({network['dimension']} dimensions)" if "dimension" in network else ""
        text = f"{network['network']}{dimension}; weights sha256 {network['sha256'][:12]}"
        measures.setdefault(text, []).append(name)
    lines += [f"{', '.join(names)}: {text}" for text, names in measures.items()]
    return "".join(f"* {line}\n" for line in lines) + "\n"


def warning_lines(warnings: Iterable[tuple[str, str | None]]) -> str:
    """Named warnings as a list, for below a table; every sentence once."""
    by_text: dict[str, list[str]] = {}
    for name, text in warnings:
        if text:
            by_text.setdefault(text, []).append(name)
    lines = [f"* warning, {', '.join(dict.fromkeys(names))}: {text}\n" for text, names in by_text.items()]
    return "\n" + "".join(lines) if lines else ""


def write_results(
    config: Any, metric_suite: MetricSuite | None, results: dict[str, Any], tables: dict[str, str], output: Path
) -> None:
    """Write config.yaml, the tables by file name, and results.json, which says that the run is complete.

    `table.md` is printed. The suite is None where nothing is measured by a protocol.
    """
    facts: dict[str, Any] = {
        "configuration": config_dict(config),
        "versions": {"tpc-animate": VERSION, "torch": torch.__version__, "python": platform.python_version()},
    }
    if metric_suite is not None:
        facts["protocol"] = metric_suite.protocol.plain() | {"measures": list(metric_suite.measures)}
        facts["definitions"] = {
            name: {"unit": MEASURES[name].unit, "better": MEASURES[name].better, "is": MEASURES[name].definition}
            for name in metric_suite.measures
        }
        facts["networks"] = metric_suite.networks()
    save_config(config, output / "config.yaml")
    for name, text in tables.items():
        with complete_file(output / name) as path:
            path.write_text(text, encoding="utf-8")
    write_json(output / RESULTS_FILE, facts | results)
    print(tables["table.md"], end="")


def write_table(
    config: Any,
    metric_suite: MetricSuite,
    table: Table,
    results: dict[str, Any],
    warnings: Iterable[tuple[str, str | None]],
    output: Path,
    compared: Table | None = None,
) -> None:
    """Write and print the table of a task, and one with intervals below; with warnings of its numbers by name.

    See `write_results`.
    """
    tables, facts = [table], [table.caption]
    if compared is not None:
        tables.append(compared)
        pooled = ", ".join(MEASURES[name].label for name in metric_suite.measures if MEASURES[name].is_pooled)
        facts += [compared.caption] + ([f"{pooled}: of all clips together, so without an interval"] if pooled else [])
    text = heading(metric_suite, *facts) + "\n".join(map(markdown, tables)) + warning_lines(warnings)
    written = {"table.md": text, "table.tex": "\n".join(map(latex, tables))}
    write_results(config, metric_suite, results, written, output)
