"""The figures of `monge-sam bad-minimum`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from monge_sam_jax.experiments.common.plots import (
    COLOURS,
    FONT_SIZE,
    GREY,
    SMALL,
    band,
    blank_figure,
    log_ticks,
)

ACCURACIES = {"test_accuracy": "test accuracy (%)", "train_accuracy": "training accuracy (%)"}
MECHANISM = {
    "grad_norm": r"$\|g\|$ at $\theta$ (nats)",
    "perturbation_norm": r"$\|\delta\| / \rho$",
    "effective_radius": r"$\|\delta\| / \|g\|$ (1/nats)",
    "perturbed_loss": r"loss at $\theta + \delta$ (nats)",
}

# What SGD has none of, though its curves hold zeros and the loss at theta in their place.
PERTURBED = ("perturbation_norm", "effective_radius", "perturbed_loss")


def accuracy_figure(results: Mapping[str, Any]) -> Figure:
    """Test and training accuracy over the epochs of fine-tuning, a panel for each radius.

    Args:
      results: content of the results.json of `monge-sam bad-minimum`.

    Returns:
      The figure: means over seeds, in bands of one standard error if there are several; dotted the
      end of the baseline from scratch. A curve ends where a seed diverged.
    """
    figure, panels = _grid(results, ACCURACIES)
    scratch = next(run for run in results["runs"] if run["method"] == "scratch")
    for name, row in zip(ACCURACIES, panels, strict=True):
        level = scratch["summary"][name]["mean"]
        for axes in row:
            if level is not None:
                axes.axhline(level, color=GREY, linestyle=":", label=scratch["label"])
    _finish(figure, panels)
    return figure


def mechanism_figure(results: Mapping[str, Any]) -> Figure:
    """Gradient, perturbation and perturbed loss over the epochs, a column for each radius.

    Args:
      results: content of the results.json of `monge-sam bad-minimum`.

    Returns:
      The figure: means over seeds in bands of one standard error. SGD, which does not perturb, is
      in the first row alone. The axis of the epochs is logarithmic from the first on.
    """
    figure, panels = _grid(results, MECHANISM)
    for name, row in zip(MECHANISM, panels, strict=True):
        if name != "perturbation_norm":
            row[0].set_yscale("log")
            log_ticks(row[0])
    _finish(figure, panels)
    panels[0, 0].set_xscale("symlog", linthresh=1)
    return figure


def _grid(results: Mapping[str, Any], rows: Mapping[str, str]) -> tuple[Figure, np.ndarray]:
    radii = results["configuration"]["rho"]
    figure = blank_figure(0.6 + 1.45 * len(rows))
    panels = figure.subplots(len(rows), len(radii), squeeze=False, sharex=True, sharey="row")
    for (name, label), row in zip(rows.items(), panels, strict=True):
        row[0].set_ylabel(label, fontsize=FONT_SIZE)
        for axes, rho in zip(row, radii, strict=True):
            for run in results["runs"]:
                if run["method"] == "scratch" or run["rho"] not in (None, rho):
                    continue
                if run["method"] != "sgd" or name not in PERTURBED:
                    _draw(axes, run, name, rho if name == "perturbation_norm" else 1.0)
    for axes, rho in zip(panels[0], radii, strict=True):
        axes.set_title(rf"$\rho$ = {rho:g}", fontsize=FONT_SIZE)
    return figure, panels


def _draw(axes: Axes, run: Mapping[str, Any], name: str, unit: float) -> None:
    seeds = run["seeds"]
    curves = np.array([seed["curves"][name] for seed in seeds], float) / unit  # null becomes NaN
    mean, colour = curves.mean(axis=0), COLOURS[run["method"]]
    axes.plot(run["epoch"], mean, color=colour, label=run["label"], linewidth=1.2)
    if len(curves) > 1:
        error = curves.std(axis=0, ddof=1) / np.sqrt(len(curves))
        low = np.maximum(mean - error, mean / 100)  # a logarithm has it
        axes.fill_between(run["epoch"], low, mean + error, color=colour, alpha=0.2, linewidth=0)


def _finish(figure: Figure, panels: np.ndarray) -> None:
    for axes in panels.flat:
        axes.tick_params(which="both", labelsize=SMALL)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    panels[0, 0].set_xlim(left=0)
    for axes in panels[-1]:
        axes.set_xlabel("epoch", fontsize=FONT_SIZE)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    entries = panels[0][0].get_legend_handles_labels()[0]
    figure.legend(
        handles=entries + [band()] * bool(panels[0, 0].collections),
        loc="outside upper center",
        ncols=5,
        fontsize=SMALL,
        frameon=False,
    )
