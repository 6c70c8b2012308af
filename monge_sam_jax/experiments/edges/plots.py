"""The figure of `monge-sam edges`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from monge_sam_jax.experiments.common.plots import (
    COLOURS,
    FONT_SIZE,
    GREY,
    SMALL,
    blank_figure,
    log_ticks,
)

ROWS = {
    "two passes": {"sgd": "sgd", "sam": "sam", "monge_sam": "monge_sam"},
    "one pass": {"sgd": "sgd", "one_pass_sam": "sam", "one_pass_monge_sam": "monge_sam"},
}
LABELS = {"sgd": "GD", "sam": "SAM", "monge_sam": "M-SAM"}


def edges_figure(results: Mapping[str, Any]) -> Figure:
    """Sharpness and the predicted edge along training, a panel for each radius and kind of step.

    Args:
      results: content of the results.json of `monge-sam edges`.

    Returns:
      The figure: thin lines for each seed; the edges dashed, geometric means over seeds.
    """
    radii = results["configuration"]["rho"]
    figure = blank_figure(4.4)
    panels = figure.subplots(2, len(radii), squeeze=False, sharex=True, sharey=True)
    for (passes, methods), row in zip(ROWS.items(), panels, strict=True):
        for axes, rho in zip(row, radii, strict=True):
            for run in results["runs"]:
                if run["method"] in methods and run["rho"] in (None, rho):
                    _draw(axes, results["steps"], run, COLOURS[methods[run["method"]]])
            axes.set_yscale("log")
            log_ticks(axes)
            axes.tick_params(labelsize=SMALL)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"{passes}\nsharpness", fontsize=FONT_SIZE)
    for axes, rho in zip(panels[0], radii, strict=True):
        axes.set_title(rf"$\rho$ = {rho:g}", fontsize=FONT_SIZE)
    for axes in panels[-1]:
        axes.set_xlabel("step", fontsize=FONT_SIZE)
    figure.legend(
        handles=[
            *(Line2D([], [], color=COLOURS[name], label=label) for name, label in LABELS.items()),
            Line2D([], [], color=GREY, linestyle="--", label="edge at its effective radius"),
        ],
        loc="outside upper center",
        ncols=4,
        fontsize=SMALL,
        frameon=False,
    )
    return figure


def _draw(axes: Axes, steps: list[int], run: Mapping[str, Any], colour: str) -> None:
    for curve in np.array(run["sharpness"], float):
        axes.plot(steps, curve, color=colour, linewidth=0.9, alpha=0.7)
    edge = np.exp(np.mean(np.log(np.array(run["edge"], float)), axis=0))
    axes.plot(steps, edge, "--", color=colour, linewidth=1.4)
