"""The figures of `monge-sam study`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from monge_sam_jax.experiments.common.plots import COLOURS, FONT_SIZE, SMALL, band, blank_figure
from monge_sam_jax.experiments.study.statistics import profiles
from monge_sam_jax.experiments.study.tasks import TASKS

# What is drawn; the tables have all. A method in one pass has the colour of its two-pass form, and
# dashes; with an annealed radius dots; late in training alone, or annealed after a warm-up, both.
STYLES: dict[str, tuple[str, Any]] = {
    "plain": (COLOURS["sgd"], "-"),
    "average": (COLOURS["sgd"], "--"),
    "sam": (COLOURS["sam"], "-"),
    "late_sam": (COLOURS["sam"], "-."),
    "one_pass_sam": (COLOURS["sam"], "--"),
    "annealed_one_pass_sam": (COLOURS["sam"], ":"),
    "monge_sam": (COLOURS["monge_sam"], "-"),
    "one_pass_monge": (COLOURS["monge_sam"], "--"),
    "annealed_one_pass_monge": (COLOURS["monge_sam"], ":"),
    "warm_annealed_one_pass_monge": (COLOURS["monge_sam"], "-."),
    "adaptive_sam": (COLOURS["adaptive_sam"], "-"),
}
RATIOS = np.geomspace(1, 4, 100)


def study_figure(summary: Mapping[str, Any]) -> Figure:
    """Gains over plain training against the radius, a panel for each task, at equal gradients.

    Args:
      summary: content of the summary.json of `monge-sam study`.

    Returns:
      The figure: means of paired differences over the seeds that choose, in bands of one standard
      error.
    """
    tasks = summary["tasks"]
    columns = min(2, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = blank_figure(1.1 + 1.7 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (task, entry) in zip(panels, tasks.items(), strict=False):
        draw_gains(axes, entry)
        axes.set_title(f"{task}, in {entry['unit']}", fontsize=SMALL)
        axes.set_ylabel("gain over plain", fontsize=SMALL)
        axes.tick_params(labelsize=SMALL)
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    for axes in panels[max(0, len(tasks) - columns) : len(tasks)]:
        axes.set_xlabel(r"radius $\rho$", fontsize=FONT_SIZE)
    several = any(entry["tuned_on"] > 1 for entry in tasks.values())
    _legend(figure, panels[0], [band()] * several)
    return figure


def draw_gains(axes: Axes, entry: Mapping[str, Any]) -> None:
    """Draws the gains of a task against the radius.

    Args:
      axes: where.
      entry: of the task in summary.json.
    """
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
    radii = sorted({rho for line in entry["lines"].values() for rho in line["rho"]})
    axes.set_xticks(radii, [f"{rho:g}" for rho in radii])
    axes.minorticks_off()
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def _draw(axes: Axes, entry: Mapping[str, Any], name: str) -> list[float]:
    """The mean gains of a method by radius, of those that are finite."""
    if name not in entry["lines"]:
        return []
    line = entry["lines"][name]
    gains = np.array(line["gains"], float)
    mean, (colour, style) = gains.mean(1), STYLES[name]
    axes.plot(
        line["rho"], mean, color=colour, linestyle=style, label=_label(entry, name), linewidth=1.2
    )
    if gains.shape[1] > 1:
        error = gains.std(1, ddof=1) / np.sqrt(gains.shape[1])
        axes.fill_between(
            line["rho"], mean - error, mean + error, color=colour, alpha=0.15, linewidth=0
        )
    return [float(x) for x in mean if np.isfinite(x)]


def _label(entry: Mapping[str, Any], name: str) -> str:
    return next(row["label"] for row in entry["rows"] if row["method"] == name)


def profiles_figure(summary: Mapping[str, Any]) -> Figure:
    """For every method the part of tasks and seeds where its error is near the best one's.

    Args:
      summary: content of the summary.json of `monge-sam study`.

    Returns:
      The figure: of the methods that all tasks have, at equal gradients.
    """
    figure = blank_figure(3.2)
    axes = figure.subplots()
    draw_profiles(axes, summary)
    axes.set_xlabel("error, over that of the best method", fontsize=FONT_SIZE)
    axes.set_ylabel("tasks and seeds (%)", fontsize=FONT_SIZE)
    axes.tick_params(labelsize=SMALL)
    _legend(figure, axes)
    return figure


def draw_profiles(axes: Axes, summary: Mapping[str, Any]) -> None:
    """Draws the performance profiles of the methods that all tasks have.

    Args:
      axes: where.
      summary: content of summary.json.
    """
    entries = summary["tasks"]
    names = [
        name
        for name in STYLES
        if all(name in (row["method"] for row in entry["rows"]) for entry in entries.values())
    ]
    errors = {
        name: np.concatenate(
            [
                TASKS[task].kind.error(np.array(row["ends"], float))
                for task, entry in entries.items()
                for row in entry["rows"]
                if row["method"] == name
            ]
        )
        for name in names
    }
    for name, profile in profiles(errors, RATIOS).items():
        colour, style = STYLES[name]
        label = _label(next(iter(entries.values())), name)
        axes.plot(RATIOS, 100 * profile, color=colour, linestyle=style, label=label, linewidth=1.2)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def frontier_figure(summary: Mapping[str, Any]) -> Figure:
    """Loss on the old text against that on the new one, while the new one is learnt.

    Args:
      summary: content of the summary.json of `monge-sam study`, with the task forgetting.

    Returns:
      The figure: means over seeds, from right to left; lower and further left is better.
    """
    figure = blank_figure(3.4)
    axes = figure.subplots()
    draw_frontier(axes, summary["tasks"]["forgetting"])
    axes.set_xlabel("loss on the new text (nats per byte)", fontsize=FONT_SIZE)
    axes.set_ylabel("loss on the old text", fontsize=FONT_SIZE)
    axes.tick_params(labelsize=SMALL)
    _legend(figure, axes)
    return figure


def draw_frontier(axes: Axes, entry: Mapping[str, Any]) -> None:
    """Draws both losses of a task that goes on after training.

    Args:
      axes: where.
      entry: of the task in summary.json.
    """
    for row in entry["rows"]:
        if row["method"] in STYLES:
            colour, style = STYLES[row["method"]]
            new, old = (-np.array(row["after"][name], float) for name in ("new", "old"))
            label = row["label"]
            axes.plot(new, old, color=colour, linestyle=style, label=label, linewidth=1.2)
            axes.plot(new[-1:], old[-1:], color=colour, marker="o", markersize=3)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, axes: Any, others: Sequence[Any] = ()) -> None:
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(
        handles=[*handles, *others],
        loc="outside upper center",
        ncols=2,
        fontsize=SMALL,
        frameon=False,
    )
