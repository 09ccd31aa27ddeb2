"""Reports of checked data sets: JSON for programs, a table for people."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.files import complete_file, output_folder, write_json
from data.preparation.clip_facts import ClipFacts, Report

_SHOWN_CLIPS = 60
_ORDER = {"error": 0, "warning": 1, "note": 2}


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write `report.json` and `report.md`; returns their paths."""
    folder = folder if folder.is_dir() or not folder.is_file() else folder.parent
    output_folder(folder)
    paths = folder / "report.json", folder / "report.md"
    write_json(paths[0], {**summary(report), "clips": [asdict(clip) for clip in report.clips]})
    with complete_file(paths[1]) as temporary:
        temporary.write_text(report_table(report, len(report.clips)), encoding="utf-8")
    return paths


def summary(report: Report) -> dict[str, Any]:
    """Numbers of the whole data set."""
    known = [clip for clip in report.clips if clip.frames is not None]
    kinds = Counter(f"{found.severity}: {found.kind}" for clip in report.clips for found in clip.findings)
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
        "findings": dict(kinds.most_common()),
    }


def report_table(report: Report, shown: int = _SHOWN_CLIPS) -> str:
    """Summary, a row for each clip, those with errors first, and what to do about every kind of finding."""
    numbers = summary(report)
    usable = numbers["checked"] - numbers["errors"]
    lines = [
        f"{report.dataset} ({report.layout}): {usable} of {numbers['found']} clips without errors, "
        f"{numbers['frames']} frames, {numbers['seconds'] / 60:.1f} minutes",
        f"lengths {numbers['shortest']} to {numbers['longest']} frames; "
        f"frames per second: {_counts(numbers['fps'])}; sizes: {_counts(numbers['sizes'])}",
        "",
    ]
    clips = sorted(report.clips, key=_worst)
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
    lines, told = [], set()
    found = [(finding, clip.name) for clip in clips for finding in clip.findings]
    counts = Counter((finding.severity, finding.kind) for finding, _ in found)
    for finding, name in sorted(found, key=lambda pair: _ORDER[pair[0].severity]):
        kind = (finding.severity, finding.kind)
        if kind not in told:
            told.add(kind)
            times = f"{counts[kind]} clips, such as {name}" if counts[kind] > 1 else name
            lines.append(f"* {finding.severity}: {finding.kind} ({times}): {finding.message}. -> {finding.advice}")
    return ["", *lines] if lines else []


def _worst(clip: ClipFacts) -> int:
    return min((_ORDER[finding.severity] for finding in clip.findings), default=len(_ORDER))


def _counts(counts: dict[str, int], most: int = 4) -> str:
    parts = [f"{value} ({count})" for value, count in list(counts.items())[:most]]
    return ", ".join(parts) + (", ..." if len(counts) > most else "") or "none"
