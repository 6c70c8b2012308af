r"""The Monge metric averaged over several gradients.

.. math:: G = M + \frac{\alpha^2}{r} \sum_{i=1}^{r} g_i g_i^\top

of the last r steps, or of r micro-batches or points nearby: what the surface of the loss is like
around the params, and not at them alone. By Woodbury's identity the worst step is a combination of
r gradients that solves r equations.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_factor, cho_solve

from monge_sam_jax._core.checks import check_at_least, check_nonnegative
from monge_sam_jax._core.numerics import (
    bounded_product,
    bounded_quotient,
    inner_product,
    keep_unless,
    lift_factors,
    scaled_norm,
    tree_scale,
    widen,
    working_dtype,
)
from monge_sam_jax.metrics import (
    Ascent,
    Grads,
    Metric,
    Params,
    State,
    check_base,
    euclidean,
    monge,
)

__all__ = ["AveragedMongeState", "averaged_monge", "averaged_monge_over"]
__dir__ = __all__.copy


class AveragedMongeState(NamedTuple):
    """State of `averaged_monge`.

    Attributes:
      count: number of gradients seen so far, the history at most; an int32 scalar.
      former: the gradients before the present one, the latest first; history - 1 trees of the form
        and the dtypes of the params, zero where there was none yet.
      base_state: state of the base metric.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives such
    former: tuple[Grads, ...]
    base_state: State


def averaged_monge(
    history: int,
    alpha: chex.Numeric = 1.0,
    base: Metric = euclidean(),  # noqa: B008
) -> Metric:
    r"""The Monge metric averaged over the last gradients, the present one among them.

    .. math:: G = M + \frac{\alpha^2}{r} \sum_{i=1}^{r} g_i g_i^\top

    with r = history, and before so many gradients are there, the number of them: the first step is
    that of `monge`, and identical gradients are at every step. Directions in which the loss has
    changed lately are short, that of the present gradient among them, so the perturbation turns to
    what is new in it.

    The state keeps history - 1 copies of the params, and a step takes about as many more while it
    compares them, by (history - 1)^2 inner products. Where alpha times the gradients is large and
    they are alike to k digits, the direction has 7 - k of them in float32; where they are alike to
    all, they count as parallel. A gradient that is not finite is not kept.

    Args:
      history: r, one or more; one is `monge`.
      alpha: height of the loss graph, in 1 / (units of the loss); non-negative. A traced value is
        not checked.
      base: the metric M, one that does not depend on the gradient: `euclidean`, `adaptive`,
        `pullback`, and `scaled` ones of these.

    Returns:
      The metric, with an `AveragedMongeState`; for a history of one, with the base's state.

    Raises:
      TypeError: base is no `Metric`, or alpha no real number.
      ValueError: history is no integer or less than one, alpha is negative, NaN or infinite, or
        the base depends on the gradient.

    References:
      Jacobsen and Arvanitidis, Monge SAM, section 6, where averaging the metric over iterations is
      future work; eq. 6 for r = 1.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import averaged_monge
    >>> metric, params = averaged_monge(history=2, alpha=3.0), jnp.zeros(2)
    >>> _, state = metric.ascent(jnp.array([1.0, 0.0]), params, metric.init(params))
    >>> ascent, _ = metric.ascent(jnp.array([1.0, 0.1]), params, state)
    >>> d = ascent.direction
    >>> (d / jnp.linalg.norm(d)).round(2)  # the first entry is not new
    Array([0.88, 0.48], dtype=float32)
    """
    check_at_least("history", history, 1)
    check_nonnegative("alpha", alpha)
    _check_linear(base)
    if history == 1:
        return monge(base, alpha)

    def init(params: Params) -> State:
        zeros = tuple(jax.tree.map(jnp.zeros_like, params) for _ in range(history - 1))
        return AveragedMongeState(jnp.zeros((), jnp.int32), zeros, base.init(params))

    def ascent(grads: Grads, params: Params, state: State) -> tuple[Ascent, State]:
        dtype = working_dtype(grads)
        count = jnp.minimum(state.count + 1, history)
        height = jnp.asarray(alpha, dtype) / jnp.sqrt(count.astype(dtype))
        former = jax.tree.map(lambda *g: jnp.stack([widen(x, dtype) for x in g]), *state.former)
        heights = (height, height)
        found, base_state = _ascent(base, grads, former, heights, params, state.base_state)
        after = AveragedMongeState(count, (grads, *state.former[:-1]), base_state)
        return found, keep_unless(jnp.isfinite(found.dual_norm), after, state)

    return Metric(init, ascent)


