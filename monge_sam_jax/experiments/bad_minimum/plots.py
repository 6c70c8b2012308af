"""The figures of `monge-sam bad-minimum`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from monge_sam_jax.experiments.common.plots import (
    COLOURS,
    FONT_SIZE,
    GREY,
    band,
    draw_mean,
    legend_below,
    log_ticks,
    panels_of,
)

ACCURACIES = {
    "test_accuracy": "test\naccuracy (%)",
    "train_accuracy": "training\naccuracy (%)",
}
MECHANISM = {
    "grad_norm": r"$\|g\|$ at $\theta$" "\n(nats)",
    "perturbation_norm": r"$\|\delta\| / \rho$",
    "effective_radius": r"$\|\delta\| / \|g\|$" "\n(1/nats)",
    "perturbed_loss": "loss at\n" r"$\theta + \delta$ (nats)",
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
    figure, panels = _draw(results, ACCURACIES)
    scratch = next(run for run in results["runs"] if run["method"] == "scratch")
    for name, row in zip(ACCURACIES, panels, strict=True):
        level = scratch["summary"][name]["mean"]
        for axes in row:
            if level is not None:
                axes.axhline(level, color=GREY, linestyle=":", label=scratch["label"])
    _explain(figure, panels)
    return figure


def mechanism_figure(results: Mapping[str, Any]) -> Figure:
    """Gradient, perturbation and perturbed loss over the epochs, a column for each radius.

    Args:
      results: content of the results.json of `monge-sam bad-minimum`.

    Returns:
      The figure: means over seeds in bands of one standard error. SGD, which does not perturb, is
      in the first row alone. The axis of the epochs is logarithmic from the first on.
    """
    figure, panels = _draw(results, MECHANISM)
    for name, row in zip(MECHANISM, panels, strict=True):
        if name != "perturbation_norm":
            row[0].set_yscale("log")
            log_ticks(row[0])
    panels[0, 0].set_xscale("symlog", linthresh=1)
    _explain(figure, panels)
    return figure


def _draw(results: Mapping[str, Any], rows: Mapping[str, str]) -> tuple[Figure, np.ndarray]:
    radii = results["configuration"]["rho"]
    figure, panels = panels_of(list(rows.values()), len(radii), "epoch", 1.1)
    for name, row in zip(rows, panels, strict=True):
        for axes, rho in zip(row, radii, strict=True):
            for run in results["runs"]:
                if run["method"] == "scratch" or run["rho"] not in (None, rho):
                    continue
                if run["method"] != "sgd" or name not in PERTURBED:
                    curves = np.array([seed["curves"][name] for seed in run["seeds"]], float)
                    unit = rho if name == "perturbation_norm" else 1.0
                    colour, label = COLOURS[run["method"]], run["label"]
                    draw_mean(axes, run["epoch"], curves / unit, colour, label)
    for axes, rho in zip(panels[0], radii, strict=True):
        axes.set_title(rf"$\rho$ = {rho:g}", fontsize=FONT_SIZE)
    panels[0, 0].set_xlim(left=0)
    panels[0, 0].xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    return figure, panels


def _explain(figure: Figure, panels: np.ndarray) -> None:
    entries = panels[0, 0].get_legend_handles_labels()[0]
    legend_below(figure, entries + [band()] * bool(panels[0, 0].collections))
