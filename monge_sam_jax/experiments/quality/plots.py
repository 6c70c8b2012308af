"""The figure of `monge-sam quality`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from monge_sam_jax.experiments.common.plots import COLOURS, FONT_SIZE, SMALL, band, blank_figure

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
    figure = blank_figure(0.5 + 2.0 * len(tasks))
    panels = figure.subplots(len(tasks), columns, squeeze=False, sharey="row")
    for row, (task, entry) in zip(panels, tasks.items(), strict=True):
        for axes, rho in zip(row, entry["rho"], strict=True):
            for run in entry["runs"]:
                if run["rho"] in (None, rho):
                    _draw(axes, run)
            axes.set_title(rf"{task}, $\rho$ = {rho:g}", fontsize=FONT_SIZE)
            axes.tick_params(labelsize=SMALL)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.2)
        row[0].set_ylabel("test accuracy (%)", fontsize=FONT_SIZE)
        row[0].set_ylim(*_limits(entry))
    for axes in panels[-1]:
        axes.set_xlabel("gradients taken", fontsize=FONT_SIZE)
    several = any(len(run["test_accuracy"]) > 1 for run in next(iter(tasks.values()))["runs"])
    figure.legend(
        handles=panels[0][0].get_legend_handles_labels()[0] + [band()] * several,
        loc="outside upper center",
        ncols=len(STYLES) + 1,
        fontsize=SMALL,
        frameon=False,
    )
    return figure


def _draw(axes: Any, run: Mapping[str, Any]) -> None:
    curves, (colour, style) = np.array(run["test_accuracy"], float), STYLES[run["method"]]
    mean = curves.mean(axis=0)
    axes.plot(run["gradients"], mean, style, color=colour, label=run["label"], linewidth=1.2)
    if len(curves) > 1:
        error = curves.std(axis=0, ddof=1) / np.sqrt(len(curves))
        axes.fill_between(
            run["gradients"], mean - error, mean + error, color=colour, alpha=0.15, linewidth=0
        )


def _limits(entry: Mapping[str, Any]) -> tuple[float, float]:
    """So that curves which fall apart do not flatten the others."""
    ends = [np.mean(run["test_accuracy"], axis=0) for run in entry["runs"]]
    best = max(curve.max() for curve in ends)
    start = ends[0][0]
    lowest = start if start > 30 else np.median([curve[2:].min() for curve in ends])
    margin = 0.08 * (best - lowest) + 0.5
    return max(0.0, lowest - 3 * margin), min(100.0, best + margin)
