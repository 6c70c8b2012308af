r"""When to perturb: every step, some of them by the count, or those with a large gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp

from monge_sam_jax._core.checks import check_fraction
from monge_sam_jax._core.injection import NOT_A_SCHEDULE
from monge_sam_jax._core.numerics import scaled_norm
from monge_sam_jax.metrics import Grads, State

__all__ = ["GradientStatistics", "When", "WhenRule", "gradient_is_large"]
__dir__ = __all__.copy


class WhenRule(NamedTuple):
    """A rule that looks at the gradient, as a pair of pure functions.

    Attributes:
      init: () -> state.
      decide: (count, grads, state) -> (bool, state), at every step: the number of updates so far
        and the gradient, averaged over the devices.
    """

    init: Callable[[], State]
    decide: Callable[[jax.Array, Grads, State], tuple[bool | jax.Array, State]]


# A function of the number of updates so far, or a rule.
When: TypeAlias = "Callable[[jax.Array], bool | jax.Array] | WhenRule"


class GradientStatistics(NamedTuple):
    """State of `gradient_is_large`: float32 scalars.

    Attributes:
      root_mean: square root of the running mean of the squared norm.
      root_deviation: square root of its running standard deviation.
    """

    root_mean: jax.Array
    root_deviation: jax.Array


def gradient_is_large(
    deviations: chex.Numeric | Callable[[jax.Array], chex.Numeric] = 0.0, decay: float = 0.9
) -> WhenRule:
    r"""Perturbs where the gradient is large for its running statistics: the policy of AE-SAM.

    .. math::
        \|g\|^2 \ge \mu_t + c \, \sigma_t, \qquad
        \mu_t = d \mu_{t-1} + (1 - d) \|g\|^2, \quad
        \sigma_t^2 = d \sigma_{t-1}^2 + (1 - d) (\|g\|^2 - \mu_t)^2

    Both begin at zero. The other steps cost one gradient.

    Args:
      deviations: c, a number of any sign, or a schedule of the number of updates; the authors let
        it rise from -1 to 1: `optax.linear_schedule(-1.0, 1.0, num_steps)`.
      decay: d, in [0, 1).

    Returns:
      The rule, for `when=`, with a `GradientStatistics` as its state. It looks at the whole
      gradient, whatever the mask.

    Raises:
      TypeError: decay is no real number.
      ValueError: decay is not in [0, 1).

    References:
      Jiang et al., An Adaptive Policy to Employ Sharpness-Aware Minimization, 2023.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax.when import gradient_is_large
    >>> rule = gradient_is_large(deviations=1.0, decay=0.5)
    >>> state = rule.init()
    >>> for norm in (1.0, 1.0, 3.0):
    ...     now, state = rule.decide(jnp.zeros((), int), jnp.array([norm]), state)
    ...     print(now)
    True
    False
    True
    """
    check_fraction("decay", decay)

    def init() -> GradientStatistics:
        return GradientStatistics(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

    def decide(
        count: jax.Array, grads: Grads, state: GradientStatistics
    ) -> tuple[jax.Array, GradientStatistics]:
        norm = jax.lax.stop_gradient(scaled_norm(grads).norm).astype(jnp.float32)
        c = jnp.asarray(deviations(count) if callable(deviations) else deviations, jnp.float32)
        # In units of the largest, so that squares and fourth powers are in range.
        unit = jnp.maximum(norm, jnp.maximum(state.root_mean, state.root_deviation))
        unit = jnp.where(unit == 0, 1.0, unit)
        square = (norm / unit) ** 2
        mean = decay * (state.root_mean / unit) ** 2 + (1 - decay) * square
        variance = decay * (state.root_deviation / unit) ** 4 + (1 - decay) * (square - mean) ** 2
        deviation = jnp.sqrt(variance)
        seen = GradientStatistics(unit * jnp.sqrt(mean), unit * jnp.sqrt(deviation))
        known = jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(norm), new, old), seen, state)
        return square >= mean + c * deviation, known

    return WhenRule(init, decide)


def check_when(when: Any) -> None:
    """Raises TypeError unless it is None, a function or a rule."""
    if when is not None and not callable(when) and not isinstance(when, WhenRule):
        raise TypeError(
            "when must be a function of the count, or a rule such as gradient_is_large(), got "
            f"{when!r}. {NOT_A_SCHEDULE}"
        )


def when_to_perturb(when: When | None, period: Any) -> When:
    """The one of the two that was given, as a function of the count or a rule.

    Raises:
      TypeError: period is no integer.
      ValueError: it is less than one, or both were given.
    """
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
