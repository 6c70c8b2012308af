"""The sharpness-aware transformation: a method is a choice in four slots.

=========  =====================================================================================
ascent     which way is up: a transformation of the first gradient
metric     what a ball is
descent    what is followed, given both gradients
when       at which steps
=========  =====================================================================================
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from monge_sam_jax._core.checks import bind_grad_fn, check_state
from monge_sam_jax._core.injection import NOT_A_SCHEDULE, injectable, unfixed
from monge_sam_jax._core.masks import check_mask
from monge_sam_jax._core.surroundings import check_surroundings
from monge_sam_jax.descent import Descent
from monge_sam_jax.diagnostics import Diagnostics, MeasuredDiagnostics, no_diagnostics
from monge_sam_jax.metrics import Grads, Params, State
from monge_sam_jax.perturbation import (
    AxisName,
    Mask,
    MetricOrFunction,
    SlotStates,
    check_ball,
    check_slots,
    fit,
    init_states,
    robust_gradient_when,
)
from monge_sam_jax.when import When, WhenRule, check_when, when_to_perturb

__all__ = ["GradFn", "SharpnessAwareState", "sharpness_aware"]
__dir__ = __all__.copy

GradFn = Callable[..., Grads]


class SharpnessAwareState(NamedTuple):
    """State of `sharpness_aware`; no copy of the params, but for what its parts keep.

    Attributes:
      count: number of updates so far, an int32 scalar.
      metric_state: state of the metric.
      diagnostics: of the last perturbation; zeros before the first.
      ascent_state: state of the ascent, of descent and when_state the same; empty without.
      descent_state: see there.
      when_state: see there.
    """

    count: jax.Array  # type: ignore[assignment]  # the name that Optax gives it
    metric_state: State
    diagnostics: Diagnostics | MeasuredDiagnostics
    ascent_state: State = ()
    descent_state: State = ()
    when_state: State = ()


@injectable
def sharpness_aware(
    grad_fn: GradFn | None = None,
    *,
    metric: MetricOrFunction,
    rho: chex.Numeric | optax.Schedule = 0.05,
    ascent: optax.GradientTransformation | None = None,
    descent: Descent | None = None,
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
      metric: the metric G; or a function of rho that returns one, such as `lambda rho:
        monge(alpha=rho / sigma)`.
      rho: radius of the ball in the metric's units: a scalar, or a schedule of the number of
        updates. Traced values and schedules are not checked.
      ascent: a transformation of the first gradient before the metric sees it, such as
        `optax.ema(0.9)` or one of `monge_sam_jax.ascent`. It gets the perturbed leaves in float32
        or wider, its state is kept in this one, and it is not asked at the steps that do not
        perturb. The descent and the norm among the diagnostics are of the gradient itself.
      descent: what is followed, of both gradients: one of `monge_sam_jax.descent`, such as
        `surrogate_gap(0.1)`. None: the second.
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
      when: in place of a period, a function of the number of updates so far that returns a bool,
        `lambda count: count >= 9000` for the end of training alone; or a rule that looks at the
        gradient, `gradient_is_large()`.
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
    grad_fn, metric, mask, when = map(unfixed, (grad_fn, metric, mask, when))
    if grad_fn is not None and not callable(grad_fn):
        raise TypeError(
            f"grad_fn must be a function of the params, got {grad_fn!r}. {NOT_A_SCHEDULE}"
        )
    check_mask(mask)
    check_when(when)
    check_ball(metric, rho, schedule_allowed=True)
    check_slots(ascent, descent)
    now = when_to_perturb(when, period)
    rule = now if isinstance(now, WhenRule) else None
    builder_grad_fn = grad_fn

    def init(params: Params) -> SharpnessAwareState:
        none = no_diagnostics(measure=measure)
        states = init_states(metric, ascent, descent, rule, mask, params)
        return _state(jnp.zeros((), jnp.int32), none, states)

    def update(
        updates: Grads,
        state: SharpnessAwareState,
        params: Params | None = None,
        *,
        grad_fn: GradFn | None = None,
        **extra_args: Any,
    ) -> tuple[Grads, SharpnessAwareState]:
        check_state(state, SharpnessAwareState, "sharpness_aware")
        check_surroundings(is_link, state, params)
        given = builder_grad_fn if grad_fn is None else grad_fn
        states = SlotStates(
            state.metric_state, state.ascent_state, state.descent_state, state.when_state
        )
        parts = (metric, ascent, descent, rule)
        if params is not None and not fit(states, *parts, mask, params):
            raise ValueError(
                "the state of metric, ascent, descent or when is that of another one: make the "
                "state of the transformation anew, tx.init(params), and keep those of the other "
                "links"
            )
        robust = robust_gradient_when(
            functools.partial(now.decide, state.count)
            if isinstance(now, WhenRule)
            else now(state.count),
            bind_grad_fn(given, params, extra_args),
            updates,
            params,
            metric=metric,
            ascent=ascent,
            descent=descent,
            states=states,
            last=state.diagnostics,
            rho=rho(state.count) if callable(rho) else rho,
            mask=mask,
            measure=measure,
            widen_params=widen_params,
            axis_name=axis_name,
            sync_perturbation=sync_perturbation,
        )
        count = optax.safe_increment(state.count)
        return robust.grads, _state(count, robust.diagnostics, robust.states)

    return optax.GradientTransformationExtraArgs(init, update)


def is_link(x: Any) -> bool:
    """Whether `x` is the state of such a transformation."""
    return isinstance(x, SharpnessAwareState)


def _state(
    count: jax.Array, diagnostics: Diagnostics | MeasuredDiagnostics, states: SlotStates
) -> SharpnessAwareState:
    return SharpnessAwareState(
        count, states.metric, diagnostics, states.ascent, states.descent, states.when
    )
