"""The worst-case perturbation, and the gradient there: the core that all entry points share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from monge_sam_jax._core.checks import (
    check_nonnegative,
    check_params_and_gradient,
    check_second_gradient,
)
from monge_sam_jax._core.collectives import average_varying, check_varying, make_varying
from monge_sam_jax._core.masks import Mask, broadcast_mask, chosen_leaves, merge, select
from monge_sam_jax._core.numerics import (
    as_arrays,
    scaled_norm,
    tree_scale,
    widen,
    widened,
)
from monge_sam_jax.descent import Descent
from monge_sam_jax.diagnostics import (
    Diagnostics,
    MeasuredDiagnostics,
    add_measurements,
    diagnose,
)
from monge_sam_jax.metrics import Ascent, Grads, Metric, Params, State, stateless
from monge_sam_jax.when import WhenRule

__all__ = ["AxisName", "Mask", "MetricOrFunction", "worst_case_perturbation"]
__dir__ = __all__.copy

AxisName: TypeAlias = Hashable
# A metric, or a function of rho that returns one, always of the same state.
MetricOrFunction: TypeAlias = "Metric | Callable[[chex.Numeric], Metric]"
Decide: TypeAlias = "Callable[[Grads, State], tuple[bool | jax.Array, State]]"


def check_ball(metric: Any, rho: Any, *, schedule_allowed: bool) -> None:
    """Raises unless metric and rho describe a ball; traced values and schedules pass unchecked.

    Raises:
      TypeError: metric is no `Metric` and no function, or rho no real number.
      ValueError: rho is negative, NaN, infinite or not a scalar.
    """
    # A constructor without its parentheses is a function too, of something else.
    of_rho = callable(metric) and list(inspect.signature(metric).parameters) == ["rho"]
    if not (isinstance(metric, Metric) or of_rho):
        raise TypeError(
            "metric must be a Metric such as monge(), or a function of rho that returns one, such "
            f"as lambda rho: monge(alpha=rho), got {metric!r}"
        )
    if not callable(rho):
        check_nonnegative("rho", rho)
    elif not schedule_allowed:
        raise TypeError("rho must be a number; a schedule needs the count of sharpness_aware")


def check_slots(ascent: Any, descent: Any) -> None:
    """Raises TypeError unless ascent and descent are what they are called, or None."""
    if not (ascent is None or isinstance(ascent, optax.GradientTransformation)):
        raise TypeError(
            "ascent must be an optax.GradientTransformation of the first gradient, such as "
            f"optax.ema(0.9), got {ascent!r}"
        )
    if not (descent is None or isinstance(descent, Descent)):
        raise TypeError(f"descent must be a Descent such as surrogate_gap(), got {descent!r}")


def metric_at(rho: chex.Numeric, metric: MetricOrFunction) -> Metric:
    """The metric, or what the function makes of rho.

    Raises:
      TypeError: the function returns no `Metric`.
    """
    if isinstance(metric, Metric):
        return metric
    made = metric(rho)
    if not isinstance(made, Metric):
        raise TypeError(f"metric, a function of rho, must return a Metric, got {made!r}")
    return made


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


class SlotStates(NamedTuple):
    """The states of what a sharpness-aware gradient is made of."""

    metric: State = ()
    ascent: State = ()
    descent: State = ()
    when: State = ()


class RobustGradient(NamedTuple):
    """What is followed, and what was learnt on the way."""

    grads: Grads
    states: SlotStates
    diagnostics: Diagnostics | MeasuredDiagnostics


def robust_gradient_when(
    when: bool | jax.Array | Decide,
    grad_fn: Callable[[Params], Grads],
    first: Grads,
    params: Params,
    *,
    states: SlotStates,
    last: Diagnostics | MeasuredDiagnostics,
    descent: Descent | None = None,
    axis_name: AxisName | None = None,
    sync_perturbation: bool = True,
    **options: Any,
) -> RobustGradient:
    """`robust_gradient` where `when` is true; elsewhere `first`, for the price of one gradient.

    Args:
      when: whether to perturb; traced or not, or to be asked.
      grad_fn: params -> gradient.
      first: the gradient at theta; with `axis_name`, that of this device's share of the batch.
      params: theta.
      states: where nothing is perturbed, those of metric and ascent stay.
      last: the diagnostics that are kept where nothing is perturbed.
      descent: see `sharpness_aware`, like what follows.
      axis_name: see there.
      sync_perturbation: see there.
      **options: of `robust_gradient`.

    Returns:
      What is followed, averaged over the axis.
    """
    check_params_and_gradient(params, first)
    params, first = as_arrays((params, first))
    if axis_name is not None:
        check_varying(first, axis_name, source="the gradient given to update")
        if sync_perturbation:
            first = jax.lax.pmean(first, axis_name)

    def mean_over_axis(tree: Any) -> Any:
        return tree if axis_name is None or sync_perturbation else jax.lax.pmean(tree, axis_name)

    def perturb() -> RobustGradient:
        robust = robust_gradient(
            grad_fn, first, params, states, axis_name, sync_perturbation, **options
        )
        if descent is None:
            return robust
        followed, state = descent.follow(mean_over_axis(first), robust.grads, states.descent)
        return robust._replace(grads=followed, states=robust.states._replace(descent=state))

    def pass_on() -> RobustGradient:
        followed, state = mean_over_axis(first), states.descent
        if descent is not None:
            followed, state = descent.between(followed, state)
        return RobustGradient(followed, states._replace(descent=state), last)

    if callable(when):
        when, state = when(mean_over_axis(first), states.when)
        states = states._replace(when=state)
    if isinstance(when, (bool, np.bool_)):
        return perturb() if when else pass_on()
    return jax.lax.cond(when, perturb, pass_on)


def robust_gradient(
    grad_fn: Callable[[Params], Grads],
    grads: Grads,
    params: Params,
    states: SlotStates,
    axis_name: AxisName | None,
    sync_perturbation: bool,
    *,
    metric: MetricOrFunction,
    rho: chex.Numeric,
    ascent: optax.GradientTransformation | None = None,
    mask: Mask = None,
    measure: bool = False,
    widen_params: bool = False,
) -> RobustGradient:
    """The gradient at theta + delta*, with delta* from `grads`, the gradient at theta.

    `sharpness_aware` explains the arguments.
    """
    chosen = broadcast_mask(mask, params)
    theta, g = select(chosen, params), select(chosen, grads)
    metric = metric_at(rho, metric)
    up, ascent_state = transform(ascent, g, states.ascent, theta)
    steepest, metric_state = metric.ascent(up, theta, states.metric)
    k = ascent_multiple(steepest, rho)
    delta = tree_scale(k, steepest.tangent)

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
    diagnostics = basic = diagnose(
        g_norm, steepest, k, rho, isotropic=metric.isotropic, transformed=ascent is not None
    )
    if measure:
        realised = jax.tree.map(
            lambda q, p, d: widen(q, d.dtype) - widen(p, d.dtype), perturbed, theta, delta
        )
        diagnostics = add_measurements(basic, g, select(chosen, second), delta, realised)
    states = states._replace(metric=metric_state, ascent=ascent_state)
    if axis_name is not None:
        if sync_perturbation:  # equal on all devices, but varying for JAX if the params are
            states, diagnostics = average_varying((states, diagnostics), axis_name)
        else:
            second, diagnostics = jax.lax.pmean((second, diagnostics), axis_name)
            states = jax.tree.map(
                lambda x: (
                    jax.lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.inexact) else x
                ),
                states,
            )
    return RobustGradient(second, states, diagnostics)


def transform(
    ascent: optax.GradientTransformation | None, g: Grads, state: State, theta: Params
) -> tuple[Grads, State]:
    """What takes the place of the gradient for the metric, and the state."""
    return (g, state) if ascent is None else ascent.update(widened(g), state, widened(theta))


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


def init_states(
    metric: MetricOrFunction,
    ascent: optax.GradientTransformation | None,
    descent: Descent | None,
    rule: WhenRule | None,
    mask: Mask,
    params: Params,
) -> SlotStates:
    """Fresh states: of metric and ascent for the leaves that are perturbed, of descent for all."""
    params = as_arrays(params)
    perturbed = select(chosen_leaves(mask, params), params)
    return SlotStates(
        metric_at(1.0, metric).init(perturbed),
        () if ascent is None else ascent.init(widened(perturbed)),
        () if descent is None else descent.init(widened(params)),
        () if rule is None else rule.init(),
    )


def fit(
    states: SlotStates,
    metric: MetricOrFunction,
    ascent: optax.GradientTransformation | None,
    descent: Descent | None,
    rule: WhenRule | None,
    mask: Mask,
    params: Params,
) -> bool:
    """Whether the states are of the form that `init_states` would make."""
    others = (ascent, descent, rule)
    if others == (None, None, None) and metric_at(1.0, metric).init is stateless:
        expected = SlotStates()
    else:
        make = functools.partial(init_states, metric, *others, mask)
        expected = jax.eval_shape(make, params)
    structure: Any = jax.tree.structure(expected)
    return structure == jax.tree.structure(states)


def fresh_states(
    metric: MetricOrFunction,
    ascent: optax.GradientTransformation | None,
    descent: Descent | None,
    mask: Mask,
    params: Params,
) -> SlotStates:
    """As `init_states`, for a function that keeps nothing from one call to the next.

    Raises:
      ValueError: one of them has a state with arrays.
    """
    states = init_states(metric, ascent, descent, None, mask, params)
    for name, state in states._asdict().items():
        if jax.tree.leaves(state):
            raise ValueError(
                f"the {name} keeps a state from step to step, and a function without memory would "
                f"begin it anew at each call: use sharpness_aware(grad_fn, {name}=...), first in "
                "an optax.chain"
            )
    return states
