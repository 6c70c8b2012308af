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
    band,
    blank_figure,
    draw_mean,
    finish,
    legend_below,
    log_ticks,
)
from monge_sam_jax.experiments.edges.claims import COLLAPSED, late

PASSES = {
    "two passes": {"sgd": "sgd", "sam": "sam", "monge_sam": "monge_sam"},
    "one pass": {"sgd": "sgd", "one_pass_sam": "sam", "one_pass_monge_sam": "monge_sam"},
}
LABELS = {"sgd": "SGD", "sam": "SAM", "monge_sam": "M-SAM"}
SHOWN = 0.1  # about the rho whose curves over training are drawn
ROWS = ("sharpness", "late sharpness", r"$r \lambda$", "training\naccuracy (%)")


def edges_figure(*results: Mapping[str, Any]) -> Figure:
    """Sharpness and the predicted edge along training, and by radius with what becomes of training.

    Args:
      *results: contents of results.json of `monge-sam edges`, with the same radii; two columns of
        panels for each, of two passes and of one.

    Returns:
      The figure. Along training: thin lines for each seed, the edge dashed, its geometric mean over
      seeds. By radius: means over seeds in bands of one standard error, late in training; the edge
      dashed, and grey what is predicted of r lambda, and below which accuracy is collapse.
    """
    columns = [(content, passes) for content in results for passes in PASSES]
    figure = blank_figure(6.6)
    figure.set_figwidth(figure.get_figwidth() * (1 if len(results) == 1 else 1.6))
    panels = figure.subplots(len(ROWS), len(columns), squeeze=False, sharey="row")
    for axes, name in zip(panels[:, 0], ROWS, strict=True):
        axes.set_ylabel(name, fontsize=FONT_SIZE)
    for column, (content, passes) in zip(panels.T, columns, strict=True):
        radii = np.array(content["configuration"]["rho"])
        shown = radii[np.argmin(np.abs(radii - SHOWN))]
        for run in content["runs"]:
            if run["method"] in PASSES[passes] and run["rho"] in (None, shown):
                _draw_training(column[0], content["steps"], run, _colour(run, passes))
        for name, colour in PASSES[passes].items():
            runs = [run for run in content["runs"] if run["method"] == name]
            _draw_by_radius(column[1:], np.sort(radii), runs, COLOURS[colour])
        batch = content["configuration"]["batch_size"]
        finish(column[0], rf"step, at $\rho$ = {shown:g}", column[0].get_ylabel())
        column[0].set_title(
            f"{passes}, {'all images' if batch is None else f'{batch} images'}", fontsize=FONT_SIZE
        )
        for axes in column[1:]:
            finish(axes, r"$\rho$" if axes is column[-1] else "", axes.get_ylabel())
            if np.all(radii > 0):
                axes.set_xscale("log")
        for axes in column[:3]:
            axes.set_yscale("log")
        column[2].axhline(1, color=GREY, linewidth=0.8)
        column[3].axhline(COLLAPSED, color=GREY, linewidth=0.8)
    for axes in panels[:3, 0]:
        log_ticks(axes)
    legend_below(
        figure,
        [
            *(Line2D([], [], color=COLOURS[name], label=label) for name, label in LABELS.items()),
            Line2D([], [], color=GREY, linestyle="--", label="edge"),
            band(),
        ],
    )
    return figure


def _colour(run: Mapping[str, Any], passes: str) -> str:
    return COLOURS[PASSES[passes][run["method"]]]


def _draw_training(axes: Axes, steps: list[int], run: Mapping[str, Any], colour: str) -> None:
    for curve in np.array(run["sharpness"], float):
        axes.plot(steps, curve, color=colour, linewidth=0.6, alpha=0.5)
    edge = np.exp(np.mean(np.log(np.array(run["edge"], float)), axis=0))
    axes.plot(steps, edge, "--", color=colour, linewidth=1.4)


def _draw_by_radius(
    panels: np.ndarray, radii: np.ndarray, runs: list[Mapping[str, Any]], colour: str
) -> None:
    """Draws a method late in training; one without a radius as a level, and without r lambda."""
    has_radius = runs[0]["rho"] is not None
    quantities = [late(run) for run in sorted(runs, key=lambda run: run["rho"] or 0.0)]
    if not has_radius:
        quantities *= len(radii)
    for axes, name in zip(panels, ("sharpness", "r lambda", "train_accuracy"), strict=True):
        if name != "r lambda" or has_radius:
            curves = np.stack([q[name] for q in quantities], axis=1)
            draw_mean(axes, radii, curves, colour, "")
    edge = np.stack([q["edge"] for q in quantities], axis=1)
    panels[0].plot(radii, np.exp(np.mean(np.log(edge), axis=0)), "--", color=colour, linewidth=1.2)
