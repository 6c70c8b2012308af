"""The figures of `monge-sam study`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from monge_sam_jax.experiments.common.plots import COLOURS, FONT_SIZE, SMALL, band, blank_figure
from monge_sam_jax.experiments.study.statistics import profiles
from monge_sam_jax.experiments.study.tasks import TASKS

# What is drawn; the tables have all. A method in one pass has the colour of its two-pass form, and
# dashes; with an annealed radius dots.
STYLES: dict[str, tuple[str, Any]] = {
    "plain": (COLOURS["sgd"], "-"),
    "sam": (COLOURS["sam"], "-"),
    "one_pass_sam": (COLOURS["sam"], "--"),
    "annealed_one_pass_sam": (COLOURS["sam"], ":"),
    "monge_sam": (COLOURS["monge_sam"], "-"),
    "one_pass_monge": (COLOURS["monge_sam"], "--"),
    "annealed_one_pass_monge": (COLOURS["monge_sam"], ":"),
    "adaptive_sam": (COLOURS["adaptive_sam"], "-"),
}
RATIOS = np.geomspace(1, 4, 100)


def study_figure(results: Mapping[str, Any]) -> Figure:
    """Gains over plain training against the radius, a panel for each task, at equal gradients.

    Args:
      results: content of the results.json of `monge-sam study`.

    Returns:
      The figure: means of paired differences, in bands of one standard error.
    """
    tasks = results["tasks"]
    columns = min(2, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = blank_figure(1.1 + 1.7 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (task, entry) in zip(panels, tasks.items(), strict=False):
        curves = [curve for name in STYLES if (curve := _draw(axes, entry, name))]
        best = max([0.0, *(max(curve) for curve in curves)])
        lowest = min([0.0, *(min(curve) for curve in curves)])
        # So that what falls apart at large radii does not flatten the rest.
        first = min([0.0, *(curve[0] for curve in curves)])
        bottom = max(lowest, -max(best, -2 * first))
        margin = 0.1 * (best - bottom) or 1.0
        axes.set_ylim(bottom - margin, best + margin)
        axes.axhline(0.0, color=COLOURS["sgd"], linewidth=1.2, label="plain")
        axes.set_xscale("log")
        axes.set_title(f"{task}, in {entry['unit']}", fontsize=SMALL)
        axes.set_ylabel("gain over plain", fontsize=SMALL)
        axes.tick_params(labelsize=SMALL)
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    for axes in panels[max(0, len(tasks) - columns) : len(tasks)]:
        axes.set_xlabel(r"radius $\rho$", fontsize=FONT_SIZE)
    several = results["configuration"]["seeds"] > 1
    _legend(figure, panels[0], [band()] * several)
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
            if row["gradients"] == 2 and row["method"] in STYLES:
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


def _draw(axes: Any, entry: Mapping[str, Any], name: str) -> list[float]:
    """The mean gains of a method by radius."""
    cells = [c for c in entry["cells"] if c["gradients"] == 2 and c["factor"] == 1]
    plain = next(_ends(c, "test") for c in cells if c["method"] == "plain")
    cells = [c for c in cells if c["method"] == name and c["rho"] is not None]
    if not cells:
        return []
    gains = np.array([_ends(cell, "test") - plain for cell in cells])
    mean, (colour, style) = gains.mean(1), STYLES[name]
    rho = [cell["rho"] for cell in cells]
    axes.plot(rho, mean, color=colour, linestyle=style, label=cells[0]["label"], linewidth=1.2)
    if gains.shape[1] > 1:
        error = gains.std(1, ddof=1) / np.sqrt(gains.shape[1])
        axes.fill_between(rho, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
    return mean.tolist()


def _cell_of(entry: Mapping[str, Any], row: Mapping[str, Any]) -> Mapping[str, Any]:
    keys = ("method", "rho", "gradients", "factor")
    return next(c for c in entry["cells"] if all(c[key] == row[key] for key in keys))


def _ends(cell: Mapping[str, Any], quantity: str) -> np.ndarray:
    return np.array([curve[-1] for curve in cell[quantity]], float)


def _legend(figure: Figure, axes: Any, others: Sequence[Any] = ()) -> None:
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(
        handles=[*handles, *others],
        loc="outside upper center",
        ncols=2,
        fontsize=SMALL,
        frameon=False,
    )
