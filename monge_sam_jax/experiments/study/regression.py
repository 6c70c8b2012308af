"""The regression of `monge-sam study`: the temperature of a rod, where losses are tiny."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from monge_sam_jax.experiments.common.data import Batch
from monge_sam_jax.experiments.study.kinds import Kind, Problem, Size

POINTS, UNSEEN = 256, 1000


class _Solution(nn.Module):
    """A network of three hidden layers of tanh units."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = jnp.tanh(nn.Dense(self.width)(x))
        return nn.Dense(1)(x)[:, 0]


def _temperature(params: chex.ArrayTree, x: jax.Array) -> jax.Array:
    width = params["params"]["Dense_0"]["bias"].size
    return _Solution(width).apply(params, x)  # type: ignore[return-value]


def heat(seed: int, size: Size) -> Problem:
    r"""Temperatures of a rod from 256 points in place and time.

    .. math:: u(x, t) = \sum_k a_k \sin(k \pi x) \exp(-(k \pi)^2 t / 20), \quad k = 1, ..., 4
    """
    rng = np.random.default_rng((seed, 5))
    k = np.arange(1, 5)
    a = rng.normal(size=4) / k

    def samples(number: int) -> Batch:
        x, t = rng.random((2, number, 1))
        u = (a * np.sin(k * np.pi * x) * np.exp(-((k * np.pi) ** 2) * t / 20)).sum(1)
        return Batch(jnp.asarray(np.hstack([x, t]), jnp.float32), jnp.asarray(u, jnp.float32))

    train, validation, test = samples(POINTS), samples(UNSEEN), samples(UNSEEN)
    params = _Solution(max(1, size.width // 2)).init(jax.random.key(seed), train.x[:1])
    return Problem(params, train, validation, test, {})


def _mean_square(u: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((u - y) ** 2)


def _log_accuracy(u: jax.Array, y: jax.Array) -> jax.Array:
    return -0.5 * jnp.log10(jnp.mean((u - y) ** 2) / jnp.mean(y**2))


HEAT = Kind(
    _temperature,
    _mean_square,
    _log_accuracy,
    "digits right",
    lambda score: 10.0**-score,
    optax.adam,
    batch_size=64,
)
