"""Facts about the clips of a data set, filled in by checks, and their reports in JSON and as a table."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core.files import complete_file, output_folder, write_json

_ORDER = {"error": 0, "warning": 1, "note": 2}


@dataclass(frozen=True)
class Finding:
    """Something about a clip; `kind` is a short name, the same for all findings of a sort."""

    severity: str  # "error": training leaves the clip out, or should; "warning"; "note": good to know
    kind: str
    message: str
    advice: str


@dataclass
class ClipFacts:
    """Facts about a clip; None where they could not be found out."""

    name: str
    video: str
    split: str | None = None
    frames: int | None = None
    fps: float | None = None
    size: tuple[int, int] | None = None  # (width, height) in pixels
    persons: int | None = None
    missing_joints: float | None = None  # share of joints of present persons that are not visible
    absent_frames: float | None = None  # share without anybody
    findings: list[Finding] = field(default_factory=list)

    def add(self, severity: str, kind: str, message: str, advice: str) -> None:
        self.findings.append(Finding(severity, kind, message, advice))


@dataclass(frozen=True)
class Report:
    dataset: str
    layout: str
    found: int  # clips of its source
    clips: list[ClipFacts]

    @property
    def errors(self) -> int:
        return sum(any(finding.severity == "error" for finding in clip.findings) for clip in self.clips)


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write `report.json` and `report.md`; returns their paths."""
    folder = output_folder(folder.parent if folder.is_file() else folder)
    paths = folder / "report.json", folder / "report.md"
    write_json(paths[0], {**summary(report), "clips": [asdict(clip) for clip in report.clips]})
    with complete_file(paths[1]) as temporary:
        temporary.write_text(report_table(report, len(report.clips)), encoding="utf-8")
    return paths


def summary(report: Report) -> dict[str, Any]:
    known = [clip for clip in report.clips if clip.frames is not None]
    findings = Counter(f"{found.severity}: {found.kind}" for clip in report.clips for found in clip.findings)
    return {
        "dataset": report.dataset,
        "layout": report.layout,
        "found": report.found,
        "checked": len(report.clips),
        "errors": report.errors,
        "frames": sum(clip.frames for clip in known),
        "seconds": round(sum(clip.frames / clip.fps for clip in known), 1),
        "shortest": min((clip.frames for clip in known), default=0),
        "longest": max((clip.frames for clip in known), default=0),
        "fps": dict(Counter(f"{clip.fps:g}" for clip in known).most_common()),
        "sizes": dict(Counter(f"{clip.size[0]}x{clip.size[1]}" for clip in known).most_common()),
        "findings": dict(findings.most_common()),
    }


def report_table(report: Report, shown: int = 60) -> str:
    """Summary, a row for each clip, those with errors first, and advice for every kind of finding."""
    numbers = summary(report)
    usable = numbers["checked"] - numbers["errors"]
    lines = [
        f"{report.dataset} ({report.layout}): {usable} of {numbers['found']} clips without errors, "
        f"{numbers['frames']} frames, {numbers['seconds'] / 60:.1f} minutes",
        f"lengths {numbers['shortest']} to {numbers['longest']} frames; "
        f"frames per second: {_counts(numbers['fps'])}; sizes: {_counts(numbers['sizes'])}",
        "",
    ]
    worst = [min((_ORDER[found.severity] for found in clip.findings), default=len(_ORDER)) for clip in report.clips]
    clips = [report.clips[index] for index in np.argsort(worst, kind="stable")]
    rows = [("clip", "frames", "fps", "size", "persons", "joints missing", "findings")]
    rows += [_row(clip) for clip in clips[:shown]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, tuple("-" * width for width in widths))
    lines += ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    if len(clips) > shown:
        lines.append(f"... and {len(clips) - shown} more clips, see report.md")
    lines += _details(clips)
    return "\n".join(lines) + "\n"


def _row(clip: ClipFacts) -> tuple[str, ...]:
    def known(value: Any, text: str) -> str:
        return "-" if value is None else text.format(value)

    return (
        clip.name,
        known(clip.frames, "{}"),
        known(clip.fps, "{:g}"),
        known(clip.size, "{0[0]}x{0[1]}"),
        known(clip.persons, "{}"),
        known(clip.missing_joints, "{:.0%}"),
        ", ".join(f"{found.severity}: {found.kind}" for found in clip.findings) or "ok",
    )


def _details(clips: list[ClipFacts]) -> list[str]:
    """Every kind of finding once, with an example and what to do."""
    examples: dict[tuple[str, str], list[tuple[Finding, str]]] = {}
    for clip in clips:
        for finding in clip.findings:
            examples.setdefault((finding.severity, finding.kind), []).append((finding, clip.name))
    lines = []
    for (severity, kind), found in sorted(examples.items(), key=lambda item: _ORDER[item[0][0]]):
        finding, name = found[0]
        times = f"{len(found)} clips, such as {name}" if len(found) > 1 else name
        lines.append(f"* {severity}: {kind} ({times}): {finding.message}. -> {finding.advice}")
    return ["", *lines] if lines else []


def _counts(counts: dict[str, int]) -> str:
    parts = [f"{value} ({count})" for value, count in list(counts.items())[:4]]
    return ", ".join(parts) + (", ..." if len(counts) > 4 else "") or "none"
