"""Loss scaling for float16: one scale for both passes, one update of the scale.

Small gradients of a loss computed in float16 underflow on their way back, so the loss is multiplied
by a scale before differentiation and the gradient divided by it afterwards. That must come before
the perturbation, whose length under the Monge metric depends on the scale of the gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp

from monge_sam_jax._core.checks import check_nonnegative
from monge_sam_jax._core.numerics import widen, working_dtype
from monge_sam_jax.metrics import Grads

__all__ = ["loss_scaled", "update_dynamic_scale"]
__dir__ = __all__.copy

DynamicScale = TypeVar("DynamicScale", bound=Any)  # flax.training.dynamic_scale.DynamicScale


def loss_scaled(
    scale: chex.Numeric, value_and_grad: Callable[..., Any] = jax.value_and_grad
) -> Callable[..., Any]:
    r"""`jax.value_and_grad` with the backward pass at another scale of the loss.

    .. math:: \big(\ell(\theta), \; \tfrac{1}{s} \nabla (s \, \ell)(\theta)\big)

    For the argument `value_and_grad` of `sharpness_aware_value_and_grad`, or by itself for the two
    gradients that a transformation in a chain needs.

    Args:
      scale: s, a positive scalar, best a power of two; it may be traced.
      value_and_grad: what differentiates: `jax.value_and_grad`, or a function of its signature such
        as `flax.nnx.value_and_grad`.

    Returns:
      A function of the signature of `value_and_grad`. The value is unscaled, the gradient too, in
      float32 or wider, so that the division loses nothing. The gradient is not finite where the
      scaled one has overflown.

    Raises:
      TypeError: scale is no real number.
      ValueError: scale is negative, NaN, infinite or no scalar. A traced value is not checked.

    >>> import jax, jax.numpy as jnp
    >>> from monge_sam_jax.loss_scaling import loss_scaled
    >>> def loss_fn(params):  # its gradient, 1e-9, is zero in float16
    ...     return jnp.sum(1e-9 * params.astype(jnp.float16).astype(jnp.float32))
    >>> jax.value_and_grad(loss_fn)(jnp.ones(2))[1]
    Array([0., 0.], dtype=float32)
    >>> 1e9 * loss_scaled(2.0**15)(loss_fn)(jnp.ones(2))[1]
    Array([1.00, 1.00], dtype=float32)
    """
    check_nonnegative("scale", scale)

    def unscale(g: jax.Array) -> jax.Array:
        g = widen(g, working_dtype(g))
        return g / jnp.asarray(scale, g.dtype)

    def scaled_value_and_grad(
        fun: Callable[..., Any], argnums: Any = 0, has_aux: bool = False, **options: Any
    ) -> Callable[..., Any]:
        @functools.wraps(fun)  # NNX reads the signature
        def scaled_loss(*inputs: Any, **named: Any) -> Any:
            output = fun(*inputs, **named)
            value = jnp.asarray(output[0] if has_aux else output)
            dtype = working_dtype(value)
            return jnp.asarray(scale, dtype) * value.astype(dtype), output

        differentiate = value_and_grad(scaled_loss, argnums=argnums, has_aux=True, **options)

        def unscaled_value_and_grad(*inputs: Any, **named: Any) -> Any:
            (_, output), grads = differentiate(*inputs, **named)
            return output, jax.tree.map(unscale, grads)

        return unscaled_value_and_grad

    return scaled_value_and_grad


def update_dynamic_scale(
    dynamic_scale: DynamicScale, grads: Grads
) -> tuple[DynamicScale, jax.Array]:
    """One update of Flax's `DynamicScale` for the two passes of a sharpness-aware step.

    A gradient at the perturbed params is not finite anywhere if the first gradient was not finite
    somewhere, so looking at it is looking at both.

    Args:
      dynamic_scale: a `flax.training.dynamic_scale.DynamicScale`, whose `scale` was given to
        `loss_scaled`.
      grads: the gradient at the perturbed params, unscaled, and averaged over devices if there are
        several.

    Returns:
      The scale for the next step, grown or backed off as by `DynamicScale.value_and_grad`, and
      whether the gradient is finite: if not, keep params and optimizer state as they were.

    >>> import jax.numpy as jnp
    >>> from flax.training.dynamic_scale import DynamicScale
    >>> from monge_sam_jax.loss_scaling import update_dynamic_scale
    >>> dynamic_scale, is_finite = update_dynamic_scale(DynamicScale(), jnp.array([1.0, jnp.inf]))
    >>> dynamic_scale.scale, is_finite
    (Array(32768., dtype=float32, weak_type=True), Array(False, dtype=bool))
    """
    is_finite = jnp.array(True)
    for leaf in jax.tree.leaves(grads):
        is_finite &= jnp.all(jnp.isfinite(leaf))
    scale, steps = dynamic_scale.scale, dynamic_scale.fin_steps
    # Python numbers leave the weak type of Flax's initial scale alone, so that nothing recompiles.
    largest, smallest = float(jnp.finfo(jnp.float32).max), float(dynamic_scale.minimum_scale or 0)
    grow = steps == dynamic_scale.growth_interval
    grown = jnp.minimum(scale * dynamic_scale.growth_factor, largest)
    backed_off = jnp.maximum(scale * dynamic_scale.backoff_factor, smallest)
    updated = dynamic_scale.replace(
        scale=jnp.where(is_finite, jnp.where(grow, grown, scale), backed_off),
        fin_steps=jnp.where(grow | ~is_finite, 0, steps + 1),
    )
    return updated, is_finite
