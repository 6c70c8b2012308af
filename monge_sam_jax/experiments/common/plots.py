"""How figures look, which are drawn without pyplot and so without global state."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

WIDTH = 7.0  # of the text on a page, in inches
# Of the commands' figures: where a column of 3.3 inches takes them, the small font has 6 points.
FIGURE_WIDTH = 4.4
FONT_SIZE = 9  # of titles and of the names of axes
SMALL = FONT_SIZE - 1  # of ticks and legends
DOTS_PER_INCH = 300
MOST_COLUMNS = 3  # of panels beside one another

LABELS = {
    "sam": "SAM",
    "monge_sam": "M-SAM",
    "fisher_sam": "Fisher SAM",
    "adaptive_sam": "ASAM",
}
# The palette of Okabe and Ito, whose colours remain distinct to the colour-blind.
# "sgd" is descent without a perturbation, on the toy losses with the whole gradient.
COLOURS = {
    "sgd": "#000000",
    "adam": "#E69F00",
    "adamw": "#E69F00",
    "sam": "#0072B2",
    "monge_sam": "#D55E00",
    "adaptive_sam": "#009E73",
    "fisher_sam": "#CC79A7",
}
GREY = "#888888"  # what is no method: references, levels, and marks that hold for all methods
# For `matplotlib.rcParams`: pyplot's figures in the notebooks then look like those drawn here.
NOTEBOOK = {
    "axes.labelsize": FONT_SIZE,
    "axes.titlesize": FONT_SIZE,
    "figure.constrained_layout.use": True,
    "figure.dpi": 120,
    "figure.titlesize": FONT_SIZE,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
}


def blank_figure(height: float) -> Figure:
    """A figure to draw on."""
    figure = Figure(figsize=(FIGURE_WIDTH, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels_of(
    quantities: Sequence[str], columns: int, x_label: str, height: float, most: int = MOST_COLUMNS
) -> tuple[Figure, np.ndarray]:
    """A figure of several quantities, the same for every column.

    Args:
      quantities: names of y axes.
      columns: of panels for each, of which at most `most` are beside one another: the others follow
        below, behind all quantities.
      x_label: name of the x axes.
      height: of a row, in inches.
      most: panels beside one another.

    Returns:
      The figure, and its panels by quantity and column. Those of a quantity share the y axis.
    """
    blocks = -(-columns // most)
    width = -(-columns // blocks)
    rows = blocks * len(quantities)
    figure = blank_figure(0.7 + height * rows)
    grid = figure.subplots(rows, width, squeeze=False, sharex=True)
    panels = np.empty((len(quantities), columns), object)
    for column in range(blocks * width):
        block, place = divmod(column, width)
        for row, name in enumerate(quantities):
            axes = grid[block * len(quantities) + row, place]
            if column >= columns:
                figure.delaxes(axes)
                continue
            panels[row, column] = axes
            finish(axes, "", "" if place else name)
            axes.grid(alpha=0.2)
            if column:
                axes.sharey(panels[row, 0])
                axes.tick_params(labelleft=not place)
        if columns - width <= column < columns:  # nothing is below
            axes = panels[-1, column]
            axes.set_xlabel(x_label, fontsize=FONT_SIZE)
            axes.tick_params(labelbottom=True)
    return figure, panels


def legend_below(figure: Figure, handles: Sequence[Artist]) -> None:
    """A legend in as many columns as the longest of its texts leaves room for."""
    # In mathematics a command is a character.
    shown = [re.sub(r"\\[a-z]+ ?", "x", str(handle.get_label())) for handle in handles]
    longest = max(map(len, shown))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=max(1, int(FIGURE_WIDTH / (0.4 + 0.055 * longest))),  # in inches, roughly
        fontsize=SMALL,
        frameon=False,
        columnspacing=1.2,
        handlelength=1.6,
    )


def legend_in_corner(figure: Figure, handles: Sequence[Artist]) -> None:
    """A legend in the lower right quarter of a figure that has three panels."""
    figure.legend(
        handles=handles, loc="center", bbox_to_anchor=(0.78, 0.27), fontsize=SMALL, frameon=False
    )


def three_panels(x_label: str, y_labels: tuple[str, str, str]) -> tuple[Figure, list[Axes]]:
    """A figure of three panels, and room for a legend in the lower right corner."""
    figure = blank_figure(3.6)
    grid = figure.add_gridspec(2, 2)
    panels = [figure.add_subplot(grid[place]) for place in ((0, 0), (0, 1), (1, 0))]
    for axes, name in zip(panels, y_labels, strict=True):
        finish(axes, x_label, name)
    return figure, panels


def draw_mean(
    axes: Axes,
    x: Sequence[float] | np.ndarray,
    curves: Sequence[Sequence[float | None]] | np.ndarray,
    colour: str,
    label: str,
    **style: Any,
) -> None:
    """Draws the mean over seeds of a curve, in a band of one standard error if there are several.

    Args:
      axes: where.
      x: of the points.
      curves: (seeds, points), with None or NaN where a seed has diverged, at which the mean ends.
      colour: of both.
      label: of the mean.
      **style: of its line.
    """
    values = np.array(curves, float)
    mean = values.mean(axis=0)
    axes.plot(x, mean, color=colour, label=label, **{"linewidth": 1.2} | style)
    if len(values) > 1:
        error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
        # Above zero the lower edge is too, for logarithmic axes.
        low = np.where(mean > 0, np.maximum(mean - error, mean / 100), mean - error)
        axes.fill_between(x, low, mean + error, color=colour, alpha=0.2, linewidth=0)


def finish(axes: Axes, x_label: str = "", y_label: str = "") -> None:
    """Names the axes, in the sizes of all figures, without the frame's upper and right side."""
    axes.set_xlabel(x_label, fontsize=FONT_SIZE)
    axes.set_ylabel(y_label, fontsize=FONT_SIZE)
    axes.tick_params(which="both", labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)


def band() -> Patch:
    """What explains the bands around the curves, for a legend."""
    return Patch(color=GREY, alpha=0.4, linewidth=0, label="± one standard error")


def log_ticks(axes: Axes) -> None:
    """Gives a logarithmic y axis ticks at powers of ten, and below two decades at 2 and 5 as well.

    Args:
      axes: with everything drawn, as their limits decide.
    """
    low, high = axes.get_ylim()
    if high < 100 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
