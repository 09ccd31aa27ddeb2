"""Result files: the resolved configuration, versions and protocol in JSON, tables in Markdown and LaTeX."""

import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.config import VERSION, config_dict, save_config
from core.files import complete_file, write_json
from evaluation.jobs import RESULTS_FILE
from evaluation.metric_suite import REGIONS, MetricSuite
from evaluation.summary import Number
from metrics.protocols import MEASURES

ARROWS = {"higher": "↑", "lower": "↓"}
LATEX_ARROWS = {"higher": r"$\uparrow$", "lower": r"$\downarrow$"}


@dataclass(frozen=True)
class Cell:
    """A number of a table over seeds.

    Attributes:
        mean: None when there is nothing.
        deviation: sample standard deviation over seeds; None for a single one.
        best: printed in bold.
    """

    mean: float | None
    deviation: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells with a label each, and two header lines.

    Attributes:
        corner: header of the labels.
        columns: headers.
        rows: label and cells.
        caption: what the numbers are.
    """

    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    caption: str


def over_seeds(values: Sequence[float | None]) -> Cell:
    """Mean and deviation of one number over seeds; None when any seed lacks it."""
    if not values or any(value is None for value in values):
        return Cell(None)
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Cell(float(np.mean(values)), deviation)


def measure_numbers(runs: Sequence[dict[str, Number]], seeds: Sequence[int]) -> dict[str, Any]:
    """Every measure over seeds: mean, deviation, each seed's value, samples and warnings, as in JSON."""
    described = {}
    for name in runs[0]:
        cell = over_seeds([by_seed[name].value for by_seed in runs])
        described[name] = {
            "mean": cell.mean,
            "deviation": cell.deviation,
            "by_seed": {str(seed): by_seed[name].value for seed, by_seed in zip(seeds, runs, strict=True)},
            "samples": runs[0][name].samples,
            "warnings": sorted({by_seed[name].warning for by_seed in runs if by_seed[name].warning}),
        }
    return described


def split_name(name: str) -> tuple[str, str]:
    """Region and measure of a measured name: "foreground_ssim" -> ("foreground", "ssim")."""
    for region in REGIONS[1:]:
        if name.startswith(region + "_"):
            return region, name[len(region) + 1 :]
    return "", name


def measure_label(name: str, arrows: dict[str, str] = ARROWS) -> str:
    """A measure as a header of a table: "foreground SSIM ↑", "PSNR (dB) ↑"."""
    region, measure = split_name(name)
    about = MEASURES[measure]
    unit = f" ({about.unit})" if about.unit else ""
    return f"{region + ' ' if region else ''}{about.label}{unit} {arrows[about.better]}"


def with_best(rows: Sequence[Sequence[Cell]], better: Sequence[str]) -> list[list[Cell]]:
    """The rows with the best cell of every column marked."""
    marked = [list(row) for row in rows]
    for column, direction in enumerate(better):
        known = [row[column].mean for row in marked if row[column].mean is not None]
        if len(set(known)) < 2:
            continue
        best = max(known) if direction == "higher" else min(known)
        for row in marked:
            cell = row[column]
            row[column] = Cell(cell.mean, cell.deviation, cell.mean == best)
    return marked


def format_number(cell: Cell, plus_minus: str) -> str:
    """Mean and deviation with three significant digits of what matters."""
    if cell.mean is None:
        return "-"
    if cell.mean == 0:
        return "0"
    size = max(abs(cell.mean), 1e-12)
    if size < 1e-3:
        return f"{cell.mean:.2e}"
    digits = max(0, 2 - math.floor(math.log10(size)))
    text = f"{cell.mean:.{digits}f}"
    return text if cell.deviation is None else f"{text}{plus_minus}{cell.deviation:.{digits}f}"


def markdown(table: Table) -> str:
    """A table as Markdown."""
    lines = ["| " + " | ".join((table.corner, *table.columns)) + " |", "|---" * (len(table.columns) + 1) + "|"]
    for label, cells in table.rows:
        shown = [format_number(cell, " ± ") for cell in cells]
        shown = [f"**{text}**" if cell.best else text for text, cell in zip(shown, cells, strict=True)]
        lines.append("| " + " | ".join((label, *shown)) + " |")
    return "\n".join(lines) + "\n"