def averaged_monge_over(
    gradients: Grads,
    alpha: chex.Numeric = 1.0,
    base: Metric = euclidean(),  # noqa: B008
) -> Metric:
    r"""The Monge metric averaged over given gradients: of micro-batches, or of points nearby.

    .. math:: G = M + \frac{\alpha^2}{r} \sum_{i=1}^{r} g_i g_i^\top

    With the gradients of single examples it is :math:`M + \alpha^2 F`, F the empirical Fisher
    information. The gradient that is followed counts only if it is one of the given ones.

    Args:
      gradients: :math:`g_1, \dots, g_r`, a tree of the form of the params, every leaf with a
        leading axis of size r. They may be traced, so that a metric is made anew in every compiled
        step. Leaves that are masked do not enter.
      alpha: height of the loss graph, in 1 / (units of the loss); non-negative. A traced value is
        not checked.
      base: the metric M, one that does not depend on the gradient, as in `averaged_monge`.

    Returns:
      The metric, with the base's state.

    Raises:
      TypeError: base is no `Metric`, or alpha no real number.
      ValueError: alpha is negative, NaN or infinite, the base depends on the gradient, or there is
        no leading axis that all leaves share; at a use, the gradients are not of the form of the
        params.

    References:
      Jacobsen and Arvanitidis, Monge SAM, section 6, where sampling the metric from the local
      neighborhood is future work; eq. 6 for r = 1.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import averaged_monge_over, worst_case_perturbation
    >>> loss = lambda params, batch: jnp.mean((batch @ params - 1) ** 2)
    >>> params, batch = jnp.array([1.0, 0.0]), jnp.array([[1.0, 2.0], [2.0, 0.5]])
    >>> microbatches = batch.reshape(2, 1, 2)
    >>> each = jax.vmap(jax.grad(loss), (None, 0))(params, microbatches)
    >>> metric = averaged_monge_over(each, alpha=1.0)
    >>> delta = worst_case_perturbation(metric, jax.grad(loss)(params, batch), params, rho=0.1)
    >>> delta.round(3)
    Array([0.031, 0.008], dtype=float32)
    """
    check_nonnegative("alpha", alpha)
    _check_linear(base)
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(gradients)}
    if len(sizes) != 1 or not all(map(math.prod, sizes - {()})) or () in sizes:
        raise ValueError(
            "gradients must be stacked along a leading axis that all leaves share, as by "
            "jax.vmap(jax.grad(loss), (None, 0))(params, microbatches); got leaves whose shapes "
            f"begin with {sorted(sizes)}"
        )
    ((r,),) = sizes

    def choose(g: jax.Array | None, given: Grads) -> jax.Array | None:
        if g is None:
            return None
        if np.shape(given) != (r, *g.shape):
            raise ValueError(f"a leaf of shape {g.shape} has gradients of shape {np.shape(given)}")
        return widen(jnp.asarray(given), jnp.finfo(g.dtype).dtype)

    def ascent(grads: Grads, params: Params, state: State) -> tuple[Ascent, State]:
        try:
            others = jax.tree.map(choose, grads, gradients, is_leaf=lambda x: x is None)
        except ValueError as error:
            raise ValueError(f"gradients must have the form of the params: {error}") from error
        dtype = working_dtype(grads)
        heights = jnp.zeros((), dtype), jnp.asarray(alpha, dtype) / jnp.sqrt(jnp.asarray(r, dtype))
        return _ascent(base, grads, others, heights, params, state)

    return Metric(base.init, ascent)


def _check_linear(base: Any) -> None:
    check_base("base", base)
    if not base.linear:
        raise ValueError(
            "base must be a metric that does not depend on the gradient: euclidean, adaptive, "
            "pullback, scaled ones of these, or one of your own with Metric(..., linear=True)"
        )


class _Gradient(NamedTuple):
    """A gradient g = unit / scale, its natural gradient, and sizes in the base metric M."""

    unit: Grads
    tangent: Params  # a positive multiple of M^-1 g
    length: jax.Array  # of the tangent
    unit_norm: jax.Array  # dual norm of unit, not zero
    norm: jax.Array  # dual norm of g


