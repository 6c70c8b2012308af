r"""Curvature and sharpness of a loss around params: Hessian products, spectrum, trace, worst rise.

All take a scalar function of the params alone, and any tree of real params. Cast bfloat16 and
float16 ones to float32 first: second derivatives lose what those dtypes round away.

What asks for the spectrum of a matrix takes a `SymmetricOperator` in place of a loss: of
Gauss-Newton or Fisher products, or of means over a data set (`mean_over_data`,
`mean_over_batches`).

========================  =====================================================================
products                  `hvp`, `gauss_newton_product`, `fisher_product`
the whole matrix          `hessian`
spectrum                  `top_eigenvalues` on the host; under `jax.jit`, and of sharded params,
                          `lanczos_eigenvalues`, `spectral_density`, `lanczos_quadrature`,
                          `hessian_trace`
layer by layer            `layerwise_eigenvalues`, `layerwise_traces`
how far the loss rises    `sharpness`, `adaptive_worst_case_sharpness`
the loss on a plane       `loss_slice`, along `filter_normalized_directions`
========================  =====================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import LinearOperator, eigsh  # type: ignore[import-untyped]

from monge_sam_jax._core.checks import check_at_least
from monge_sam_jax.blocks import layerwise_eigenvalues as layerwise_eigenvalues
from monge_sam_jax.blocks import layerwise_traces as layerwise_traces
from monge_sam_jax.landscape import adaptive_worst_case_sharpness as adaptive_worst_case_sharpness
from monge_sam_jax.landscape import filter_normalized_directions as filter_normalized_directions
from monge_sam_jax.landscape import loss_slice as loss_slice
from monge_sam_jax.metrics import Metric, Params
from monge_sam_jax.perturbation import worst_case_perturbation
from monge_sam_jax.products import LossFn, SymmetricOperator, check_real, product_with
from monge_sam_jax.products import fisher_product as fisher_product
from monge_sam_jax.products import gauss_newton_product as gauss_newton_product
from monge_sam_jax.products import hvp as hvp
from monge_sam_jax.products import mean_over_batches as mean_over_batches
from monge_sam_jax.products import mean_over_data as mean_over_data
from monge_sam_jax.spectrum import ORDERS
from monge_sam_jax.spectrum import Quadrature as Quadrature
from monge_sam_jax.spectrum import hessian_trace as hessian_trace
from monge_sam_jax.spectrum import lanczos_eigenvalues as lanczos_eigenvalues
from monge_sam_jax.spectrum import lanczos_quadrature as lanczos_quadrature
from monge_sam_jax.spectrum import spectral_density as spectral_density

__all__ = [
    "LossFn",
    "Quadrature",
    "SymmetricOperator",
    "adaptive_worst_case_sharpness",
    "filter_normalized_directions",
    "fisher_product",
    "gauss_newton_product",
    "hessian",
    "hessian_trace",
    "hvp",
    "lanczos_eigenvalues",
    "lanczos_quadrature",
    "layerwise_eigenvalues",
    "layerwise_traces",
    "loss_slice",
    "mean_over_batches",
    "mean_over_data",
    "sharpness",
    "spectral_density",
    "top_eigenvalues",
]
__dir__ = __all__.copy


def hessian(loss_fn: LossFn, params: Params) -> jax.Array:
    r"""The Hessian as a matrix over the flattened params, for small problems.

    .. math:: H_{ij} = \partial^2 \ell / \partial \theta_i \, \partial \theta_j

    Args:
      loss_fn: params -> loss, a scalar.
      params: theta, a tree of real arrays with n entries in all.

    Returns:
      H, of shape (n, n), in the order of `jax.flatten_util.ravel_pytree`.

    Raises:
      TypeError: a param is no real float.

    >>> import jax.numpy as jnp
    >>> hessian(lambda p: p[0] ** 2 * p[1], jnp.array([3.0, 2.0]))
    Array([[4., 6.],
           [6., 0.]], dtype=float32)
    """
    check_real(params)
    theta, unravel = ravel_pytree(params)
    return jax.hessian(lambda x: loss_fn(unravel(x)))(theta)


def top_eigenvalues(
    loss_fn: LossFn | SymmetricOperator,
    params: Params,
    k: int = 1,
    which: str = "LA",
    *,
    tol: float = 1e-2,
    seed: int = 0,
    return_eigenvectors: bool = False,
) -> Any:
    r"""Eigenvalues at an end of the Hessian's spectrum, without forming the Hessian.

    .. math:: H q_i = \lambda_i q_i, \qquad \lambda_1 \ge \lambda_2 \ge \dots

    By ARPACK's restarted Lanczos iteration on the host, over products that are compiled once per
    call. The largest eigenvalue of a network takes 20 to 40 products, whatever its size; the
    smallest, once training has brought it close to the many near zero, may take hundreds.

    Args:
      loss_fn: params -> loss, a scalar, whose Hessian is meant; or another symmetric matrix.
      params: theta, a tree of real arrays with n entries in all.
      k: how many eigenvalues; all n of them if k >= n.
      which: "LA" for the largest, "SA" for the smallest, "LM" for those of largest magnitude.
      tol: an eigenvalue is found once :math:`\|H q - \lambda q\|_2 / |\lambda|` is below it, which
        bounds the relative error but is mostly far above it. Zero: the precision of the dtype.
      seed: of the random start vector.
      return_eigenvectors: whether to return (eigenvalues, eigenvectors).

    Returns:
      The k eigenvalues, descending, in the dtype of the params; eigenvectors of unit norm, as a
      tree of the form of the params, stacked along a new first axis.

    Raises:
      TypeError: a param is no real float, or this is inside `jax.jit` or another transformation.
      ValueError: k or which is none of those above, or the Hessian is not finite.
      scipy.sparse.linalg.ArpackNoConvergence: tol was not reached within 1000 restarts.

    References:
      Lehoucq, Sorensen and Yang, ARPACK Users' Guide, 1998.

    >>> import jax.numpy as jnp
    >>> loss_fn = lambda p: 0.5 * jnp.sum(jnp.arange(100.0) * p**2)
    >>> jnp.round(top_eigenvalues(loss_fn, jnp.zeros(100), k=2, tol=1e-4))
    Array([99., 98.], dtype=float32)
    """
    if which not in ORDERS:
        raise ValueError(f"which must be one of {', '.join(ORDERS)}, got {which!r}")
    check_real(params)
    theta, unravel = ravel_pytree(params)
    check_arpack(theta, k)
    product = product_with(loss_fn, params)
    matvec = lambda v: ravel_pytree(product(unravel(jnp.asarray(v))))[0]  # noqa: E731
    if theta.size <= krylov_dimension(k):
        if isinstance(loss_fn, SymmetricOperator):
            matrix = jnp.stack([matvec(v) for v in jnp.eye(theta.size, dtype=theta.dtype)])
        else:
            matrix = hessian(loss_fn, params)
        values, vectors = np.linalg.eigh(np.asarray_chkfinite(matrix))
        chosen = np.argsort(ORDERS[which](values))[:k]
        values, vectors = values[chosen], vectors[:, chosen]
    else:
        values, vectors = arpack(eigsh, matvec, theta, k, seed, which=which, tol=tol)
    order = np.argsort(-values)
    eigenvalues = jnp.asarray(values[order])
    if not return_eigenvectors:
        return eigenvalues
    return eigenvalues, jax.vmap(unravel)(jnp.asarray(vectors.T[order]))


def sharpness(
    loss_fn: LossFn, params: Params, *, metric: Metric, rho: chex.Numeric, steps: int = 1
) -> jax.Array:
    r"""How much the loss rises at the worst-case perturbation of the params.

    .. math::
        \max_{1 \le k \le K} \ell(\theta + \delta_k) - \ell(\theta), \qquad
        \delta_k = \arg\max_{\delta^\top G \delta \le \rho^2}
                   \nabla \ell(\theta + \delta_{k-1})^\top \delta, \quad \delta_0 = 0

    One step is the sharpness of eq. 2 at the perturbation that the optimizer takes. Each further
    one linearises the loss at the point reached, and goes to the point of the ball around theta
    that is worst for that: conditional gradient ascent with full steps, along which a convex loss
    never falls. G is that of theta, but where it depends on the gradient (`monge`,
    `diagonal_fisher`) it is given the one at :math:`\theta + \delta_{k-1}`, and the ball changes
    with k.

    Args:
      loss_fn: params -> loss, a scalar.
      params: theta, a tree of real arrays.
      metric: the metric G.
      rho: radius of the ball in the metric's units, a scalar. A traced value is not checked.
      steps: K, at least one; each costs a gradient and a loss, and they are unrolled.

    Returns:
      The rise, a scalar; zero where the gradient is, and negative if every step overshoots.

    Raises:
      TypeError: a param is no real float, or rho no real number.
      ValueError: steps is less than one, or rho is negative, NaN or infinite.

    References:
      Jacobsen and Arvanitidis, Monge SAM, eq. 2.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import euclidean
    >>> sharpness(lambda p: p @ p, jnp.array([3.0, 4.0]), metric=euclidean(), rho=1.0)  # 6^2 - 5^2
    Array(11., dtype=float32)
    """
    check_real(params)
    check_at_least("steps", steps, 1)
    value, perturbed, rises = loss_fn(params), params, []
    for _ in range(steps):
        delta = worst_case_perturbation(metric, jax.grad(loss_fn)(perturbed), params, rho)
        perturbed = optax.tree.add(params, delta)
        rises.append(loss_fn(perturbed) - value)
    return jnp.max(jnp.stack(rises))


def check_arpack(theta: jax.Array, k: int) -> None:
    """Raises unless k is a number of eigenvalues and theta a concrete array."""
    check_at_least("k", k, 1)
    if isinstance(theta, jax.core.Tracer):
        raise TypeError("ARPACK runs on the host: call this outside of jax.jit, jax.vmap and so on")


def krylov_dimension(k: int) -> int:
    """How many vectors ARPACK keeps, and so about how many products it takes at least."""
    return max(20, 2 * k + 1)


def arpack(
    solver: Callable[..., Any], product: Any, theta: jax.Array, k: int, seed: int, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, and eigenvectors as columns, of a product with vectors like theta."""
    n = theta.size
    matvec = lambda v: np.asarray_chkfinite(product(v))  # noqa: E731
    start = np.random.default_rng(seed).standard_normal(n).astype(theta.dtype)
    if not matvec(start).any():  # the matrix is zero, which ARPACK refuses
        return np.zeros(k, theta.dtype), np.eye(n, k, dtype=theta.dtype)
    operator = LinearOperator((n, n), matvec=matvec, dtype=theta.dtype)
    return solver(operator, k, v0=start, ncv=krylov_dimension(k), maxiter=1000, **options)
