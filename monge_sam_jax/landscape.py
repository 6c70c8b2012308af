r"""How a loss rises around the params: in a box, at the worst; on a plane, point by point."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from monge_sam_jax._core.checks import check_at_least, check_nonnegative
from monge_sam_jax._core.numerics import working_dtype
from monge_sam_jax.metrics import Params
from monge_sam_jax.products import LossFn, check_real

__all__ = ["adaptive_worst_case_sharpness", "filter_normalized_directions", "loss_slice"]
__dir__ = __all__.copy


def adaptive_worst_case_sharpness(
    loss_fn: LossFn, params: Params, *, rho: chex.Numeric, num_steps: int = 20
) -> jax.Array:
    r"""The rise of the loss at the worst perturbation in a box as large as the params themselves.

    .. math::
        \max_{|\delta_i| \le \rho |\theta_i|} \ell(\theta + \delta) - \ell(\theta)

    By auto-PGD: signed gradient steps :math:`\delta_i \leftarrow \delta_i + \eta \rho |\theta_i|
    \operatorname{sign} g_i` that are clipped to the box, with momentum, and with a rate of 2 at
    first, which is halved, and the ascent taken back to the best point, where the loss does not go
    on rising. The best point counts, so that this is a lower bound of the maximum. The first point
    is the corner to which the gradient points.

    m-sharpness is the mean over batches of m samples:

    .. code-block:: python

        mean_over_data(
            lambda params, batch: adaptive_worst_case_sharpness(
                lambda p: loss_fn(p, batch), params, rho=rho
            ),
            data,
            m,
        )(params)

    The paper takes the logits normalized in loss_fn for networks that are trained with
    cross-entropy, and compares networks in evaluation mode.

    Args:
      loss_fn: params -> loss, a scalar.
      params: theta, a tree of real arrays; those that are zero stay.
      rho: size of the box relative to the params, a scalar. A traced value is not checked.
      num_steps: at least one; each costs a loss and a gradient.

    Returns:
      The rise, a scalar, not negative; NaN if a loss on the way is.

    Raises:
      TypeError: a param is no real float, or rho no real number.
      ValueError: num_steps is less than one, or rho is negative, NaN or infinite.

    References:
      Andriushchenko et al., A modern look at the relationship between sharpness and generalization,
      2023; Croce and Hein, Reliable evaluation of adversarial robustness with an ensemble of
      diverse parameter-free attacks, 2020 (auto-PGD).

    >>> import jax.numpy as jnp
    >>> adaptive_worst_case_sharpness(lambda p: p @ p, jnp.array([3.0, 4.0]), rho=0.5)  # 56.25 - 25
    Array(31.25, dtype=float32)
    """
    check_real(params)
    check_at_least("num_steps", num_steps, 1)
    check_nonnegative("rho", rho)
    params = jax.tree.map(jnp.asarray, params)

    def value_and_ascent(point: Params) -> tuple[jax.Array, Params]:
        theta = jax.tree.map(lambda p, u: p + (rho * jnp.abs(p) * u).astype(p.dtype), params, point)
        value, grads = jax.value_and_grad(loss_fn)(theta)
        return value, jax.tree.map(jnp.sign, grads)

    start = jax.tree.map(jnp.zeros_like, params)
    value, ascent = value_and_ascent(start)
    climb = _Climb(
        _Place(start, ascent, value),
        _Place(start, ascent, value),
        previous=start,
        rate=jnp.full((), 2.0),
        rises=jnp.zeros((), jnp.int32),
        highest_before=value,
        halved=jnp.array(True),
    )
    intervals = jnp.array(_intervals(num_steps))

    def step(k: jax.Array, now: _Climb) -> _Climb:
        weight = jnp.where(k == 0, 1.0, 0.75)

        def move(u: jax.Array, old: jax.Array, sign: jax.Array) -> jax.Array:
            rate, a = now.rate.astype(u.dtype), weight.astype(u.dtype)
            target = jnp.clip(u + rate * sign, -1, 1)
            return jnp.clip(u + a * (target - u) + (1 - a) * (u - old), -1, 1)

        point = jax.tree.map(move, now.place.point, now.previous, now.place.ascent)
        place = _Place(point, *reversed(value_and_ascent(point)))
        better = place.value > now.best.value
        best = _where(better, place, now.best)
        best = best._replace(value=jnp.maximum(place.value, now.best.value))  # NaN too
        rises = now.rises + (place.value > now.place.value)

        interval = intervals[k]
        stuck = (rises <= 0.75 * interval) | (~now.halved & (best.value <= now.highest_before))
        halve = (interval > 0) & stuck
        return _Climb(
            _where(halve, best, place),
            best,
            previous=_where(halve, best.point, now.place.point),
            rate=jnp.where(halve, now.rate / 2, now.rate),
            rises=jnp.where(interval > 0, 0, rises),
            highest_before=jnp.where(interval > 0, best.value, now.highest_before),
            halved=jnp.where(interval > 0, stuck, now.halved),
        )

    return jax.lax.fori_loop(0, num_steps, step, climb).best.value - value


class _Place(NamedTuple):
    """A point of the box, in units of its size; the gradient's signs and the loss there."""

    point: Params
    ascent: Params
    value: jax.Array


