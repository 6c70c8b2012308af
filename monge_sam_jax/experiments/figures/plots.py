"""The figures of the Monge SAM paper, from arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Ellipse, Patch, Rectangle
from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped]

from monge_sam_jax.experiments.common.plots import (
    COLOURS,
    FONT_SIZE,
    GREY,
    SMALL,
    blank_figure,
    legend_below,
)
from monge_sam_jax.experiments.common.plots import LABELS as METHOD_LABELS

LABELS = {"sgd": "GD", **METHOD_LABELS}
LEVELS = "#cccccc"
START: dict[str, Any] = {"marker": "s", "color": "black", "linestyle": "none", "markersize": 4}
SADDLE: dict[str, Any] = START | {
    "marker": "X",
    "markersize": 8,
    "markeredgecolor": "white",
    "markeredgewidth": 0.5,
}
MINIMUM: dict[str, Any] = SADDLE | {"marker": "*", "markersize": 9}


def plane(axes: Axes, low: Sequence[float], high: Sequence[float]) -> None:
    """Makes the axes a part of the plane of theta_1 and theta_2, with equal units.

    Args:
      axes: to be set up.
      low: the lower left corner.
      high: the upper right corner.
    """
    axes.set_aspect("equal")
    axes.set_xlim(low[0], high[0])
    axes.set_ylim(low[1], high[1])
    axes.set_xlabel(r"$\theta_1$", fontsize=FONT_SIZE, labelpad=1)
    axes.set_ylabel(r"$\theta_2$", fontsize=FONT_SIZE, labelpad=1)
    axes.tick_params(labelsize=SMALL)


def banana_contours(axes: Axes) -> None:
    """Draws level lines of (1 - t1 t2)^2 over the limits of the axes, and its minima and saddle.

    Args:
      axes: whose limits are set; their legend gets an entry for each kind of line and mark.
    """
    x, y = (np.linspace(*limits, 201) for limits in (axes.get_xlim(), axes.get_ylim()))
    loss = (1 - x * y[:, None]) ** 2
    levels = np.arange(0.25, 11, 0.5) ** 2  # evenly spaced on a scale of square roots
    axes.contour(x, y, loss, levels, colors=LEVELS, linewidths=0.6, zorder=0)
    axes.contour(x, y, 1 - x * y[:, None], [0], colors=GREY, linewidths=1.0, zorder=1)
    axes.plot(0, 0, **SADDLE, zorder=6, label="saddle")
    axes.plot([-1, 1], [-1, 1], **MINIMUM, zorder=6, label="flattest minima")
    axes.plot([], [], color=GREY, linewidth=1.0, label=r"minima, $\theta_1 \theta_2 = 1$")
    axes.plot([], [], color=LEVELS, linewidth=0.6, label="level lines of the loss")


def balls_figure(
    paths: Mapping[str, np.ndarray],
    arrows: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    perturbations: Mapping[str, np.ndarray],
    rho: float,
) -> Figure:
    """Figure 1: trajectories on the banana, and the balls of SAM and M-SAM around the start.

    Args:
      paths: iterates, shape (steps + 1, 2), by method, from the same start.
      arrows: some iterates, the points perturbed from them, and the gradients there, by method.
      perturbations: delta* at the start, of "sam" and "monge_sam".
      rho: radius of both balls in their metrics.

    Returns:
      The trajectories with an arrow against the gradient, of a fixed length, at each perturbed
      point; and beside them the start with the ball of each metric, for M-SAM an ellipse, and the
      perturbations as arrows.
    """
    figure = blank_figure(4.0)
    left, right = figure.subplots(1, 2)
    plane(left, (-2.7, -1.8), (0.9, 1.8))
    banana_contours(left)
    for name, path in paths.items():
        left.plot(*path.T, color=COLOURS[name], linewidth=1.4, label=LABELS[name], zorder=3)
        left.plot(*path[-1], "o", color=COLOURS[name], markersize=4, zorder=7)
    for name, (iterates, points, grads) in arrows.items():
        lines = LineCollection(list(np.stack([iterates, points], axis=1)), linestyles=":")
        lines.set(color=COLOURS[name], linewidth=0.8)
        left.add_collection(lines)
        unit = -0.4 * grads / np.linalg.norm(grads, axis=-1, keepdims=True)
        left.quiver(
            *points.T,
            *unit.T,
            color=COLOURS[name],
            angles="xy",
            scale_units="xy",
            scale=1,
            width=0.005,
            zorder=4,
        )
    start = next(iter(paths.values()))[0]
    left.plot(*start, **START, zorder=6, label="start")

    plane(right, start - 1.3, start + 1.3)
    banana_contours(right)
    right.plot(*start, **START, zorder=6)
    along = perturbations["monge_sam"]
    length = float(np.linalg.norm(along))
    angle = float(np.degrees(np.arctan2(along[1], along[0])))
    circle = Circle((start[0], start[1]), rho, label=r"SAM: $\|\delta\| \leq \rho$")
    ellipse = Ellipse(
        (start[0], start[1]),
        2 * length,
        2 * rho,
        angle=angle,
        label=r"M-SAM: $\delta^\top (I + gg^\top) \delta \leq \rho^2$",
    )
    for name, ball in (("sam", circle), ("monge_sam", ellipse)):
        ball.set(edgecolor=COLOURS[name], facecolor="none", linestyle="--", linewidth=1.2)
        right.add_patch(ball)
        right.annotate(
            "",
            start + perturbations[name],
            start,
            arrowprops={"arrowstyle": "-|>", "color": COLOURS[name], "shrinkA": 0, "shrinkB": 0},
            zorder=4 if name == "sam" else 5,
        )
    left.set_title("trajectories", fontsize=FONT_SIZE)
    right.set_title("balls at the start,\n" r"$\delta^*$ as arrows", fontsize=FONT_SIZE)
    steps = len(next(iter(paths.values()))) - 1
    neutral: dict[str, Any] = {"color": GREY, "linestyle": "none", "markersize": 4}
    legend_below(
        figure,
        [
            *left.get_legend_handles_labels()[0],
            Line2D([], [], **neutral, marker="o", label=f"after {steps} steps"),
            Line2D(
                [], [], color=GREY, linewidth=0.8, linestyle=":", label=r"to $\theta + \delta^*$"
            ),
            Line2D([], [], **neutral, marker=r"$\rightarrow$", label="against the gradient there"),
            circle,
            ellipse,
        ],
    )
    return figure


def density_figure(
    panels: Sequence[Sequence[tuple[str, str, np.ndarray, str]]],
    row_labels: Sequence[str],
    ring: float,
) -> Figure:
    """Figure 2: densities of end points on the sinc function.

    Args:
      panels: rows of method, title, end points of shape (n, 2) and a note under the title.
      row_labels: what the rows are.
      ring: radius of the circle of minima.

    Returns:
      Histograms smoothed with a Gaussian of standard deviation 0.1, on a scale of square roots that
      is every panel's own; a cross at the maximum, the circle of minima dashed.
    """
    figure = blank_figure(3.6)
    grid = figure.subplots(len(panels), len(panels[0]), sharex=True, sharey=True, squeeze=False)
    edge, cell = 2.8, 0.05
    bins = np.arange(-edge, edge + cell / 2, cell)
    for row, label, axes_row in zip(panels, row_labels, grid, strict=True):
        for (name, title, ends, note), axes in zip(row, axes_row, strict=True):
            density = np.histogram2d(ends[:, 0], ends[:, 1], bins)[0]
            density = gaussian_filter(density, 0.1 / cell)
            colours = LinearSegmentedColormap.from_list(name, ["white", COLOURS[name], "black"])
            extent = (-edge, edge, -edge, edge)
            axes.imshow(density.T, extent=extent, origin="lower", cmap=colours, norm=PowerNorm(0.5))
            axes.add_patch(Circle((0, 0), ring, fill=False, linestyle="--", edgecolor=GREY))
            axes.plot(0, 0, **SADDLE)
            plane(axes, (-edge, -edge), (edge, edge))
            axes.set_title(f"{title}\n{note}", fontsize=FONT_SIZE)
            axes.label_outer()
        axes_row[0].set_ylabel(f"{label}\n$\\theta_2$", fontsize=FONT_SIZE)
    legend_below(
        figure,
        [
            Line2D([], [], **SADDLE, label="maximum"),
            Line2D([], [], color=GREY, linestyle="--", label="circle of minima"),
            Patch(color=GREY, label="density of end points; dark: many (each panel's own scale)"),
        ],
    )
    return figure


def cycles_figure(
    paths: Mapping[float, Mapping[str, np.ndarray]], cycles: Mapping[float, Mapping[str, float]]
) -> Figure:
    """Figure 3: iterates on the paraboloid, and their distance from its minimum.

    Args:
      paths: iterates, shape (steps + 1,), by learning rate and method.
      cycles: abs(theta) of the limit cycle, by the same.

    Returns:
      A column for each learning rate: the iterates on the graph of the loss, above their distance
      from the minimum, with the limit cycles dashed.
    """
    figure = blank_figure(4.3)
    grid = figure.subplots(2, len(paths), sharex="row", sharey="row", squeeze=False)
    t = np.linspace(-1, 1, 201)
    for (rate, by_method), (top, bottom) in zip(paths.items(), grid.T, strict=True):
        top.plot(t, t**2, color=GREY, linewidth=1, zorder=0, label=r"loss $\theta^2$")
        for name, path in by_method.items():
            for axes, x, y in ((top, path, path**2), (bottom, range(len(path)), np.abs(path))):
                style = {"color": COLOURS[name], "label": LABELS[name]}
                axes.plot(x, y, "o-", markersize=3, linewidth=0.9, **style)
            bottom.axhline(cycles[rate][name], color=COLOURS[name], linestyle="--", linewidth=0.8)
        start = next(iter(by_method.values()))[0]
        top.plot(start, start**2, **START, label="start")
        bottom.plot(0, abs(start), **START, zorder=5)
        top.set_xticks(np.linspace(-1, 1, 5))
        top.set_title(f"learning rate {rate:g}", fontsize=FONT_SIZE)
        top.set_xlabel(r"$\theta$", fontsize=FONT_SIZE)
        bottom.set_xlabel("step", fontsize=FONT_SIZE)
        bottom.set_ylim(0.3, 0.95)
        for axes in (top, bottom):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=SMALL)
    grid[0, 0].set_ylabel(r"loss $\theta^2$", fontsize=FONT_SIZE)
    grid[1, 0].set_ylabel(r"distance $|\theta|$", fontsize=FONT_SIZE)
    legend_below(
        figure,
        [
            *grid[0, 0].get_legend_handles_labels()[0],
            Line2D([], [], color=GREY, linestyle="--", linewidth=0.8, label="limit cycle"),
        ],
    )
    return figure


def stability_figure(
    maps: Mapping[str, Mapping[float, np.ndarray]], edge: float, half_side: float
) -> Figure:
    """Figure 4: the smaller eigenvalue of A over the plane of the banana.

    Args:
      maps: eigenvalues, shape (n, n), theta_2 along the first axis, by method and rho.
      edge: the maps are those of the square from -edge to edge, cell by cell.
      half_side: half the side of the squares drawn around the saddle and the flattest minima.

    Returns:
      A row for each method. Red is positive, hence attracting; colours end at -4 and 4.
    """
    figure = blank_figure(2.9)
    columns = len(next(iter(maps.values())))
    grid = figure.subplots(len(maps), columns, sharex=True, sharey=True, squeeze=False)
    t = np.linspace(1 / edge, edge, 200)
    for (name, by_rho), axes_row in zip(maps.items(), grid, strict=True):
        for (rho, eigenvalues), axes in zip(by_rho.items(), axes_row, strict=True):
            extent = (-edge, edge, -edge, edge)
            image = axes.imshow(
                eigenvalues, extent=extent, origin="lower", cmap="RdBu_r", vmin=-4, vmax=4
            )
            for sign in (-1, 1):
                axes.plot(sign * t, sign / t, color="black", linewidth=0.6)
            for centre, style in ((-1, ":"), (0, "-"), (1, ":")):
                square = Rectangle((centre - half_side,) * 2, 2 * half_side, 2 * half_side)
                square.set(fill=False, linewidth=1.0, linestyle=style)
                axes.add_patch(square)
            plane(axes, (-edge, -edge), (edge, edge))
            if axes in grid[0]:
                flow = "gradient\nflow, " if rho == 0 else ""
                axes.set_title(rf"{flow}$\rho = {rho:g}$", fontsize=FONT_SIZE)
            axes.label_outer()
        axes_row[0].set_ylabel(f"{LABELS[name]}\n$\\theta_2$", fontsize=FONT_SIZE)
    bar = figure.colorbar(image, ax=grid, extend="both", shrink=0.8, pad=0.01, aspect=25)
    bar.ax.tick_params(labelsize=SMALL)
    bar.set_label(r"smaller eigenvalue $\lambda_2$ of $A_\rho$", fontsize=FONT_SIZE)
    legend_below(
        figure,
        [
            Patch(color="#B2182B", label=r"$\lambda_2 > 0$: attracts"),
            Patch(color="#2166AC", label=r"$\lambda_2 < 0$"),
            Line2D([], [], color="black", linewidth=0.6, label=r"minima, $\theta_1 \theta_2 = 1$"),
            Rectangle((0, 0), 1, 1, fill=False, label="at the saddle"),
            Rectangle((0, 0), 1, 1, fill=False, linestyle=":", label="at the flattest minima"),
        ],
    )
    return figure


def marginals_figure(paths: Mapping[str, np.ndarray], notes: Mapping[str, str]) -> Figure:
    """Figure 5: trajectories on the banana, with the marginal distributions of their ends.

    Args:
      paths: iterates, shape (steps + 1, n, 2), by method; four at most.
      notes: what is written under the title of each panel, by method.

    Returns:
      A panel for each method, with histograms of the end points above and beside it, up to half
      of the points.
    """
    figure = blank_figure(5.9)
    edge = 3.2
    bins = np.arange(-3.3, 3.4, 0.2)
    for (name, path), axes in zip(paths.items(), figure.subplots(2, 2).flat, strict=False):
        plane(axes, (-edge, -edge), (edge, edge))
        banana_contours(axes)
        lines = LineCollection(list(path.transpose(1, 0, 2)), colors=COLOURS[name])
        lines.set(linewidth=0.7, alpha=0.7)
        axes.add_collection(lines)
        axes.plot(*path[0].T, "o", color=GREY, markersize=1.5)
        axes.plot(
            *path[-1].T,
            "o",
            color=COLOURS[name],
            markersize=4,
            markeredgecolor="white",
            markeredgewidth=0.5,
            zorder=7,
        )
        top = axes.inset_axes((0, 1.02, 1, 0.13))
        side = axes.inset_axes((1.02, 0, 0.13, 1))
        ends = path[-1]
        top.hist(ends[:, 0], bins, color=COLOURS[name])
        side.hist(ends[:, 1], bins, color=COLOURS[name], orientation="horizontal")
        top.set(xlim=(-edge, edge), ylim=(0, 0.5 * len(ends)))
        side.set(ylim=(-edge, edge), xlim=(0, 0.5 * len(ends)))
        for marginal in (top, side):
            marginal.axis("off")
        top.set_title(f"{LABELS[name]}\n{notes[name]}", fontsize=FONT_SIZE)
    neutral: dict[str, Any] = {"color": GREY, "linestyle": "none", "marker": "o"}
    steps = len(next(iter(paths.values()))) - 1
    legend_below(
        figure,
        [
            *axes.get_legend_handles_labels()[0],
            Line2D([], [], **neutral, markersize=1.5, label="starts"),
            Line2D([], [], **START | {"marker": "o"}, label=f"in colour: after {steps} steps"),
            Patch(color="black", label="and their marginal distributions"),
        ],
    )
    return figure
