"""The newer balls on the banana: loops in NumPy, and where all end, by count."""

import json

import jax
import matplotlib.image
import numpy as np
import pytest
from looks import check_column
from reference import banana_gradient
from scipy.integrate import solve_ivp

from monge_sam_jax.__main__ import main
from monge_sam_jax.experiments.figures import comparison
from monge_sam_jax.experiments.figures import run as figures
from monge_sam_jax.experiments.figures.options import Figures

STARTS = np.array([[-1.5, 0.5], [2.0, 1.0], [-0.4, -3.0]])
STEPS = 30


def loop(start, perturb, steps=STEPS):
    """Iterates with the gradient at theta + perturb(gradients so far, theta)."""
    theta, grads, path = start, [], [start]
    for _ in range(steps):
        grads.append(banana_gradient(theta))
        theta = theta - 0.01 * banana_gradient(theta + perturb(grads, theta))
        path.append(theta)
    return np.array(path)


def to_the_corner(grads, theta):
    return np.sign(grads[-1]) / np.sqrt(2)  # of length one


def averaged(grads, theta):
    g, last = grads[-1], np.array(grads[-4:])
    v = np.linalg.inv(np.eye(2) + last.T @ last / len(last)) @ g
    return v / np.sqrt(g @ v)


def straight_on(grads, theta):
    return averaged(grads[-1:], theta)  # M-SAM's


def along_the_geodesic(grads, theta):
    """The equation in the docstring of `geodesic_perturbation`, solved by scipy."""

    def derivative(_, state):
        (x, y), velocity = state[:2], state[2:]
        g = banana_gradient(state[:2])
        off = 4 * x * y - 2
        curvature = velocity @ np.array([[2 * y**2, off], [off, 2 * x**2]]) @ velocity
        return np.concatenate([velocity, -curvature / (1 + g @ g) * g])

    n = np.linalg.norm(grads[-1])
    velocity = grads[-1] / n / np.sqrt(1 + n**2)
    state = np.concatenate([theta, velocity])
    return solve_ivp(derivative, (0, 1), state, rtol=1e-9, atol=1e-10).y[:2, -1] - theta


@pytest.mark.parametrize(
    ("name", "perturb"), [("supremum", to_the_corner), ("averaged_monge", averaged)]
)
def test_paths_of_balls_are_those_of_a_loop(name, perturb, x64):
    actual = comparison.ball_paths(name, STARTS, STEPS)
    for i, start in enumerate(STARTS):
        np.testing.assert_allclose(actual[:, i], loop(start, perturb), rtol=1e-9)


def test_steps_along_the_geodesic_are_those_of_the_equation(x64):
    actual = comparison.geodesic_paths(STARTS, STEPS).reshape(-1, 2)
    steps = [loop(theta, along_the_geodesic, 1)[1] for theta in actual[: -len(STARTS)]]
    straight = [loop(theta, straight_on, 1)[1] for theta in actual[: -len(STARTS)]]
    error = np.linalg.norm(steps - actual[len(STARTS) :], axis=-1)
    other = np.linalg.norm(straight - actual[len(STARTS) :], axis=-1)
    print(error.max(), np.median(error), other.max(), np.median(other))
    assert 0
