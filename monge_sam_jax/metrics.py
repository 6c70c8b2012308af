r"""Metrics: what a ball around the params is.

Every sharpness-aware method takes the worst step inside a small ball of a metric G,

.. math::
    \delta^* = \arg\max_{\delta^\top G \delta \le \rho^2} g^\top \delta
             = \rho \, \frac{G^{-1} g}{\sqrt{g^\top G^{-1} g}}
    \qquad \text{(eqs. 5 and 8)}

and the methods differ in G alone:

========================  ======================================  =============================
metric                    G                                       method
========================  ======================================  =============================
`euclidean()`             I                                       SAM (Foret et al. 2020)
`adaptive(eta)`           diag(1 / (abs(theta) + eta)^2)          ASAM (Kwon et al. 2021)
`diagonal_fisher(eta)`    diag(1 + eta g^2)                       Fisher SAM (Kim et al. 2022)
`monge(base, alpha)`      M + alpha^2 g g^T, M the base's metric  Monge SAM (eq. 6)
`averaged_monge(r)`       M + alpha^2 / r sum_i g_i g_i^T         Monge SAM, over the last r steps
`averaged_monge_over(g)`  the same, of given gradients            Monge SAM, over micro-batches
`pullback(phi)`           J^T J, J the Jacobian of phi            SAM in the coordinates phi(psi)
`preconditioned(tx)`      P^-1, P what tx does to a gradient      SAM in the ball of an optimizer
========================  ======================================  =============================

Others have a norm N in place of :math:`\sqrt{\delta^\top G \delta}`, with a dual norm
:math:`N^*(g) = \max_{N(\delta) \le 1} g^\top \delta`:

========================  ======================================  =============================
metric                    N(delta)                                method
========================  ======================================  =============================
`layerwise(base)`         max over leaves of the base's norm      SAM layer by layer
`grouped(metrics, ...)`   max over groups of their norms          the same, by groups
`supremum()`              max of abs(delta)                       SAM of p = infinity
`spectral()`              max over leaves of singular values      SAM in the ball of Muon
========================  ======================================  =============================

A metric is a pair of pure functions. One of your own takes the natural gradient v = G^{-1} g (or
any positive multiple of it), its length in the metric and the dual norm of g; here a metric given
by a fixed positive diagonal:

>>> import jax
>>> import jax.numpy as jnp
>>> def diagonal(weights):
...     def ascent(grads, params, state):
...         v = jax.tree.map(lambda g, w: g / w, grads, weights)
...         gv = jax.tree.map(lambda g, v: jnp.sum(g * v), grads, v)
...         dual_norm = jnp.sqrt(sum(jax.tree.leaves(gv)))
...         return Ascent(v, dual_norm, length=dual_norm), state
...
...     return Metric(init=lambda params: (), ascent=ascent)
>>> metric = diagonal({"w": jnp.array([1.0, 4.0])})
>>> ascent, _ = metric.ascent({"w": jnp.array([3.0, 8.0])}, None, ())
>>> ascent.direction["w"], ascent.dual_norm
(Array([0.6, 0.4], dtype=float32), Array(5., dtype=float32))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg

from monge_sam_jax._core.checks import check_nonnegative
from monge_sam_jax._core.numerics import (
    as_it_is,
    bounded_product,
    bounded_quotient,
    inner_product,
    lift_factors,
    scaled_norm,
    tree_scale,
    widen,
)

__all__ = [
    "Ascent",
    "Grads",
    "Metric",
    "Params",
    "State",
    "adaptive",
    "diagonal_fisher",
    "euclidean",
    "monge",
    "pullback",
]
__dir__ = __all__.copy

Params: TypeAlias = chex.ArrayTree
Grads: TypeAlias = chex.ArrayTree
State: TypeAlias = chex.ArrayTree


class Ascent(NamedTuple):
    r"""Unit steepest ascent under a metric G.

    The direction is kept as a tangent vector and its length, so that rho and the factor of a lifted
    metric meet the length as scalars, and a leaf is multiplied once, whatever was composed.

    Attributes:
      tangent: v, any positive multiple of the natural gradient :math:`G^{-1} g`; shapes of the
        params, float32 or wider; zero where g is zero. Entries of order one are the safest.
      dual_norm: :math:`\|g\|_{G^{-1}} = \sqrt{g^\top G^{-1} g}`, scalar;
        :math:`\rho` times it is :math:`g^\top \delta^*`. One beyond the dtype's range is its
        largest number.
      length: :math:`\|v\|_G = \sqrt{v^\top G v}`, scalar, not zero; one if v is a unit vector.
    """

    tangent: Params
    dual_norm: jax.Array
    length: chex.Numeric = 1.0

    @property
    def direction(self) -> Params:
        r""":math:`G^{-1} g / \|g\|_{G^{-1}}`, the unit steepest ascent: tangent / length."""
        return tree_scale(1 / jnp.asarray(self.length, self.dual_norm.dtype), self.tangent)


class Metric(NamedTuple):
    r"""A metric as a pair of pure functions.

    Attributes:
      init: params -> state of the metric; an empty tuple for the metrics of this module.
      ascent: (grads, params, state) -> (`Ascent`, state). Leaves that are None (masked ones) stay
        None. `grads` is the direction of ascent of the loss: for complex leaves, the conjugate of
        what `jax.grad` returns.
      isotropic: whether :math:`G^{-1} g` is a multiple of g, by one scalar for all leaves, so that
        `one_pass_sam` may recompute a perturbation in place of storing it.
      linear: whether G depends on params and state alone, so that :math:`G^{-1} g` is linear in g:
        what `averaged_monge` needs of its base.
    """

    init: Callable[[Params], State]
    ascent: Callable[[Grads, Params, State], tuple[Ascent, State]]
    isotropic: bool = False
    linear: bool = False


def stateless(params: Params) -> State:
    """`Metric.init` of a metric without state."""
    del params
    return ()


def check_base(name: str, metric: Any) -> None:
    """Raises TypeError unless the argument of that name is a `Metric`."""
    if not isinstance(metric, Metric):
        raise TypeError(f"{name} must be a Metric such as euclidean(), got {metric!r}")


def euclidean() -> Metric:
    r"""The Euclidean metric, G = I, of SAM.

    .. math:: \delta^* = \rho \, g / \|g\|_2 \qquad \text{(eq. 3)}

    Returns:
      The metric, without state.

    References:
      Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, 2020.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import worst_case_perturbation
    >>> worst_case_perturbation(euclidean(), jnp.array([3.0, 4.0]), jnp.zeros(2), rho=0.5)
    Array([0.3, 0.4], dtype=float32)
    """

    def ascent(grads: Grads, params: Params, state: State) -> tuple[Ascent, State]:
        del params
        g = scaled_norm(grads)
        return Ascent(g.unit, dual_norm=g.norm, length=g.unit_norm), state

    return Metric(stateless, ascent, isotropic=True, linear=True)


def adaptive(eta: chex.Numeric = 0.01) -> Metric:
    r"""The elementwise adaptive metric of ASAM.

    .. math::
        G = \operatorname{diag}(1 / T^2), \quad T = |\theta| + \eta, \qquad
        \delta^* = \rho \, T^2 g / \|T g\|_2

    Args:
      eta: floor of the params' size, in the params' units; non-negative. A traced value is not
        checked.

    Returns:
      The metric, without state.

    Raises:
      TypeError: eta is no real number.
      ValueError: eta is negative, NaN or infinite.

    References:
      Kwon et al., ASAM: Adaptive Sharpness-Aware Minimization, 2021.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import worst_case_perturbation
    >>> params, grads = jnp.array([1.0, -2.0]), jnp.array([3.0, 2.0])
    >>> worst_case_perturbation(adaptive(eta=0.0), grads, params, rho=0.5)
    Array([0.3, 0.8], dtype=float32)
    """
    check_nonnegative("eta", eta)

    def ascent(grads: Grads, params: Params, state: State) -> tuple[Ascent, State]:
        g = scaled_norm(grads)
        dtype = g.unit_norm.dtype

        def size(p: jax.Array) -> jax.Array:  # T / 8, so that its product with g.unit is in range
            return widen(jnp.abs(p), dtype) / 8 + jnp.asarray(eta, dtype) / 8

        h = scaled_norm(jax.tree.map(lambda u, p: u * size(p).astype(u.dtype), g.unit, params))
        tangent = jax.tree.map(
            lambda u, p: u * (8 * size(p) * h.scale).astype(u.dtype), h.unit, params
        )
        dual_norm = bounded_product(h.divided(g.inverse_scale), jnp.asarray(8, dtype))
        return Ascent(tangent, dual_norm, length=h.unit_norm * h.scale), state

    return Metric(stateless, ascent, linear=True)


def diagonal_fisher(eta: chex.Numeric = 1.0) -> Metric:
    r"""The diagonal empirical Fisher metric of the batch, as Fisher SAM regularises it.

    .. math::
        G^{-1} = \operatorname{diag}\big(1 / (1 + \eta f)\big), \quad f = g \odot g, \qquad
        \delta^* = \rho \, G^{-1} g / \sqrt{g^\top G^{-1} g} \qquad \text{(eq. 5)}

    g is the gradient of the mean loss over the batch, so f is the square of the mean, not the mean
    of the squares (section 2.2 of the Monge SAM paper).

    Args:
      eta: weight of the Fisher information against the identity, in 1 / (units of g)^2;
        non-negative. A traced value is not checked.

    Returns:
      The metric, without state.

    Raises:
      TypeError: eta is no real number.
      ValueError: eta is negative, NaN or infinite.

    References:
      Kim et al., Fisher SAM: Information Geometry and Sharpness Aware Minimisation, 2022.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import worst_case_perturbation
    >>> worst_case_perturbation(diagonal_fisher(eta=1.0), jnp.array([1.0, 0.0]), jnp.zeros(2), 0.5)
    Array([0.35355338, 0.        ], dtype=float32)
    """
    check_nonnegative("eta", eta)

    def ascent(grads: Grads, params: Params, state: State) -> tuple[Ascent, State]:
        del params
        g = scaled_norm(grads)
        info = jnp.finfo(g.scale.dtype)
        grads = jax.tree.map(lambda x: widen(x, info.dtype), grads)
        root_eta = jnp.sqrt(jnp.asarray(eta, info.dtype))
        # mu G^-1 g is of order one where it is largest, at eta f = 1 or the largest g, but
        # 1 / kappa where kappa^2 = eta f is large. The factor b has the squares of both in range.
        mu = jnp.maximum(root_eta, g.scale)
        kappa = bounded_quotient(mu, g.scale)
        b = jnp.sqrt(kappa)

        def divide(x: jax.Array) -> jax.Array:  # b mu x / (1 + eta f), no square out of range
            s = jnp.minimum(jnp.abs(as_it_is(x) * root_eta.astype(x.dtype)), 1 / info.tiny)
            q = jax.lax.stop_gradient(1 / jnp.maximum(s, 1.0))
            w = jnp.abs(x * (q * root_eta).astype(x.dtype))  # 1 + eta f = (q^2 + w^2) / q^2
            return x * (q * mu).astype(x.dtype) * (b * q / (q**2 + w**2)).astype(x.dtype)

        v = jax.tree.map(divide, grads)
        product = inner_product(tree_scale(mu / b, grads), v, info.dtype)  # mu^2 g^T G^-1 g
        n = jnp.sqrt(jnp.maximum(product, info.tiny ** (1 / 3)))
        dual_norm = bounded_quotient(jnp.where(g.inverse_scale != 0, n, 0.0), mu)
        return Ascent(v, dual_norm, length=b * n), state

    return Metric(stateless, ascent)


def monge(base: Metric = euclidean(), alpha: chex.Numeric = 1.0) -> Metric:  # noqa: B008
    r"""The Monge metric of the loss surface, over any base metric M.

    .. math:: G = M + \alpha^2 g g^\top \qquad \text{(eq. 6, where } M = I, \alpha = 1)

    It is the metric that the graph :math:`(\theta, \alpha \ell(\theta))` inherits from the space
    around it. By Sherman and Morrison (eq. 7) the base's perturbation changes by one scalar: with
    :math:`n = \|g\|_{M^{-1}}`,

    .. math:: \delta^*_\text{Monge} = \delta^*_M / \sqrt{1 + \alpha^2 n^2} \qquad \text{(eq. 9)}

    so that its length is at most rho, where the gradient is small, and falls as rho / (alpha n)
    where it is large. The length depends on the loss's scale: the gradient must be that of the mean
    loss, unscaled and not yet clipped.

    The same holds of any norm N with dual norm n, in place of the base's. In the ball
    :math:`N(\delta)^2 + \alpha^2 (g^\top \delta)^2 \le \rho^2`

    .. math::
        (g^\top \delta)^2 \le n^2 N(\delta)^2 \le n^2 (\rho^2 - \alpha^2 (g^\top \delta)^2), \qquad
        g^\top \delta \le \rho n / \sqrt{1 + \alpha^2 n^2}

    which the worst step of N attains at that length.

    Args:
      base: the metric M.
      alpha: height of the loss graph, in 1 / (units of the loss); non-negative. Zero is the base
        metric, one the paper's M-SAM, and the larger, the closer to gradient descent. A traced
        value is not checked.

    Returns:
      The metric, with the base's state.

    Raises:
      TypeError: base is no `Metric`, or alpha is no real number.
      ValueError: alpha is negative, NaN or infinite.

    References:
      Jacobsen and Arvanitidis, Monge SAM, eqs. 6 to 9; Hartmann et al. 2022 for alpha.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import worst_case_perturbation
    >>> g = jnp.array([3.0, 4.0])
    >>> worst_case_perturbation(monge(), g, jnp.zeros(2), rho=0.5) * jnp.sqrt(1 + 5.0**2)
    Array([0.3, 0.4], dtype=float32)
    """
    check_nonnegative("alpha", alpha)
    check_base("base", base)

    def ascent(grads: Grads, params: Params, state: State) -> tuple[Ascent, State]:
        base_ascent, state = base.ascent(grads, params, state)
        n = base_ascent.dual_norm
        u, r = lift_factors(n, jnp.asarray(alpha, n.dtype))  # r / u = sqrt(1 + alpha^2 n^2)
        length = bounded_quotient(jnp.asarray(base_ascent.length, n.dtype) * r, u)
        return base_ascent._replace(dual_norm=n * u / r, length=length), state

    return Metric(base.init, ascent, base.isotropic)


def pullback(
    reparameterization: Callable[[Params], Params], *, diagonal: bool = False, tol: float = 1e-6
) -> Metric:
    r"""The Euclidean metric of other coordinates, pulled back to the params.

    .. math::
        G = J^\top J, \quad J = \partial \phi / \partial \psi, \quad \theta = \phi(\psi)

    For params psi of a loss :math:`\ell(\phi(\psi))`, so that :math:`J \delta^*_\psi` is SAM's
    perturbation of theta, and with `monge(pullback(phi))` Monge SAM's: the step taken does not
    depend on the coordinates, to first order. The Monge formula applied afresh in the coordinates
    psi, :math:`I + \alpha^2 g g^\top`, does not have this property: only the metric
    :math:`J^\top J + \alpha^2 g g^\top` does.

    Args:
      reparameterization: phi, from the params to a tree of real arrays; its Jacobian must have full
        column rank.
      diagonal: whether phi acts on each entry by itself, by a function with nonzero derivative:
        then G is diagonal and costs one product with J. Otherwise G is inverted by conjugate
        gradients on products with J and its transpose.
      tol: relative residual at which conjugate gradients stop, in float32 not below 1e-6.

    Returns:
      The metric, without state. It needs all params, so it does not go with `mask`.

    References:
      Jacobsen and Arvanitidis, Monge SAM, section 3.1, where phi would be any chart.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import worst_case_perturbation
    >>> metric = pullback(lambda psi: 2 * psi, diagonal=True)
    >>> psi_delta = worst_case_perturbation(metric, jnp.array([3.0, 4.0]), jnp.zeros(2), rho=0.5)
    >>> 2 * psi_delta  # as SAM's in the coordinates theta = 2 psi
    Array([0.3, 0.4], dtype=float32)
    """

    def ascent(grads: Grads, params: Params, state: State) -> tuple[Ascent, State]:
        g = scaled_norm(grads)
        dtype = g.unit_norm.dtype
        params = jax.tree.map(lambda p: widen(p, dtype), params)
        _, times_jacobian = jax.linearize(reparameterization, params)

        if diagonal:
            slopes = times_jacobian(jax.tree.map(jnp.ones_like, params))
            h = scaled_norm(jax.tree.map(jnp.divide, g.unit, slopes))
            dual_norm = h.divided(g.inverse_scale)
            v = jax.tree.map(jnp.divide, h.unit, slopes)
            return Ascent(v, dual_norm, length=h.unit_norm), state

        transposed = jax.linear_transpose(times_jacobian, params)
        v, _ = cg(lambda x: transposed(times_jacobian(x))[0], g.unit, tol=tol)
        length = jnp.sqrt(jnp.maximum(inner_product(g.unit, v, dtype), jnp.finfo(dtype).tiny))
        return Ascent(v, dual_norm=g._replace(unit_norm=length).norm, length=length), state

    return Metric(stateless, ascent, linear=True)
