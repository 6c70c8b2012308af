"""A metric out of what an Optax optimizer makes of a gradient."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from monge_sam_jax._core.numerics import (
    bounded_quotient,
    inner_product,
    keep_unless,
    scaled_norm,
    tree_scale,
)
from monge_sam_jax.metrics import Ascent, Grads, Metric, Params, State

__all__ = ["preconditioned"]
__dir__ = __all__.copy


def preconditioned(tx: optax.GradientTransformation) -> Metric:
    r"""The metric whose inverse is an Optax preconditioner.

    .. math::
        G^{-1} g = P g, \qquad \delta^* = \rho \, \frac{P g}{\sqrt{g^\top P g}}, \qquad
        \|g\|_{G^{-1}} = \sqrt{g^\top P g}

    where P g is what tx makes of the gradient, state and params: the ball is long where the
    optimizer takes long steps. P has to be positive, as that of `optax.scale_by_rms`,
    `optax.scale_by_adam` with b1=0 and the like: no learning rate, which is negative, and no
    momentum, by which P g may point down. Where :math:`g^\top P g` is not positive although g and
    P g are not zero there is no such ball, and the perturbation is NaN.

    Args:
      tx: an Optax transformation. It gets the gradient, its own state and the params, every leaf in
        its own dtype, and what it makes of numbers at the ends of their range is its own.

    Returns:
      The metric. Its state is that of tx; a gradient that is not finite leaves it as it was.

    Raises:
      TypeError: tx is no Optax transformation.

    References:
      Jacobsen and Arvanitidis, Monge SAM, eqs. 5 and 8, for any metric G; Kingma and Ba, Adam,
      2015, for the usual preconditioner.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> from monge_sam_jax import preconditioned, worst_case_perturbation
    >>> g = jnp.array([9.0, 16.0])
    >>> metric = preconditioned(optax.scale_by_rms(decay=0.0))  # P = diag(1 / |g|)
    >>> worst_case_perturbation(metric, g, g, rho=0.5)  # signs over the root of 9 + 16
    Array([0.1, 0.1], dtype=float32)
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"tx must be an Optax transformation such as scale_by_rms(), got {tx!r}")

    def ascent(grads: Grads, params: Params, state: State) -> tuple[Ascent, State]:
        scaled, after = tx.update(grads, state, params)
        g, v = scaled_norm(grads), scaled_norm(scaled)
        dtype = jnp.promote_types(g.unit_norm.dtype, v.unit_norm.dtype)
        product = inner_product(g.unit, v.unit, dtype)
        nonzero = (g.inverse_scale != 0) & (v.inverse_scale != 0)
        is_defined = product > 0
        root = jnp.sqrt(jnp.where(is_defined, product, 1.0))
        root = jnp.where(is_defined | ~nonzero, root, jnp.nan)  # also if something is not finite

        roots = jnp.sqrt(g.scale.astype(dtype)), jnp.sqrt(v.scale.astype(dtype))
        norm = bounded_quotient(bounded_quotient(jnp.where(nonzero, root, 0.0), roots[0]), roots[1])
        tangent = tree_scale(jnp.where(nonzero, root / root, 0.0), v.unit)  # zero for g or P g zero
        after = keep_unless(jnp.isfinite(g.unit_norm), after, state)
        return Ascent(tangent, norm, length=root * roots[1] / roots[0]), after

    return Metric(tx.init, ascent)
