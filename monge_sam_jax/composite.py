r"""Metrics made of metrics: another radius, and a ball for each leaf or group of leaves.

The worst step inside a product of balls is the worst step inside each of them,

.. math::
    \delta^*_k = \rho \, \frac{G_k^{-1} g_k}{\|g_k\|_{G_k^{-1}}}, \qquad
    g^\top \delta^* = \rho \sum_k \|g_k\|_{G_k^{-1}}

so groups of leaves need one transformation and not one each. Their norm
:math:`\max_k \|\delta_k\|_{G_k}` has the dual norm :math:`\sum_k \|g_k\|_{G_k^{-1}}`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp

from monge_sam_jax._core.checks import broadcast_prefix, check_positive
from monge_sam_jax._core.numerics import bounded_product, tree_scale, working_dtype
from monge_sam_jax.metrics import (
    Ascent,
    Grads,
    Metric,
    Params,
    State,
    check_base,
    euclidean,
)

__all__ = ["Labels", "grouped", "layerwise", "scaled"]
__dir__ = __all__.copy

# A tree of labels, a prefix of the params; or a function of the params that returns one.
Labels: TypeAlias = Any | Callable[[Params], Any]


def scaled(base: Metric, factor: chex.Numeric) -> Metric:
    r"""A metric whose perturbations are longer or shorter by a factor.

    .. math:: G = M / c^2, \qquad \delta^* = c \, \delta^*_M

    Inside `grouped` it is the radius of a group, as a multiple of rho.

    Args:
      base: the metric M.
      factor: c, positive; leaves that are not to be perturbed are left out by `mask`. A traced
        value is not checked.

    Returns:
      The metric, with the base's state.

    Raises:
      TypeError: base is no `Metric`, or factor no real number.
      ValueError: factor is zero, negative, NaN or infinite.

    References:
      Jacobsen and Arvanitidis, Monge SAM, eqs. 5 and 8, with the metric divided by c^2.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import euclidean, scaled, worst_case_perturbation
    >>> metric = scaled(euclidean(), 10.0)
    >>> worst_case_perturbation(metric, jnp.array([3.0, 4.0]), jnp.zeros(2), rho=0.05)
    Array([0.3, 0.4], dtype=float32)
    """
    check_base("base", base)
    check_positive("factor", factor, zero="leave leaves out by mask= in place of a factor of zero")

    def ascent(grads: Grads, params: Params, state: State) -> tuple[Ascent, State]:
        base_ascent, state = base.ascent(grads, params, state)
        n = base_ascent.dual_norm
        c = jnp.asarray(factor, n.dtype)
        length = jnp.asarray(base_ascent.length, n.dtype) / c
        return base_ascent._replace(dual_norm=bounded_product(n, c), length=length), state

    return Metric(base.init, ascent, base.isotropic, base.linear)


def layerwise(base: Metric = euclidean()) -> Metric:  # noqa: B008
    r"""A ball of its own for each leaf, all of one radius.

    .. math::
        \delta^*_k = \rho \, \frac{M_k^{-1} g_k}{\|g_k\|_{M_k^{-1}}}, \qquad
        \|g\|_* = \sum_k \|g_k\|_{M_k^{-1}}

    The steepest ascent in the norm :math:`\max_k \|\delta_k\|_{M_k}`: no leaf is left without a
    perturbation because the gradients of others are larger. It is `grouped` with a group for each
    leaf, and what is said there of a lifted metric inside and around it holds here:
    layerwise(monge()) lifts every leaf by its own gradient, monge(layerwise()) all by one scalar.
    Over L leaves the whole perturbation is :math:`\sqrt{L}` times as long as without.

    Args:
      base: the metric M of each leaf; it gets the leaf as a bare array in place of a tree.

    Returns:
      The metric. Its state is that of the base, with a tree of the form of the params in place of
      every part.

    Raises:
      TypeError: base is no `Metric`.

    References:
      Jacobsen and Arvanitidis, Monge SAM, eqs. 5 and 8, leaf by leaf; You et al., Large Batch
      Optimization for Deep Learning, 2020, normalise a step by layers alike.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import layerwise, worst_case_perturbation
    >>> g = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([100.0])}
    >>> delta = worst_case_perturbation(layerwise(), g, g, rho=0.5)
    >>> delta["w"], delta["b"]
    (Array([0.3, 0.4], dtype=float32), Array([0.5], dtype=float32))
    """
    check_base("base", base)

    def init(params: Params) -> State:
        leaves, tree = jax.tree.flatten(params)
        if not leaves:
            return base.init(params)
        states = [base.init(leaf) for leaf in leaves]
        return jax.tree.map(lambda *parts: jax.tree.unflatten(tree, parts), *states)

    def ascent(grads: Grads, params: Params, state: State) -> tuple[Ascent, State]:
        tree: Any = jax.tree.structure(grads)
        leaves = list(zip(jax.tree.leaves(grads), tree.flatten_up_to(params), strict=True))
        form: Any = jax.tree.structure(jax.eval_shape(base.init, leaves[0][1]) if leaves else state)
        parts = [tree.flatten_up_to(part) for part in form.flatten_up_to(state)] if leaves else []
        # A base without any part of a state has the same one for each leaf.
        states = [form.unflatten(own) for own in zip(*parts, strict=True)] or [state] * len(leaves)
        found = [base.ascent(*leaf, own) for leaf, own in zip(leaves, states, strict=True)]
        if parts:
            state = jax.tree.map(lambda *own: tree.unflatten(own), *(after for _, after in found))

        tangents, dual_norm, length = product_of_balls(
            [ascent for ascent, _ in found], working_dtype(grads)
        )
        return Ascent(tree.unflatten(tangents), dual_norm, length), state

    return Metric(init, ascent)


def grouped(metrics: Mapping[Hashable, Metric], labels: Labels) -> Metric:
    r"""A ball of its own for each group of leaves.

    .. math::
        \delta^*_k = \rho \, \frac{G_k^{-1} g_k}{\|g_k\|_{G_k^{-1}}}, \qquad
        \|g\|_* = \sum_k \|g_k\|_{G_k^{-1}}

    The steepest ascent in the norm :math:`\max_k \|\delta_k\|_{G_k}`: every group has the radius
    rho, or a multiple of it by `scaled`, whatever the gradients of the others are. A lifted metric
    inside, {"a": monge()}, sees the gradient of its group alone; around it, monge(grouped(...)),
    shortens all groups by the one scalar :math:`1 / \sqrt{1 + \alpha^2 \|g\|_*^2}`.

    Args:
      metrics: the metric of each group by its label.
      labels: a tree of labels that is a prefix of the params, or a function of the params that
        returns one, as for `optax.partition`.

    Returns:
      The metric; its state is a dict of those of the groups.

    Raises:
      TypeError: metrics holds something that is no `Metric`.
      ValueError: metrics is empty; at a use, a label has no metric, or labels is no prefix.

    References:
      Jacobsen and Arvanitidis, Monge SAM, eqs. 5 and 8, group by group.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import euclidean, grouped, scaled, worst_case_perturbation
    >>> metrics = {"weights": euclidean(), "biases": scaled(euclidean(), 0.1)}
    >>> metric = grouped(metrics, {"w": "weights", "b": "biases"})
    >>> g = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([100.0])}
    >>> delta = worst_case_perturbation(metric, g, g, rho=0.5)
    >>> delta["w"], delta["b"]
    (Array([0.3, 0.4], dtype=float32), Array([0.05], dtype=float32))
    """
    if not metrics:
        raise ValueError("metrics must hold a metric for each label, got none")
    for label, metric in metrics.items():
        check_base(f"metrics[{label!r}]", metric)

    def groups(params: Params) -> Any:
        return _labels_of_leaves(labels, params, metrics)

    def init(params: Params) -> State:
        if not jax.tree.leaves(params):  # nothing to label, as where Optax tries a placeholder
            return {label: metric.init(params) for label, metric in metrics.items()}
        of = groups(params)
        return {label: metric.init(_part(of, label, params)) for label, metric in metrics.items()}

    def ascent(grads: Grads, params: Params, state: State) -> tuple[Ascent, State]:
        of, dtype = groups(params), working_dtype(grads)
        ascents, states = {}, {}
        for label, metric in metrics.items():
            g, theta = _part(of, label, grads), _part(of, label, params)
            ascents[label], states[label] = metric.ascent(g, theta, state[label])

        tangents, dual_norm, length = product_of_balls(list(ascents.values()), dtype)
        tangent = jax.tree.map(lambda label, *x: x[list(metrics).index(label)], of, *tangents)
        return Ascent(tangent, dual_norm, length), states

    return Metric(init, ascent)


def product_of_balls(
    ascents: Sequence[Ascent], dtype: jnp.dtype
) -> tuple[list[Params], jax.Array, jax.Array]:
    """Tangents of a common length, the dual norm of the product, and the length.

    If one dual norm is not finite, all tangents are NaN.
    """
    if not ascents:
        return [], jnp.zeros((), dtype), jnp.ones((), dtype)
    # The largest number over the number of balls is as far as the sum stays in range.
    norms = jnp.stack([a.dual_norm.astype(dtype) for a in ascents])
    total = jnp.sum(jnp.minimum(norms, jnp.finfo(dtype).max / len(ascents)))
    finite = jax.lax.stop_gradient((1 + total) / (1 + total))  # one, or NaN for all

    lengths = jnp.stack([jnp.asarray(a.length, dtype) for a in ascents])
    shortest = jax.lax.stop_gradient(jnp.min(lengths))  # so that no tangent grows
    factors = finite * shortest / lengths
    tangents = [tree_scale(factor, a.tangent) for factor, a in zip(factors, ascents, strict=True)]
    return tangents, total, shortest


def _labels_of_leaves(labels: Labels, params: Params, metrics: Mapping[Hashable, Metric]) -> Any:
    tree = labels(params) if callable(labels) else labels
    of = broadcast_prefix("labels must be a tree of labels", tree, params)
    for label in jax.tree.leaves(of):
        if label not in metrics:
            known = ", ".join(map(repr, metrics))
            raise ValueError(f"the label {label!r} has no metric; there are those of {known}")
    return of


def _part(of: Any, label: Hashable, tree: Any) -> Any:
    """`tree` with None for leaves of other groups."""
    return jax.tree.map(lambda own, leaf: leaf if own == label else None, of, tree)
