"""Results of a comparison, as numbers and as a table."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

MIB = 2**20
PRIVATE = "private_peak_bytes"
COLUMNS = (
    "work", "ours", "{peer}", "s, ours", "s, {peer}", "times faster", "MiB, ours", "MiB, {peer}", "share of memory",
    "private MiB, ours", "private MiB, {peer}", "share of private memory", "largest difference",
)  # fmt: skip


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

    @property
    def title(self) -> str:
        return self.work if self.work == "inference" else f"training step, {self.work} stage"

    @property
    def format(self) -> str:
        return self.dtype + ", checkpointed" * self.checkpointed

    def numbers(self, rows: Sequence["Row"]) -> dict[str, Any]:
        """As JSON takes them, with the ratios to the peer's rows that this one is held against."""
        ratios = {other.format.replace(",", ""): self.ratios(other) for other in self.peers(rows)}
        return {**asdict(self), "ratios": ratios}

    def peers(self, rows: Sequence["Row"]) -> Iterator["Row"]:
        """The rows whose peer this one is held against: itself, and plain float32."""
        if self.theirs:
            yield self
        for other in rows:
            if other is not self and other.theirs and (other.work, other.format) == (self.work, "float32"):
                yield other

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


def markdown(rows: Sequence[Row], peer: str) -> str:
    """A table with a line for every pair, for the whole run and for a denoising step, and why the peer did not run."""
    lines = [_line(column.format(peer=peer) for column in COLUMNS), "|---" * len(COLUMNS) + "|\n"]
    for row in rows:
        for other in row.peers(rows):
            lines.append(_line(_cells(row, other)))
            if "step_seconds" in row.ours and "step_seconds" in other.theirs:
                lines.append(_line(_cells(row, other, of_step=True)))
    notes = [f"\n{row.title}, {row.format}: {row.reason}\n" for row in rows if row.reason]
    return "".join(lines + notes)


def _line(cells: Iterator[str] | list[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def _cells(row: Row, other: Row, of_step: bool = False) -> list[str]:
    """One line of the table, of all the work or of a denoising step."""
    part, seconds, peak = ("step_", "step_seconds", "loop_peak_bytes") if of_step else ("", "seconds", "peak_bytes")
    ratios = {name: f"{ratio:.2f}" for name, ratio in row.ratios(other).items()}
    cells = [row.title + ", a step" * of_step, row.format, other.format]
    cells += [f"{row.ours[seconds]:.2f}", f"{other.theirs[seconds]:.2f}", ratios[f"{part}speed"]]
    cells += [f"{row.ours[peak] / MIB:.0f}", f"{other.theirs[peak] / MIB:.0f}", ratios.get(f"{part}memory", "")]
    if PRIVATE in row.ours and PRIVATE in other.theirs and not of_step:
        cells += [f"{row.ours[PRIVATE] / MIB:.0f}", f"{other.theirs[PRIVATE] / MIB:.0f}"]
        cells += [ratios.get("private_memory", "")]
    else:
        cells += [""] * 3
    return [*cells, _difference(row.difference) if row is other and not of_step else ""]


def _difference(found: dict[str, Any]) -> str:
    if "loss" in found:
        return f"loss {found['loss']:.1e}"
    rounded = found["peer_rounding"]["largest"]
    return f"{found['largest']:.1e} of {found['deviation']:.1f}; {rounded:.1e} when rounding alike"
