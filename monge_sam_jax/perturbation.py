"""The worst-case perturbation, and the gradient there: the core that all entry points share."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

from monge_sam_jax._checks import (
    check_nonnegative,
    check_params_and_gradient,
    check_second_gradient,
)
from monge_sam_jax._collectives import check_varying, make_varying
from monge_sam_jax._numerics import (
    euclidean_norm,
    inner_product,
    scaled_norm,
    tree_scale,
    widen,
)
from monge_sam_jax.metrics import Ascent, Grads, Metric, Params, State

# A tree of bools, a prefix of the params; or a function of the params that returns one.
Mask: TypeAlias = Any
AxisName: TypeAlias = Hashable


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
    ascent, _ = metric.ascent(grads, params, metric.init(params))
    return tree_scale(_multiple(ascent, rho), ascent.tangent)


def _multiple(ascent: Ascent, rho: chex.Numeric) -> jax.Array:
    """The factor k in delta* = k v, where v is the tangent of the ascent."""
    dtype = ascent.dual_norm.dtype
    return jnp.asarray(rho, dtype) / jnp.asarray(ascent.length, dtype)


class Diagnostics(NamedTuple):
    r"""What the perturbation of a step looked like: float32 scalars over the perturbed leaves.

    They come with the norm that the step needs anyway. Constants to differentiation.

    Attributes:
      grad_norm: :math:`\|g\|_2` of the first gradient, in units of loss per param.
      dual_norm: :math:`\|g\|_{G^{-1}}`.
      perturbation_norm: :math:`\|\delta^*\|_2`, in units of the params, before any rounding.
      effective_radius: perturbation_norm / grad_norm, for SAM and M-SAM the paper's
        :math:`\tilde\rho` (sections 2.1 and 3.2); zero where the gradient is zero.
      predicted_sharpness: :math:`g^\top \delta^* = \rho \|g\|_{G^{-1}}`, in units of the loss.
    """

    grad_norm: jax.Array
    dual_norm: jax.Array
    perturbation_norm: jax.Array
    effective_radius: jax.Array
    predicted_sharpness: jax.Array


class MeasuredDiagnostics(NamedTuple):
    r"""`Diagnostics`, and what takes another pass over params and gradients.

    Attributes:
      grad_norm, dual_norm, perturbation_norm, effective_radius, predicted_sharpness: as in
        `Diagnostics`.
      cosine: cosine of the angle between the gradients at theta and theta + delta.
      curvature: :math:`\delta^\top (g' - g) / \|\delta\|_2^2`, of the loss along delta.
      realised_norm: Euclidean length of the perturbation that was left after rounding to the
        dtype of the params that `grad_fn` got.
    """

    grad_norm: jax.Array
    dual_norm: jax.Array
    perturbation_norm: jax.Array
    effective_radius: jax.Array
    predicted_sharpness: jax.Array
    cosine: jax.Array
    curvature: jax.Array
    realised_norm: jax.Array


class RobustGradient(NamedTuple):
    """The gradient at the perturbed params, and what was learnt on the way."""

    grads: Grads
    metric_state: State
    basic = _diagnose(g_norm.norm, ascent, rho)
    diagnostics: Diagnostics | MeasuredDiagnostics = basic
    if measure:
        realised = jax.tree.map(
            lambda q, p, d: widen(q, d.dtype) - widen(p, d.dtype), perturbed, theta, delta
        )
        measured = _measure(g, _select(chosen, second), delta, realised)
        diagnostics = MeasuredDiagnostics(*basic, *measured)
    diagnostics = jax.tree.map(lambda x: jax.lax.stop_gradient(x).astype(jnp.float32), diagnostics)
    if axis_name is not None and not sync_perturbation:
        second, diagnostics = jax.lax.pmean((second, diagnostics), axis_name)
    return RobustGradient(second, metric_state, diagnostics)


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


def _diagnose(grad_norm: jax.Array, ascent: Ascent, rho: chex.Numeric) -> Diagnostics:
    dtype = grad_norm.dtype
    # For the Euclidean metric this sum of squares is the norm's own, which XLA computes once.
    tangent_norm = euclidean_norm(ascent.tangent, dtype)
    nonzero = grad_norm != 0
    perturbation_norm = jnp.where(nonzero, _multiple(ascent, rho).astype(dtype) * tangent_norm, 0.0)
    return Diagnostics(
        grad_norm=grad_norm,
        dual_norm=ascent.dual_norm,
        perturbation_norm=perturbation_norm,
        effective_radius=perturbation_norm / jnp.where(nonzero, grad_norm, 1.0),
        predicted_sharpness=jnp.asarray(rho, dtype) * ascent.dual_norm.astype(dtype),
    )


def _measure(
    first: Grads, second: Grads, delta: Params, realised: Params
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cosine of the gradients, curvature along delta and realised length; 0 where 0 / 0."""
    a, b, d = scaled_norm(first), scaled_norm(second), scaled_norm(delta)
    dtype = a.unit_norm.dtype
    cosine = inner_product(a.unit, b.unit, dtype) / (a.unit_norm * b.unit_norm)
    change = scaled_norm(jax.tree.map(jnp.subtract, second, first))
    curvature = inner_product(d.unit, change.unit, dtype) / d.unit_norm**2
    changed = change.inverse_scale != 0
    curvature *= d.inverse_scale / jnp.where(changed, change.inverse_scale, 1.0)
    return cosine, curvature, scaled_norm(realised).norm


def _broadcast_mask(mask: Mask, params: Params) -> Any:
    """A bool for every leaf of the params, or None where all of them are perturbed."""
    if mask is None:
        return None
    tree = mask(params) if callable(mask) else mask

    def fill(chosen: Any, subtree: Params) -> Any:
        if not isinstance(chosen, (bool, np.bool_)):
            raise TypeError(f"the leaves of mask must be bools, got {chosen!r}")
        return jax.tree.map(lambda _: bool(chosen), subtree)

    return jax.tree.map(fill, tree, params)


def _select(chosen: Any, tree: Any) -> Any:
    """`tree` with None at the leaves that are not chosen."""
    if chosen is None:
        return tree
    return jax.tree.map(lambda choose, leaf: leaf if choose else None, chosen, tree)


def _merge(chosen: Any, selected: Any, tree: Any) -> Any:
    """`tree` with the chosen leaves taken from `selected`."""
    if chosen is None:
        return selected
    return jax.tree.map(lambda choose, s, leaf: s if choose else leaf, chosen, selected, tree)
