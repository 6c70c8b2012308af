"""The worst-case perturbation, and the gradient there: the core that all entry points share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

from monge_sam_jax._core.checks import (
    broadcast_prefix,
    check_nonnegative,
    check_params_and_gradient,
    check_second_gradient,
)
from monge_sam_jax._core.collectives import average_varying, check_varying, make_varying
from monge_sam_jax._core.injection import NOT_A_SCHEDULE
from monge_sam_jax._core.numerics import as_arrays, scaled_norm, tree_scale, widen
from monge_sam_jax.diagnostics import (
    Diagnostics,
    MeasuredDiagnostics,
    add_measurements,
    diagnose,
)
from monge_sam_jax.metrics import Ascent, Grads, Metric, Params, State, stateless

__all__ = ["AxisName", "Mask", "When", "worst_case_perturbation"]
__dir__ = __all__.copy

# A tree of bools, a prefix of the params; or a function of the params that returns one.
Mask: TypeAlias = Any
AxisName: TypeAlias = Hashable
When: TypeAlias = Callable[[jax.Array], "bool | jax.Array"]  # of the number of updates so far


def check_ball(metric: Any, rho: Any, *, schedule_allowed: bool) -> None:
    """Raises unless metric and rho describe a ball; traced values and schedules pass unchecked.

    Raises:
      TypeError: metric is no `Metric`, or rho no real number.
      ValueError: rho is negative, NaN, infinite or not a scalar.
    """
    if not isinstance(metric, Metric):
        raise TypeError(f"metric must be a Metric such as monge(), got {metric!r}")
    if not callable(rho):
        check_nonnegative("rho", rho)
    elif not schedule_allowed:
        raise TypeError("rho must be a number; a schedule needs the count of sharpness_aware")


def check_mask(mask: Mask) -> None:
    """Raises ValueError if the mask is a single leaf that chooses nothing."""
    if mask is None or callable(mask) or not jax.tree_util.all_leaves([mask]):
        return
    if not (isinstance(mask, (bool, np.bool_)) and mask):
        raise ValueError(
            f"mask={mask!r} leaves nothing to perturb: it must be a tree of bools, or a function "
            f"of the params that returns one. {NOT_A_SCHEDULE}"
        )


def check_when(when: Any) -> None:
    """Raises TypeError unless it is None or a function."""
    if when is not None and not callable(when):
        raise TypeError(f"when must be a function of the count, got {when!r}. {NOT_A_SCHEDULE}")


def worst_case_perturbation(
    metric: Metric, grads: Grads, params: Params, rho: chex.Numeric
) -> Params:
    r"""The first-order worst step inside the ball of radius rho around the params.

    .. math::
        \delta^* = \arg\max_{\delta^\top G \delta \le \rho^2} g^\top \delta
                 = \rho \, \frac{G^{-1} g}{\sqrt{g^\top G^{-1} g}}
        \qquad \text{(eqs. 5 and 8)}

    Args:
      metric: the metric G; its state is a fresh one.
      grads: g, direction of ascent of the loss at the params (for complex leaves, the conjugate of
        `jax.grad`); a tree of the form of the params, of any float or complex dtype.
      params: theta.
      rho: radius of the ball in the metric's units; a scalar. A traced value is not checked.

    Returns:
      delta*, a tree of the form of the params, in float32 or wider. It is zero where the gradient
      is zero, and NaN everywhere if the gradient is not finite anywhere. A length below the
      smallest normal number counts as zero.

    Raises:
      TypeError: rho is no real number, or a gradient is float0 or integer.
      ValueError: rho is negative, NaN or infinite, or params and gradient differ in form.

    References:
      Jacobsen and Arvanitidis, Monge SAM, eqs. 5 and 8.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import euclidean
    >>> worst_case_perturbation(euclidean(), {"w": jnp.array([3.0, 4.0])}, {"w": jnp.zeros(2)}, 0.5)
    {'w': Array([0.3, 0.4], dtype=float32)}
    """
    check_nonnegative("rho", rho)
    check_params_and_gradient(params, grads)
    params, grads = as_arrays((params, grads))
    ascent, _ = metric.ascent(grads, params, metric.init(params))
    return tree_scale(ascent_multiple(ascent, rho), ascent.tangent)


def ascent_multiple(ascent: Ascent, rho: chex.Numeric) -> jax.Array:
    """The factor k in delta* = k v, where v is the tangent of the ascent."""
    dtype = ascent.dual_norm.dtype
    return jnp.asarray(rho, dtype) / jnp.asarray(ascent.length, dtype)


class RobustGradient(NamedTuple):
    """The gradient at the perturbed params, and what was learnt on the way."""

    grads: Grads
    metric_state: State
    diagnostics: Diagnostics | MeasuredDiagnostics


def robust_gradient_when(
    when: bool | jax.Array,
    grad_fn: Callable[[Params], Grads],
    grads: Grads,
    params: Params,
    *,
    metric_state: State,
    last: Diagnostics | MeasuredDiagnostics,
    axis_name: AxisName | None = None,
    **options: Any,
) -> RobustGradient:
    """`robust_gradient` where `when` is true; elsewhere `grads`, for the price of one gradient.

    `last` are the diagnostics that it keeps then.
    """

    def perturb() -> RobustGradient:
        return robust_gradient(
            grad_fn, grads, params, metric_state=metric_state, axis_name=axis_name, **options
        )

    def pass_on() -> RobustGradient:
        _check_first(params, grads, axis_name)
        own = as_arrays(grads)
        mean = own if axis_name is None else jax.lax.pmean(own, axis_name)
        return RobustGradient(mean, metric_state, last)

    if isinstance(when, (bool, np.bool_)):
        return perturb() if when else pass_on()
    return jax.lax.cond(when, perturb, pass_on)


def robust_gradient(
    grad_fn: Callable[[Params], Grads],
    grads: Grads,
    params: Params,
    *,
    metric: Metric,
    metric_state: State,
    rho: chex.Numeric,
    mask: Mask = None,
    measure: bool = False,
    widen_params: bool = False,
    axis_name: AxisName | None = None,
    sync_perturbation: bool = True,
) -> RobustGradient:
    """The gradient at theta + delta*, with delta* from `grads`, the gradient at theta.

    `sharpness_aware` explains the arguments. With `axis_name`, `grads` is what this device found
    for its share of the batch, and what is returned is averaged over the axis.
    """
    _check_first(params, grads, axis_name)
    params, grads = as_arrays((params, grads))
    if axis_name is not None and sync_perturbation:
        grads = jax.lax.pmean(grads, axis_name)

    chosen = broadcast_mask(mask, params)
    theta, g = select(chosen, params), select(chosen, grads)
    ascent, metric_state = metric.ascent(g, theta, metric_state)
    k = ascent_multiple(ascent, rho)
    delta = tree_scale(k, ascent.tangent)

    def perturb(p: jax.Array, d: jax.Array) -> jax.Array:
        wide = widen(p, d.dtype) + d
        return wide if widen_params else wide.astype(p.dtype)

    perturbed = jax.tree.map(perturb, theta, delta)
    second = _evaluate(grad_fn, merge(chosen, perturbed, params), grads, axis_name)
    if axis_name is not None and sync_perturbation:
        second = jax.lax.pmean(second, axis_name)

    # A second gradient can be finite at NaN params (relu passes on zeros), so a first gradient that
    # is not finite has to be passed on here: `finite` is exactly one, or NaN.
    g_norm = scaled_norm(g)
    finite = jax.lax.stop_gradient(g_norm.unit_norm / g_norm.unit_norm)
    second = jax.tree.map(lambda s: s * finite.astype(s.dtype), second)

    diagnostics: Diagnostics | MeasuredDiagnostics
    diagnostics = basic = diagnose(g_norm.norm, ascent, k, rho, isotropic=metric.isotropic)
    if measure:
        realised = jax.tree.map(
            lambda q, p, d: widen(q, d.dtype) - widen(p, d.dtype), perturbed, theta, delta
        )
        diagnostics = add_measurements(basic, g, select(chosen, second), delta, realised)
    if axis_name is not None:
        if sync_perturbation:  # equal on all devices, but varying for JAX if the params are
            diagnostics = average_varying(diagnostics, axis_name)
        else:
            second, diagnostics = jax.lax.pmean((second, diagnostics), axis_name)
    return RobustGradient(second, metric_state, diagnostics)


def _check_first(params: Params, grads: Grads, axis_name: AxisName | None) -> None:
    check_params_and_gradient(params, grads)
    if axis_name is not None:
        check_varying(grads, axis_name, source="the gradient given to update")


def _evaluate(
    grad_fn: Callable[[Params], Grads], perturbed: Params, first: Grads, axis_name: AxisName | None
) -> Grads:
    """grad_fn(perturbed), checked against the first gradient and in its dtypes."""
    if axis_name is not None:
        perturbed = make_varying(perturbed, axis_name)
    second = grad_fn(perturbed)
    check_second_gradient(first, second)
    if axis_name is not None:
        check_varying(second, axis_name, source="the gradient that grad_fn returned")
    return jax.tree.map(lambda f, s: s.astype(f.dtype), first, second)


def broadcast_mask(mask: Mask, params: Params) -> Any:
    """A bool for every leaf of the params, or None where all of them are perturbed."""
    if mask is None:
        return None
    tree = _evaluate_mask(mask, params) if callable(mask) else mask

    chosen = broadcast_prefix("mask must be a tree of bools", tree, params)
    for leaf in jax.tree.leaves(chosen):
        if not isinstance(leaf, (bool, np.bool_)):
            raise TypeError(f"the leaves of mask must be bools, got {leaf!r}")
    return jax.tree.map(bool, chosen)


def _evaluate_mask(mask: Callable[..., Any], params: Params) -> Any:
    try:
        inspect.signature(mask).bind(params)
    except TypeError as error:
        raise TypeError(
            f"mask must be a function of the params that returns a tree of bools, but {error}. One "
            "of path and leaf is mapped over them: "
            "mask=lambda params: jax.tree.map_with_path(function, params)"
        ) from None
    except ValueError:  # some callables written in C have no signature
        pass
    return mask(params)


def chosen_leaves(mask: Mask, params: Params) -> Any:
    """A bool for every leaf of the params: whether it is perturbed."""
    # Optax looks for what is like the params in a state by `init` on a placeholder without leaves.
    return broadcast_mask(True if mask is None or not jax.tree.leaves(params) else mask, params)


def init_metric(metric: Metric, mask: Mask, params: Params) -> State:
    """A fresh state of the metric, for the leaves that are perturbed."""
    params = as_arrays(params)
    return metric.init(select(chosen_leaves(mask, params), params))


def fits_metric(metric: Metric, mask: Mask, params: Params, metric_state: State) -> bool:
    """Whether the state is of the form that the metric would make."""
    if metric.init is stateless:
        expected = stateless(params)
    else:
        expected = jax.eval_shape(lambda p: init_metric(metric, mask, p), params)
    structure: Any = jax.tree.structure(expected)
    return structure == jax.tree.structure(metric_state)


def select(chosen: Any, tree: Any) -> Any:
    """`tree` with None at the leaves that are not chosen."""
    if chosen is None:
        return tree
    return jax.tree.map(lambda choose, leaf: leaf if choose else None, chosen, tree)


def merge(chosen: Any, selected: Any, tree: Any) -> Any:
    """`tree` with the chosen leaves taken from `selected`."""
    if chosen is None:
        return selected
    return jax.tree.map(lambda choose, s, leaf: s if choose else leaf, chosen, selected, tree)
