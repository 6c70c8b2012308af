"""Sharpness-aware steps as Optax transformations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, Unpack

import chex
import jax
import jax.numpy as jnp
import optax

from monge_sam_jax._core.checks import bind_grad_fn, check_state
from monge_sam_jax._core.injection import NOT_A_SCHEDULE, injectable, spelling_out, unfixed
from monge_sam_jax._core.surroundings import check_surroundings
from monge_sam_jax.diagnostics import Diagnostics, MeasuredDiagnostics, no_diagnostics
from monge_sam_jax.metrics import (
    Grads,
    Metric,
    Params,
    State,
    adaptive,
    diagonal_fisher,
    euclidean,
    monge,
)
from monge_sam_jax.perturbation import (
    AxisName,
    Mask,
    When,
    check_ball,
    check_mask,
    check_when,
    fits_metric,
    init_metric,
    robust_gradient_when,
)

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

GradFn = Callable[..., Grads]


class SharpnessAwareState(NamedTuple):
    """State of `sharpness_aware`; no copy of the params.

    Attributes:
      count: number of updates so far, an int32 scalar.
      metric_state: state of the metric.
      diagnostics: of the last perturbation; zeros before the first.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it
    metric_state: State
    diagnostics: Diagnostics | MeasuredDiagnostics


