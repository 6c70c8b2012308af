"""What the perturbation of a step looked like."""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from monge_sam_jax._core.numerics import (
    ScaledNorm,
    bounded_product,
    bounded_quotient,
    euclidean_norm,
    inner_product,
    scaled_norm,
)
from monge_sam_jax.metrics import Ascent, Grads, Params

__all__ = ["Diagnostics", "MeasuredDiagnostics", "get_diagnostics"]
__dir__ = __all__.copy


class Diagnostics(NamedTuple):
    r"""Float32 scalars over the perturbed leaves, that come with the norm the step needs anyway.

    They are constants to differentiation.

    Attributes:
      grad_norm: :math:`\|g\|_2` of the first gradient, in units of loss per param.
      dual_norm: :math:`\|a\|_{G^{-1}}`, where a is g, or what `ascent` makes of it.
      perturbation_norm: :math:`\|\delta^*\|_2`, in units of the params, before any rounding.
      effective_radius: perturbation_norm / grad_norm, for SAM and M-SAM the paper's
        :math:`\tilde\rho` (sections 2.1 and 3.2); zero where the gradient is zero.
      predicted_sharpness: :math:`g^\top \delta^*`, in units of the loss; without an `ascent`,
        :math:`\rho \|g\|_{G^{-1}}`.
    """

    grad_norm: jax.Array
    dual_norm: jax.Array
    perturbation_norm: jax.Array
    effective_radius: jax.Array
    predicted_sharpness: jax.Array


class MeasuredDiagnostics(NamedTuple):
    r"""`Diagnostics`, and what takes another pass over params and gradients.

    Attributes:
      grad_norm: as in `Diagnostics`, like the next four.
      dual_norm: see there.
      perturbation_norm: see there.
      effective_radius: see there.
      predicted_sharpness: see there.
      cosine: cosine of the angle between the gradients g at theta and g' at theta + delta.
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


def no_diagnostics(*, measure: bool = False) -> Any:
    """Those of no perturbation: zeros."""
    kind = MeasuredDiagnostics if measure else Diagnostics
    return kind(*(jnp.zeros((), jnp.float32) for _ in kind._fields))


def get_diagnostics(opt_state: chex.ArrayTree) -> Diagnostics | MeasuredDiagnostics:
    """The diagnostics of the sharpness-aware transformation somewhere inside an Optax state.

    Args:
      opt_state: state of the transformation, or of whatever was built around it: `optax.chain`,
        `optax.inject_hyperparams`, a Flax training state, any pytree.

    Returns:
      The `Diagnostics` of the last perturbation, or `MeasuredDiagnostics` with measure=True.

    Raises:
      ValueError: there is no such transformation in the state, or more than one.

    >>> import jax, optax
    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import get_diagnostics, sam
    >>> tx = optax.chain(sam(), optax.adam(1e-3))
    >>> get_diagnostics(tx.init(jnp.ones(2))).grad_norm
    Array(0., dtype=float32)
    """

    def is_diagnostics(x: Any) -> bool:
        return isinstance(x, (Diagnostics, MeasuredDiagnostics))

    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_diagnostics) if is_diagnostics(x)]
    if len(found) != 1:
        raise ValueError(
            f"expected one sharpness-aware state in the optimizer's state, found {len(found)}: "
            "there is one if sam, monge_sam or the like is in the chain that made the state. Of "
            "several optimizers give the state of one; in one optimizer a second transformation "
            "is a mistake, see monge_sam_jax.grouped"
        )
    return found[0]


def diagnose(
    g: ScaledNorm,
    steepest: Ascent,
    multiple: jax.Array,
    rho: chex.Numeric,
    *,
    isotropic: bool,
    transformed: bool,
) -> Diagnostics:
    """Diagnostics of delta* = multiple * tangent of the steepest ascent.

    `transformed` says whether that is one of another vector than the gradient g.
    """
    grad_norm = g.norm
    dtype = grad_norm.dtype
    v = jax.lax.stop_gradient(steepest.tangent)
    # A multiple of g has entries of order one, and is as long as its metric says: what XLA computed
    # for that it does not compute again. Others may be short.
    is_along_g = isotropic and not transformed
    norm = euclidean_norm if is_along_g else lambda v, dtype: jnp.sqrt(inner_product(v, v, dtype))
    tangent_norm, k = norm(v, dtype), multiple.astype(dtype)
    nonzero = grad_norm != 0
    length = bounded_product(tangent_norm, k)
    perturbation_norm = jnp.where(nonzero, length, 0.0)
    if transformed:
        slope = inner_product(g.unit, v, dtype)
        rise = jnp.sign(slope) * bounded_quotient(bounded_product(jnp.abs(slope), k), g.scale)
    else:
        rise = bounded_product(steepest.dual_norm.astype(dtype), jnp.asarray(rho, dtype))
    return Diagnostics(
        grad_norm=_report(grad_norm),
        dual_norm=_report(steepest.dual_norm),
        perturbation_norm=_report(perturbation_norm),
        effective_radius=_report(
            bounded_quotient(perturbation_norm, jnp.where(nonzero, grad_norm, 1.0))
        ),
        predicted_sharpness=_report(rise),
    )


def add_measurements(
    basic: Diagnostics, first: Grads, second: Grads, delta: Params, realised: Params
) -> MeasuredDiagnostics:
    """Adds to `basic` what the two gradients and the perturbation tell; 0 in place of 0 / 0."""
    a, b, d = scaled_norm(first), scaled_norm(second), scaled_norm(delta)
    dtype = a.unit_norm.dtype
    cosine = inner_product(a.unit, b.unit, dtype) / (a.unit_norm * b.unit_norm)
    change = scaled_norm(jax.tree.map(jnp.subtract, second, first))
    changed = change.inverse_scale != 0
    curvature = inner_product(d.unit, change.unit, dtype) / d.unit_norm**2
    scale = bounded_quotient(d.inverse_scale, jnp.where(changed, change.inverse_scale, 1.0))
    curvature = jnp.sign(curvature) * bounded_product(scale, jnp.abs(curvature))
    return MeasuredDiagnostics(
        *basic, _report(cosine), _report(curvature), _report(scaled_norm(realised).norm)
    )


def _report(x: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(x).astype(jnp.float32)