def _ascent(
    base: Metric,
    grads: Grads,
    others: Grads,
    heights: tuple[jax.Array, jax.Array],
    params: Params,
    state: State,
) -> tuple[Ascent, State]:
    r"""Steepest ascent under :math:`M + h^2 g g^T + k^2 \sum_i g_i g_i^T`, heights (h, k).

    With u the unit multiple of g in the dual norm, and :math:`\kappa_i` and :math:`w_i` what
    :math:`k g_i = a_i (\kappa_i u + w_i)` have along it and apart from it, the vector v with
    :math:`u^\top v = 1` that is shortest in G is the ascent:

    .. math::
        v = M^{-1} \Big(u - \sum_i z_i a_i w_i\Big), \qquad (I + A W^\top M^{-1} W A) z = A \kappa,
        \qquad v^\top G v = 1 + h^2 n^2 + \kappa^\top A z

    Nothing in it cancels where gradients are parallel or large, as in Woodbury's identity for
    :math:`G^{-1} g` itself.
    """
    dtype = working_dtype(grads)
    eps = jnp.finfo(dtype).eps

    def product(x: Grads, y: Params) -> jax.Array:
        return inner_product(x, y, dtype)

    def describe(x: Grads) -> tuple[_Gradient, State]:
        x = scaled_norm(jax.tree.map(lambda leaf: widen(leaf, dtype), x))
        found, after = base.ascent(x.unit, params, state)
        unit_norm = found.dual_norm.astype(dtype)
        norm = bounded_quotient(unit_norm, x.scale)
        nonzero = unit_norm > 0
        unit_norm = jnp.where(nonzero, unit_norm, 1.0)
        length = jnp.where(nonzero, jnp.asarray(found.length, dtype), 1.0)
        return _Gradient(x.unit, found.tangent, length, unit_norm, norm), after

    def less(x: Grads, factor: jax.Array, y: Grads) -> Grads:
        return jax.tree.map(lambda a, b: a - factor.astype(b.dtype) * b, x, y)

    g, after = describe(grads)
    h = jax.vmap(lambda x: describe(x)[0])(others)
    ratio = h.length / g.length
    one = h.unit_norm * h.length  # products with tangents are in these units: in range
    along = jax.vmap(product, (0, None))(h.unit, g.tangent) / one * ratio
    units = jax.vmap(less, (0, 0, None))(h.unit, along * h.unit_norm / g.unit_norm, g.unit)
    tangents = jax.vmap(less, (0, 0, None))(h.tangent, along * ratio, g.tangent)
    gram = jax.vmap(jax.vmap(product, (None, 0)), (0, None))(units, tangents)
    gram = gram / (jnp.outer(one / h.length, h.length))

    # What rounding leaves of parallel gradients counts as nothing.
    squares = jnp.diagonal(gram)
    is_apart = squares > (4 * eps) ** 2
    apart = jnp.sqrt(jnp.where(is_apart, squares, 1.0))
    a = bounded_product(h.norm, heights[1])
    b = jnp.where(is_apart, a * apart, 0.0)
    u, root = lift_factors(b, jnp.ones((), dtype))  # root / u = sqrt(1 + b^2)
    t = b * u / root
    # The equations for z sqrt(1 + b^2), with ones on the diagonal; a little less beside it makes up
    # for rounding, by which they would not be positive where the w_i are parallel to one another.
    matrix = gram * jnp.outer(t / apart, t / apart) * (1 - 8 * eps * len(b))
    matrix = jnp.where(jnp.eye(len(b), dtype=bool), 1.0, matrix)
    rhs = jnp.where(is_apart, t * along / apart, 0.0)
    x = cho_solve(cho_factor(matrix), rhs)

    parts = jnp.concatenate(
        [
            jnp.ones(1, dtype),
            bounded_product(g.norm, heights[0]).reshape(1),
            jnp.where(is_apart, 0.0, a * along),
        ]
    )
    # A power of two: products and quotients at the end of the range do not round beyond it.
    largest = jax.lax.stop_gradient(jnp.minimum(jnp.max(jnp.abs(parts)), 1 / jnp.finfo(dtype).tiny))
    largest = jax.lax.reduce_precision(largest, jnp.finfo(dtype).nexp, 0)
    lift = jnp.sqrt(jnp.sum((parts / largest) ** 2) + jnp.sum(rhs * x) / largest / largest)
    tangent = jax.tree.map(
        lambda own, w: own - jnp.sum(w, axis=0),
        g.tangent,
        jax.vmap(tree_scale)(jnp.where(is_apart, t * x / apart, 0.0) / ratio, tangents),
    )
    length = bounded_product(g.length * lift, largest)
    return Ascent(tangent, dual_norm=g.norm / largest / lift, length=length), after
