"""Figures 3 and 4 of the paper: limit cycles, and what attracts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq  # type: ignore[import-untyped]

from monge_sam_jax.experiments.figures import plots
from monge_sam_jax.experiments.figures.plots import LABELS
from monge_sam_jax.experiments.figures.trajectories import (
    FLATTEST,
    Result,
    Row,
    run_method,
)
from monge_sam_jax.metrics import Metric, euclidean, monge
from monge_sam_jax.stability import stability_matrix
from monge_sam_jax.toy import banana, paraboloid


def sam_cycle(learning_rate: float, rho: float) -> float:
    r"""Size of theta in SAM's limit cycle on the paraboloid.

    A step is :math:`\theta - 2 a (\theta + \rho \operatorname{sign} \theta)`, with the learning
    rate a. It is :math:`-\theta` where :math:`(1 - a) |\theta| = a \rho`:

    .. math:: |\theta| = a \rho / (1 - a)

    and the cycle attracts for 0 < a < 1, where the step's slope 1 - 2 a is less than one.

    >>> round(sam_cycle(0.5, rho=0.3), 6)
    0.3
    """
    return learning_rate * rho / (1 - learning_rate)


def monge_sam_cycle(learning_rate: float, rho: float) -> float:
    r"""Size of theta in M-SAM's limit cycle on the paraboloid, by root finding.

    .. math:: (1 - a) |\theta| \sqrt{1 + 4 \theta^2} = a \rho

    by the same argument as in `sam_cycle`, delta* being shorter by the root.

    >>> round(monge_sam_cycle(0.5, rho=0.3), 6)
    0.265059
    """

    def excess(t: float) -> float:
        return t * np.sqrt(1 + 4 * t**2) - sam_cycle(learning_rate, rho)

    return brentq(excess, 0.0, sam_cycle(learning_rate, rho), xtol=1e-14)


def figure_3() -> Result:
    """Limit cycles of SAM and M-SAM on the paraboloid in one dimension."""
    start, rho, steps = 0.5, 0.3, 11
    cycle_of = {"sam": sam_cycle, "monge_sam": monge_sam_cycle}
    paths: dict[float, dict[str, np.ndarray]] = {0.66: {}, 0.74: {}}
    cycles: dict[float, dict[str, float]] = {0.66: {}, 0.74: {}}
    rows: list[Row] = []
    for rate in paths:
        for name, cycle in cycle_of.items():
            path = run_method(name, paraboloid, [start], rho=rho, learning_rate=rate, steps=steps)[
                :, 0
            ]
            paths[rate][name], cycles[rate][name] = path, cycle(rate, rho)
            rows.append(
                {
                    "learning rate": rate,
                    "method": LABELS[name],
                    "start": start,
                    "after 1": float(abs(path[1])),
                    "after 11": float(abs(path[-1])),
                    "limit cycle": cycles[rate][name],
                    "loss there": cycles[rate][name] ** 2,
                }
            )
    setting = "theta^2 in one dimension, rho 0.3, 11 steps: |theta|. The start is ours"
    return Result(setting, rows, plots.cycles_figure(paths, cycles))


def eigenvalue_maps(metric: Metric, rho: float, points: np.ndarray) -> np.ndarray:
    """The eigenvalues of A of eq. 10 on the banana, by ascending real part.

    Args:
      metric: the metric G, for which delta* is a multiple of the gradient.
      rho: radius of the ball.
      points: theta, shape (..., 2).

    Returns:
      Their real parts, shape (..., 2).
    """
    matrix = partial(stability_matrix, banana, metric=metric, rho=rho)
    A = np.asarray(jax.jit(jax.vmap(matrix))(jnp.asarray(points.reshape(-1, 2))))
    mean = np.trace(A, axis1=-2, axis2=-1) / 2
    root = np.sqrt(np.maximum(mean**2 - np.linalg.det(A), 0))  # zero for a complex pair
    return np.stack([mean - root, mean + root], axis=-1).reshape(points.shape)


def figure_4() -> Result:
    """The smaller eigenvalue of A on the banana, for growing rho."""
    edge, cells = 2.0, 200
    # Centres of cells: none is the saddle or a minimum, where A is not defined.
    ticks = edge * ((np.arange(cells) + 0.5) / cells * 2 - 1)
    points = np.stack(np.meshgrid(ticks, ticks), axis=-1)

    def near(centres: np.ndarray, half_side: float) -> np.ndarray:
        return np.any([np.all(np.abs(points - c) < half_side, axis=-1) for c in centres], axis=0)

    metrics = {"sam": euclidean(), "monge_sam": monge()}
    maps: dict[str, dict[float, np.ndarray]] = {name: {} for name in metrics}
    rows: list[Row] = []
    for rho in (0.0, 0.25, 0.5, 1.0):
        for name, metric in metrics.items():
            smaller, larger = np.moveaxis(eigenvalue_maps(metric, rho, points), -1, 0)
            maps[name][rho] = smaller
            row: Row = {"rho": rho, "method": LABELS[name]}
            for place, centres in (("saddle", np.zeros((1, 2))), ("flat", FLATTEST)):
                for side, half_side in (("1/4", 0.25), ("1/2", 0.5)):
                    share = np.mean(smaller[near(centres, half_side)] > 0)
                    row[f"{place} {side}"] = float(share)
            rows.append(row | {"plane": float(np.mean(smaller > 0)), "min l1": float(larger.min())})
    setting = (
        "(1 - t1 t2)^2 on a grid of 200 x 200 in [-2, 2]^2. Shares of points with lambda_2 > 0, in "
        "squares of the half-sides given around the saddle and the flattest minima"
    )
    return Result(setting, rows, plots.stability_figure(maps, edge, half_side=0.5))
