"""The paper's formulas written densely in NumPy, and small problems to try them on."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import monge_sam_jax as ms


class Case(NamedTuple):
    """A builder, the metric behind it, and its matrix G(theta, g)."""

    builder: object
    metric: object  # keyword arguments of the builder -> Metric
    matrix: object  # (params, grads, keyword arguments) -> G
    options: dict


def euclidean_matrix(p, g):
    return np.eye(p.size)


def monge_matrix(p, g, alpha=1.0):
    return np.eye(p.size) + alpha**2 * np.outer(g, g)  # eq. 6


def adaptive_matrix(p, g, eta=0.01):
    return np.diag(1 / (np.abs(p) + eta) ** 2)


def fisher_matrix(p, g, eta=1.0):
    return np.diag(1 + eta * g**2)


CASES = {
    "sam": Case(ms.sam, ms.euclidean, euclidean_matrix, {}),
    "monge_sam": Case(ms.monge_sam, lambda alpha=1.0: ms.monge(alpha=alpha), monge_matrix, {}),
    "monge_sam_steep": Case(
        ms.monge_sam, lambda alpha: ms.monge(alpha=alpha), monge_matrix, {"alpha": 3.0}
    ),
    "adaptive_sam": Case(ms.adaptive_sam, ms.adaptive, adaptive_matrix, {"eta": 0.1}),
    "fisher_sam": Case(ms.fisher_sam, ms.diagonal_fisher, fisher_matrix, {"eta": 2.0}),
}
QUICK_CASES = ("monge_sam", "adaptive_sam")
EACH_CASE = [
    name if name in QUICK_CASES else pytest.param(name, marks=pytest.mark.slow) for name in CASES
]


def dense_perturbation(G, g, rho):
    """Eq. 5: rho G^-1 g / sqrt(g^T G^-1 g)."""
    natural_gradient = np.linalg.solve(G, g)
    return rho * natural_gradient / np.sqrt(g @ natural_gradient)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def relative_error(actual, expected):
    """Largest error, relative to the largest entry expected."""
    return np.max(np.abs(np.asarray(actual, float) - expected)) / np.max(np.abs(expected))


def example_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        "hidden": {
            "w": jnp.asarray(rng.normal(size=(3, 5)), dtype),
            "b": jnp.asarray(0.1 * rng.normal(size=5), dtype),
        },
        "out": jnp.asarray(rng.normal(size=(5, 2)), dtype),
        "temperature": jnp.asarray(1.5, dtype),
    }


def example_batch(n=16, seed=1):
    rng = np.random.default_rng(seed)
    return {
        "x": jnp.asarray(rng.normal(size=(n, 3)), jnp.float32),
        "y": jnp.asarray(rng.normal(size=(n, 2)), jnp.float32),
    }


def network_loss(params, batch):
    """Mean squared error of a small network; smooth in all params."""
    b = params["hidden"]["b"].reshape(1, -1)
    hidden = jnp.tanh(batch["x"].astype(b.dtype) @ params["hidden"]["w"] + b)
    prediction = params["temperature"] * (hidden @ params["out"])
    return jnp.mean((prediction - batch["y"].astype(b.dtype)) ** 2)


network_grad = jax.grad(network_loss)


def banana(t):
    """(1 - t1 t2)^2, figure 1 of the paper."""
    return (1 - t[0] * t[1]) ** 2


def banana_gradient(t):
    """Gradient of `banana`, by hand."""
    return -2 * (1 - t[0] * t[1]) * np.array([t[1], t[0]])
