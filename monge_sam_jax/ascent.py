r"""Which way is up: transformations of the first gradient, before the metric sees it.

The perturbation is the worst step for another vector a in place of the gradient g,

.. math:: \delta^* = \rho \, \frac{G^{-1} a}{\sqrt{a^\top G^{-1} a}}

and any `optax.GradientTransformation` makes one, as `ascent=` of the builders and of
`one_pass_sam`: `optax.ema` (VaSSO), `optax.centralize`, `optax.scale_by_adam`, or one of these. The
state is kept with the transformation's, in float32 or wider, like what it gets.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from monge_sam_jax._core.checks import check_fraction, check_nonnegative
from monge_sam_jax._core.numerics import scaled_norm
from monge_sam_jax.metrics import Grads, Params

__all__ = ["friendly", "z_score"]
__dir__ = __all__.copy


def friendly(decay: float = 0.9, weight: float = 1.0) -> optax.GradientTransformation:
    r"""Ascent along what is the batch's own of the gradient, of Friendly SAM.

    .. math:: a_t = g_t - \sigma m_t, \qquad m_t = \lambda m_{t-1} + (1 - \lambda) g_t

    The average m stands for the gradient of the whole data set, and is left out of the ascent. It
    begins at zero and has the present gradient in it. (The authors' code begins it at the first
    gradient, and subtracts the average of the steps before.)

    Args:
      decay: :math:`\lambda`, in [0, 1).
      weight: :math:`\sigma`, not negative.

    Returns:
      The transformation, with an `optax.EmaState` that holds m: a copy of the perturbed params.

    Raises:
      TypeError: an argument is no real number.
      ValueError: decay is not in [0, 1), or weight negative, NaN or infinite.

    References:
      Li et al., Friendly Sharpness-Aware Minimization, 2024.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax.ascent import friendly
    >>> tx = friendly(decay=0.5, weight=1.0)
    >>> state = tx.init(jnp.zeros(2))
    >>> first, state = tx.update(jnp.array([4.0, 0.0]), state)  # m = [2, 0]
    >>> second, state = tx.update(jnp.array([0.0, 4.0]), state)  # m = [1, 2]
    >>> first, second
    (Array([2., 0.], dtype=float32), Array([-1.,  2.], dtype=float32))
    """
    check_fraction("decay", decay)
    check_nonnegative("weight", weight)
    average = optax.ema(decay, debias=False)

    def update(
        updates: Grads, state: optax.EmaState, params: Params | None = None
    ) -> tuple[Grads, optax.EmaState]:
        del params
        m, state = average.update(updates, state)
        return jax.tree.map(lambda g, m: g - weight * m, updates, m), state

    return optax.GradientTransformation(average.init, update)


def z_score(top: float = 0.05) -> optax.GradientTransformation:
    r"""Ascent along the entries of each leaf that stand out from its others, of ZSharp.

    .. math:: a_i = g_i \; [\, |z_i| \ge q \,], \qquad z = (g - \bar g) / s_g

    q is the quantile of abs(z) in the leaf above which the fraction `top` of its entries are, the
    largest at least. The standard deviation cancels: the entries chosen are those farthest from the
    leaf's mean. A leaf that is the same everywhere, such as one of a single entry, is kept.

    Args:
      top: fraction of the entries of a leaf that are kept, in (0, 1].

    Returns:
      The transformation, without state. It sorts every leaf.

    Raises:
      TypeError: top is no real number.
      ValueError: top is not in (0, 1].

    References:
      Yun, Sharpness-Aware Minimization with Z-Score Gradient Filtering for Neural Networks, 2025.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax.ascent import z_score
    >>> tx = z_score(top=0.25)
    >>> a, _ = tx.update(jnp.array([0.0, 1.0, 9.0, 2.0]), tx.init(jnp.zeros(4)))
    >>> a
    Array([0., 0., 9., 0.], dtype=float32)
    """
    check_fraction("top", top, zero=False, one=True)

    def keep_top(g: jax.Array) -> jax.Array:
        if not g.size:
            return g
        scaled = scaled_norm(g)  # whose mean is in range
        distance = jnp.abs(scaled.unit - jnp.mean(scaled.unit))
        threshold = jnp.quantile(distance, 1 - top, method="higher")
        threshold *= 1 - 8 * jnp.finfo(distance.dtype).eps  # those of a pair are equal
        # A comparison with NaN is false, which would hide a gradient that is not finite.
        return jnp.where(distance >= threshold, g, scaled.unit * 0)

    def update(
        updates: Grads, state: optax.EmptyState, params: Params | None = None
    ) -> tuple[Grads, optax.EmptyState]:
        del params
        return jax.tree.map(keep_top, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
