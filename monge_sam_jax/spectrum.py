r"""Spectra of curvature matrices without the matrices: trace, density, ends.

Everything runs under `jax.jit`, on the device, and leaves params that are sharded where they are.
A matrix is the Hessian of a loss, or a `SymmetricOperator`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from monge_sam_jax._core.checks import check_at_least
from monge_sam_jax._core.lanczos import matrix, tridiagonalize
from monge_sam_jax._core.numerics import inner_product, working_dtype
from monge_sam_jax.metrics import Params
from monge_sam_jax.products import LossFn, SymmetricOperator, product_with

__all__ = [
    "Quadrature",
    "hessian_trace",
    "lanczos_eigenvalues",
    "lanczos_quadrature",
    "spectral_density",
]
__dir__ = __all__.copy


class Quadrature(NamedTuple):
    r"""Points and weights, :math:`\operatorname{tr} f(H) / n \approx \sum_j w_j f(\lambda_j)`.

    Attributes:
      nodes: Ritz values, of shape (num_samples, steps), ascending in each sample.
      weights: of the same shape; not negative, and of sum one.
    """

    nodes: jax.Array
    weights: jax.Array


def hessian_trace(
    loss_fn: LossFn | SymmetricOperator,
    params: Params,
    key: chex.PRNGKey,
    num_samples: int = 100,
    *,
    batch_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Hutchinson's estimate of the Hessian's trace, and its standard error.

    .. math::
        \operatorname{tr} H \approx \frac{1}{N} \sum_{s=1}^N v_s^\top H v_s, \quad
        v_s \in \{-1, 1\}^n, \qquad \text{variance } \frac{2}{N} \sum_{i \ne j} H_{ij}^2

    Args:
      loss_fn: params -> loss, a scalar, whose Hessian is meant; or another symmetric matrix.
      params: theta, a tree of real arrays.
      key: of the random signs.
      num_samples: N, at least two; each costs a Hessian product.
      batch_size: how many of them are computed at once, which bounds the memory; None: all.

    Returns:
      (estimate, standard error), scalars; the standard error is that of the samples.

    Raises:
      TypeError: a param is no real float.
      ValueError: num_samples is less than two.

    References:
      Hutchinson, A stochastic estimator of the trace of the influence matrix, 1989.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> hessian_trace(lambda p: p[0] ** 2 + 3 * p[1] ** 2, jnp.ones(2), jax.random.key(0))
    (Array(8., dtype=float32), Array(0., dtype=float32))
    """
    check_at_least("num_samples", num_samples, 2)
    product, params = product_with(loss_fn, params), jax.tree.map(jnp.asarray, params)

    def sample(key: chex.PRNGKey) -> jax.Array:
        v = optax.tree.random_like(key, params, sampler=jax.random.rademacher)
        return inner_product(v, product(v), working_dtype(params))

    keys = jax.random.split(key, num_samples)
    samples = jax.lax.map(sample, keys, batch_size=batch_size or num_samples)
    return jnp.mean(samples), jnp.std(samples, ddof=1) / num_samples**0.5


def lanczos_quadrature(
    loss_fn: LossFn | SymmetricOperator,
    params: Params,
    key: chex.PRNGKey,
    *,
    num_samples: int = 4,
    num_steps: int = 40,
    reorthogonalize: bool = True,
) -> Quadrature:
    r"""Stochastic Lanczos quadrature of a Hessian's spectrum.

    .. math::
        \frac{1}{n} \operatorname{tr} f(H) = \operatorname{E} v^\top f(H) v
        \approx \frac{1}{S} \sum_{s=1}^S \sum_{j=1}^m (e_1^\top u_{sj})^2 f(\lambda_{sj}), \quad
        v \in \{-1, 1\}^n / \sqrt{n}

    m steps of Lanczos' iteration from each of S random vectors v give a tridiagonal matrix of
    eigenvalues :math:`\lambda_{sj}` and eigenvectors :math:`u_{sj}`: the points and weights of
    Gauss' quadrature, exact for polynomials f of degree 2m - 1. What is left is the variance over
    v, which decreases as 1 / (n S): at most :math:`2 \|f(H)\|_F^2 / (n^2 S)`.

    It takes S m products, and keeps m vectors of the size of the params, against which every new
    one is orthogonalised; the samples are drawn one after another. Without that, as
    `reorthogonalize=False` has it, five vectors are kept. Eigenvalues that are found then are found
    again, as copies that share the weight: the quadrature hardly changes.

    Args:
      loss_fn: params -> loss, a scalar, whose Hessian is meant; or another symmetric matrix.
      params: theta, a tree of real arrays with n entries in all.
      key: of the random signs.
      num_samples: S.
      num_steps: m; n of them if m > n.
      reorthogonalize: whether to keep the basis.

    Returns:
      The quadrature, in the dtype of the params; NaN if the Hessian is not finite.

    Raises:
      TypeError: a param is no real float.
      ValueError: num_samples or num_steps is less than one, or there are no params.

    References:
      Ubaru, Chen and Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, 2017.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> loss_fn = lambda p: 0.5 * jnp.sum(jnp.arange(100.0) * p**2)
    >>> nodes, weights = lanczos_quadrature(loss_fn, jnp.zeros(100), jax.random.key(0))
    >>> jnp.sum(weights * nodes)  # trace / 100
    Array(49.5, dtype=float32)
    """
    check_at_least("num_samples", num_samples, 1)
    num_steps = _check_steps(params, num_steps)
    product, params = product_with(loss_fn, params), jax.tree.map(jnp.asarray, params)
    rows = num_steps if reorthogonalize else 2

    def sample(key: chex.PRNGKey) -> jax.Array:
        return matrix(tridiagonalize(product, params, key, num_steps, rows))

    keys = jax.random.split(key, num_samples)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, key))):
        matrices = jax.lax.map(sample, keys)
    else:
        matrices = jnp.stack([sample(key) for key in keys])
    nodes, vectors = jnp.linalg.eigh(matrices)
    return Quadrature(nodes, vectors[:, 0] ** 2 / num_samples)