class _Climb(NamedTuple):
    """The state of auto-PGD.

    Attributes:
      place: where it is.
      best: where the loss was highest.
      previous: the point before.
      rate: size of a step, in units of the box.
      rises: how many steps since the last checkpoint raised the loss.
      highest_before: the highest loss up to the last checkpoint.
      halved: whether the rate was halved there; true at the start.
    """

    place: _Place
    best: _Place
    previous: Params
    rate: jax.Array
    rises: jax.Array
    highest_before: jax.Array
    halved: jax.Array


def _where(condition: jax.Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _intervals(num_steps: int) -> list[int]:
    """For each step, the number of steps since the last checkpoint if it ends in one, else zero."""
    lengths = [0] * num_steps
    interval, end = max(int(0.22 * num_steps), 1), -1
    while (end := end + interval) < num_steps:
        lengths[end] = interval
        interval = max(interval - max(int(0.03 * num_steps), 1), int(0.06 * num_steps), 1)
    return lengths


def filter_normalized_directions(
    params: Params,
    key: chex.PRNGKey,
    num_directions: int = 2,
    *,
    output_axis: int = -1,
    vectors: bool = False,
) -> tuple[Params, ...]:
    r"""Random directions in which every filter is as long as that of the params.

    .. math::
        d_{lo} \leftarrow \frac{d_{lo}}{\|d_{lo}\|_2} \|\theta_{lo}\|_2, \qquad d \sim N(0, I)

    A filter is what leads to one output unit o of layer l: a slice of the kernel along its axis of
    outputs. So the plane shows the loss in units of the weights, whatever their scale. In many
    dimensions two random directions are orthogonal enough.

    Args:
      params: theta, a tree of real arrays.
      key: of the directions.
      num_directions: how many.
      output_axis: of kernels, the axis of their output units: the last one in Flax and Haiku, 0 in
        Equinox.
      vectors: whether the directions have entries for params of one dimension or none too, biases
        and those of normalization layers. In the paper they have none. With them, each such entry
        is a filter: its direction is that of the param, or its negative.

    Returns:
      Directions, trees of the form of the params.

    Raises:
      TypeError: a param is no real float.
      ValueError: num_directions is less than one, or a kernel has no such output_axis.

    References:
      Li et al., Visualizing the loss landscape of neural nets, 2018.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 2.0]]), "bias": jnp.ones(2)}
    >>> (direction,) = filter_normalized_directions(params, jax.random.key(0), 1)
    >>> jnp.linalg.norm(direction["kernel"], axis=0), direction["bias"]
    (Array([5., 2.], dtype=float32), Array([0., 0.], dtype=float32))
    """
    check_real(params)
    check_at_least("num_directions", num_directions, 1)
    params = jax.tree.map(jnp.asarray, params)
    for leaf in jax.tree.leaves(params):
        if leaf.ndim >= 2 and not -leaf.ndim <= output_axis < leaf.ndim:
            raise ValueError(
                f"output_axis must be an axis of every kernel, got {output_axis} for one of shape "
                f"{leaf.shape}"
            )

    def normalize(d: jax.Array, p: jax.Array) -> jax.Array:
        if p.ndim < 2:
            return jnp.copysign(p, d) if vectors else jnp.zeros_like(p)
        axes = tuple(axis for axis in range(p.ndim) if axis != output_axis % p.ndim)
        square = partial(jnp.sum, axis=axes, keepdims=True)
        return d * jnp.sqrt(square(p**2) / square(d**2))

    return tuple(
        jax.tree.map(normalize, optax.tree.random_like(key, params), params)
        for key in jax.random.split(key, num_directions)
    )


def loss_slice(
    loss_fn: LossFn,
    params: Params,
    directions: tuple[Params, Params],
    *,
    radius: float = 1.0,
    num_points: int = 25,
    batch_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""The loss on a plane through the params.

    .. math:: L_{ij} = \ell(\theta + a_i d_1 + a_j d_2), \qquad -r \le a_i \le r

    Args:
      loss_fn: params -> loss, a scalar.
      params: theta, a tree of real arrays.
      directions: d_1 and d_2, of the form of the params, as from `filter_normalized_directions`.
      radius: r, in units of the directions.
      num_points: of each axis; if odd, the params are the middle one.
      batch_size: how many losses are computed at once; None: one.

    Returns:
      (a, L), of shapes (num_points,) and (num_points, num_points).

    Raises:
      TypeError: a param is no real float.
      ValueError: num_points is less than two, or there are not two directions of the params' form.

    References:
      Li et al., Visualizing the loss landscape of neural nets, 2018.

    >>> import jax.numpy as jnp
    >>> directions = jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])
    >>> loss_slice(lambda p: p[0] ** 2 + p[1], jnp.zeros(2), directions, num_points=3)[1]
    Array([[-1.,  1.,  3.],
           [-2.,  0.,  2.],
           [-1.,  1.,  3.]], dtype=float32)
    """
    check_real(params)
    check_at_least("num_points", num_points, 2)
    params = jax.tree.map(jnp.asarray, params)
    if len(directions) != 2:
        raise ValueError(f"directions must be two, got {len(directions)}")
    first, second = directions
    a = jnp.linspace(-radius, radius, num_points, dtype=working_dtype(params))

    def loss(point: jax.Array) -> jax.Array:
        x, y = point
        return loss_fn(
            jax.tree.map(lambda p, d, e: p + (x * d + y * e).astype(p.dtype), params, first, second)
        )

    plane = jnp.stack(jnp.meshgrid(a, a, indexing="ij"), axis=-1).reshape(-1, 2)
    losses = jax.lax.map(loss, plane, batch_size=batch_size)
    return a, losses.reshape(num_points, num_points)