@injectable
def sharpness_aware(
    grad_fn: GradFn | None = None,
    *,
    metric: Metric,
    rho: chex.Numeric | optax.Schedule = 0.05,
    mask: Mask = None,
    axis_name: AxisName | None = None,
    sync_perturbation: bool = True,
    period: int = 1,
    when: When | None = None,
    measure: bool = False,
    widen_params: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by the one at the worst-case perturbation of the params.

    .. math::
        g = \nabla \ell(\theta) \;\mapsto\; \nabla \ell(\theta + \delta^*), \qquad
        \delta^* = \rho \, \frac{G^{-1} g}{\sqrt{g^\top G^{-1} g}}
        \qquad \text{(eqs. 5 and 8)}

    Place it first in `optax.chain`: what comes after sees an ordinary gradient at the ordinary
    params. Each update calls `grad_fn` once. The gradient given to `update` and `grad_fn` must
    share batch, reduction, random numbers, loss scale and synchronisation. An optimizer holds one
    sharpness-aware transformation; a radius for each group of leaves is its metric's (`grouped`).

    `update(grads, state, params, *, grad_fn=None, **extra_args)` returns the new gradient, of the
    structure, shapes and dtypes of `grads`, and the new state. Complex gradients follow Optax's
    convention: conjugated by the caller, in `grads` and in `grad_fn` alike, so that
    params - learning_rate * grads descends.

    Args:
      grad_fn: params -> gradient of the loss, such as `jax.grad(loss_fn)`. Beside the params it is
        given those extra arguments of `update` that its signature accepts by name; one that it does
        not take, but that is spelt much like an optional one, is an error. Give what the second
        gradient must have no default, so that it cannot be missed. A `grad_fn` given to `update`
        takes the place of this one.
      metric: the metric G.
      rho: radius of the ball in the metric's units: a scalar, or a schedule of the number of
        updates. Traced values and schedules are not checked.
      mask: which leaves are perturbed and enter the norm: a tree of bools that is a prefix of the
        params, or a function of the params that returns one. The gradient of the others is taken at
        the perturbed params too. None: all.
      axis_name: name of the mapped axis, or a tuple of names, over which a batch is split, under
        `jax.pmap`, `jax.shard_map` or `jax.vmap`. `grads` and `grad_fn` are those of the device's
        own share, and what `update` returns is averaged over the axis. Not for `jax.jit` with
        sharded arrays, where gradients are global already.
      sync_perturbation: with `axis_name`, whether devices share the perturbation of the averaged
        gradient. If False each perturbs along its own (m-sharpness), and diagnostics are averages.
      period: perturb at every period-th update, beginning with the first; the others pass the
        gradient on, and keep the diagnostics. A convolution's gradient inside the conditional that
        this takes is slow on CPU.
      when: in place of a period, a function of the number of updates so far that returns a bool:
        `lambda count: count >= 9000` perturbs the end of training alone.
      measure: keep `MeasuredDiagnostics`, at the cost of another pass over params and gradients.
      widen_params: hand `grad_fn` the perturbed params in float32 or wider, in place of rounding
        them to the dtype of the params, which may lose small perturbations.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `SharpnessAwareState`.

    Raises:
      TypeError: an argument is of the wrong type; at an update, a gradient is float0 or integer.
      ValueError: rho is negative, NaN or infinite, or period less than one; at an update, params,
        gradient function or an argument of it is missing, gradients do not fit the params, or the
        optimizer around it perturbs twice or accumulates the first gradient alone.

    References:
      Jacobsen and Arvanitidis, Monge SAM, eqs. 5, 8 and 9.

    >>> import jax, optax, jax.numpy as jnp
    >>> from monge_sam_jax import euclidean, monge, sharpness_aware
    >>> def loss_fn(params, batch):
    ...     return jnp.mean((batch @ params) ** 2)
    >>> grad_fn = jax.grad(loss_fn)
    >>> tx = optax.chain(sharpness_aware(grad_fn, metric=monge(), rho=0.05), optax.adam(1e-3))
    >>> params, batch = jnp.ones(2), jnp.eye(2)
    >>> state = tx.init(params)
    >>> updates, state = tx.update(grad_fn(params, batch), state, params, batch=batch)
    >>> updates
    Array([-0.001, -0.001], dtype=float32)
    """
    grad_fn, mask, when = unfixed(grad_fn), unfixed(mask), unfixed(when)
    if grad_fn is not None and not callable(grad_fn):
        raise TypeError(
            f"grad_fn must be a function of the params, got {grad_fn!r}. {NOT_A_SCHEDULE}"
        )
    check_mask(mask)
    check_when(when)
    check_ball(metric, rho, schedule_allowed=True)
    perturb_now = _when(when, period)
    builder_grad_fn = grad_fn

    def init(params: Params) -> SharpnessAwareState:
        none = no_diagnostics(measure=measure)
        metric_state = init_metric(metric, mask, params)
        return SharpnessAwareState(jnp.zeros((), jnp.int32), metric_state, none)

    def update(
        updates: Grads,
        state: SharpnessAwareState,
        params: Params | None = None,
        *,
        grad_fn: GradFn | None = None,
        **extra_args: Any,
    ) -> tuple[Grads, SharpnessAwareState]:
        check_state(state, SharpnessAwareState, "sharpness_aware")
        check_surroundings(lambda x: isinstance(x, SharpnessAwareState), state, params)
        given = builder_grad_fn if grad_fn is None else grad_fn
        if params is not None and not fits_metric(metric, mask, params, state.metric_state):
            raise ValueError(
                "the state of the metric is that of another one: make the state of the "
                "transformation anew, tx.init(params), and keep those of the other links"
            )
        robust = robust_gradient_when(
            perturb_now(state.count),
            bind_grad_fn(given, params, extra_args),
            updates,
            params,
            metric=metric,
            metric_state=state.metric_state,
            last=state.diagnostics,
            rho=rho(state.count) if callable(rho) else rho,
            mask=mask,
            measure=measure,
            widen_params=widen_params,
            axis_name=axis_name,
            sync_perturbation=sync_perturbation,
        )
        count = optax.safe_increment(state.count)
        return robust.grads, SharpnessAwareState(count, robust.metric_state, robust.diagnostics)

    return optax.GradientTransformationExtraArgs(init, update)


def _when(when: When | None, period: Any) -> When:
    """The function of the count that says whether to perturb."""
    if not isinstance(period, jax.core.Tracer):
        if isinstance(period, bool) or not jnp.issubdtype(jnp.result_type(period), jnp.integer):
            raise TypeError(f"period must be an integer, got {period!r}")
        if period < 1:
            raise ValueError(f"period must be at least one, got {period!r}")
    every_step = isinstance(period, int) and period == 1
    if when is None:
        return lambda count: every_step or count % period == 0
    if isinstance(period, int) and not every_step:
        raise ValueError(f"when and period={period} both say when to perturb: give one of the two")
    return when


class Options(TypedDict, total=False):
    """Options that the named builders share with `sharpness_aware`, which explains them."""

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
      **options: mask, axis_name, sync_perturbation, period, when, measure and widen_params of
        `sharpness_aware`.

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
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    r"""Monge SAM: `sharpness_aware` with the `monge` metric over the Euclidean one.

    .. math::
        \delta^* = \frac{1}{\sqrt{1 + \alpha^2 \|g\|_2^2}} \cdot \frac{\rho}{\|g\|_2} \, g
        \qquad \text{(eq. 9, where } \alpha = 1)

    Unlike SAM's, the perturbation depends on the scale of the loss: use the mean over the batch,
    unscale a scaled loss, and clip only afterwards.

    Args:
      grad_fn: params -> gradient of the loss, as in `sharpness_aware`.
      rho: length of the perturbation on the loss surface, and so the most that its Euclidean length
        can be, in units of the params; a scalar or a schedule.
      alpha: height of the loss surface, in 1 / (units of the loss): 0 is SAM, 1 the paper's M-SAM,
        and the larger, the closer to gradient descent.
      **options: mask, axis_name, sync_perturbation, period, when, measure and widen_params of
        `sharpness_aware`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError, ValueError: as `sharpness_aware` and `monge`.

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
    return sharpness_aware(grad_fn, metric=monge(euclidean(), alpha), rho=rho, **options)


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
      **options: mask, axis_name, sync_perturbation, period, when, measure and widen_params of
        `sharpness_aware`.

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
      **options: mask, axis_name, sync_perturbation, period, when, measure and widen_params of
        `sharpness_aware`.

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
