r"""What is followed: a gradient made of the two that there are.

The first is g, and the second :math:`g' = \nabla \ell(\theta + \delta^*)`. The builders take one of
these as `descent=`; without it they follow the second. A descent is a triple of pure functions.
They see the whole gradients, whatever the mask, and with `axis_name` the averages over the axis.
One of your own that follows the sum of both:

>>> import jax
>>> import jax.numpy as jnp
>>> from monge_sam_jax.descent import Descent
>>> def both():
...     def follow(first, second, state):
...         return jax.tree.map(jnp.add, first, second), state
...
...     return Descent(follow)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from monge_sam_jax._core.checks import check_fraction, check_nonnegative
from monge_sam_jax._core.numerics import (
    inner_product,
    scaled_norm,
    tree_scale,
    widen,
    working_dtype,
)
from monge_sam_jax.metrics import Grads, Params, State, stateless

__all__ = ["Descent", "look", "stable", "surrogate_gap", "weighted"]
__dir__ = __all__.copy


def follow_first(first: Grads, state: State) -> tuple[Grads, State]:
    """The gradient of a step that does not perturb."""
    return first, state


class Descent(NamedTuple):
    """What is followed, as pure functions.

    Attributes:
      follow: (first, second, state) -> (gradient, state), both gradients at hand.
      between: (first, state) -> (gradient, state), at the steps that do not perturb (`when`).
      init: params -> state; the params are whole, and in float32 or wider.
    """

    follow: Callable[[Grads, Grads, State], tuple[Grads, State]]
    between: Callable[[Grads, State], tuple[Grads, State]] = follow_first
    init: Callable[[Params], State] = stateless


def surrogate_gap(alpha: chex.Numeric = 0.1) -> Descent:
    r"""The second gradient, less what the first has across it: GSAM.

    .. math:: g' - \alpha \, g_\perp, \qquad g_\perp = g - \frac{g^\top g'}{\|g'\|^2} g'

    It climbs along :math:`g_\perp`, which changes the perturbed loss at second order only, and so
    lessens its gap to the loss.

    Args:
      alpha: weight of the orthogonal part, not negative. A traced value is not checked.

    Returns:
      The descent, without state.

    Raises:
      TypeError: alpha is no real number.
      ValueError: alpha is negative, NaN or infinite.

    References:
      Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware Training, 2022.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax.descent import surrogate_gap
    >>> first, second = jnp.array([1.0, 3.0]), jnp.array([2.0, 0.0])
    >>> surrogate_gap(alpha=0.5).follow(first, second, ())[0]
    Array([ 2. , -1.5], dtype=float32)
    """
    check_nonnegative("alpha", alpha)

    def follow(first: Grads, second: Grads, state: State) -> tuple[Grads, State]:
        across = _across(first, second)
        factor = jnp.asarray(alpha, working_dtype(first))
        return _map_wide(lambda s, a: s - factor.astype(a.dtype) * a, second, across), state

    return Descent(follow)


def weighted(gamma: chex.Numeric = 0.9) -> Descent:
    r"""A weighted sum of the loss's gradient and of the sharpness's: WSAM.

    .. math:: g + \frac{\gamma}{1 - \gamma} (g' - g)

    It descends on :math:`\ell + \frac{\gamma}{1 - \gamma} (\ell_\rho - \ell)`, with the perturbed
    loss :math:`\ell_\rho`: gamma of 0 is plain training, 1/2 the second gradient. A penalty
    :math:`\ell + \lambda \|\nabla \ell\|` (Zhao et al. 2022) is :math:`\lambda = \rho \gamma / (1 -
    \gamma)`. (The authors of WSAM add the second term to the step of the base optimizer, undivided
    by its preconditioner. With `optax.sgd` without momentum this is the same.)

    Args:
      gamma: in [0, 1). A traced value is not checked.

    Returns:
      The descent, without state.

    Raises:
      TypeError: gamma is no real number.
      ValueError: gamma is not in [0, 1).

    References:
      Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization
      Term, 2023.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax.descent import weighted
    >>> weighted(gamma=0.75).follow(jnp.array([1.0]), jnp.array([1.5]), ())[0]
    Array([2.5], dtype=float32)
    """
    check_fraction("gamma", gamma)

    def follow(first: Grads, second: Grads, state: State) -> tuple[Grads, State]:
        g = jnp.asarray(gamma, working_dtype(first))
        factor = g / (1 - g)
        return _map_wide(lambda f, s: f + factor.astype(f.dtype) * (s - f), first, second), state

    return Descent(follow)


def stable() -> Descent:
    r"""The second gradient at the length of the first: SSAM.

    .. math:: \frac{\|g\|}{\|g'\|} \, g'

    Returns:
      The descent, without state.

    References:
      Tan et al., Stabilizing Sharpness-Aware Minimization Through a Simple Renormalization
      Strategy, 2024.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax.descent import stable
    >>> stable().follow(jnp.array([1.0, 0.0]), jnp.array([3.0, 4.0]), ())[0]
    Array([0.6, 0.8], dtype=float32)
    """

    def follow(first: Grads, second: Grads, state: State) -> tuple[Grads, State]:
        a, b = scaled_norm(first), scaled_norm(second)
        return _like(first, tree_scale(a.norm / b.unit_norm, b.unit)), state

    return Descent(follow)


def look(alpha: chex.Numeric = 0.5) -> Descent:
    r"""What the second gradient adds across the first, used again until the next: LookSAM.

    At the steps that perturb (`when=`, `period=`) the second gradient is followed, and its part
    across the first is kept as a unit vector; the steps between add it to their one gradient,

    .. math::
        g + \alpha \, \|g\| \, \frac{g_v}{\|g_v\|}, \qquad
        g_v = g' - \frac{g^\top g'}{\|g\|^2} g

    Args:
      alpha: weight of the part that is kept, not negative. A traced value is not checked.

    Returns:
      The descent; its state is a copy of the params, in float32 or wider.

    Raises:
      TypeError: alpha is no real number.
      ValueError: alpha is negative, NaN or infinite.

    References:
      Liu et al., Towards Efficient and Scalable Sharpness-Aware Minimization, 2022.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax.descent import look
    >>> descent = look(alpha=0.5)
    >>> first, second = jnp.array([2.0, 0.0]), jnp.array([3.0, 1.0])
    >>> followed, state = descent.follow(first, second, descent.init(first))
    >>> descent.between(first, state)[0]
    Array([2., 1.], dtype=float32)
    """
    check_nonnegative("alpha", alpha)

    def init(params: Params) -> State:
        return jax.tree.map(jnp.zeros_like, params)

    def follow(first: Grads, second: Grads, state: State) -> tuple[Grads, State]:
        across = scaled_norm(_across(second, first))
        unit = tree_scale(1 / across.unit_norm, across.unit)
        return second, jax.tree.map(lambda u, kept: u.astype(kept.dtype), unit, state)

    def between(first: Grads, state: State) -> tuple[Grads, State]:
        norm = scaled_norm(first).norm
        factor = jnp.asarray(alpha, norm.dtype) * norm
        return _map_wide(lambda f, u: f + factor.astype(f.dtype) * u, first, state), state

    return Descent(follow, between, init)


def _across(a: Grads, b: Grads) -> Grads:
    """The part of a that is orthogonal to b, in float32 or wider; a itself where b is zero."""
    x, y = scaled_norm(a), scaled_norm(b)
    dtype = x.unit_norm.dtype
    along = inner_product(x.unit, y.unit, dtype) / y.unit_norm**2
    return jax.tree.map(
        lambda u, v: (u - along.astype(u.dtype) * v) / x.scale.astype(u.dtype), x.unit, y.unit
    )


def _map_wide(function: Callable[..., jax.Array], *trees: Grads) -> Grads:
    """Maps over the leaves in float32 or wider; the result is in the dtypes of the first tree."""
    dtype = working_dtype(trees[0])
    wide = [jax.tree.map(lambda x: widen(x, dtype), tree) for tree in trees]
    return _like(trees[0], jax.tree.map(function, *wide))


def _like(tree: Grads, wide: Grads) -> Grads:
    return jax.tree.map(lambda x, w: w.astype(x.dtype), tree, wide)
