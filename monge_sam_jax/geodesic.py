r"""The perturbation along the loss surface itself, in place of a straight step.

The balls of `monge_sam_jax.metrics` are ellipsoids: they take the metric at the params for that of
everywhere around. Here the perturbation goes along a geodesic of the Monge metric, the straightest
curve on the graph of the loss.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from monge_sam_jax._core.checks import check_at_least, check_nonnegative, check_real
from monge_sam_jax._core.numerics import (
    as_arrays,
    inner_product,
    lift_factors,
    scaled_norm,
    tree_scale,
    widen,
    working_dtype,
)
from monge_sam_jax.metrics import Params

__all__ = ["geodesic_perturbation"]
__dir__ = __all__.copy


def geodesic_perturbation(
    loss_fn: Callable[[Params], jax.Array],
    params: Params,
    rho: chex.Numeric,
    *,
    num_steps: int = 4,
    alpha: chex.Numeric = 1.0,
) -> Params:
    r"""The displacement along the geodesic of length rho that starts in steepest ascent.

    .. math::
        \delta = \theta(\rho) - \theta(0), \qquad
        \theta'' = -\frac{\alpha^2 \, \theta'^\top H \theta'}{1 + \alpha^2 \|g\|_2^2} \, g, \qquad
        \theta'(0) = \frac{g / \|g\|_2}{\sqrt{1 + \alpha^2 \|g\|_2^2}}

    with the gradient g and the Hessian H at :math:`\theta(s)`. It is a geodesic of the Monge metric
    :math:`G = I + \alpha^2 g g^\top` (eq. 6), whose length s is that of the curve on the graph
    :math:`(\theta, \alpha \ell(\theta))`. Monge SAM's perturbation (eq. 9) is
    :math:`\rho \, \theta'(0)`. To second order in rho the two differ in length alone: where the
    loss curves upwards along g, the geodesic ends nearer. It may pass over a maximum, and go down.

    The equation: a curve on a surface is a geodesic if its acceleration is normal to the surface.
    That of :math:`(\theta, z)`, with :math:`z = \alpha \ell(\theta)`, is
    :math:`(\theta'', z'') = \mu (-\alpha g, 1)`, and :math:`z'' = \alpha (\theta'^\top H \theta' +
    g^\top \theta'')`. So :math:`\mu = \alpha \theta'^\top H \theta' - \alpha^2 \|g\|_2^2 \mu`.

    The integrator: half of the step straight on; then the unit tangent
    :math:`T = (\theta', z')` is mirrored in the plane that is tangent there; then the other half,

    .. math:: T \leftarrow T - 2 (N^\top T) N, \qquad
              N = (-\alpha g, 1) / \sqrt{1 + \alpha^2 \|g\|_2^2}

    It needs one gradient and no Hessian, is of second order and symmetric in time, and keeps the
    length of T to rounding, so that :math:`\|\delta\|_2 \le \rho` whatever the loss, also where
    gradients jump, as those of ReLU networks do. On a linear loss it is eq. 9 exactly.

    The cost is that of num_steps + 1 gradients, unrolled; with the one for the descent, a training
    step takes num_steps + 2, where Monge SAM takes two.

    Args:
      loss_fn: params -> loss, a scalar.
      params: theta, a tree of real arrays; those below float32 are given to `loss_fn` as float32.
      rho: length of the geodesic, a scalar; a traced value is not checked.
      num_steps: number of steps, at least one. The error falls with its square, once a step turns
        the tangent by less than a radian: :math:`\alpha \rho` times the curvature of the loss along
        the geodesic, divided by num_steps.
      alpha: height of the loss graph, in 1 / (units of the loss), as in `monge`; zero gives SAM's
        perturbation. A traced value is not checked.

    Returns:
      delta, a tree of the form of the params, in float32 or wider. It is zero where the gradient
      at the params is zero, and NaN everywhere if one on the way is not finite anywhere.

    Raises:
      TypeError: a param is no real float, or rho or alpha no real number.
      ValueError: rho or alpha is negative, NaN or infinite, or num_steps less than one.

    References:
      Jacobsen and Arvanitidis, Monge SAM, section 6; Hartmann, Girolami and Klami, Lagrangian
      Manifold Monte Carlo on Monge Patches, 2022, for the geodesics of this metric.

    A training step, with any optimizer:

    >>> import jax, optax
    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import geodesic_perturbation
    >>> loss_fn = lambda params: jnp.sum((params - jnp.array([3.0, 4.0])) ** 2)
    >>> tx = optax.sgd(0.1)
    >>> params = jnp.zeros(2)
    >>> state = tx.init(params)
    >>> delta = geodesic_perturbation(loss_fn, params, rho=1.0)
    >>> grads = jax.grad(loss_fn)(optax.tree.add(params, delta))
    >>> updates, state = tx.update(grads, state, params)
    >>> optax.apply_updates(params, updates)
    Array([0.611825  , 0.81576663], dtype=float32)
    """
    check_real(params)
    check_nonnegative("rho", rho)
    check_nonnegative("alpha", alpha)
    check_at_least("num_steps", num_steps, 1)
    params = as_arrays(params)
    dtype = working_dtype(params)
    params = jax.tree.map(lambda p: widen(p, dtype), params)
    alpha = jnp.asarray(alpha, dtype)

    def slope(theta: Params) -> tuple[Params, jax.Array, jax.Array]:
        """The unit gradient e, and the factors in N = (-sine * e, cosine)."""
        g = scaled_norm(jax.grad(loss_fn)(theta))
        u, r = lift_factors(g.norm, alpha)
        cosine = jnp.maximum(u / r, jnp.finfo(dtype).tiny)
        sine = jnp.minimum(alpha * (g.norm * cosine), 1.0)
        return tree_scale(1 / g.unit_norm, g.unit), sine, cosine

    # T = (first * q, z'), where q stays in range also where the graph is too steep for theta' to.
    q, z, first = slope(params)
    delta = jax.tree.map(jnp.zeros_like, params)
    half_step = jnp.asarray(rho, dtype) / (2 * num_steps) * first
    for _ in range(num_steps):
        delta = optax.tree.add_scale(delta, half_step, q)
        e, sine, cosine = slope(optax.tree.add(params, delta))
        off = z * (cosine / first) - sine * inner_product(e, q, dtype)  # N^T T / first
        q = optax.tree.add_scale(q, 2 * off * sine, e)
        z = z - 2 * (off * first) * cosine
        delta = optax.tree.add_scale(delta, half_step, q)
    return delta
