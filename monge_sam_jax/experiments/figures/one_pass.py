"""Figure 6, which the paper does not have: figure 5 with one pass beside two."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from monge_sam_jax.experiments.common.plots import (
    COLOURS,
    FONT_SIZE,
    GREY,
    LABELS,
    SMALL,
    blank_figure,
)
from monge_sam_jax.experiments.figures.plots import banana_contours, plane
from monge_sam_jax.experiments.figures.trajectories import (
    METRICS,
    Result,
    Row,
    classify,
    run_method,
)
from monge_sam_jax.metrics import Metric
from monge_sam_jax.one_pass import one_pass_sam, unperturbed_params
from monge_sam_jax.toy import banana

RHO, LEARNING_RATE = 1.0, 0.01
STEPS, LONGER = 200, 5000


def one_pass_paths(metric: Metric, starts: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Trajectories of one pass along the gradient on the banana.

    Args:
      metric: the metric G of the ball.
      starts: shape (n, 2).
      steps: number of steps.

    Returns:
      Perturbed and unperturbed iterates y and theta, each of shape (steps + 1, n, 2).
    """
    tx = one_pass_sam(optax.sgd(LEARNING_RATE), metric=metric, rho=RHO)
    grad_fn = jax.grad(banana)

    def step(carry: tuple, _: None) -> tuple[tuple, tuple[jax.Array, jax.Array]]:
        y, state = carry
        updates, state = tx.update(grad_fn(y), state, y)
        y = optax.apply_updates(y, updates)
        return (y, state), (y, unperturbed_params(state, y))

    def run(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.scan(step, (start, tx.init(start)), length=steps)[1]

    paths = jax.jit(jax.vmap(run, out_axes=1))(jnp.asarray(starts))
    y, theta = (np.concatenate([starts[None], np.asarray(path)]) for path in paths)
    return y, theta


def figure_6() -> Result:
    """Trajectories from the grid of figure 5, of SAM and M-SAM in two passes and in one."""
    ticks = np.linspace(-3, 3, 10)
    starts = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    panels: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    rows: list[Row] = []
    for name in ("sam", "monge_sam"):
        settings = {"rho": RHO, "learning_rate": LEARNING_RATE, "steps": LONGER}
        two = run_method(name, banana, starts, **settings)
        metric = METRICS[name]
        assert metric is not None  # for the type checker
        y, theta = one_pass_paths(metric, starts, LONGER)
        for passes, paths in (("two", {"theta": two}), ("one", {"theta": theta, "y": y})):
            panels[name, passes] = {place: path[: STEPS + 1] for place, path in paths.items()}
            for place, path in paths.items():
                for steps in (STEPS, LONGER):
                    row: Row = {"method": LABELS[name], "passes": passes, "at": place}
                    row["steps"] = steps
                    rows.append(row | _summary(path[steps]))
    setting = (
        "(1 - t1 t2)^2 from a 10 x 10 grid on [-3, 3]^2, rho 1, learning rate 0.01. One pass takes "
        "its gradients at y, theta + delta. Shares of ends as in figure 5, medians over all"
    )
    return Result(setting, rows, _figure(panels))


def _summary(ends: np.ndarray) -> Row:
    saddle, flattest, valley, diverged = classify(ends)
    return {
        "saddle": float(saddle.mean()),
        "flattest": float(flattest.mean()),
        "valley": float(valley.mean()),
        "other": float(1 - (saddle | flattest | valley | diverged).mean()),
        "median loss": float(np.median(banana(jnp.asarray(ends)))),
    }


def _figure(panels: Mapping[tuple[str, str], Mapping[str, np.ndarray]]) -> Figure:
    """A panel for each method and number of passes, with the median loss at the ends."""
    figure = blank_figure(7.4)
    edge = 3.2
    neutral: dict[str, Any] = {"color": GREY, "linestyle": "none", "marker": "o"}
    for (key, paths), axes in zip(panels.items(), figure.subplots(2, 2).flat, strict=True):
        name, passes = key
        plane(axes, (-edge, -edge), (edge, edge))
        banana_contours(axes)
        path = paths["theta"]
        lines = LineCollection(list(path.transpose(1, 0, 2)), colors=COLOURS[name])
        lines.set(linewidth=0.7, alpha=0.7)
        axes.add_collection(lines)
        axes.plot(*path[0].T, "o", color=GREY, markersize=1.5)
        ends = {"color": COLOURS[name], "linestyle": "none", "marker": "o"}
        white = {"markeredgecolor": "white", "markeredgewidth": 0.5}
        axes.plot(*path[-1].T, **ends, **white, markersize=4, zorder=7)
        if "y" in paths:
            axes.plot(*paths["y"][-1].T, **ends, markerfacecolor="white", markersize=3, zorder=8)
        title = f"{LABELS[name]}, {'two passes' if passes == 'two' else 'one pass'}"
        axes.set_title(f"{title}\n{_note(paths)}", fontsize=FONT_SIZE)
    figure.legend(
        handles=[
            *axes.get_legend_handles_labels()[0],
            Line2D([], [], **neutral, markersize=1.5, label="starts"),
            Line2D([], [], **neutral, markersize=4, label=rf"$\theta$ after {STEPS} steps"),
            Line2D(
                [], [], **neutral, markerfacecolor="white", markersize=3, label="$y$ of one pass"
            ),
        ],
        loc="outside lower center",
        ncols=4,
        fontsize=SMALL,
        frameon=False,
    )
    return figure


def _note(paths: Mapping[str, np.ndarray]) -> str:
    symbols = {"theta": r"$\theta$", "y": "$y$"}
    notes = []
    for place, path in paths.items():
        row = _summary(path[-1])
        notes.append(
            f"{symbols[place]}: {row['saddle']:.0%} at saddle, loss {row['median loss']:.2g}"
        )
    return "\n".join(notes)