def spectral_density(
    loss_fn: LossFn | SymmetricOperator,
    params: Params,
    key: chex.PRNGKey,
    *,
    num_samples: int = 4,
    num_steps: int = 40,
    width: chex.Numeric | None = None,
    num_points: int = 1024,
    grid: jax.Array | None = None,
    reorthogonalize: bool = True,
) -> tuple[jax.Array, jax.Array]:
    r"""The density of a Hessian's eigenvalues, smoothed by a Gaussian, without the Hessian.

    .. math::
        \phi_\sigma(t) = \frac{1}{n} \sum_{i=1}^n \mathcal{N}(t; \lambda_i, \sigma^2)
        \approx \sum_j w_j \mathcal{N}(t; \lambda_j, \sigma^2)

    with the points and weights of `lanczos_quadrature`, which says what it costs. What is narrower
    than :math:`\sigma` is not resolved; nor, inside the bulk, what is narrower than about its width
    divided by num_steps. Isolated eigenvalues are found to more digits than the plot shows.

    Args:
      loss_fn: as in `lanczos_quadrature`.
      params: as there.
      key: as there.
      num_samples: as there.
      num_steps: as there.
      width: sigma, in units of eigenvalues; None: a hundredth of the largest one in magnitude. It
        is no narrower than the spacing of a grid that is chosen here, nor than its dtype resolves,
        so that no peak falls between two points.
      num_points: points of the grid, 64 or more.
      grid: points at which to give the density, to compare several; None: evenly spaced ones from
        six widths below the smallest Ritz value to six above the largest. num_points is not used
        if there is a grid.
      reorthogonalize: as there.

    Returns:
      (grid, density), two vectors. The density integrates to one by the trapezoidal rule, as far
      as a given grid covers and resolves it.

    Raises:
      TypeError: a param is no real float.
      ValueError: num_samples or num_steps is less than one, num_points less than 64, or there are
        no params.

    References:
      Ghorbani, Krishnan and Xiao, An investigation into neural net optimization via Hessian
      eigenvalue density, 2019.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> loss_fn = lambda p: 0.5 * jnp.sum(jnp.arange(100.0) * p**2)
    >>> grid, density = spectral_density(loss_fn, jnp.zeros(100), jax.random.key(0), width=2.0)
    >>> jnp.trapezoid(density, grid), jnp.interp(50.0, grid, density)  # about 1 / 100
    (Array(1., dtype=float32), Array(0.01, dtype=float32))
    """
    check_at_least("num_points", num_points, 64)
    nodes, weights = lanczos_quadrature(
        loss_fn,
        params,
        key,
        num_samples=num_samples,
        num_steps=num_steps,
        reorthogonalize=reorthogonalize,
    )
    largest = jnp.max(jnp.abs(nodes))
    if width is None:
        width = 0.01 * jnp.where(largest == 0, 1.0, largest)
    width = jnp.asarray(width, nodes.dtype)
    if grid is None:
        low, high, margin = jnp.min(nodes), jnp.max(nodes), 6
        width = jnp.maximum(width, (high - low) / (num_points - 1 - 2 * margin))
        width = jnp.maximum(width, num_points * jnp.finfo(nodes.dtype).eps * largest)
        grid = jnp.linspace(low - margin * width, high + margin * width, num_points)
    grid = jnp.asarray(grid, nodes.dtype)
    bells = jax.scipy.stats.norm.pdf(grid[:, None], nodes.reshape(1, -1), width)
    return grid, jnp.matmul(bells, weights.ravel(), precision="highest")


