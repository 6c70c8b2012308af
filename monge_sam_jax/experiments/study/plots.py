"""The figures of `monge-sam study`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from monge_sam_jax.experiments.common.plots import COLOURS, FONT_SIZE, GREY, SMALL, blank_figure
from monge_sam_jax.experiments.study.statistics import profiles
from monge_sam_jax.experiments.study.tasks import TASKS

# A method in one pass has the colour of its two-pass form, and dashes; annealed ones have dots.
STYLES = {
    "plain": (COLOURS["sgd"], "-"),
    "average": (GREY, "-"),
    "sam": (COLOURS["sam"], "-"),
    "late_sam": (COLOURS["sam"], "-."),
    "annealed_sam": (COLOURS["sam"], ":"),
    "one_pass_sam": (COLOURS["sam"], "--"),
    "annealed_one_pass_sam": (COLOURS["sam"], (0, (3, 1, 1, 1, 1, 1))),
    "monge_sam": (COLOURS["monge_sam"], "-"),
    "budget": (COLOURS["monge_sam"], "-."),
    "one_pass_monge": (COLOURS["monge_sam"], "--"),
    "annealed_one_pass_monge": (COLOURS["monge_sam"], ":"),
    "adaptive_sam": (COLOURS["adaptive_sam"], "-"),
    "friendly": (COLOURS["fisher_sam"], "-"),
    "averaged_monge": (COLOURS["monge_sam"], (0, (5, 1))),
    "geodesic": (COLOURS["monge_sam"], (0, (1, 3))),
    "functional": (COLOURS["fisher_sam"], "--"),
    "layerwise": (COLOURS["adaptive_sam"], "--"),
    "supremum": (COLOURS["adaptive_sam"], ":"),
    "spectral": (COLOURS["adaptive_sam"], "-."),
}
RATIOS = np.geomspace(1, 4, 100)


def study_figure(results: Mapping[str, Any]) -> Figure:
    """Test scores at the end against the radius, a panel for each task, at equal gradients.

    Args:
      results: content of the results.json of `monge-sam study`.

    Returns:
      The figure: means over seeds, in bands of one standard error.
    """
    tasks = results["tasks"]
    columns = min(2, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = blank_figure(1.0 + 1.9 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (task, entry) in zip(panels, tasks.items(), strict=False):
        for method in STYLES:
            _draw(axes, [c for c in entry["cells"] if c["method"] == method])
        axes.set_xscale("log")
        axes.set_title(task, fontsize=FONT_SIZE)
        axes.set_ylabel(entry["unit"], fontsize=SMALL)
        axes.tick_params(labelsize=SMALL)
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    for axes in panels[max(0, len(tasks) - columns) : len(tasks)]:
        axes.set_xlabel(r"radius $\rho$", fontsize=FONT_SIZE)
    _legend(figure, panels[0])
    return figure


def profiles_figure(results: Mapping[str, Any]) -> Figure:
    """For every method the part of tasks and seeds where its error is near the best one's.

    Args:
      results: content of the results.json of `monge-sam study`.

    Returns:
      The figure: radii are chosen by validation samples, and gradients are equal.
    """
    figure = blank_figure(3.2)
    axes = figure.subplots()
    errors: dict[str, list[np.ndarray]] = {}
    for task, entry in results["tasks"].items():
        for row in entry["rows"]:
            if row["gradients"] >= 2:
                scores = _ends(_cell_of(entry, row), "test")
                errors.setdefault(row["method"], []).append(TASKS[task].kind.error(scores))
    stacked = {name: np.concatenate(parts) for name, parts in errors.items()}
    for name, profile in profiles(stacked, RATIOS).items():
        colour, style = STYLES[name]
        label = next(
            row["label"]
            for entry in results["tasks"].values()
            for row in entry["rows"]
            if row["method"] == name
        )
        axes.plot(RATIOS, 100 * profile, color=colour, linestyle=style, label=label, linewidth=1.2)
    axes.set_xlabel("error, over that of the best method", fontsize=FONT_SIZE)
    axes.set_ylabel("tasks and seeds (%)", fontsize=FONT_SIZE)
    axes.tick_params(labelsize=SMALL)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, axes)
    return figure


def _draw(axes: Any, cells: list[Mapping[str, Any]]) -> None:
    """A method at two gradients a step, or as many."""
    drawn = [c for c in cells if c["gradients"] >= 2 and c["factor"] == 1]
    if not drawn:
        return
    colour, style = STYLES[drawn[0]["method"]]
    ends = [_ends(cell, "test") for cell in drawn]
    mean = np.array([np.mean(end) for end in ends])
    error = np.array(
        [np.std(end, ddof=1) / np.sqrt(len(end)) if len(end) > 1 else 0 for end in ends]
    )
    options = {"color": colour, "linestyle": style, "label": drawn[0]["label"], "linewidth": 1.2}
    if drawn[0]["rho"] is None:
        axes.axhline(mean[0], **options)
        return
    rho = [cell["rho"] for cell in drawn]
    axes.plot(rho, mean, **options)
    axes.fill_between(rho, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)


def _cell_of(entry: Mapping[str, Any], row: Mapping[str, Any]) -> Mapping[str, Any]:
    keys = ("method", "rho", "gradients", "factor")
    return next(c for c in entry["cells"] if all(c[key] == row[key] for key in keys))


def _ends(cell: Mapping[str, Any], quantity: str) -> np.ndarray:
    return np.array([curve[-1] for curve in cell[quantity]], float)


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=3, fontsize=SMALL, frameon=False
    )
