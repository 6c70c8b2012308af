r"""The paper's toy losses, and trajectories on them (figures 1 to 5).

The losses take an array whose last axis holds the coordinates of a point:

===============  ==========================  ==================================  ==========
loss             formula                     what it has                         figures
===============  ==========================  ==================================  ==========
`banana(t)`      (1 - t1 t2)^2               a saddle at 0, a valley t1 t2 = 1   1, 4 and 5
`sinc(t)`        5 sin(r) / r, r = abs(t)^2  a maximum at 0, minima on a circle  2
`paraboloid(t)`  abs(t)^2                    a minimum at 0                      3
===============  ==========================  ==================================  ==========

>>> import jax.numpy as jnp
>>> from monge_sam_jax import euclidean, monge
>>> settings = dict(rho=1.0, learning_rate=0.01, steps=200)
>>> start = jnp.array([-1.5, 0.5])
>>> print(jnp.abs(trajectory(banana, start, metric=euclidean(), **settings)[-1]) < 0.05)
[ True  True]
>>> print(trajectory(banana, start, metric=monge(), **settings)[-1].round(2))
[-0.95 -0.94]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from monge_sam_jax._core.checks import check_nonnegative
from monge_sam_jax.metrics import Metric
from monge_sam_jax.perturbation import worst_case_perturbation
from monge_sam_jax.transforms import sharpness_aware

__all__ = ["ToyLoss", "banana", "paraboloid", "perturbed_points", "sinc", "trajectory"]
__dir__ = __all__.copy

# A loss of one point, shape (d,); of many, shape (..., d), if it is to be drawn.
ToyLoss = Callable[[jax.Array], jax.Array]

# sin(r) / r = sum_k (-1)^k r^2k / (2k + 1)!; up to r = 1, to the last digit of float64.
SERIES = np.array([(-1) ** k / math.factorial(2 * k + 1) for k in reversed(range(10))])


def banana(t: jax.Array) -> jax.Array:
    r"""The loss with banana-shaped minima, of figures 1, 4 and 5.

    .. math:: \ell(\theta) = (1 - \theta_1 \theta_2)^2

    Its minima are the hyperbola :math:`\theta_1 \theta_2 = 1`, flattest at (1, 1) and (-1, -1); its
    saddle is at the origin.

    Args:
      t: theta, shape (..., 2).

    Returns:
      The loss, shape (...).

    References:
      Jacobsen and Arvanitidis, Monge SAM, section 3.3.

    >>> import jax.numpy as jnp
    >>> banana(jnp.array([[0.0, 0.0], [2.0, 0.5], [3.0, 1.0]]))
    Array([1., 0., 4.], dtype=float32)
    """
    return (1 - t[..., 0] * t[..., 1]) ** 2


def sinc(t: jax.Array) -> jax.Array:
    r"""The scaled sinc function of figure 2, with its maximum 5 at the origin.

    .. math:: \ell(\theta) = 5 \sin(r) / r, \quad r = \theta^\top \theta

    It falls off as :math:`5 (1 - r^2 / 6)` around the maximum, whose Hessian is zero. The nearest
    minima are the circle with tan(r) = r, of radius 2.12.

    Args:
      t: theta, shape (..., d).

    Returns:
      The loss, shape (...), with all derivatives right at and near the origin.

    References:
      Jacobsen and Arvanitidis, Monge SAM, figure 2.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> jax.value_and_grad(sinc)(jnp.zeros(2))
    (Array(5., dtype=float32), Array([0., 0.], dtype=float32))
    """
    r = jnp.sum(t**2, axis=-1)
    # The derivatives of sin(r) / r cancel for small r. Each branch is kept from the other's r, as
    # its overflow there would turn the gradient into NaN.
    small = r < 1
    series = jnp.polyval(jnp.asarray(SERIES, r.dtype), jnp.where(small, r, 0.0) ** 2)
    r = jnp.where(small, 1.0, r)
    return 5 * jnp.where(small, series, jnp.sin(r) / r)


def paraboloid(t: jax.Array) -> jax.Array:
    r"""The paraboloid of figure 3.

    .. math:: \ell(\theta) = \theta^\top \theta

    Args:
      t: theta, shape (..., d).

    Returns:
      The loss, shape (...).

    References:
      Jacobsen and Arvanitidis, Monge SAM, section 3.2.

    >>> import jax.numpy as jnp
    >>> paraboloid(jnp.array([[3.0], [-0.5]]))
    Array([9.  , 0.25], dtype=float32)
    """
    return jnp.sum(t**2, axis=-1)


def trajectory(
    loss_fn: ToyLoss,
    theta0: jax.Array,
    *,
    metric: Metric | None,
    rho: chex.Numeric,
    learning_rate: chex.Numeric,
    steps: int,
) -> jax.Array:
    r"""Iterates of the sharpness-aware method from one start or many.

    .. math:: \theta_{k+1} = \theta_k - a \nabla \ell(\theta_k + \delta^*(\theta_k))

    Built on `sharpness_aware` and `optax.sgd`. Compiled once for a loss, a metric (the same object,
    not an equal one), a number of steps and a shape; rho, learning rate and starts may change.

    Args:
      loss_fn: point of shape (d,) -> loss, a scalar; a hashable function.
      theta0: the starts, shape (..., d). Each has a ball of its own.
      metric: the metric G of the ball; None is gradient descent, without a perturbation.
      rho: radius of the ball in the metric's units, a scalar.
      learning_rate: a, a scalar.
      steps: number of steps; not negative.

    Returns:
      All iterates, shape (steps + 1, ..., d), beginning with the starts.

    Raises:
      TypeError: metric is neither a `Metric` nor None, or rho or the learning rate no real number.
      ValueError: rho or the learning rate is negative, NaN or infinite, steps is negative, or
        theta0 a scalar.

    References:
      Jacobsen and Arvanitidis, Monge SAM, figures 1, 2, 3 and 5.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import euclidean
    >>> starts = jnp.array([[1.0], [-2.0]])
    >>> path = trajectory(
    ...     paraboloid, starts, metric=euclidean(), rho=0.5, learning_rate=0.25, steps=1
    ... )
    >>> path[1]  # start - 0.25 * 2 * (start + 0.5 * sign(start))
    Array([[ 0.25],
           [-0.75]], dtype=float32)
    """
    if not isinstance(metric, Metric | None):
        raise TypeError(f"metric must be a Metric such as monge(), or None, got {metric!r}")
    check_nonnegative("rho", rho)
    check_nonnegative("learning_rate", learning_rate)
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps!r}")
    theta0 = jnp.asarray(theta0)
    if theta0.ndim == 0:
        raise ValueError("theta0 must have an axis of coordinates, got a scalar")
    return _trajectory(loss_fn, theta0, metric, rho, learning_rate, steps)


@partial(jax.jit, static_argnames=("loss_fn", "metric", "steps"))
def _trajectory(
    loss_fn: ToyLoss,
    theta0: jax.Array,
    metric: Metric | None,
    rho: chex.Numeric,
    learning_rate: chex.Numeric,
    steps: int,
) -> jax.Array:
    grad_fn = jax.grad(loss_fn)
    tx = optax.sgd(learning_rate)
    if metric is not None:
        tx = optax.chain(sharpness_aware(grad_fn, metric=metric, rho=rho), tx)

    def step(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
        theta, state = carry
        updates, state = tx.update(grad_fn(theta), state, theta)
        theta = optax.apply_updates(theta, updates)
        return (theta, state), theta

    def run(start: jax.Array) -> jax.Array:
        _, iterates = jax.lax.scan(step, (start, tx.init(start)), length=steps)
        return jnp.concatenate([start[None], iterates])

    paths = jax.vmap(run, out_axes=1)(theta0.reshape(-1, theta0.shape[-1]))
    return paths.reshape(steps + 1, *theta0.shape)


def perturbed_points(
    loss_fn: ToyLoss, theta: jax.Array, *, metric: Metric, rho: chex.Numeric
) -> jax.Array:
    r"""The points at which the sharpness-aware methods take their gradients.

    .. math:: \theta + \delta^*(\theta)

    Args:
      loss_fn: point of shape (d,) -> loss, a scalar.
      theta: points, shape (..., d).
      metric: the metric G of the ball around each.
      rho: radius of the ball in the metric's units, a scalar.

    Returns:
      The perturbed points, shape (..., d).

    Raises:
      TypeError, ValueError: as `worst_case_perturbation`.

    References:
      Jacobsen and Arvanitidis, Monge SAM, figure 1.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import euclidean
    >>> perturbed_points(paraboloid, jnp.array([[1.0], [-2.0]]), metric=euclidean(), rho=0.5)
    Array([[ 1.5],
           [-2.5]], dtype=float32)
    """

    def perturb(point: jax.Array) -> jax.Array:
        return point + worst_case_perturbation(metric, jax.grad(loss_fn)(point), point, rho)

    points = theta.reshape(-1, theta.shape[-1])
    return jax.vmap(perturb)(points).reshape(theta.shape)
