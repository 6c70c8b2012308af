r"""Edges of stability: how sharp a minimum steps can bear (`stability` offers all of this too).

Near an equilibrium, along an eigenvector of the Hessian with eigenvalue :math:`\lambda`, the
gradient is :math:`\lambda \theta`. With the effective radius r in :math:`\delta = r g` frozen, all
methods are linear recursions, each stable where the roots z of a polynomial lie inside the unit
circle. With learning rate :math:`\eta`, momentum :math:`\beta` as in `optax.sgd` (not Nesterov's;
where the momentum is a moving average, :math:`1 - \beta` times as long, :math:`\eta` is to be
multiplied by that, and so is r along the momentum), and for short
:math:`h = \eta \lambda, \; s = r \lambda`, they are

==============================  ============================================================
two passes                      :math:`(z - 1) (z - \beta) + h (1 + s) z`
one pass along the gradient     :math:`(z - 1) (z - \beta) (z - s) + h z^2`
one pass along the momentum     :math:`(z - 1) (z - \beta - s) + h z`
==============================  ============================================================

The first is gradient descent's with :math:`\lambda (1 + r \lambda)` for :math:`\lambda` (eq. 10).
One pass takes its gradients at :math:`y_t = \theta_t + r g_{t - 1}`, and so follows

.. math:: y_{t+1} = y_t - \eta g_t + r (g_t - g_{t-1})

without momentum: the last term is that of optimistic gradient descent, with the opposite sign, and
that of heavy balls, as :math:`g_t - g_{t-1} = \lambda (y_t - y_{t-1})`. **One pass is momentum, of
size** :math:`r \lambda` **along each eigenvector.** Along the momentum of the base optimizer, in
:math:`\delta = r m`, it adds up with that, to :math:`\beta + r \lambda`. A saddle or maximum has a
negative momentum and repels at every radius, with deviations that grow by about
:math:`1 + \eta |\lambda| / (1 + r |\lambda|)` a step while :math:`r |\lambda| < 1`; two passes are
drawn to it (eq. 11). A minimum with :math:`r \lambda > 1` repels too.

What is frozen is not constant. At a fixed rho, r grows without bound where the gradient vanishes,
so that theta never settles at a minimum, but moves around it (`one_pass_orbit`). Across the
gradient a change of g does change delta by r times as much, so the recursion is right there to
first order. Along it SAM's delta keeps its length, and M-SAM's may even become shorter. And a
radius that rises and falls may do what none that is constant does: on quadratic saddles where the
other coordinates keep moving around without a circle, the one of negative curvature was seen to
decay (M-SAM with :math:`\alpha \rho \lambda = 40`, SAM with :math:`\eta \lambda = 0.8`).

In training on whole data sets sharpness tends to settle near the edge, in one pass as in two; on
mini-batches two passes stay below it, as SGD does. `monge-sam edges` measures it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp

from monge_sam_jax._core.checks import check_nonnegative
from monge_sam_jax.one_pass import Direction

__all__ = [
    "Orbit",
    "edge_of_stability",
    "one_pass_edge_of_stability",
    "one_pass_is_stable",
    "one_pass_orbit",
    "two_pass_is_stable",
]
__dir__ = __all__.copy


def edge_of_stability(
    learning_rate: chex.Numeric, effective_radius: chex.Numeric = 0.0, *, momentum: float = 0.0
) -> jax.Array:
    r"""The sharpness above which two passes leave a minimum, at a frozen effective radius.

    Steps :math:`\theta - \eta H (I + r H) \theta` with momentum :math:`\beta` decay along an
    eigenvector while :math:`0 < \eta \lambda (1 + r \lambda) < 2 (1 + \beta)`, as the roots of
    :math:`z^2 + (\eta \lambda (1 + r \lambda) - 1 - \beta) z + \beta` tell, so up to

    .. math:: \lambda = \frac{\sqrt{1 + 8 (1 + \beta) r / \eta} - 1}{2 r}

    or :math:`2 (1 + \beta) / \eta`, gradient descent's, at r = 0. It falls as r grows. It is
    computed in a form that loses no digits for small r.

    Args:
      learning_rate: eta, a scalar.
      effective_radius: r, the paper's rho-tilde in delta = r g, as in `Diagnostics`, in units of
        params per gradient; any shape.
      momentum: beta in [0, 1), as in `optax.sgd`.

    Returns:
      The largest eigenvalue of the Hessian that is stable, of the shape of the radius; NaN where
      that is negative or NaN.

    Raises:
      TypeError: learning_rate or momentum is no real number.
      ValueError: one of them is negative, NaN or infinite, or momentum is one or more. Traced
        values are not checked.

    References:
      Cohen et al., Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability,
      2021; Long and Bartlett, Sharpness-Aware Minimization and the Edge of Stability, 2023.

    >>> import jax.numpy as jnp
    >>> edge_of_stability(0.1, jnp.array([0.0, 0.05, 0.1])).round(2)
    Array([20.  , 12.36, 10.  ], dtype=float32)
    """
    eta, r, beta = _checked(learning_rate, effective_radius, momentum)
    b = 1 + beta
    return 4 * b / (jnp.sqrt(eta) * (jnp.sqrt(eta) + jnp.sqrt(eta + 8 * b * r)))


def two_pass_is_stable(
    hessian_eigenvalues: jax.Array,
    *,
    learning_rate: chex.Numeric,
    effective_radius: chex.Numeric,
    momentum: float = 0.0,
) -> jax.Array:
    r"""Whether two passes stay at an equilibrium, at a frozen effective radius.

    .. math:: 0 < \eta \lambda_i (1 + r \lambda_i) < 2 (1 + \beta) \quad \text{for all } i

    by the argument of `edge_of_stability`. It holds for saddles and maxima too, if r is above the
    `critical_radius` of eq. 11 and the learning rate small enough.

    Args:
      hessian_eigenvalues: of the Hessian, real; any leading axes. The extreme ones of each sign,
        and the negative ones nearest to zero, are enough.
      learning_rate: as in `edge_of_stability`.
      effective_radius: as there; its shape is broadcast against the leading axes.
      momentum: as there.

    Returns:
      Booleans, without the last axis; False where an eigenvalue is zero or NaN.

    Raises:
      TypeError, ValueError: as `edge_of_stability`.

    >>> import jax.numpy as jnp
    >>> saddle = jnp.array([-3.0, 3.0])
    >>> two_pass_is_stable(saddle, learning_rate=0.1, effective_radius=jnp.array([0.3, 0.4]))
    Array([False,  True], dtype=bool)
    """
    eta, r, beta = _checked(learning_rate, effective_radius, momentum)
    eigenvalues, r = jnp.broadcast_arrays(
        _floating(hessian_eigenvalues), jnp.expand_dims(r, axis=-1)
    )
    step = eta * eigenvalues * (1 + r * eigenvalues)
    return jnp.all((step > 0) & (step < 2 * (1 + beta)), axis=-1)


def one_pass_edge_of_stability(
    learning_rate: chex.Numeric,
    effective_radius: chex.Numeric = 0.0,
    *,
    momentum: float = 0.0,
    direction: Direction = "gradient",
) -> jax.Array:
    r"""The sharpness above which one pass leaves a minimum, at a frozen effective radius.

    By Jury's conditions for the polynomials at the head of this module, one pass is stable where
    :math:`\lambda > 0` and both of these hold. With direction="gradient":

    .. math::
        \eta \lambda \, \beta r \lambda < (1 - \beta) (1 - r \lambda) (1 - \beta r \lambda), \qquad
        \lambda (\eta - 2 (1 + \beta) r) < 2 (1 + \beta)

    which is :math:`r \lambda < 1` and :math:`\lambda (\eta - 2 r) < 2` without momentum, and with
    direction="momentum":

    .. math:: r \lambda < 1 - \beta, \qquad \lambda (\eta - 2 r) < 2 (1 + \beta)

    Beyond the first, deviations grow while they rotate; beyond the second, while they change their
    sign at every step. The first is where :math:`\lambda` is

    .. math:: \frac{2}{(1 + \beta) r + \sqrt{(1 - \beta)^2 r^2 + 4 \beta r \eta / (1 - \beta)}}
              \qquad \text{or} \qquad \frac{1 - \beta}{r}

    Without momentum the edge rises with r from :math:`2 / \eta` to :math:`4 / \eta` at
    :math:`r = \eta / 4`, and falls from there as :math:`1 / r`: so in one pass a small radius lets
    minima be sharper than gradient descent does, and only one above :math:`\eta / 2` excludes
    sharper ones. In two passes every radius does.

    Args:
      learning_rate: as in `edge_of_stability`.
      effective_radius: as there, in delta = r g, or with direction="momentum" in delta = r m. The
        `Diagnostics` of `one_pass_sam` have it as it is meant here.
      momentum: as there.
      direction: as in `one_pass_sam`.

    Returns:
      The largest eigenvalue of the Hessian that is stable, of the shape of the radius; NaN where
      that is negative or NaN.

    Raises:
      TypeError: as `edge_of_stability`.
      ValueError: as there, or direction is unknown.

    >>> import jax.numpy as jnp
    >>> one_pass_edge_of_stability(0.1, jnp.array([0.0, 0.01, 0.025, 0.05, 0.1])).round(2)
    Array([20., 25., 40., 20., 10.], dtype=float32)
    """
    eta, r, beta = _checked(learning_rate, effective_radius, momentum)
    _check_direction(direction)
    positive = jnp.where(r == 0, 1.0, r)  # NaN stays
    if direction == "gradient":
        root = jnp.sqrt(positive) * jnp.sqrt(
            (1 - beta) ** 2 * positive + 4 * beta / (1 - beta) * eta
        )
        rotating = 2 / ((1 + beta) * positive + root)
        slope = eta - 2 * (1 + beta) * r
    else:
        rotating = (1 - beta) / positive
        slope = eta - 2 * r
    flipping = jnp.where(slope > 0, 2 * (1 + beta) / jnp.where(slope > 0, slope, 1.0), jnp.inf)
    return jnp.minimum(jnp.where(r == 0, jnp.inf, rotating), flipping)


def one_pass_is_stable(
    hessian_eigenvalues: jax.Array,
    *,
    learning_rate: chex.Numeric,
    effective_radius: chex.Numeric,
    momentum: float = 0.0,
    direction: Direction = "gradient",
) -> jax.Array:
    r"""Whether one pass stays at an equilibrium, at a frozen effective radius.

    .. math:: \lambda_i > 0, \qquad r \lambda_i < 1, \qquad \lambda_i (\eta - 2 r) < 2
              \quad \text{for all } i

    without momentum; the conditions with it are those of `one_pass_edge_of_stability`, and the
    smallest and the largest eigenvalue decide. No saddle and no maximum is stable, at any radius.

    The first follows from :math:`z = 1`, where the polynomial :math:`z^2 - (1 + s - h) z + s` is h;
    the second from the product of its roots, s; the third from :math:`z = -1`, where it is
    :math:`2 (1 + s) - h`. As :math:`r = \rho / (\|g\| \sqrt{1 + \alpha^2 \|g\|^2})` for Monge SAM,
    a minimum repels from where :math:`\|g\| \sqrt{1 + \alpha^2 \|g\|^2} < \rho \lambda`, which the
    gradient has to be smaller for than for SAM's :math:`\|g\| < \rho \lambda`.

    Args:
      hessian_eigenvalues: of the Hessian, real; any leading axes. The first and last are enough.
      learning_rate: as in `one_pass_edge_of_stability`.
      effective_radius: as there; its shape is broadcast against the leading axes.
      momentum: as there.
      direction: as there.

    Returns:
      Booleans, without the last axis; False where an eigenvalue is zero or NaN.

    Raises:
      TypeError, ValueError: as `one_pass_edge_of_stability`.

    >>> import jax.numpy as jnp
    >>> eigenvalues = jnp.array([[-3.0, 3.0], [0.1, 3.0]])
    >>> one_pass_is_stable(eigenvalues, learning_rate=0.1, effective_radius=0.3)
    Array([False,  True], dtype=bool)
    """
    edge = one_pass_edge_of_stability(
        learning_rate, effective_radius, momentum=momentum, direction=direction
    )
    eigenvalues = _floating(hessian_eigenvalues)
    lowest, highest = jnp.min(eigenvalues, axis=-1), jnp.max(eigenvalues, axis=-1)
    lowest, highest, edge = jnp.broadcast_arrays(lowest, highest, edge)
    return (lowest > 0) & (highest < edge)


class Orbit(NamedTuple):
    """A circle around a minimum, in units of the params.

    Attributes:
      perturbed_radius: distance from the minimum of y, where gradients are taken.
      unperturbed_radius: that of theta.
      angle: by which both move on at each step, in radians.
    """

    perturbed_radius: jax.Array
    unperturbed_radius: jax.Array
    angle: jax.Array


def one_pass_orbit(
    hessian_eigenvalue: chex.Numeric,
    *,
    learning_rate: chex.Numeric,
    rho: chex.Numeric,
    alpha: chex.Numeric = 1.0,
    momentum: float = 0.0,
    direction: Direction = "gradient",
) -> Orbit:
    r"""The circle on which one pass moves around a minimum, for ever.

    At a fixed rho, the momentum :math:`r \lambda` of one pass is above one near the minimum, and
    below one far away. It is one on the circle, where with :math:`\|\delta\| = r \|g\|`

    .. math::
        \|g\| \sqrt{1 + \alpha^2 \|g\|^2} = \rho \lambda, \qquad
        \|y\| = \|g\| / \lambda, \qquad
        \|\theta\| = \sqrt{\eta \lambda} \, \|y\|, \qquad
        2 \sin(\varphi / 2) = \sqrt{\eta \lambda}

    without momentum. SAM (:math:`\alpha = 0`) has :math:`\|y\| = \rho`, Monge SAM a smaller circle.
    In two passes, which jump to and fro, :math:`\|\theta\|` is :math:`\rho \eta \lambda /
    (2 - \eta \lambda)` for SAM: for small steps much closer to the minimum.

    With momentum, r is where a pair of roots :math:`e^{\pm i \varphi}` lies on the unit circle.
    With direction="momentum", m takes the place of g in the first formula, and
    :math:`\rho \lambda / (1 - \beta)` that of :math:`\rho \lambda`.

    This is exact if the largest eigenvalue belongs to two or more eigenvectors; deviations along
    the others decay. (A network that has collapsed, so that the biases of its outputs alone are
    left, moves on such a circle.) Without momentum the circle attracts if :math:`\eta \lambda <
    4 / (3 + 2 \alpha^2 \|g\|^2)`; beyond, other orbits were seen, up to three times as far in the
    root mean square. If the second eigenvalue is smaller, orbits are no circles. With
    :math:`\rho \lambda = 1` and :math:`\eta \lambda` from 0.01 to 0.5, the root mean square of the
    gradient's norm was 0.95 to 0.97 of that on the circle for a second eigenvalue 0.9 times the
    largest, 0.82 to 0.95 for half of it, and 0.58 to 0.80 for a hundredth to a tenth. But theta
    then goes up to rho away, with a mean loss of up to 18 times that on the circle for half the
    eigenvalue, the more the smaller the learning rate. Always, on any quadratic loss with
    :math:`0 < \eta \lambda_\max < 2`, and without momentum,

    .. math:: \|g\|_\text{rms} \le \rho \lambda_\max / (1 - \eta \lambda_\max / 2)

    as sums of :math:`\|\theta_{t+1}\|^2 - \|\theta_t\|^2` over bounded orbits stay bounded.

    On a line there is no way around: if :math:`\eta \lambda < 1`, SAM's y runs into the minimum
    itself, and theta ends at the distance rho. So does M-SAM's for small learning rates, and so do
    both from :math:`\delta_0 = 0` on an isotropic loss, where y stays on the line through the
    minimum until rounding drives it away. And so it is in a valley whose other curvatures are zero,
    such as the banana's: y comes to rest in it, where theta is rho away at a much larger loss.

    Args:
      hessian_eigenvalue: lambda, the largest; any shape.
      learning_rate: as in `edge_of_stability`.
      rho: radius of the ball, a scalar.
      alpha: of `monge`, a scalar; zero: SAM.
      momentum: as in `edge_of_stability`.
      direction: as in `one_pass_sam`.

    Returns:
      The `Orbit`, NaN where there is none: lambda is not positive, or eta lambda too large.

    Raises:
      TypeError: an argument is no real number.
      ValueError: one of the others than lambda is negative, NaN or infinite, momentum is one or
        more, or direction unknown. Traced values are not checked.

    >>> orbit = one_pass_orbit(2.0, learning_rate=0.02, rho=0.5, alpha=0.0)
    >>> print(*(round(float(x), 4) for x in orbit))
    0.5 0.1 0.2003
    """
    eta, eigenvalue, beta = _checked(learning_rate, hessian_eigenvalue, momentum)
    check_nonnegative("rho", rho)
    check_nonnegative("alpha", alpha)
    _check_direction(direction)
    h = eta * jnp.where(eigenvalue > 0, eigenvalue, jnp.nan)
    if direction == "gradient":
        # r lambda of the neutral pair: s in (1 - s) (1 - beta) (1 - beta s) = beta h s.
        q = 1 + beta + beta / (1 - beta) * h
        s = 2 / (q + jnp.sqrt(q**2 - 4 * beta))
        k = 1 - beta * s
    else:
        s, k = 1 - beta, jnp.ones_like(h)
    balance = rho * eigenvalue / s
    ascended = balance * jnp.sqrt(2 / (1 + jnp.hypot(1.0, 2 * alpha * balance)))  # |g|, or |m|
    from_beta = jnp.sqrt((1 - beta) ** 2 + beta * h / k)  # |z - beta|
    y = ascended / eigenvalue * (1.0 if direction == "gradient" else from_beta)
    angle = 2 * jnp.arcsin(jnp.sqrt(h / k) / 2)
    theta = y * jnp.sqrt(h * k) / from_beta
    exists = ~jnp.isnan(angle)
    return Orbit(jnp.where(exists, y, jnp.nan), jnp.where(exists, theta, jnp.nan), angle)


def _floating(x: Any) -> jax.Array:
    """`x` as an array of float32 or wider; a Python number still takes the dtype of others."""
    x = jnp.asarray(x)
    is_wide = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits >= 32
    return x if is_wide else x.astype(jnp.float32)


def _checked(
    learning_rate: chex.Numeric, measured: chex.Numeric, momentum: float
) -> tuple[jax.Array, jax.Array, chex.Numeric]:
    """The arguments as numbers to compute with; what was measured is NaN where it is negative."""
    check_nonnegative("learning_rate", learning_rate)
    check_nonnegative("momentum", momentum)
    if not isinstance(momentum, jax.core.Tracer) and momentum >= 1:
        raise ValueError(f"momentum must be less than 1, got {momentum!r}")
    measured = _floating(measured)
    return _floating(learning_rate), jnp.where(measured >= 0, measured, jnp.nan), momentum


def _check_direction(direction: Direction) -> None:
    if direction not in get_args(Direction):
        raise ValueError(f"direction must be 'gradient' or 'momentum', got {direction!r}")
