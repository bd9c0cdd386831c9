"""pass@k over k, of several models in one picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

from megatron_prorl.tracking.plots import COLOURS, dress, new_figure

MARKERS = "osD^vP"  # beside the colour, for print without any


def pass_at_k_curves(results: Mapping[str, Any], out: str | Path) -> Path:
    """Draw each model's pass@k overall, with its 95% interval, from what `results.summarise` found.

    `out` ends in .png or .svg, and its metadata say what was evaluated. k is on a logarithmic axis, with a tick at
    every power of 2 that was estimated.
    """
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    ks = results["k"]
    for (name, model), colour, marker in zip(results["models"].items(), cycle(COLOURS), cycle(MARKERS)):
        curve = model["overall"]["pass_at_k"]
        means, lows, highs = ([100 * interval[key] for interval in curve] for key in ("mean", "low", "high"))
        axes.fill_between(ks, lows, highs, color=colour, alpha=0.15, linewidth=0)
        axes.plot(ks, means, color=colour, marker=marker, markersize=5, linewidth=1.6, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set_ylim(0.0, 102.0)
    axes.set_xlabel("k, samples of a problem")
    axes.set_ylabel("pass@k (%)")
    title = f"pass@k on {results['suite']['name']}"
    dress(axes, title)
    axes.legend(fontsize=8.5, loc="best", framealpha=0.9, edgecolor="none", title="shaded: 95%", title_fontsize=8)
    out = Path(out)
    about = {key: results[key] for key in ("suite", "samples", "specs", "differences")}
    figure.savefig(out, metadata={"Title": title, "Description": json.dumps(about)})
    return out
