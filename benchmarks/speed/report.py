"""Tables of what was measured."""

from typing import Any

Numbers = dict[str, Any]


def speed_tables(results: dict[str, Any]) -> str:
    """Markdown with one table a part.

    Args:
        results: as `python -m benchmarks.speed` writes them: "machine", "settings" and "parts", of each of which the
            numbers by name.
    """
    parts = results["parts"]
    rates = {name: values["gflop_per_second"] for name, values in parts.get("machine", {}).items()}
    blocks = [_heading(results["machine"], rates)]
    for name, entries in parts.items():
        kind, dtype = name.split()[0], name.split()[-1]
        if kind == "machine":
            continue
        rate = rates.get(dtype)
        baseline = entries.get("without TPC", {}).get("seconds")
        rows = [_row(entry, numbers, rate, baseline) for entry, numbers in entries.items()]
        blocks.append(f"## {name}\n\n" + _table(rows))
    return "\n\n".join(blocks) + "\n"


def _heading(machine: dict[str, Any], rates: dict[str, float]) -> str:
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "diffusers", "python"))
    products = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    text = f"{machine['device']}, {machine['threads']} threads; {versions}."
    return text + (f" Matrix products: {products} GFLOP/s." if products else "")


def _row(name: str, numbers: Numbers, rate: float | None, baseline: float | None) -> dict[str, str]:
    """Cells by column; a column is left out where no row has it."""
    row = {"": name, "seconds": f"{numbers['seconds']:.3g}"}
    if baseline:
        row["more time"] = f"{numbers['seconds'] / baseline - 1:+.1%}" if numbers["seconds"] != baseline else ""
    for part, seconds in numbers["parts"].items():
        row[f"{part}, s"] = f"{seconds:.3g}"
    if numbers["peak_mib"]:
        row["peak, MiB"] = f"{numbers['peak_mib']}"
    if numbers["gflop"]:
        row["GFLOP"] = f"{numbers['gflop']:.4g}"
        if rate:
            row["of matrix products"] = f"{numbers['gflop'] / numbers['seconds'] / rate:.0%}"
    for fact, form in (
        ("frames_per_second", "{:.1f}"),
        ("images_per_second", "{:.0f}"),
        ("busy", "{:.1%}"),
        ("clips_per_minute", "{:.2f}"),
        ("clips_per_minute_with_start", "{:.2f}"),
    ):
        if fact in numbers:
            row[fact.replace("_", " ")] = form.format(numbers[fact])
    return row


def _table(rows: list[dict[str, str]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row.get(column, "") for column in columns) + " |" for row in rows])
