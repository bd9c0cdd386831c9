"""Figures by matplotlib: one drawing is the picture in the page, the SVG and the PNG."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_prorl.report.content import Figure, Series
from megatron_prorl.tracking.plots import GREY, dress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

# Points at 72 an inch; the page shows them as about as many CSS pixels, on a phone in one column.
WIDTH, HEIGHT = 360.0, 222.0
ROW, ROW_SERIES = 11.0, 5.0  # of a category, and more for each series
LEFT, RIGHT, TOP, BOTTOM, LEGEND_ROW = 44.0, 10.0, 24.0, 34.0, 14.0
CHARACTER = 5.6  # width, at FONT
FONT, TITLE_FONT = 9.5, 11.5
PNG_DPI = 220
MEAN_OF = 50  # a running mean is over this part of a curve
MOST_POINTS = 800  # of a line as it is drawn; hovering and zooming know them all
# Colours of the page that are others in the dark. Those of curves are the same on both.
INKS = {"#000000": "--ink", GREY.lower(): "--soft", "#bfbfbf": "--line", "#e6e6e6": "--grid", "#ffffff": "--paper"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A figure's SVG for a page, and the values behind it for the page's script, as JSON."""

    figure: Figure
    svg: str
    data: str


def draw(figure: Figure, folder: Path) -> Drawing:
    """Draw a figure, and leave `folder`/NAME.svg and .png."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # without a display or pyplot's global state
    from matplotlib.figure import Figure as Canvas

    labels = [series.label for series in figure.series if series.label]
    kinds = {mark.kind: mark for mark in figure.marks if mark.kind != "note"}
    labels += [{"reset": "reset", "stage": "stage begins"}[kind] for kind in kinds]
    rows = _legend_rows(labels) if len(labels) > 1 or kinds else 0
    left = LEFT + (0 if not figure.categories else CHARACTER * max(map(len, figure.categories)) - LEFT + 12)
    left = min(left + (12.0 if figure.ylabel else 0.0), 0.5 * WIDTH)
    top = TOP + LEGEND_ROW * rows
    row = ROW + ROW_SERIES * len(figure.series)
    height = HEIGHT if not figure.categories else top + BOTTOM + row * (len(figure.categories) + 0.6)

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": figure.name, "font.size": FONT}):
        canvas = Canvas(figsize=(WIDTH / 72, height / 72), dpi=72)
        FigureCanvasAgg(canvas)
        box = (left / WIDTH, BOTTOM / height, (WIDTH - left - RIGHT) / WIDTH, (height - top - BOTTOM) / height)
        axes = canvas.add_axes(box)
        dress(axes, "")
        axes.tick_params(labelsize=FONT, pad=3)
        size = min(TITLE_FONT, 0.96 * WIDTH / (0.68 * len(figure.title)))
        canvas.text(0.012, 1 - 5 / height, figure.title, fontsize=size, fontweight="bold", va="top")
        _frame(axes, figure)
        stacked: NDArray[np.float64] | None = None
        for number, series in enumerate(figure.series):
            stacked = _series(axes, figure, series, f"{figure.name}:{number}", stacked)
        _limits(axes, figure)
        _marks(axes, figure)
        if rows:
            handles = [_handle(series) for series in figure.series if series.label]
            handles += [_mark_handle(mark.kind) for mark in kinds.values()]
            axes.legend(
                handles,
                labels,
                loc="lower left",
                bbox_to_anchor=((8 - left) / (WIDTH - left - RIGHT), 1 + 3 / (height - top - BOTTOM)),
                ncols=math.ceil(len(labels) / rows),
                frameon=False,
                fontsize=FONT,
                borderaxespad=0.1,
                borderpad=0.1,
                labelspacing=0.25,
                handlelength=1.3,
                handletextpad=0.4,
                columnspacing=1.0,
            )
        folder.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        canvas.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Title": figure.title})
        svg = _compact(text.getvalue())
        (folder / f"{figure.name}.svg").write_text(svg, encoding="utf-8")
        canvas.savefig(folder / f"{figure.name}.png", dpi=PNG_DPI, metadata={"Title": figure.title})
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    frame = {"box": [left, top, WIDTH - RIGHT, height - BOTTOM], "x": [x0, x1], "y": [y0, y1], "log2": figure.log2}
    return Drawing(figure=figure, svg=_inline(svg, figure.title), data=_data(figure, frame))


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and the `window` - 1 before it, as far as there are any."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    means: list[float] = ((sums[ends] - sums[starts]) / (ends - starts)).tolist()
    return means


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """A curve with no more than MOST_POINTS: the lowest and highest value of each stretch, so that no peak is lost."""
    if len(y) <= MOST_POINTS:
        return list(x), list(y)
    values = np.asarray(y, dtype=np.float64)
    places: list[int] = []
    for stretch in np.array_split(np.arange(len(values)), MOST_POINTS // 2):
        lowest, highest = stretch[np.argmin(values[stretch])], stretch[np.argmax(values[stretch])]
        places += sorted({int(lowest), int(highest)})
    return [x[place] for place in places], [y[place] for place in places]


def _legend_rows(labels: list[str]) -> int:
    """How many rows the labels take in equally wide columns."""
    width = CHARACTER * max(map(len, labels)) + 34
    return math.ceil(len(labels) / max(1, int((WIDTH - 16) // width)))


def _frame(axes: Axes, figure: Figure) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel(figure.xlabel, fontsize=FONT, color=GREY, labelpad=2)
    axes.xaxis.set_gid(f"{figure.name}:ticks")
    if figure.ylabel:
        axes.set_ylabel(figure.ylabel, fontsize=FONT, color=GREY, labelpad=2)
    if figure.categories:
        axes.set_yticks(range(len(figure.categories)), figure.categories)
        axes.set_ylim(len(figure.categories) - 0.3, -0.7)
        axes.grid(axis="x", color="#E6E6E6", linewidth=0.8)
        axes.grid(axis="y", visible=False)
    elif figure.log2:
        ks = sorted({k for series in figure.series for k in series.x})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [f"{k:g}" for k in ks])
        axes.minorticks_off()
    elif not figure.diagonal:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=figure.xlabel == "step", steps=[1, 2, 5, 10]))
    if not figure.categories:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}".replace("e-0", "e-")))


def _series(
    axes: Axes, figure: Figure, series: Series, gid: str, stacked: NDArray[np.float64] | None
) -> NDArray[np.float64] | None:
    """Draw one; returns the upper edge of the areas so far."""
    style: dict[str, Any] = {"color": series.colour, "linewidth": 1.5, "linestyle": "--" if series.dashed else "-"}
    if series.kind == "area":
        base = np.zeros(len(series.y)) if stacked is None else stacked
        edge = base + np.asarray(series.y, dtype=np.float64)
        axes.fill_between(series.x, base, edge, color=series.colour, linewidth=0.4, edgecolor="#FFFFFF", gid=gid)
        return edge
    if series.kind == "points":
        style |= {"linestyle": "", "marker": series.marker, "markersize": 5.5, "markeredgewidth": 0}
        if len(series.low):
            axes.hlines(series.y, series.low, series.high, color=series.colour, linewidth=1.4, alpha=0.6)
        axes.plot(series.x, series.y, gid=gid, **style)
    elif series.kind == "steps":
        axes.plot(series.x, series.y, drawstyle="steps-pre", gid=gid, **style)
    elif series.kind == "noisy" and (window := window_of(series)) > 1:
        axes.plot(*thinned(series.x, series.y), gid=gid, **style | {"linewidth": 0.7, "alpha": 0.25})
        axes.plot(*thinned(series.x, running_mean(series.y, window)), gid=f"{gid}:mean", **style)
    else:
        if len(series.low):
            band: dict[str, Any] = {"color": series.colour, "alpha": 0.16, "linewidth": 0}
            axes.fill_between(series.x, series.low, series.high, gid=f"{gid}:band", **band)
        style |= {"marker": series.marker, "markersize": 4.5} if series.kind == "marked" else {}
        x, y = (series.x, series.y) if series.kind == "marked" else thinned(series.x, series.y)
        axes.plot(x, y, gid=gid, **style)
    return stacked


def window_of(series: Series) -> int:
    """Values that a running mean takes together; 1 for curves that need none."""
    return max(1, len(series.y) // MEAN_OF) if series.kind == "noisy" else 1


def _limits(axes: Axes, figure: Figure) -> None:
    values = [value for series in figure.series for value in (*series.y, *series.high)]
    if figure.categories and min((x for series in figure.series for x in (*series.x, *series.low)), default=0.0) >= 0.0:
        axes.set_xlim(left=0.0)
    if figure.categories or figure.diagonal:
        if figure.diagonal:
            axes.axhline(0.0, color="#BFBFBF", linewidth=0.9, zorder=0)
            axes.axvline(0.0, color="#BFBFBF", linewidth=0.9, zorder=0)
            axes.margins(0.08)
        return
    if any(series.kind == "area" for series in figure.series):
        axes.set_ylim(bottom=0.0)
    elif figure.zero and min(values, default=0.0) >= 0.0:
        highest = max(values, default=0.0)
        upper = max(figure.top, 1.06 * highest) or 1.0
        axes.set_ylim(-0.012 * upper, upper)  # a curve at 0 lies beside the axis, not under it
    elif values:
        middle, half = (min(values) + max(values)) / 2, 0.55 * (max(values) - min(values))
        half = max(half, 0.002 * abs(middle))  # noise in the last digits stays flat
        axes.set_ylim(middle - half, middle + half)
    if not figure.log2:
        ends = [value for series in figure.series for value in series.x]
        if ends and min(ends) < max(ends):
            margin = 0.015 * (max(ends) - min(ends))
            axes.set_xlim(min(ends) - margin, max(ends) + margin)


def _marks(axes: Axes, figure: Figure) -> None:
    for number, mark in enumerate(figure.marks):
        look: dict[str, Any] = {"linewidth": 0.9, "alpha": 0.75, "linestyle": (0, (4, 3))}
        if mark.kind == "stage":
            look |= {"linestyle": "-", "alpha": 0.45}
        elif mark.kind == "note":
            look |= {"linestyle": (0, (1, 2)), "linewidth": 1.2}
        axes.axvline(mark.x, color=mark.colour, zorder=0.5, gid=f"{figure.name}:mark{number}", **look)
        if mark.text:
            axes.text(
                mark.x,
                1.0,
                f" {mark.text}",
                transform=axes.get_xaxis_transform(),
                color=GREY,
                fontsize=FONT - 1.5,
                va="top",
                clip_on=True,
                gid=f"{figure.name}:mark{number}:text",
            )


def _handle(series: Series) -> Any:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if series.kind == "area":
        return Patch(color=series.colour)
    if series.kind == "points":
        return Line2D([], [], linestyle="", marker=series.marker, color=series.colour, markersize=5.5)
    marker = series.marker if series.kind == "marked" else ""
    return Line2D([], [], color=series.colour, linestyle="--" if series.dashed else "-", marker=marker, markersize=4.5)


def _mark_handle(kind: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=GREY, linewidth=0.9, linestyle="-" if kind == "stage" else (0, (4, 2)))


def _compact(svg: str) -> str:
    """Without comments, and coordinates to a hundredth of a point."""
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    return re.sub(r'(?<==")[^"]*', lambda value: re.sub(r"(\d\.\d\d)\d+", r"\1", value[0]), svg)


def _inline(svg: str, title: str) -> str:
    """The SVG as part of a page: the page's ink and font, and no id that another figure has as well."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z]+[0-9.]*_[0-9]+"', "", svg)
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    for ink, name in INKS.items():
        svg = svg.replace(f": {ink}", f": var({name})")
    return svg


def _data(figure: Figure, frame: dict[str, Any]) -> str:
    """Values with four significant digits; series that share their x share it here too."""
    xs: list[list[float]] = []
    rows = []
    for series in figure.series:
        x = _short(series.x)
        if x not in xs:
            xs.append(x)
        row: dict[str, Any] = {
            "label": series.label,
            "colour": series.colour,
            "kind": series.kind,
            "x": xs.index(x),
            "y": _short(series.y),
        }
        row |= {"window": window} if (window := window_of(series)) > 1 else {}
        row |= {"low": _short(series.low), "high": _short(series.high)} if len(series.low) else {}
        row |= {"names": list(series.names)} if series.names else {}
        rows.append(row)
    about = {
        "name": figure.name,
        "xlabel": figure.xlabel,
        "marks": [mark.x for mark in figure.marks],
        "categories": list(figure.categories),
    }
    text = json.dumps(about | frame | {"xs": xs, "series": rows}, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _short(values: Sequence[float]) -> list[float]:
    """Whole numbers as they are, others with four significant digits."""
    return [int(value) if float(value).is_integer() else float(f"{value:.4g}") for value in values]
