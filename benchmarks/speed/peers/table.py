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
    """One kind of work in one dtype."""

    work: str  # "inference", or the stage of a training step
    dtype: str
    checkpointed: bool = False  # gradients
    # "seconds", "peak_bytes", on CPUs "private_peak_bytes"; of inference also "step_seconds" and "loop_peak_bytes"
    ours: dict[str, float] = field(default_factory=dict)
    theirs: dict[str, float] = field(default_factory=dict)  # empty where the peer did not run
    difference: dict[str, Any] = field(default_factory=dict)  # of latents or of losses, see `compare.measure`
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
    table = [[column.format(peer=peer) for column in COLUMNS]]
    for row in rows:
        for other in row.peers(rows):
            table.append(_cells(row, other))
            if "step_seconds" in row.ours and "step_seconds" in other.theirs:
                table.append(_cells(row, other, of_step=True))
    lines = ["| " + " | ".join(cells) + " |\n" for cells in table]
    lines.insert(1, "|---" * len(COLUMNS) + "|\n")
    notes = [f"\n{row.title}, {row.format}: {row.reason}\n" for row in rows if row.reason]
    return "".join(lines + notes)


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
    found = row.difference
    if row is not other or of_step:
        return [*cells, ""]
    if "loss" in found:
        return [*cells, f"loss {found['loss']:.1e}"]
    rounded = found["peer_rounding"]["largest"]
    return [*cells, f"{found['largest']:.1e} of {found['deviation']:.1f}; {rounded:.1e} when rounding alike"]
