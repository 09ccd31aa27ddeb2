"""Results of a comparison, as numbers and as a table."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

MIB = 2**20
PRIVATE = "private_peak_bytes"
HEADER = (
    "| work | ours | {peer} | s, ours | s, {peer} | times faster | MiB, ours | MiB, {peer} | share of memory "
    "| private MiB, ours | private MiB, {peer} | share of private memory | largest difference |\n"
    + "|---" * 13
    + "|\n"
)


@dataclass(frozen=True)
class Row:
    """One kind of work in one dtype.

    `ours` and `theirs`, empty where a side did not run, have medians of "seconds", "peak_bytes", on CPUs
    "private_peak_bytes" of them, and of inference also "step_seconds" and "loop_peak_bytes" before decoding.
    `difference` is of inference the largest and the mean one of the latents, their deviation, and the same with us
    rounding what the peer rounds; of training that of the losses before the first and before the last step.
    """

    work: str  # "inference", or the stage of a training step
    dtype: str
    checkpointed: bool = False  # gradients
    ours: dict[str, float] = field(default_factory=dict)
    theirs: dict[str, float] = field(default_factory=dict)
    difference: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None  # why the peer did not run

    def numbers(self, rows: Sequence["Row"]) -> dict[str, Any]:
        """As JSON takes them, with the ratios to the peer's rows that this one is held against."""
        ratios = {
            f"{other.dtype}{' checkpointed' * other.checkpointed}": self.ratios(other) for other in peers(self, rows)
        }
        return {**asdict(self), "ratios": ratios}

    def ratios(self, other: "Row") -> dict[str, float]:
        """Seconds of the peer in `other` over ours here, and our share of its memory."""
        found = {}
        for name, seconds, peak in (("", "seconds", "peak_bytes"), ("step_", "step_seconds", "loop_peak_bytes")):
            if seconds in self.ours and seconds in other.theirs:
                found[f"{name}speed"] = other.theirs[seconds] / self.ours[seconds]
                if other.theirs[peak]:
                    found[f"{name}memory"] = self.ours[peak] / other.theirs[peak]
        if other.theirs.get(PRIVATE):
            found["private_memory"] = self.ours[PRIVATE] / other.theirs[PRIVATE]
        return found


def peers(row: Row, rows: Sequence[Row]) -> Iterator[Row]:
    """The rows whose peer a row is held against: itself, and plain float32."""
    if row.theirs:
        yield row
    for other in rows:
        if other is not row and other.theirs and (other.work, other.dtype) == (row.work, "float32"):
            if not other.checkpointed:
                yield other


def markdown(rows: Sequence[Row], peer: str) -> str:
    """A table with a line for every pair, for the whole run and for a denoising step, and why the peer did not run."""
    lines = [HEADER.format(peer=peer)]
    notes = []
    for row in rows:
        for other in peers(row, rows):
            lines.append(line(row, other))
            if "step_seconds" in row.ours and "step_seconds" in other.theirs:
                lines.append(line(row, other, of_step=True))
        if row.reason:
            notes.append(f"\n{name_of(row)}, {format_of(row)}: {row.reason}\n")
    return "".join(lines + notes)


def line(row: Row, other: Row, of_step: bool = False) -> str:
    """One line of the table, of all the work or of a denoising step."""
    part, seconds, peak = ("step_", "step_seconds", "loop_peak_bytes") if of_step else ("", "seconds", "peak_bytes")
    ratios = row.ratios(other)
    cells = [name_of(row) + ", a step" * of_step, format_of(row), format_of(other)]
    cells += [f"{row.ours[seconds]:.2f}", f"{other.theirs[seconds]:.2f}", f"{ratios[part + 'speed']:.2f}"]
    cells += [f"{row.ours[peak] / MIB:.0f}", f"{other.theirs[peak] / MIB:.0f}"]
    cells += [f"{ratios[part + 'memory']:.2f}" if part + "memory" in ratios else ""]
    if PRIVATE in row.ours and PRIVATE in other.theirs and not of_step:
        cells += [f"{row.ours[PRIVATE] / MIB:.0f}", f"{other.theirs[PRIVATE] / MIB:.0f}"]
        cells += [f"{ratios['private_memory']:.2f}" if "private_memory" in ratios else ""]
    else:
        cells += [""] * 3
    cells += [difference(row) if row is other and not of_step else ""]
    return "| " + " | ".join(cells) + " |\n"


def name_of(row: Row) -> str:
    return row.work if row.work == "inference" else f"training step, {row.work} stage"


def format_of(row: Row) -> str:
    return row.dtype + ", checkpointed" * row.checkpointed


def difference(row: Row) -> str:
    """The differences of the two results in words."""
    found = row.difference
    if "loss" in found:
        return f"loss {found['loss']:.1e}"
    rounded = found["peer_rounding"]["largest"]
    return f"{found['largest']:.1e} of {found['deviation']:.1f}; {rounded:.1e} when rounding alike"
