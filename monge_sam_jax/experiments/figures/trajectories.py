"""Figures 1, 2 and 5 of the paper: where trajectories end."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from monge_sam_jax.experiments.figures import plots
from monge_sam_jax.experiments.figures.plots import LABELS
from monge_sam_jax.metrics import Metric, adaptive, diagonal_fisher, euclidean, monge
from monge_sam_jax.toy import banana, perturbed_points, sinc, trajectory

METRICS: dict[str, Metric | None] = {
    "sgd": None,
    "sam": euclidean(),
    "monge_sam": monge(),
    "fisher_sam": diagonal_fisher(),
    "adaptive_sam": adaptive(),
}
RING = 2.1198  # square root of the first positive root of tan(r) = r: the minima of sinc
FLATTEST = np.array([[-1.0, -1.0], [1.0, 1.0]])

Row = dict[str, float | str]


class Result(NamedTuple):
    """A figure of the paper.

    Attributes:
      setting: what was run, in words.
      rows: the numbers, with the same names in every row; NaN where there is none.
      figure: the picture.
    """

    setting: str
    rows: list[Row]
    figure: Figure


def run_method(
    name: str, loss_fn: Callable[..., jax.Array], start: Any, **settings: Any
) -> np.ndarray:
    """The trajectory of a method as a NumPy array."""
    start = jnp.asarray(start)
    return np.asarray(trajectory(loss_fn, start, metric=METRICS[name], **settings))


def figure_1() -> Result:
    """Trajectories from (-3/2, 1/2) on the banana: GD, SAM and M-SAM."""
    start, rho, steps = np.array([-1.5, 0.5]), 1.0, 200
    paths, arrows, perturbations = {}, {}, {}
    rows: list[Row] = []
    for name in ("sgd", "sam", "monge_sam"):
        path = run_method(name, banana, start, rho=rho, learning_rate=0.01, steps=steps)
        paths[name] = path
        shift = np.zeros(2)
        metric = METRICS[name]
        if metric is not None:
            iterates = path[[0, 4, 10, 20, 40]]
            points = perturbed_points(banana, jnp.asarray(iterates), metric=metric, rho=rho)
            grads = jax.vmap(jax.grad(banana))(points)
            arrows[name] = iterates, np.asarray(points), np.asarray(grads)
            shift = perturbations[name] = np.asarray(points)[0] - start
        rows.append(
            {
                "method": LABELS[name],
                "end, t1": float(path[-1, 0]),
                "end, t2": float(path[-1, 1]),
                "loss": float(banana(jnp.asarray(path[-1]))),
                "to saddle": float(np.linalg.norm(path[-1])),
                "to flattest": float(np.linalg.norm(path[-1] + 1)),
                "|delta|": float(np.linalg.norm(shift)),
            }
        )
    setting = "(1 - t1 t2)^2 from (-3/2, 1/2), rho 1, learning rate 0.01, 200 steps"
    return Result(setting, rows, plots.balls_figure(paths, arrows, perturbations, rho))


def figure_2() -> Result:
    """End points on the sinc function, for both readings of the centred unit square."""
    unit = np.random.default_rng(0).uniform(-1, 1, (200, 2))
    rows: list[Row] = []
    panels: list[list[tuple[str, str, np.ndarray, str]]] = []
    labels = []
    for half_side, reading in ((0.5, "[-1/2, 1/2]^2"), (1.0, "[-1, 1]^2")):
        panels.append([])
        labels.append(f"start in ${reading}$")
        for rho in (0.2, 1.0):
            for name in ("sam", "monge_sam"):
                starts = half_side * unit
                ends = run_method(name, sinc, starts, rho=rho, learning_rate=0.05, steps=200)[-1]
                radius = np.linalg.norm(ends, axis=-1)
                at_maximum = np.mean(radius < 0.2)
                row: Row = {
                    "square": reading,
                    "rho": rho,
                    "method": LABELS[name],
                    "at maximum": float(at_maximum),
                    "at minima": float(np.mean(np.abs(radius - RING) < 0.25)),
                    "median radius": float(np.median(radius)),
                }
                rows.append(row)
                title = f"{LABELS[name]}\n" rf"$\rho = {rho:g}$"
                panels[-1].append((name, title, ends, f"{100 * at_maximum:.3g}% at max."))
    setting = (
        "5 sin(r) / r, r = t1^2 + t2^2, learning rate 0.05, 200 steps, 200 starts (seed 0). Shares "
        "of ends within 0.2 of the maximum, and within 0.25 of the circle of minima"
    )
    return Result(setting, rows, plots.density_figure(panels, labels, RING))


def figure_5() -> Result:
    """Trajectories from a grid on the banana, for every method."""
    ticks = np.linspace(-3, 3, 10)
    starts = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    # There theta_2 = -theta_1 is kept, and gradient descent too ends at the saddle.
    skewed = np.abs(starts.sum(axis=-1)) < 1e-9
    paths, notes = {}, {}
    rows: list[Row] = []
    for name, label in LABELS.items():
        path, longer = (
            run_method(name, banana, starts, rho=1.0, learning_rate=0.01, steps=steps)
            for steps in (200, 5000)
        )
        saddle, flattest, valley, diverged = classify(path[-1])
        paths[name] = path
        notes[name] = f"{saddle.mean():.0%} at saddle,\n{flattest.mean():.0%} at flattest minima"
        rows.append(
            {
                "method": label,
                "saddle": float(saddle.mean()),
                "t2 = -t1": float((saddle & skewed).mean()),
                "flattest": float(flattest.mean()),
                "valley": float(valley.mean()),
                "other": float(1 - (saddle | flattest | valley | diverged).mean()),
                "diverged": float(diverged.mean()),
                "later": float(classify(longer[-1])[1].mean()),
            }
        )
    del paths["sgd"]
    setting = (
        "(1 - t1 t2)^2 from a 10 x 10 grid on [-3, 3]^2, rho 1, learning rate 0.01, 200 steps. "
        "Shares of ends within 0.3 of the saddle (and of those, from where theta_2 = -theta_1), "
        "within 0.3 of a flattest minimum, else in the valley (loss below 0.05). Later: after 5000 "
        "steps, where rounding has freed some of gradient descent's from the saddle"
    )
    return Result(setting, rows, plots.marginals_figure(paths, notes))


def classify(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which end points on the banana are where; at most one of the four holds for each.

    Args:
      ends: shape (n, 2).

    Returns:
      Booleans, shape (n,): within 0.3 of the saddle; within 0.3 of a flattest minimum; elsewhere
      with a loss below 0.05; not finite, or further than 10 from the saddle.
    """
    radius = np.linalg.norm(ends, axis=-1)
    diverged = ~(radius < 10)
    distances = np.linalg.norm(ends - FLATTEST[:, None], axis=-1)
    saddle, flattest = radius < 0.3, np.min(distances, axis=0) < 0.3
    valley = (np.asarray(banana(jnp.asarray(ends))) < 0.05) & ~flattest & ~diverged
    return saddle, flattest, valley, diverged
