"""The curves that tell whether a run is healthy, as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prorl.errors import UserError
from megatron_prorl.tracking.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)  # Okabe and Ito: told apart by the colour-blind
GREY = "#595959"

Rows = list[dict[str, float]]


def new_figure(width: float, height: float) -> Figure:
    """An empty one, sizes in inches, that draws without a display and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    FigureCanvasAgg(figure)
    return figure


def curves(run_dirs: str | Path | Sequence[str | Path], out: str | Path, labels: Sequence[str] | None = None) -> Path:
    """Draw reward, entropy, KL to the reference and response length over the steps of one run, or of several at once.

    `out` ends in .png or .svg. Dashed vertical lines are resets, whole ones stages, counted from 1. A metric that a run
    did not log leaves its panel without that curve. Raises UserError if a run has no metrics.
    """
    from matplotlib.ticker import MaxNLocator

    folders = [run_dirs] if isinstance(run_dirs, str | Path) else list(run_dirs)
    labels = list(labels) if labels is not None else [Path(folder).name for folder in folders]
    runs = [read_metrics(folder) for folder in folders]
    for folder, rows in zip(folders, runs, strict=True):
        if not rows:
            raise UserError(f"{folder}: no metrics there; give the run_dir of a run that has made a step")

    figure = new_figure(9.6, 5.8)
    reward, entropy, kl, length = figure.subplots(2, 2, sharex=True).flat
    several = len(runs) > 1
    for rows, label, colour in zip(runs, labels, cycle(COLOURS)):
        _curve(reward, rows, "reward/mean", colour, label if several else "training, mean of a step")
        held_out = points(rows, "validation/reward")
        reward.plot(*held_out, color=colour if several else COLOURS[1], marker="o", markersize=4, linewidth=1.2,
                    linestyle="--" if several else "-", label=None if several else "held-out problems")  # fmt: skip
        _curve(entropy, rows, "policy/entropy", colour)
        _curve(kl, rows, "policy/kl_reference", colour, smooth=False)  # a mean would blur its fall at a reset
        _curve(length, rows, "rollout/response_tokens_mean", colour)
        for step in (row["step"] for row in rows if row.get("reset/happened") == 1.0):
            for axes in (reward, entropy, kl, length):
                axes.axvline(
                    step,
                    color=colour if several else GREY,
                    linestyle=(0, (4, 3)),
                    linewidth=0.9,
                    alpha=0.35 if several else 0.7,
                    zorder=0,
                )

        for step, stage in stages(rows):
            for axes in (reward, entropy, kl, length):
                axes.axvline(step, color=colour if several else GREY, linewidth=0.9, alpha=0.35, zorder=0)
            if not several:
                reward.text(step, 1.0, f" {stage}", color=GREY, fontsize=8, va="top", zorder=0)

    dress(reward, "Reward")
    dress(entropy, "Entropy of the policy (nats a token)")
    dress(kl, "KL to the reference (nats a token)")
    dress(length, "Response length (tokens)")
    reward.set_ylim(0.0, 1.02)
    for axes in (entropy, kl, length):
        axes.set_ylim(bottom=0.0)
    for axes in (kl, length):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    _truncation(length, runs, several)
    if any(row.get("reset/happened") == 1.0 for rows in runs for row in rows):
        reward.plot([], [], color=GREY, linestyle=(0, (4, 3)), linewidth=0.9, label="reset")
    if any(stages(rows) for rows in runs):
        reward.plot([], [], color=GREY, alpha=0.5, linewidth=0.9, label="stage begins")
    if several:
        reward.plot(
            [], [], color=GREY, linestyle="--", marker="o", markersize=4, linewidth=1.2, label="held-out problems"
        )
    # Above the panels, where it covers no point.
    handles, names = reward.get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8.5, loc="outside upper left", ncols=min(6, len(names)), frameon=False)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out


def stages(rows: Rows) -> list[tuple[float, int]]:
    """Step at which each stage of a plan began, and its number from 1."""
    numbered = [(row["step"], int(row["stage"]) + 1) for row in rows if "stage" in row]
    last = numbered[-1][0] if numbered else 0
    # A stage's end is logged with its successor's number, and that of the last stage with the number after it.
    return [now for before, now in pairwise([(0, 0), *numbered]) if now[1] != before[1] and now[0] < last]


def points(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that have a finite value for `key`."""
    found = [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    return [step for step, _ in found], [value for _, value in found]


def _curve(axes: Axes, rows: Rows, key: str, colour: str, label: str | None = None, *, smooth: bool = True) -> None:
    """The values, and over many of them a running mean that the eye can follow."""
    steps, values = points(rows, key)
    window = len(values) // 50
    if window < 2 or not smooth:
        axes.plot(steps, values, color=colour, linewidth=1.6, label=label)
        return
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.25)
    means = [
        math.fsum(last) / len(last) for last in (values[max(0, i - window) : i] for i in range(1, len(values) + 1))
    ]
    axes.plot(steps, means, color=colour, linewidth=1.6, label=label)


def _truncation(length: Axes, runs: list[Rows], several: bool) -> None:
    """The share of truncated responses on the length panel's right-hand axis, if any was truncated."""
    fractions = [points(rows, "rollout/truncated_fraction") for rows in runs]
    if not any(max(values, default=0.0) > 0.0 for _, values in fractions):
        return
    right = length.twinx()
    for (steps, values), colour in zip(fractions, cycle(COLOURS)):
        right.plot(
            steps,
            [100.0 * value for value in values],
            color=colour if several else COLOURS[1],
            linewidth=1.2,
            linestyle=":",
        )
    right.set_ylim(0.0, max(10.0, 110.0 * max(value for _, values in fractions for value in values)))
    right.set_ylabel("truncated (%, dotted)", fontsize=8.5, color=GREY)
    right.spines[:].set_visible(False)
    right.tick_params(labelsize=8.5, colors=GREY, length=0)


def dress(axes: Axes, title: str) -> None:
    """The look that all pictures share."""
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#BFBFBF")
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, colors=GREY, length=0)
