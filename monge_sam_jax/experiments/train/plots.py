"""The figure of `monge-sam train`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from monge_sam_jax.experiments.common.plots import (
    COLOURS,
    FONT_SIZE,
    SMALL,
    band,
    blank_figure,
    log_ticks,
)

# Fisher SAM often coincides with SAM and M-SAM, which then show between its dashes.
DASHES = {"fisher_sam": (0, (4, 2))}


def training_figure(results: Mapping[str, Any]) -> Figure:
    """Training loss, test accuracy and effective radius over the epochs.

    Args:
      results: content of the results.json of `monge-sam train`.

    Returns:
      Three panels with means over seeds, in bands of one standard error if there are several seeds.
      The radius is that of SAM and of M-SAM, whichever was run. The axis of the accuracy may leave
      out the first epochs. A curve ends where a seed diverged.
    """
    optimizers = results["optimizers"]
    base = results["configuration"]["base"]
    with_radius = {name: optimizers[name] for name in ("sam", "monge_sam") if name in optimizers}
    figure = blank_figure(2.6)
    loss, accuracy, radius = figure.subplots(1, 3)
    _draw_curves(loss, optimizers, "train_loss", base)
    _draw_curves(accuracy, optimizers, "test_accuracy", base)
    _draw_curves(radius, with_radius, "effective_radius", base)
    loss.set_ylabel("training loss (nats)")
    accuracy.set_ylabel("test accuracy (%)")
    radius.set_ylabel(r"radius $\|\delta\| / \|g\|$ (1/nats)")
    for axes in (loss, accuracy, radius):
        _finish(axes, results["configuration"]["epochs"])
    _make_logarithmic(loss, if_empty="diverged")
    _make_logarithmic(radius, if_empty="diverged" if with_radius else "neither SAM\nnor M-SAM")
    _leave_out_beginning(accuracy)
    several = any(len(entry["seeds"]) > 1 for entry in optimizers.values())
    figure.legend(
        handles=loss.get_legend_handles_labels()[0] + [band()] * several,
        loc="outside lower center",
        ncols=6,
        fontsize=SMALL,
        frameon=False,
    )
    return figure


def _draw_curves(axes: Axes, optimizers: Mapping[str, Any], quantity: str, base: str) -> None:
    """Mean and standard error over seeds of a quantity after every epoch."""
    for name, entry in optimizers.items():
        seeds = entry["seeds"]
        colour = COLOURS[base if name == "sgd" else name]
        curves = np.array([seed["curves"][quantity] for seed in seeds], float)  # null becomes NaN
        mean = curves.mean(axis=0)
        epochs = np.arange(1, len(mean) + 1)
        axes.plot(
            epochs,
            mean,
            color=colour,
            linestyle=DASHES.get(name, "-"),
            linewidth=1.3,
            marker="o" if len(epochs) == 1 else None,
            markersize=4,
            label=entry["label"],
        )
        if len(seeds) > 1:
            error = curves.std(axis=0, ddof=1) / np.sqrt(len(seeds))
            low, high = mean - error, mean + error
            axes.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)


def _finish(axes: Axes, epochs: int) -> None:
    axes.set_xlabel("epoch")
    axes.set_xlim(0, epochs + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.label.set_fontsize(FONT_SIZE)
    axes.yaxis.label.set_fontsize(FONT_SIZE)
    axes.tick_params(which="both", labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)


def _curves(axes: Axes) -> list[np.ndarray]:
    return [np.asarray(line.get_ydata(), float) for line in axes.lines]


def _make_logarithmic(axes: Axes, if_empty: str) -> None:
    """A logarithmic axis of values; a note where there is none that it could show."""
    if any(np.any(curve > 0) for curve in _curves(axes)):
        axes.set_yscale("log")
        log_ticks(axes)
        return
    axes.set_yticks([])
    axes.text(0.5, 0.5, if_empty, ha="center", fontsize=FONT_SIZE, transform=axes.transAxes)


def _leave_out_beginning(axes: Axes) -> None:
    """Fits the axis to the values after a tenth of the epochs, so that the ends are told apart."""
    late = np.concatenate([curve[len(curve) // 10 :] for curve in _curves(axes)])
    margin = max(0.1 * np.ptp(late), 0.2)
    axes.set_ylim(late.min() - margin, late.max() + margin)
