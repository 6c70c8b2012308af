"""Functional SAM: a perturbation of the model alone, not of the loss of its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from monge_sam_jax.descent import Descent
from monge_sam_jax.gradients import memoryless
from monge_sam_jax.metrics import Grads, Params
from monge_sam_jax.perturbation import AxisName, Mask, MetricOrFunction

__all__ = ["functional_sam_value_and_grad"]
__dir__ = __all__.copy


def functional_sam_value_and_grad(
    model_fn: Callable[..., Any],
    loss_fn: Callable[..., Any],
    *,
    metric: MetricOrFunction,
    rho: chex.Numeric,
    ascent: optax.GradientTransformation | None = None,
    descent: Descent | None = None,
    has_aux: bool = False,
    mask: Mask = None,
    when: bool | jax.Array = True,
    diagnostics: bool = False,
    measure: bool = False,
    widen_params: bool = False,
    axis_name: AxisName | None = None,
    sync_perturbation: bool = True,
) -> Callable[..., Any]:
    r"""Value of a loss of a model's outputs, and its gradient with the model alone perturbed.

    .. math::
        \Big( L(f(\theta)), \; J(\theta + \delta^*)^\top \nabla L(f(\theta)) \Big), \qquad
        \delta^* = \rho \, \frac{G^{-1} g}{\sqrt{g^\top G^{-1} g}}, \quad
        g = J(\theta)^\top \nabla L(f(\theta))

    with the outputs f (the logits) and their Jacobian J. SAM takes the loss's gradient at the
    perturbed outputs too, :math:`\nabla L(f(\theta + \delta^*))`. To first order in delta, with
    :math:`H_L` the loss's Hessian by the outputs,

    .. math::
        \text{SAM} - g = J^\top H_L J \, \delta^* + \sum_k \frac{\partial L}{\partial f_k}
                         \nabla^2 f_k \, \delta^*, \qquad \text{here the sum alone.}

    The first term is what SAM can lower by the outputs' size alone, as by a larger norm of the
    logits; Singh et al. find that it dominates in language models, and SAM of no use there. What
    is left vanishes for a model that is linear in its params, and where the loss's gradient does,
    as on samples that are learnt by heart; and what is followed is no gradient of any function in
    general. Where the loss is linear in the outputs, it is SAM.

    The cost is that of two passes through the model, as SAM's, less the perturbed outputs and
    their loss; the loss's gradient by the outputs is kept in between, an array of their size.

    Args:
      model_fn: function of the params and other arguments, positional or by name, that returns the
        outputs, an array or a tree of arrays; or (outputs, aux).
      loss_fn: function of the outputs and the same other arguments that returns a scalar. It does
        not see the params: penalties of these go into the optimizer, as weight decay does.
      metric: the metric G, without a state.
      rho: radius of the ball in the metric's units, a scalar. A traced value is not checked.
      ascent: as in `sharpness_aware`, without a state.
      descent: as in `sharpness_aware`, without a state.
      has_aux: whether `model_fn` returns (outputs, aux).
      mask: as in `sharpness_aware`, over the params.
      when: as in `sharpness_aware_value_and_grad`.
      diagnostics: whether to append a `Diagnostics` to what is returned.
      measure: whether it is a `MeasuredDiagnostics`; its curvature is that of the sum above.
      widen_params: as in `sharpness_aware`; `model_fn` must take such params.
      axis_name: as in `sharpness_aware`; the gradient and the diagnostics are averaged over the
        axis, value and aux are the device's own.
      sync_perturbation: as in `sharpness_aware`.

    Returns:
      A function of the arguments of `model_fn` that returns (value, gradient), ((value, aux),
      gradient) if has_aux, and with a third part, the diagnostics, if asked for. Value and aux are
      those at theta. The gradient is in the convention of `jax.value_and_grad`, also for complex
      params (the perturbation ascends).

    Raises:
      TypeError: metric is no `Metric`, or rho no real number; at a call, the outputs hold no arrays
        or an array that is not of floats or complex numbers.
      ValueError: rho is negative, NaN or infinite.

    References:
      Singh, Mobahi, Agarwala and Dauphin, Avoiding spurious sharpness minimization broadens
      applicability of SAM, 2025.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import euclidean, functional_sam_value_and_grad
    >>> def model_fn(params, x):
    ...     return params[0] * params[1] * x
    >>> def loss_fn(outputs, x):
    ...     return outputs**2
    >>> fn = functional_sam_value_and_grad(model_fn, loss_fn, metric=euclidean(), rho=0.5)
    >>> fn(jnp.array([1.0, 1.0]), 2.0)  # J = 2 * (params + 0.5 / sqrt(2)), the loss's gradient is 4
    (Array(4., dtype=float32), Array([10.828427, 10.828427], dtype=float32))
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

    def functional_value_and_grad(params: Params, *args: Any, **kwargs: Any) -> Any:
        def model_at(theta: Params) -> Any:
            outputs = model_fn(theta, *args, **kwargs)
            return outputs if has_aux else (outputs, None)

        outputs, pullback, aux = jax.vjp(model_at, params, has_aux=True)
        _check_outputs(outputs)
        value, cotangent = jax.value_and_grad(loss_fn)(outputs, *args, **kwargs)

        def grad_fn(perturbed: Params) -> Grads:
            outputs, pullback, _ = jax.vjp(model_at, perturbed, has_aux=True)
            same = jax.tree.map(lambda c, output: c.astype(output.dtype), cotangent, outputs)
            return pullback(same)[0]

        grads = pullback(cotangent)[0]
        return robust_result((value, aux) if has_aux else value, grads, grad_fn, params)

    return functional_value_and_grad


def _check_outputs(outputs: Any) -> None:
    """Raises TypeError unless a loss can be differentiated with respect to the outputs."""
    leaves = jax.tree.leaves_with_path(outputs)
    if not leaves:
        raise TypeError(
            f"model_fn must return the outputs, an array or a tree of arrays, got {outputs!r}; "
            "does it lack a return statement?"
        )
    for path, leaf in leaves:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"the output{jax.tree_util.keystr(path)} of model_fn has dtype {dtype.name}, and "
                "the loss is differentiated by all of them: return it as aux, with has_aux=True, "
                "or compute it in loss_fn from the batch"
            )
