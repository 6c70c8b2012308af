"""Matrices of known spectrum, and losses of known Hessian."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


def flatten(tree):
    return ravel_pytree(tree)[0]


def orthogonal(n, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


def symmetric(spectrum, seed=0):
    Q = orthogonal(len(spectrum), seed)
    S = Q @ np.diag(spectrum) @ Q.T
    return (S + S.T) / 2


def quartic(S):
    """A loss x^T S x / 2 + sum(x^4) / 12 of the flattened params, of Hessian S + diag(x^2)."""

    def loss_fn(params):
        x = flatten(params)
        return 0.5 * x @ jnp.asarray(S) @ x + jnp.sum(x**4) / 12

    return loss_fn


def tree_of_nine(seed):
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    return {"b": [leaf(), leaf(3, 2)], "a": leaf(2), "none": None, "empty": leaf(0)}


def network(sizes, batch, activation=jnp.tanh, seed=0):
    """Cross-entropy of a multi-layer perceptron, and its params."""
    rng = np.random.default_rng(seed)
    params = [
        {"w": jnp.asarray(rng.normal(size=(m, n)) * np.sqrt(2 / m)), "b": jnp.zeros(n)}
        for m, n in itertools.pairwise(sizes)
    ]
    x = jnp.asarray(rng.normal(size=(batch, sizes[0])))
    labels = jnp.asarray(np.eye(sizes[-1])[rng.integers(sizes[-1], size=batch)])

    def loss_fn(params):
        h = x.astype(params[0]["w"].dtype)
        for layer in params[:-1]:
            h = activation(h @ layer["w"] + layer["b"][None])
        log_p = jax.nn.log_softmax(h @ params[-1]["w"] + params[-1]["b"][None])
        return -jnp.mean(jnp.sum(log_p * labels.astype(log_p.dtype), axis=-1))

    return loss_fn, params


SPECTRA = {
    "spread": np.linspace(-3.0, 9.0, 60),
    "negative": -np.geomspace(1e-2, 10.0, 60),
    "outliers_over_a_bulk": np.r_[[50.0, 20.0, -30.0], np.linspace(-0.1, 0.1, 57)],
    "clustered_at_both_ends": np.r_[
        7 + np.linspace(0, 1e-3, 5), np.linspace(-1, 1, 50), -8 - np.linspace(0, 1e-3, 5)
    ],
    "repeated": np.r_[[4.0] * 3, np.zeros(54), [-5.0] * 3],
    "low_rank": np.r_[[3.0, 2.0, -4.0], np.zeros(57)],
}
FIRST = {
    "LA": lambda x: np.sort(x)[::-1],
    "SA": np.sort,
    "LM": lambda x: x[np.argsort(-np.abs(x), kind="stable")],
}


@functools.cache
def small_network():
    """The loss, its params, and the dense Hessian."""
    loss_fn, params = network([6, 12, 5], batch=40)
    x, unravel = ravel_pytree(params)
    return loss_fn, params, np.asarray(jax.jit(jax.hessian(lambda x: loss_fn(unravel(x))))(x))
