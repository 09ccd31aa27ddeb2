"""Figures as in a paper: curves with bands over seeds, histograms, scatters and bars; each as PNG and as PDF."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from core.files import complete_file
from evaluation.report import Cell

# Colours that stay apart for colour-blind readers (Okabe and Ito), with a marker each for grey prints.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))
LEGEND_COLUMNS = 5
HATCHES = (None, "///", "...")  # of bars beyond the styles
COLUMN, LINE_HEIGHT = 3.4, 2.5  # inches of one panel
_SETTINGS = {"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "pdf.fonttype": 42, "axes.linewidth": 0.8}


@contextmanager
def _figure(path: Path, columns: float, extra_height: float) -> Iterator[Figure]:
    """A figure to draw on, which is then written as `path` and beside it as PDF."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(COLUMN * columns, LINE_HEIGHT + extra_height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        for target in (path, path.with_suffix(".pdf")):
            with complete_file(target) as temporary:
                figure.savefig(temporary, dpi=200)


def _legend_above(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = -(-len(labels) // -(-len(labels) // LEGEND_COLUMNS))  # rows of equal length
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)


@dataclass(frozen=True)
class Curve:
    """A line with a band."""

    label: str  # in the legend
    x: np.ndarray  # (n,)
    mean: np.ndarray  # (n,)
    deviation: np.ndarray | None = None  # (n,), half the band's height; None draws no band


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    curves: Sequence[Curve]
    x_label: str  # with its unit
    y_label: str
    marks: dict[float, str]  # x values of dotted lines, with what they mean
    ticks: Sequence[float] | None = None  # x values that are labelled; None leaves it to matplotlib
    log_x: bool = False  # logarithmic horizontal axis


def draw_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Draw panels of curves side by side with one legend."""
    with _figure(path, len(panels), 0.35) as figure:
        all_axes = np.atleast_1d(figure.subplots(1, len(panels)))
        for index, (axes, panel) in enumerate(zip(all_axes, panels, strict=True)):
            # Neighbours of one quantity share its axis, labelled once.
            same = index > 0 and panel.y_label == panels[index - 1].y_label
            if same:
                axes.sharey(all_axes[index - 1])
                axes.tick_params(labelleft=False)
            _draw_curves(axes, panel)
            axes.set_ylabel("" if same else panel.y_label)
        _legend_above(figure)


def _draw_curves(axes: Axes, panel: Panel) -> None:
    for (colour, marker), curve in zip(STYLES, panel.curves, strict=False):
        axes.plot(curve.x, curve.mean, color=colour, marker=marker, markersize=3.5, linewidth=1.4, label=curve.label)
        if curve.deviation is not None:
            low, high = curve.mean - curve.deviation, curve.mean + curve.deviation
            axes.fill_between(curve.x, low, high, color=colour, alpha=0.2, linewidth=0)
    if panel.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    if panel.ticks is not None:
        axes.set_xticks(panel.ticks, [f"{tick:g}" for tick in panel.ticks])
    for x, meaning in panel.marks.items():
        axes.axvline(x, color="0.5", linestyle=":", linewidth=0.9)
        _note_beside(axes, x, meaning, height=0.02)
    axes.set_xlabel(panel.x_label)
    axes.grid(alpha=0.25, linewidth=0.5)


@dataclass(frozen=True)
class Histogram:
    """One set of axes with a stacked histogram."""

    label: str  # of the quantity, with its unit
    groups: dict[str, Sequence[float]]  # name -> values
    edges: np.ndarray  # of the bins
    ticks: Sequence[float]  # values that are labelled
    threshold: float  # value of the dotted line
    threshold_label: str  # written beside it


def draw_histograms(path: Path, histograms: Sequence[Histogram]) -> None:
    """Draw histograms of clips side by side with one legend."""
    with _figure(path, len(histograms), 0.35) as figure:
        all_axes = np.atleast_1d(figure.subplots(1, len(histograms), sharey=True))
        for axes, histogram in zip(all_axes, histograms, strict=True):
            axes.hist(
                list(histogram.groups.values()),
                bins=histogram.edges,
                stacked=True,
                color=[colour for colour, _ in STYLES[: len(histogram.groups)]],
                label=list(histogram.groups),
                edgecolor="white",
                linewidth=0.5,
            )
            axes.axvline(histogram.threshold, color="0.3", linestyle=":", linewidth=1)
            _note_beside(axes, histogram.threshold, histogram.threshold_label, height=0.95)
            axes.set(xlabel=histogram.label, xlim=(histogram.edges[0], histogram.edges[-1]))
            axes.set_xticks(histogram.ticks, [f"{tick:g}" for tick in histogram.ticks])
            axes.yaxis.get_major_locator().set_params(integer=True)
        all_axes[0].set_ylabel("clips")
        _legend_above(figure)


def _note_beside(axes: Axes, x: float, text: str, height: float) -> None:
    """Write a small text right of a vertical line, at a share of the axes' height."""
    where = {"xycoords": ("data", "axes fraction"), "xytext": (2, 0), "textcoords": "offset points"}
    axes.annotate(text, (x, height), **where, color="0.35", fontsize=7)


def draw_scatter(
    path: Path, groups: dict[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str, note: str
) -> None:
    """Draw points (x, y) by group with a legend and a note above."""
    with _figure(path, 1.5, 0.6) as figure:
        axes = figure.subplots()
        for (colour, marker), (label, (x, y)) in zip(STYLES, groups.items(), strict=False):
            axes.scatter(x, y, s=18, color=colour, marker=marker, alpha=0.8, linewidths=0, label=label)
        axes.set(xlabel=x_label, ylabel=y_label, title=note)
        axes.grid(alpha=0.25, linewidth=0.5)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)


def draw_bars(path: Path, groups: Sequence[str], bars: dict[str, Sequence[Cell]], y_label: str) -> None:
    """Draw groups of bars with deviations; `bars`: label -> one cell a group, left out without a mean."""
    with _figure(path, 2.2, 0.5) as figure:
        axes = figure.subplots()
        width = 0.8 / len(bars)
        for index, (label, cells) in enumerate(bars.items()):
            known = [(group, cell) for group, cell in enumerate(cells) if cell.mean is not None]
            axes.bar(
                [group + (index - (len(bars) - 1) / 2) * width for group, _ in known],
                [cell.mean for _, cell in known],
                width,
                yerr=[cell.deviation or 0.0 for _, cell in known],
                label=label,
                color=STYLES[index % len(STYLES)][0],
                hatch=HATCHES[index // len(STYLES) % len(HATCHES)],
                error_kw={"linewidth": 0.8},
            )
        means = [cell.mean for cells in bars.values() for cell in cells if cell.mean is not None]
        axes.set_ylim(max(0.0, np.floor(min(means)) - 2), None)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel(y_label)
        _legend_above(figure)
