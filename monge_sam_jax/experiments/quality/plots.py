"""The figure of `monge-sam quality`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from monge_sam_jax.experiments.common.plots import (
    COLOURS,
    FONT_SIZE,
    band,
    draw_mean,
    legend_below,
    panels_of,
)

# A method in one pass has the colour of its two-pass form, and dashes.
STYLES = {
    "sgd": (COLOURS["sgd"], "-"),
    "sam": (COLOURS["sam"], "-"),
    "monge_sam": (COLOURS["monge_sam"], "-"),
    "one_pass_sam": (COLOURS["sam"], "--"),
    "one_pass_monge_sam": (COLOURS["monge_sam"], "--"),
}


def quality_figure(results: Mapping[str, Any]) -> Figure:
    """Test accuracy against the gradients taken, a row for each task, a panel for each radius.

    Args:
      results: content of the results.json of `monge-sam quality`.

    Returns:
      The figure: means over seeds, in bands of one standard error if there are several.
    """
    tasks = results["tasks"]
    columns = max(len(entry["rho"]) for entry in tasks.values())
    names = ["test accuracy (%)"] * len(tasks)
    figure, panels = panels_of(names, columns, "gradients taken", 1.7, most=2)
    for row, (task, entry) in zip(panels, tasks.items(), strict=True):
        for axes, rho in zip(row, entry["rho"], strict=True):
            for run in entry["runs"]:
                if run["rho"] in (None, rho):
                    colour, style = STYLES[run["method"]]
                    curves, label = run["test_accuracy"], run["label"]
                    draw_mean(axes, run["gradients"], curves, colour, label, linestyle=style)
            axes.set_title(rf"{task}, $\rho$ = {rho:g}", fontsize=FONT_SIZE)
        row[0].set_ylim(*_limits(entry))
    several = any(len(run["test_accuracy"]) > 1 for run in next(iter(tasks.values()))["runs"])
    legend_below(figure, panels[0, 0].get_legend_handles_labels()[0] + [band()] * several)
    return figure


def _limits(entry: Mapping[str, Any]) -> tuple[float, float]:
    """So that curves which fall apart do not flatten the others."""
    ends = [np.mean(run["test_accuracy"], axis=0) for run in entry["runs"]]
    best = max(curve.max() for curve in ends)
    start = ends[0][0]
    lowest = start if start > 30 else np.median([curve[2:].min() for curve in ends])
    margin = 0.08 * (best - lowest) + 0.5
    return max(0.0, lowest - 3 * margin), min(100.0, best + margin)
