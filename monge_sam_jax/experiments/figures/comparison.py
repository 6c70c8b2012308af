"""A figure that the paper does not have: figure 5 with balls that came after it."""

import jax
import jax.numpy as jnp
import numpy as np

from monge_sam_jax.averaged import averaged_monge
from monge_sam_jax.experiments.figures import plots
from monge_sam_jax.experiments.figures.plots import LABELS
from monge_sam_jax.experiments.figures.trajectories import (
    METRICS,
    Result,
    Row,
    grid_of_starts,
    panel_title,
    summary,
)
from monge_sam_jax.geodesic import geodesic_perturbation
from monge_sam_jax.norms import supremum
from monge_sam_jax.toy import banana, trajectory

RHO, LEARNING_RATE = 1.0, 0.01
STEPS, LONGER = 200, 5000
# The supremum's perturbation goes to a corner of its square, further by the root of two.
BALLS = {name: (LABELS[name], METRICS[name], RHO) for name in ("sgd", "sam", "monge_sam")} | {
    "supremum": ("Supremum", supremum(), RHO / np.sqrt(2)),
    "averaged_monge": ("Averaged Monge", averaged_monge(history=4), RHO),
}


def geodesic_paths(starts: np.ndarray, steps: int) -> np.ndarray:
    """Trajectories on the banana with the perturbation along the geodesic.

    Args:
      starts: shape (n, 2).
      steps: number of steps.

    Returns:
      Iterates, shape (steps + 1, n, 2).
    """
    grad_fn = jax.grad(banana)

    def step(theta: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        delta = geodesic_perturbation(banana, theta, RHO, num_steps=8)
        theta = theta - LEARNING_RATE * grad_fn(theta + delta)
        return theta, theta

    def run(start: jax.Array) -> jax.Array:
        return jax.lax.scan(step, start, length=steps)[1]

    path = jax.jit(jax.vmap(run, out_axes=1))(jnp.asarray(starts))
    return np.concatenate([starts[None], np.asarray(path)])


def ball_paths(name: str, starts: np.ndarray, steps: int) -> np.ndarray:
    """Trajectories on the banana with the perturbation of a ball.

    Args:
      name: of the ball, one of `BALLS`.
      starts: shape (n, 2).
      steps: number of steps.

    Returns:
      Iterates, shape (steps + 1, n, 2).
    """
    _, metric, rho = BALLS[name]
    settings = {"rho": rho, "learning_rate": LEARNING_RATE, "steps": steps}
    return np.asarray(trajectory(banana, jnp.asarray(starts), metric=metric, **settings))


def comparison_figure() -> Result:
    """Trajectories from the grid of figure 5, of SAM and M-SAM and the newer balls."""
    starts = grid_of_starts()
    runs = {name: (label, ball_paths(name, starts, LONGER)) for name, (label, *_) in BALLS.items()}
    runs["geodesic"] = ("Geodesic", geodesic_paths(starts, LONGER))
    rows: list[Row] = []
    for label, path in runs.values():
        for steps in (STEPS, LONGER):
            row: Row = {"method": label, "steps": steps}
            rows.append(row | summary(path[steps]))
    setting = (
        "(1 - t1 t2)^2 from a 10 x 10 grid on [-3, 3]^2, rho 1 (supremum: 0.707, of the same "
        "Euclidean length), learning rate 0.01; averaged over 4 gradients, geodesic in 8 steps. "
        "Shares of ends as in figure 5, medians over all"
    )
    titles = {name: panel_title(label, path[STEPS]) for name, (label, path) in runs.items()}
    paths = {name: path[: STEPS + 1] for name, (_, path) in runs.items()}
    return Result(setting, rows, plots.marginals_figure(paths, titles))
