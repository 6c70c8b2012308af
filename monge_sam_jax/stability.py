r"""Stability of the sharpness-aware gradient flow: which points attract (section 3.2, appendix A).

The flow :math:`d\theta / dt = -\nabla \ell(\theta + \delta^*)` is linearised around a point by the
matrix A of eq. 10, and the point attracts if all eigenvalues of A have positive real part. At an
equilibrium of the loss they are :math:`\lambda_i + \tilde\rho \lambda_i^2`, with the Hessian's
:math:`\lambda_i` and the effective radius :math:`\tilde\rho`. That is positive for
:math:`\tilde\rho > -1 / \lambda_i` if :math:`\lambda_i < 0`, and for every :math:`\tilde\rho \ge 0`
if :math:`\lambda_i > 0`: eq. 11, right as printed for both. A zero :math:`\lambda_i`, by which
eq. 11 divides, gives zero at every radius: this direction is neutral, and never attracts.

Appendix A derives A without a minus sign (the minus stands outside, as in eq. 10), but writes A
with one at equilibria, and expands it there with the wrong sign of the term in :math:`\tilde\rho`
for two lines. Its criterion is right nevertheless.

Steps of a finite length are stable up to some sharpness only: `edge_of_stability` and, for
`one_pass_sam`, `one_pass_edge_of_stability` and `one_pass_orbit`, derived in `edges`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import eigs  # type: ignore[import-untyped]

from monge_sam_jax._core.numerics import scaled_norm, tree_scale
from monge_sam_jax.curvature import LossFn, arpack, check_arpack, check_real, krylov_dimension
from monge_sam_jax.edges import (
    Orbit,
    edge_of_stability,
    one_pass_edge_of_stability,
    one_pass_is_stable,
    one_pass_orbit,
    two_pass_is_stable,
)
from monge_sam_jax.metrics import Grads, Metric, Params
from monge_sam_jax.perturbation import worst_case_perturbation

__all__ = [
    "Orbit",
    "critical_radius",
    "edge_of_stability",
    "is_attractor",
    "one_pass_edge_of_stability",
    "one_pass_is_stable",
    "one_pass_orbit",
    "stability_eigenvalues",
    "stability_matrix",
    "two_pass_is_stable",
]
__dir__ = __all__.copy


def stability_matrix(
    loss_fn: LossFn, params: Params, *, metric: Metric, rho: chex.Numeric, exact: bool = False
) -> jax.Array:
    r"""The matrix that governs the sharpness-aware gradient flow around the params.

    .. math::
        A_\rho(\theta) = \big(H(\theta + \delta^*) [I + \tilde\rho H(\theta)]\big)^\top
        \qquad \text{(eq. 10)}

    H is the Hessian, and the effective radius :math:`\tilde\rho`, in
    :math:`\delta^* = \tilde\rho g`, is frozen while theta varies. With `exact=True` it is not:

    .. math:: A_{ij} = \partial [\nabla \ell(\theta + \delta^*(\theta))]_j / \partial \theta_i

    The exact A tells whether neighbouring trajectories close up, which is more than being drawn to
    an equilibrium: SAM's delta* keeps its length along g, so that in one dimension the exact A is
    the second derivative at :math:`\theta + \delta^*`. It is negative around a maximum at any rho,
    while SAM moves to the maximum from less than rho away, and there eq. 10 is positive.

    Both are transposed Jacobians, as eq. 10 has it. Deviations follow the Jacobian itself,
    :math:`d\epsilon / dt = -A^\top \epsilon`: with the same eigenvalues, along left eigenvectors.

    Args:
      loss_fn: params -> loss, a scalar.
      params: theta, a tree of real arrays with n entries in all.
      metric: the metric G. Eq. 10 needs one whose delta* is a multiple of the gradient, such as
        `euclidean` (SAM) and `monge` over it (M-SAM); `exact=True` takes any.
      rho: radius of the ball in the metric's units, a scalar. A traced value is not checked.
      exact: whether to differentiate delta* in full.

    Returns:
      A, of shape (n, n), in the order of `jax.flatten_util.ravel_pytree`. All NaN where the
      gradient is zero and rho is not: delta* jumps there, its effective radius is infinite, and
      `critical_radius` is what there is to ask.

    Raises:
      TypeError: a param is no real float, or rho no real number.
      ValueError: rho is negative, NaN or infinite, or delta* is not a multiple of the gradient and
        exact is False; if values are traced, A is NaN in place of the latter.

    References:
      Jacobsen and Arvanitidis, Monge SAM, eq. 10 and appendix A.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import euclidean
    >>> loss_fn = lambda p: 0.5 * (p[0] ** 2 - p[1] ** 2)
    >>> stability_matrix(loss_fn, jnp.array([3.0, 4.0]), metric=euclidean(), rho=0.5)  # rho / 5
    Array([[ 1.1,  0. ],
           [ 0. , -0.9]], dtype=float32)
    """
    check_real(params)
    field, defined = _vector_field(loss_fn, params, metric, rho, exact)
    theta, unravel = ravel_pytree(params)
    jacobian = jax.jacfwd(lambda x: ravel_pytree(field(unravel(x)))[0])(theta)
    return jnp.where(defined, jacobian.T, jnp.nan)


def stability_eigenvalues(
    loss_fn: LossFn,
    params: Params,
    *,
    metric: Metric,
    rho: chex.Numeric,
    exact: bool = False,
    k: int | None = None,
    tol: float = 1e-2,
    seed: int = 0,
) -> jax.Array:
    r"""Eigenvalues of the stability matrix A of eq. 10, by ascending real part.

    All of them come from the matrix. The first k, which decide on attraction, are found without it,
    by ARPACK's Arnoldi iteration on the host over products with A, of two Hessian products each.
    For a trained network, with many eigenvalues near zero, that takes hundreds or thousands.

    Args:
      loss_fn: params -> loss, a scalar.
      params: theta, a tree of real arrays with n entries in all.
      metric: as in `stability_matrix`.
      rho: as there.
      exact: as there.
      k: how many eigenvalues; None: all n, also under `jax.jit` and `jax.vmap`.
      tol: as in `top_eigenvalues`.
      seed: as there.

    Returns:
      The eigenvalues, complex; NaN where A is.

    Raises:
      TypeError: as `stability_matrix`, or k is given under a transformation.
      ValueError: as there, or k is less than one, or a Hessian is not finite.
      scipy.sparse.linalg.ArpackNoConvergence: tol was not reached within 1000 restarts.

    References:
      Jacobsen and Arvanitidis, Monge SAM, eq. 10 and figure 4.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import euclidean
    >>> banana, near_saddle = lambda p: (1 - p[0] * p[1]) ** 2, jnp.array([0.1, 0.1])
    >>> stability_eigenvalues(banana, near_saddle, metric=euclidean(), rho=0.0).real
    Array([-1.94,  1.98], dtype=float32)
    >>> stability_eigenvalues(banana, near_saddle, metric=euclidean(), rho=0.5).real
    Array([3.977723, 8.487895], dtype=float32)
    """
    check_real(params)
    theta, unravel = ravel_pytree(params)
    if k is not None:
        check_arpack(theta, k)
    if k is None or theta.size <= krylov_dimension(k):
        A = stability_matrix(loss_fn, params, metric=metric, rho=rho, exact=exact)
        return jnp.sort(jnp.linalg.eigvals(A))[:k]
    field, defined = _vector_field(loss_fn, params, metric, rho, exact)
    dtype = np.result_type(theta.dtype, np.complex64)
    if not defined:
        return jnp.full(k, jnp.nan, dtype)

    @jax.jit
    def product(params: Params, v: jax.Array) -> jax.Array:
        return ravel_pytree(jax.jvp(field, (params,), (unravel(v),))[1])[0]

    eigenvalues, _ = arpack(eigs, partial(product, params), theta, k, seed, which="SR", tol=tol)
    return jnp.sort(jnp.asarray(eigenvalues, dtype))


def _vector_field(
    loss_fn: LossFn, params: Params, metric: Metric, rho: chex.Numeric, exact: bool
) -> tuple[Callable[[Params], Grads], jax.Array]:
    """The field grad loss(theta + delta*), and whether its Jacobian exists at the params."""
    grad_fn = jax.grad(loss_fn)
    grads = grad_fn(params)
    defined = (scaled_norm(grads).norm > 0) | (jnp.asarray(rho) == 0)
    if exact:
        perturb = lambda g, theta: worst_case_perturbation(metric, g, theta, rho)  # noqa: E731
    else:
        radius, skewed = _effective_radius(metric, grads, params, rho)
        perturb = lambda g, theta: tree_scale(radius, g)  # noqa: E731
        defined &= ~skewed

    def field(theta: Params) -> Grads:
        return grad_fn(optax.tree.add(theta, perturb(grad_fn(theta), theta)))

    return field, defined


def _effective_radius(
    metric: Metric, grads: Grads, params: Params, rho: chex.Numeric
) -> tuple[jax.Array, jax.Array]:
    """The radius in delta* = radius * g, and whether delta* is no multiple of g after all."""
    delta = worst_case_perturbation(metric, grads, params, rho)
    d_norm, g_norm = scaled_norm(delta).norm, scaled_norm(grads).norm
    radius = d_norm / jnp.where(g_norm == 0, 1.0, g_norm)
    across = scaled_norm(optax.tree.sub(delta, tree_scale(radius, grads))).norm
    skewed = across > jnp.finfo(across.dtype).eps ** 0.5 * d_norm
    if not isinstance(skewed, jax.core.Tracer) and skewed:
        raise ValueError(
            "eq. 10 freezes the effective radius rho_tilde in delta* = rho_tilde g, but delta* of "
            "this metric is not a multiple of the gradient; use exact=True"
        )
    return radius, skewed


def is_attractor(eigenvalues: jax.Array) -> jax.Array:
    r"""Whether a point attracts the sharpness-aware gradient flow around it.

    .. math:: \operatorname{Re} \mu_i > 0 \quad \text{for all eigenvalues } \mu_i \text{ of } A

    Args:
      eigenvalues: of A, from `stability_eigenvalues`; any leading axes. The first ones are enough.

    Returns:
      Booleans, without the last axis; False where an eigenvalue is zero or NaN.

    References:
      Jacobsen and Arvanitidis, Monge SAM, section 3.2.

    >>> import jax.numpy as jnp
    >>> is_attractor(jnp.array([[1 + 2j, 1 - 2j], [0.0, 1.0]]))
    Array([ True, False], dtype=bool)
    """
    return jnp.all(jnp.real(eigenvalues) > 0, axis=-1)


def critical_radius(hessian_eigenvalues: jax.Array) -> jax.Array:
    r"""The effective radius above which an equilibrium of the loss attracts.

    .. math:: \max_{\lambda_i < 0} \, -1 / \lambda_i, \quad
              \text{or zero if no eigenvalue is negative} \qquad \text{(eq. 11)}

    The negative eigenvalue nearest to zero decides. Those that are zero do not enter: their
    directions are neutral at every radius. Set to zero what is so up to rounding.

    The effective radius itself, :math:`\rho / \|g\|_2` for SAM and
    :math:`\rho / (\|g\|_2 \sqrt{1 + \|g\|_2^2})` for M-SAM, grows without bound towards the
    equilibrium, so that this is a bound on the gradient within which it draws the flow.

    Args:
      hessian_eigenvalues: of the Hessian, real; any leading axes.

    Returns:
      The critical effective radius, in units of params per gradient, without the last axis.

    References:
      Jacobsen and Arvanitidis, Monge SAM, eq. 11; Kim et al., Stability Analysis of Sharpness-Aware
      Minimization, 2023.

    >>> import jax.numpy as jnp
    >>> critical_radius(jnp.array([[-3.0, 3.0], [-4.0, -0.5], [1.0, 2.0]]))
    Array([0.33333334, 2.        , 0.        ], dtype=float32)
    """
    eigenvalues = jnp.asarray(hessian_eigenvalues)
    nonnegative = eigenvalues >= 0  # not negated, so that NaN is passed on
    radii = jnp.where(nonnegative, 0.0, -1 / jnp.where(nonnegative, 1.0, eigenvalues))
    return jnp.max(radii, axis=-1)
