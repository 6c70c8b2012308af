"""The sharpness-aware gradient as a drop-in for `jax.value_and_grad`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from monge_sam_jax._core.batches import part_of_batch
from monge_sam_jax._core.checks import check_fraction
from monge_sam_jax._core.masks import check_mask
from monge_sam_jax.descent import Descent
from monge_sam_jax.diagnostics import no_diagnostics
from monge_sam_jax.metrics import Grads, Params
from monge_sam_jax.perturbation import (
    AxisName,
    Mask,
    MetricOrFunction,
    check_ball,
    check_slots,
    fresh_states,
    robust_gradient_when,
)

__all__ = ["sharpness_aware_value_and_grad"]
__dir__ = __all__.copy


def sharpness_aware_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    metric: MetricOrFunction,
    rho: chex.Numeric,
    ascent: optax.GradientTransformation | None = None,
    descent: Descent | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    mask: Mask = None,
    when: bool | jax.Array = True,
    diagnostics: bool = False,
    measure: bool = False,
    widen_params: bool = False,
    axis_name: AxisName | None = None,
    sync_perturbation: bool = True,
    value_and_grad: Callable[..., Any] = jax.value_and_grad,
    ascent_batch_fraction: float = 1.0,
    batch_axis: int | Sequence[int | None] = 0,
) -> Callable[..., Any]:
    r"""Value of a loss, and its gradient at the worst-case perturbation of the params.

    .. math::
        \big(\ell(\theta), \nabla \ell(\theta + \delta^*)\big), \qquad
        \delta^* = \rho \, \frac{G^{-1} g}{\sqrt{g^\top G^{-1} g}}, \quad g = \nabla \ell(\theta)
        \qquad \text{(eqs. 5 and 8)}

    For any training loop and any optimizer. The value and the auxiliary output are those of the
    first pass, at theta: report this loss, and keep these running statistics.

    Args:
      loss_fn: function of the params and other arguments, positional or by name, that returns a
        scalar, or (scalar, aux).
      metric: the metric G, without a state.
      rho: radius of the ball in the metric's units, a scalar. A traced value is not checked.
      ascent: as in `sharpness_aware`, without a state.
      descent: as in `sharpness_aware`, without a state.
      argnums: positions of the arguments that are differentiated, and perturbed together, as in
        `jax.value_and_grad`.
      has_aux: whether `loss_fn` returns (scalar, aux).
      mask: as in `sharpness_aware`, over the differentiated argument, or the tuple of them.
      when: whether to perturb, a bool that may be traced, such as `step >= 9000`: where it is not,
        the gradient is the ordinary one, for the price of one, and the diagnostics are zeros. The
        conditional that a traced one takes makes the gradients of convolutions slow on CPU.
      diagnostics: whether to append a `Diagnostics` to what is returned.
      measure: whether it is a `MeasuredDiagnostics`.
      widen_params: as in `sharpness_aware`.
      axis_name: as in `sharpness_aware`; the gradient and the diagnostics are averaged over the
        axis, value and aux are the device's own.
      sync_perturbation: as in `sharpness_aware`.
      value_and_grad: what differentiates, in both passes: a function of the signature of
        `jax.value_and_grad`, such as `loss_scaled(scale)` or `accumulated(num_microbatches)`.
      ascent_batch_fraction: the part of the batch, above 0, on which the first pass is made. The
        perturbation, value and aux are then of those samples alone, and cheaper. Their gradient is
        longer than that of the batch, so the perturbation of a Monge metric is shorter.
      batch_axis: the axis of the samples in all arrays of the other arguments; or one for each
        other positional argument, None for one that the first pass gets whole, and 0 for keyword
        arguments then. Unused where the fraction is one.

    Returns:
      A function of the arguments of `loss_fn` that returns (value, gradient), ((value, aux),
      gradient) if has_aux, and with a third part, the diagnostics, if asked for. The gradient is as
      `jax.value_and_grad` would give it, also for complex params (the perturbation ascends).

    Raises:
      TypeError: metric is no `Metric`, rho no real number, or loss_fn no function.
      ValueError: rho is negative, NaN or infinite, or ascent_batch_fraction not in (0, 1]; at a
        call, an array has no batch_axis, differs in length from another along it, or looks like a
        random key.

    References:
      Jacobsen and Arvanitidis, Monge SAM, eqs. 5, 8 and 9.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import euclidean, sharpness_aware_value_and_grad
    >>> def loss_fn(params, scale):
    ...     return scale * jnp.sum(params**2)
    >>> value_and_grad = sharpness_aware_value_and_grad(loss_fn, metric=euclidean(), rho=0.5)
    >>> value_and_grad(jnp.array([3.0, 4.0]), 1.0)  # 2 * (params + [0.3, 0.4])
    (Array(25., dtype=float32), Array([6.6, 8.8], dtype=float32))
    """
    robust_result = memoryless(
        metric=metric,
        rho=rho,
        ascent=ascent,
        descent=descent,
        mask=mask,
        when=when,
        diagnostics=diagnostics,
        measure=measure,
        widen_params=widen_params,
        axis_name=axis_name,
        sync_perturbation=sync_perturbation,
    )
    check_fraction("ascent_batch_fraction", ascent_batch_fraction, zero=False, one=True)
    if ascent_batch_fraction < 1 and when is not True:
        raise ValueError(
            "with ascent_batch_fraction, steps without a perturbation would descend along the "
            "gradient of a part of the batch: leave when out, and take turns with "
            "jax.value_and_grad in a jax.lax.cond of your own"
        )
    differentiate = value_and_grad(loss_fn, argnums=argnums, has_aux=has_aux)

    def differentiate_on_part(*args: Any, **kwargs: Any) -> Any:
        differentiated = [argnums] if isinstance(argnums, int) else argnums
        positions = {i % len(args) for i in differentiated}
        others = [i for i in range(len(args)) if i not in positions]
        parts, named = part_of_batch(
            ascent_batch_fraction, "batch_axis", batch_axis, [args[i] for i in others], kwargs
        )
        return differentiate(*_replace(args, others, parts), **named)

    def robust_value_and_grad(*args: Any, **kwargs: Any) -> Any:
        first_pass = differentiate if ascent_batch_fraction == 1 else differentiate_on_part
        value, grads = first_pass(*args, **kwargs)

        def grad_fn(params: Params) -> Grads:
            return differentiate(*_replace(args, argnums, params), **kwargs)[1]

        params = args[argnums] if isinstance(argnums, int) else tuple(args[i] for i in argnums)
        return robust_result(value, grads, grad_fn, params)

    return robust_value_and_grad


def memoryless(
    *,
    metric: MetricOrFunction,
    rho: chex.Numeric,
    ascent: optax.GradientTransformation | None,
    descent: Descent | None,
    mask: Mask,
    when: bool | jax.Array,
    diagnostics: bool,
    measure: bool,
    **options: Any,
) -> Callable[..., Any]:
    """What all functions in place of a `value_and_grad` do after the first pass.

    Arguments and errors are those of `sharpness_aware_value_and_grad`. What is returned takes
    (value, grads, grad_fn, params), with gradients as JAX gives them, and returns what such a
    function returns.
    """
    check_ball(metric, rho, schedule_allowed=False)
    check_slots(ascent, descent)
    check_mask(mask)

    def robust_result(
        value: Any, grads: Grads, grad_fn: Callable[[Params], Grads], params: Params
    ) -> Any:
        robust = robust_gradient_when(
            when,
            lambda params: conjugate(grad_fn(params)),
            conjugate(grads),
            params,
            metric=metric,
            ascent=ascent,
            descent=descent,
            states=fresh_states(metric, ascent, descent, mask, params),
            last=no_diagnostics(measure=measure),
            rho=rho,
            mask=mask,
            measure=measure,
            **options,
        )
        result = (value, conjugate(robust.grads))
        return (*result, robust.diagnostics) if diagnostics else result

    return robust_result


def conjugate(grads: Grads) -> Grads:
    """Between JAX's gradient of a complex param and the direction of ascent."""
    return jax.tree.map(jnp.conj, grads)


def _replace(args: tuple[Any, ...], argnums: int | Sequence[int], params: Any) -> list[Any]:
    replaced = list(args)
    if isinstance(argnums, int):
        replaced[argnums] = params
    else:
        for position, argument in zip(argnums, params, strict=True):
            replaced[position] = argument
    return replaced