def latex(table: Table) -> str:
    """A table as LaTeX, for the package booktabs."""
    columns = [_escape(column) for column in table.columns]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escape(table.caption)}}}",
        rf"\begin{{tabular}}{{l{'c' * len(columns)}}}",
        r"\toprule",
        " & ".join((_escape(table.corner), *columns)) + r" \\",
        r"\midrule",
    ]
    for label, cells in table.rows:
        shown = [format_number(cell, r"\,$\pm$\,") for cell in cells]
        shown = [rf"\textbf{{{text}}}" if cell.best else text for text, cell in zip(shown, cells, strict=True)]
        lines.append(" & ".join((_escape(label), *shown)) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def _escape(text: str) -> str:
    replaced = {"↑": LATEX_ARROWS["higher"], "↓": LATEX_ARROWS["lower"], "±": r"$\pm$", "×": r"$\times$"}
    for plain in "&%$#_{}":
        text = text.replace(plain, "\\" + plain)
    for plain, code in replaced.items():
        text = text.replace(plain, code)
    return text


def common_facts(configuration: Any, metric_suite: MetricSuite | None = None) -> dict[str, Any]:
    """What every result file begins with: configuration, versions, and the protocol with its networks."""
    facts: dict[str, Any] = {
        "configuration": config_dict(configuration),
        "versions": {"tpc-animate": VERSION, "torch": torch.__version__, "python": platform.python_version()},
    }
    if metric_suite is not None:
        facts["protocol"] = metric_suite.protocol.plain() | {"measures": list(metric_suite.measures)}
        facts["definitions"] = {
            name: {"unit": MEASURES[name].unit, "better": MEASURES[name].better, "is": MEASURES[name].definition}
            for name in metric_suite.measures
        }
        facts["networks"] = metric_suite.networks()
    return facts


def heading(metric_suite: MetricSuite, *facts: str) -> str:
    """The protocol, further facts and the networks as a list, for above a table."""
    lines = [*metric_suite.protocol.lines(), *facts]
    for name, network in metric_suite.networks().items():
        dimension = f" ({network['dimension']} dimensions)" if "dimension" in network else ""
        lines.append(f"{name}: {network['network']}{dimension}; weights sha256 {network['sha256'][:12]}")
    return "".join(f"* {line}\n" for line in lines) + "\n"


def warning_lines(warnings: Iterable[tuple[str, str | None]]) -> str:
    """What makes numbers doubtful, by name, as a list for below a table; every sentence once."""
    by_text: dict[str, list[str]] = {}
    for name, text in warnings:
        if text:
            by_text.setdefault(text, []).append(name)
    lines = [f"* warning, {', '.join(dict.fromkeys(names))}: {text}\n" for text, names in by_text.items()]
    return "\n" + "".join(lines) if lines else ""


def write_results(output: Path, results: dict[str, Any], tables: dict[str, str]) -> None:
    """Write the tables by file name, then `results.json`, which says that the run is complete."""
    for name, text in tables.items():
        with complete_file(output / name) as path:
            path.write_text(text, encoding="utf-8")
    write_json(output / RESULTS_FILE, results)


def write_table(
    config: Any,
    metric_suite: MetricSuite,
    table: Table,
    results: dict[str, Any],
    warnings: Iterable[tuple[str, str | None]],
    output: Path,
) -> None:
    """Write config.yaml, table.md, table.tex and results.json, and print the table.

    Args:
        results: what the task adds to the common facts.
        warnings: of numbers, by name.
    """
    save_config(config, output / "config.yaml")
    text = heading(metric_suite, table.caption) + markdown(table) + warning_lines(warnings)
    results = common_facts(config, metric_suite) | results
    write_results(output, results, {"table.md": text, "table.tex": latex(table)})
    print(text, end="")
