"""Figures as in a paper: curves with bands over seeds, and histograms; each as PNG and as PDF."""

from collections.abc import Sequence
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
COLUMN, LINE_HEIGHT = 3.4, 2.5  # inches of one panel
_SETTINGS = {"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "pdf.fonttype": 42, "axes.linewidth": 0.8}


@dataclass(frozen=True)
class Curve:
    """A line with a band.

    Attributes:
        label: in the legend.
        x, mean: (n,).
        deviation: (n,), half the band's height; None draws no band.
    """

    label: str
    x: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray | None = None


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    Attributes:
        x_label, y_label: with units.
        marks: x values of dotted lines, with what they mean.
        ticks: x values that are labelled; None leaves it to matplotlib.
        log_x: logarithmic horizontal axis.
    """

    curves: Sequence[Curve]
    x_label: str
    y_label: str
    marks: dict[float, str]
    ticks: Sequence[float] | None = None
    log_x: bool = False


def draw_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Panels of curves side by side with one legend, written as `path` and beside it as PDF."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(COLUMN * len(panels), LINE_HEIGHT + 0.35), layout="constrained")
        FigureCanvasAgg(figure)
        all_axes = np.atleast_1d(figure.subplots(1, len(panels)))
        for number, (axes, panel) in enumerate(zip(all_axes, panels, strict=True)):
            same = number > 0 and panel.y_label == panels[number - 1].y_label
            if same:
                axes.sharey(all_axes[number - 1])
                axes.tick_params(labelleft=False)
            _draw_curves(axes, panel, labelled=not same)
        handles, labels = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
        _save(figure, path)


def draw_scatter(
    path: Path, groups: dict[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str, note: str
) -> None:
    """Points (x, y) by group with a legend and a note above, written as `path` and beside it as PDF."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(COLUMN * 1.5, LINE_HEIGHT + 0.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for (colour, marker), (label, (x, y)) in zip(STYLES, groups.items(), strict=False):
            axes.scatter(x, y, s=18, color=colour, marker=marker, alpha=0.8, linewidths=0, label=label)
        axes.set(xlabel=x_label, ylabel=y_label, title=note)
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        _save(figure, path)


@dataclass(frozen=True)
class Histogram:
    """One set of axes with a stacked histogram.

    Attributes:
        label: of the quantity, with its unit.
        groups: name -> values.
        edges: of the bins.
        ticks: values that are labelled.
        threshold: value of the dotted line; threshold_label: what is written beside it.
    """

    label: str
    groups: dict[str, Sequence[float]]
    edges: np.ndarray
    ticks: Sequence[float]
    threshold: float
    threshold_label: str


def draw_histograms(path: Path, histograms: Sequence[Histogram]) -> None:
    """Histograms side by side with one legend, written as `path` and beside it as PDF."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(COLUMN * len(histograms), LINE_HEIGHT + 0.35), layout="constrained")
        FigureCanvasAgg(figure)
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
            _beside(axes, histogram.threshold, histogram.threshold_label, height=0.95)
            axes.set(xlabel=histogram.label, xlim=(histogram.edges[0], histogram.edges[-1]))
            axes.set_xticks(histogram.ticks, [f"{tick:g}" for tick in histogram.ticks])
            axes.yaxis.get_major_locator().set_params(integer=True)
            axes.spines[["top", "right"]].set_visible(False)
        all_axes[0].set_ylabel("clips")
        handles, labels = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
        _save(figure, path)


def _beside(axes: Axes, x: float, text: str, height: float) -> None:
    """A small text right of a vertical line, at a share of the axes' height."""
    axes.annotate(
        text,
        (x, height),
        xycoords=("data", "axes fraction"),
        xytext=(2, 0),
        textcoords="offset points",
        color="0.35",
        fontsize=7,
    )


def _draw_curves(axes: Axes, panel: Panel, labelled: bool) -> None:
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
        _beside(axes, x, meaning, height=0.02)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label if labelled else "")
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    for target in (path, path.with_suffix(".pdf")):
        with complete_file(target) as temporary:
            figure.savefig(temporary, dpi=200)


def draw_bars(path: Path, groups: Sequence[str], bars: dict[str, Sequence[Cell]], y_label: str) -> None:
    """Groups of bars with deviations, one bar a label in every group, written as `path` and beside it as PDF.

    Args:
        groups: under the groups.
        bars: label in the legend -> one cell a group; those without a mean are left out.
    """
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(COLUMN * 2.2, LINE_HEIGHT + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        width = 0.8 / len(bars)
        for number, (label, cells) in enumerate(bars.items()):
            known = [(place, cell) for place, cell in enumerate(cells) if cell.mean is not None]
            places = [place + (number - (len(bars) - 1) / 2) * width for place, _ in known]
            axes.bar(
                places,
                [cell.mean for _, cell in known],
                width,
                yerr=[cell.deviation or 0.0 for _, cell in known],
                label=label,
                color=STYLES[number % len(STYLES)][0],
                error_kw={"linewidth": 0.8},
            )
        means = [cell.mean for cells in bars.values() for cell in cells if cell.mean is not None]
        axes.set_ylim(max(0.0, np.floor(min(means)) - 2), None)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel(y_label)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(bars), frameon=False)
        _save(figure, path)
