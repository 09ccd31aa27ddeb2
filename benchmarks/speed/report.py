"""Tables of the measurements."""

from typing import Any

FACTS = {
    "images_per_second": "{:.0f}",
    "busy": "{:.1%}",
    "clips_per_minute": "{:.2f}",
    "clips_per_minute_with_start": "{:.2f}",
}


def speed_tables(results: dict[str, Any]) -> str:
    """Markdown with one table a part of results.json."""
    machine, parts = results["machine"], results["parts"]
    rates = {name: values["gflop_per_second"] for name, values in parts.get("machine", {}).items()}
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "diffusers", "python"))
    heading = f"{machine['device']}, {machine['threads']} threads; {versions}."
    if rates:
        heading += f" Matrix products: {', '.join(f'{name} {rate:.0f}' for name, rate in rates.items())} GFLOP/s."
    blocks = [heading]
    for name, entries in parts.items():
        if name == "machine":
            continue
        rate, baseline = rates.get(name.split()[-1]), entries.get("without TPC", {}).get("seconds")
        rows = [_row(entry, numbers, rate, baseline) for entry, numbers in entries.items()]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(row.get(column, "") for column in columns) + " |" for row in rows]
        blocks.append(f"## {name}\n\n" + "\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _row(name: str, numbers: dict[str, Any], rate: float | None, baseline: float | None) -> dict[str, str]:
    """Cells by column; a column is left out where no row has it."""
    seconds, gflop = numbers["seconds"], numbers["gflop"]
    row = {"": name, "seconds": f"{seconds:.3g}"}
    if baseline:
        row["more time"] = f"{seconds / baseline - 1:+.1%}" if seconds != baseline else ""
    row |= {f"{part}, s": f"{taken:.3g}" for part, taken in numbers["parts"].items()}
    if numbers["peak_mib"]:
        row["peak, MiB"] = f"{numbers['peak_mib']}"
    if gflop:
        row["GFLOP"] = f"{gflop:.4g}"
        if rate:
            row["of matrix products"] = f"{gflop / seconds / rate:.0%}"
    return row | {
        fact.replace("_", " "): form.format(numbers[fact]) for fact, form in FACTS.items() if fact in numbers
    }