# Sort keys, for the words of ARPACK.
ORDERS: dict[str, Callable[[Any], Any]] = {
    "LA": lambda x: -x,
    "SA": lambda x: x,
    "LM": lambda x: -abs(x),
}


def lanczos_eigenvalues(
    loss_fn: LossFn | SymmetricOperator,
    params: Params,
    key: chex.PRNGKey,
    k: int = 1,
    which: str = "LA",
    *,
    num_steps: int = 40,
    return_eigenvectors: bool = False,
) -> Any:
    r"""Eigenvalues at an end of the Hessian's spectrum under `jax.jit`, and bounds on their errors.

    .. math::
        \| H q_i - \lambda_i q_i \|_2 = \beta_m |e_m^\top u_i| = r_i, \qquad
        \min_j |\lambda_i - \lambda_j(H)| \le r_i

    m steps of Lanczos' iteration, orthogonalised in full, where `top_eigenvalues` restarts a
    shorter one on the host until a tolerance is met. Here the number of products is fixed, and the
    residuals r say how good they were: within r of each value there is an eigenvalue, and the error
    is about :math:`r^2` over the distance to the next one where that is smaller. Rounding adds a
    few units in the last place of the eigenvalue of largest magnitude.

    Of eigenvalues that are equal one is found, unless the whole of the space that the iteration can
    reach is smaller than m steps: then it begins anew in what is orthogonal to it.

    It keeps m vectors of the size of the params, and those of the eigenvectors.

    Args:
      loss_fn: params -> loss, a scalar, whose Hessian is meant; or another symmetric matrix.
      params: theta, a tree of real arrays with n entries in all.
      key: of the random start vector.
      k: how many eigenvalues; all n of them if k >= n.
      which: "LA" for the largest, "SA" for the smallest, "LM" for those of largest magnitude.
      num_steps: m, at least k; each costs a product; n of them if m > n.
      return_eigenvectors: whether to return (eigenvalues, residuals, eigenvectors).

    Returns:
      (eigenvalues, residuals), descending by eigenvalue, in the dtype of the params; eigenvectors
      of unit norm, as a tree of the form of the params, stacked along a new first axis. NaN if the
      Hessian is not finite.

    Raises:
      TypeError: a param is no real float.
      ValueError: k, which or num_steps is none of those above, or there are no params.

    References:
      Parlett, The Symmetric Eigenvalue Problem, 1980, chapter 13.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> loss_fn = lambda p: 0.5 * jnp.sum(jnp.arange(100.0) * p**2)
    >>> values, residuals = jax.jit(lambda p, key: lanczos_eigenvalues(loss_fn, p, key, 2))(
    ...     jnp.zeros(100), jax.random.key(0)
    ... )
    >>> jnp.round(values), bool(jnp.all(residuals < 0.1))
    (Array([99., 98.], dtype=float32), True)
    """
    if which not in ORDERS:
        raise ValueError(f"which must be one of {', '.join(ORDERS)}, got {which!r}")
    check_at_least("k", k, 1)
    check_at_least("num_steps", num_steps, k)
    num_steps = _check_steps(params, num_steps)
    product, params = product_with(loss_fn, params), jax.tree.map(jnp.asarray, params)
    state = tridiagonalize(product, params, key, num_steps, num_steps)
    ritz_values, vectors = jnp.linalg.eigh(matrix(state))
    chosen = jnp.argsort(ORDERS[which](ritz_values))[:k]
    chosen = chosen[jnp.argsort(-ritz_values[chosen])]
    eigenvalues, vectors = ritz_values[chosen], vectors[:, chosen]
    residuals = state.off_diagonal[-1] * jnp.abs(vectors[-1])
    if not return_eigenvectors:
        return eigenvalues, residuals
    combine = lambda Q: jnp.tensordot(vectors.T.astype(Q.dtype), Q, 1, precision="highest")  # noqa: E731
    return eigenvalues, residuals, jax.tree.map(combine, state.basis)


def _check_steps(params: Params, num_steps: int) -> int:
    """The number of steps that the dimension allows; ValueError if there is none."""
    check_at_least("num_steps", num_steps, 1)
    n = sum(jnp.size(leaf) for leaf in jax.tree.leaves(params))
    if n == 0:
        raise ValueError(f"there are no params to take a spectrum over, got {params!r}")
    return min(num_steps, n)
