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
    band,
    draw_mean,
    legend_in_corner,
    log_ticks,
    three_panels,
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
    names = ("training loss (nats)", "test accuracy (%)", r"radius $\|\delta\| / \|g\|$ (1/nats)")
    figure, panels = three_panels("epoch", names)
    loss, accuracy, radius = panels
    _draw_curves(loss, optimizers, "train_loss", base)
    _draw_curves(accuracy, optimizers, "test_accuracy", base)
    _draw_curves(radius, with_radius, "effective_radius", base)
    for axes in panels:
        axes.set_xlim(0, results["configuration"]["epochs"] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10], integer=True))
    _make_logarithmic(loss, if_empty="diverged")
    _make_logarithmic(radius, if_empty="diverged" if with_radius else "neither SAM\nnor M-SAM")
    _leave_out_beginning(accuracy)
    several = any(len(entry["seeds"]) > 1 for entry in optimizers.values())
    legend_in_corner(figure, loss.get_legend_handles_labels()[0] + [band()] * several)
    return figure


def _draw_curves(axes: Axes, optimizers: Mapping[str, Any], quantity: str, base: str) -> None:
    """Mean and standard error over seeds of a quantity after every epoch."""
    for name, entry in optimizers.items():
        curves = [seed["curves"][quantity] for seed in entry["seeds"]]
        epochs = np.arange(1, len(curves[0]) + 1)
        draw_mean(
            axes,
            epochs,
            curves,
            COLOURS[base if name == "sgd" else name],
            entry["label"],
            linestyle=DASHES.get(name, "-"),
            marker="o" if len(epochs) == 1 else None,
            markersize=4,
        )


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
