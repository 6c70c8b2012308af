"""The named methods as Optax transformations: `sharpness_aware` with a metric chosen."""

from __future__ import annotations

from typing import TypedDict, Unpack

import chex
import jax
import optax

from monge_sam_jax._core.checks import check_positive
from monge_sam_jax._core.injection import spelling_out
from monge_sam_jax.descent import Descent
from monge_sam_jax.metrics import adaptive, diagonal_fisher, euclidean, monge
from monge_sam_jax.perturbation import AxisName, Mask
from monge_sam_jax.slots import GradFn, SharpnessAwareState, sharpness_aware
from monge_sam_jax.when import When

__all__ = [
    "GradFn",
    "SharpnessAwareState",
    "adaptive_sam",
    "fisher_sam",
    "monge_sam",
    "sam",
    "sharpness_aware",
]
__dir__ = __all__.copy


class Options(TypedDict, total=False):
    """Options that the named builders share with `sharpness_aware`, which explains them."""

    ascent: optax.GradientTransformation | None
    descent: Descent | None
    mask: Mask
    axis_name: AxisName | None
    sync_perturbation: bool
    period: int
    when: When | None
    measure: bool
    widen_params: bool


_spell_out_options = spelling_out(Options.__annotations__, sharpness_aware)


@_spell_out_options
def sam(
    grad_fn: GradFn | None = None,
    *,
    rho: chex.Numeric | optax.Schedule = 0.05,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimisation: `sharpness_aware` with the `euclidean` metric.

    .. math:: \delta^* = \rho \, g / \|g\|_2 \qquad \text{(eq. 3)}

    Args:
      grad_fn: params -> gradient of the loss, as in `sharpness_aware`.
      rho: Euclidean length of the perturbation, in units of the params; a scalar or a schedule.
      **options: ascent, descent, mask, axis_name, sync_perturbation, period, when, measure and
        widen_params of `sharpness_aware`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError, ValueError: as `sharpness_aware`.

    References:
      Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, 2020.

    >>> import jax, optax, jax.numpy as jnp
    >>> from monge_sam_jax import sam
    >>> grad_fn = jax.grad(lambda params: jnp.sum(params**2))
    >>> tx = optax.chain(sam(grad_fn, rho=0.5), optax.sgd(1.0))
    >>> params = jnp.array([3.0, 4.0])
    >>> updates, state = tx.update(grad_fn(params), tx.init(params), params)
    >>> updates  # -2 * (params + [0.3, 0.4])
    Array([-6.6, -8.8], dtype=float32)
    """
    return sharpness_aware(grad_fn, metric=euclidean(), rho=rho, **options)


@_spell_out_options
def monge_sam(
    grad_fn: GradFn | None = None,
    *,
    rho: chex.Numeric | optax.Schedule = 0.05,
    alpha: chex.Numeric = 1.0,
    loss_budget: chex.Numeric | None = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Monge SAM: `sharpness_aware` with the `monge` metric over the Euclidean one.

    .. math::
        \delta^* = \frac{1}{\sqrt{1 + \alpha^2 \|g\|_2^2}} \cdot \frac{\rho}{\|g\|_2} \, g
        \qquad \text{(eq. 9, where } \alpha = 1)

    Unlike SAM's, the perturbation depends on the scale of the loss: use the mean over the batch,
    unscale a scaled loss, and clip only afterwards.

    With a loss budget :math:`\sigma` in place of alpha, alpha is :math:`\rho / \sigma`, and

    .. math:: \|\delta^*\|^{-2} = \rho^{-2} + (\|g\|_2 / \sigma)^2

    the smooth minimum of SAM's length and of :math:`\sigma / \|g\|_2`, at which the loss rises by
    :math:`\sigma` to first order: no perturbation is longer than rho, and none raises the loss by
    more than the budget, to first order. Where the loss is multiplied by a constant, so is the
    budget, and the perturbations stay as they were.

    Args:
      grad_fn: params -> gradient of the loss, as in `sharpness_aware`.
      rho: length of the perturbation on the loss surface, and so the most that its Euclidean length
        can be, in units of the params; a scalar or a schedule.
      alpha: height of the loss surface, in 1 / (units of the loss): 0 is SAM, 1 the paper's M-SAM,
        and the larger, the closer to gradient descent.
      loss_budget: sigma, in place of alpha: the rise of the loss that a perturbation may reach, in
        units of the loss; positive. A traced value is not checked.
      **options: ascent, descent, mask, axis_name, sync_perturbation, period, when, measure and
        widen_params of `sharpness_aware`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError, ValueError: as `sharpness_aware` and `monge`; loss_budget is not positive, or given
        beside another alpha than one.

    References:
      Jacobsen and Arvanitidis, Monge SAM, eq. 9.

    >>> import jax, optax, jax.numpy as jnp
    >>> from monge_sam_jax import get_diagnostics, monge_sam
    >>> grad_fn = jax.grad(lambda params: jnp.sum(params**2))
    >>> tx = optax.chain(monge_sam(grad_fn, rho=0.5), optax.sgd(0.1))
    >>> params = jnp.array([0.3, 0.4])
    >>> updates, state = tx.update(grad_fn(params), tx.init(params), params)
    >>> diagnostics = get_diagnostics(state)
    >>> diagnostics.grad_norm, diagnostics.perturbation_norm  # 1 and 0.5 / sqrt(1 + 1^2)
    (Array(1., dtype=float32), Array(0.35355338, dtype=float32))
    """
    if loss_budget is None:
        return sharpness_aware(grad_fn, metric=monge(euclidean(), alpha), rho=rho, **options)
    check_positive("loss_budget", loss_budget, zero="it leaves nothing to perturb by")
    if not isinstance(alpha, jax.core.Tracer) and alpha != 1:
        raise ValueError(f"alpha={alpha!r} and loss_budget={loss_budget!r}: give one of the two")
    return sharpness_aware(
        grad_fn, metric=lambda rho: monge(euclidean(), rho / loss_budget), rho=rho, **options
    )


@_spell_out_options
def adaptive_sam(
    grad_fn: GradFn | None = None,
    *,
    rho: chex.Numeric | optax.Schedule = 0.5,
    eta: chex.Numeric = 0.01,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive SAM (ASAM): `sharpness_aware` with the `adaptive` metric.

    .. math:: \delta^* = \rho \, T^2 g / \|T g\|_2, \quad T = |\theta| + \eta

    Args:
      grad_fn: params -> gradient of the loss, as in `sharpness_aware`.
      rho: radius, a fraction of the params' size; a scalar or a schedule.
      eta: floor of the params' size, in the params' units.
      **options: ascent, descent, mask, axis_name, sync_perturbation, period, when, measure and
        widen_params of `sharpness_aware`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError, ValueError: as `sharpness_aware` and `adaptive`.

    References:
      Kwon et al., ASAM: Adaptive Sharpness-Aware Minimization, 2021.

    >>> import jax, optax, jax.numpy as jnp
    >>> from monge_sam_jax import adaptive_sam
    >>> grad_fn = jax.grad(lambda params: 0.5 * jnp.sum(params**2))
    >>> tx = optax.chain(adaptive_sam(grad_fn, rho=0.5, eta=0.0), optax.sgd(1.0))
    >>> params = jnp.array([2.0])
    >>> updates, state = tx.update(grad_fn(params), tx.init(params), params)
    >>> updates  # -(params + 0.5 * abs(params))
    Array([-3.], dtype=float32)
    """
    return sharpness_aware(grad_fn, metric=adaptive(eta), rho=rho, **options)


@_spell_out_options
def fisher_sam(
    grad_fn: GradFn | None = None,
    *,
    rho: chex.Numeric | optax.Schedule = 0.05,
    eta: chex.Numeric = 1.0,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Fisher SAM: `sharpness_aware` with the `diagonal_fisher` metric.

    .. math::
        \delta^* = \rho \, \frac{G^{-1} g}{\sqrt{g^\top G^{-1} g}}, \quad
        G^{-1} = \operatorname{diag}\big(1 / (1 + \eta \, g \odot g)\big) \qquad \text{(eq. 5)}

    Args:
      grad_fn: params -> gradient of the mean loss, as in `sharpness_aware`.
      rho: radius of the ball in the metric; a scalar or a schedule.
      eta: weight of the Fisher information against the identity, in 1 / (units of g)^2.
      **options: ascent, descent, mask, axis_name, sync_perturbation, period, when, measure and
        widen_params of `sharpness_aware`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError, ValueError: as `sharpness_aware` and `diagonal_fisher`.

    References:
      Kim et al., Fisher SAM: Information Geometry and Sharpness Aware Minimisation, 2022.

    >>> import jax, optax, jax.numpy as jnp
    >>> from monge_sam_jax import fisher_sam
    >>> grad_fn = jax.grad(lambda params: 0.5 * jnp.sum(params**2))
    >>> tx = optax.chain(fisher_sam(grad_fn, rho=1.0), optax.sgd(1.0))
    >>> params = jnp.array([1.0, 0.0])
    >>> updates, state = tx.update(grad_fn(params), tx.init(params), params)
    >>> updates  # -(1 + 1 / sqrt(1 + 1))
    Array([-1.7071068, -0.       ], dtype=float32)
    """
    return sharpness_aware(grad_fn, metric=diagonal_fisher(eta), rho=rho, **options)
