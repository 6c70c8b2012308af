r"""Balls of norms that no matrix G describes, whose worst step is known all the same.

The worst step in the ball of a norm N maximises :math:`g^\top \delta` where
:math:`N(\delta) \le \rho`; what it gains, :math:`\rho N^*(g)`, is rho times the dual norm:

========================  ====================================  ==============================
metric                    N(delta)                              dual norm
========================  ====================================  ==============================
`supremum()`              max of abs(delta)                     sum of abs(g)
`spectral()`              largest singular value of any leaf    sum of all singular values of g
========================  ====================================  ==============================

`grouped` and `layerwise` are norms of this kind too, and `monge` lifts all of them by one scalar.

>>> import jax.numpy as jnp
>>> from monge_sam_jax import euclidean, grouped, spectral
>>> def label(params):
...     return {name: "matrices" if leaf.ndim > 1 else "rest" for name, leaf in params.items()}
>>> metric = grouped({"matrices": spectral(), "rest": euclidean()}, label)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from monge_sam_jax._core.numerics import (
    bounded_quotient,
    inner_product,
    scaled_norm,
    tree_scale,
    widen,
    working_dtype,
)
from monge_sam_jax.composite import product_of_balls
from monge_sam_jax.metrics import Ascent, Grads, Metric, Params, State, stateless

__all__ = ["spectral", "supremum"]
__dir__ = __all__.copy

Axes: TypeAlias = int | Sequence[int]
ADVICE = "leaves that need others go into a group of their own, by monge_sam_jax.grouped"

# Muon's coefficients of the powers 1, 3 and 5 bring singular values from near zero to between 0.68
# and 1.21, a factor of 3.4 each time; those of Newton and Schulz from there to one.
QUICK, FINAL = (3.4445, -4.7750, 2.0315), (1.875, -1.25, 0.375)
COEFFICIENTS = [QUICK] * 8 + [FINAL] * 2


def supremum() -> Metric:
    r"""The ball of the largest entry, :math:`\max_i |\delta_i| \le \rho`.

    .. math:: \delta^* = \rho \operatorname{sign}(g), \qquad \|g\|_* = \sum_i |g_i|

    Every entry is moved by rho, whatever the size of its gradient: over d entries the perturbation
    is :math:`\sqrt{d}` times as long as the Euclidean one. Of complex entries the modulus is
    bounded, and :math:`\operatorname{sign}(g) = g / |g|`. An entry whose gradient is zero, or
    subnormal, stays where it is.

    Returns:
      The metric, without state.

    References:
      Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, 2020,
      section 2, for balls of p-norms; Kwon et al., ASAM, 2021, and Andriushchenko et al., A Modern
      Look at the Relationship between Sharpness and Generalization, 2023, for p = infinity.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import supremum, worst_case_perturbation
    >>> worst_case_perturbation(supremum(), jnp.array([3.0, -0.1, 0.0]), jnp.zeros(3), rho=0.5)
    Array([ 0.5, -0.5,  0. ], dtype=float32)
    """

    def ascent(grads: Grads, params: Params, state: State) -> tuple[Ascent, State]:
        del params
        g = scaled_norm(grads)
        dtype = g.unit_norm.dtype
        # Of the gradient itself: what is small beside the largest entry has a sign too.
        signs = jax.tree.map(lambda x: _sign(widen(x, dtype)), grads)
        total = inner_product(signs, g.unit, dtype)
        finite = jax.lax.stop_gradient((1 + total) / (1 + total))  # one, or NaN for all
        return Ascent(tree_scale(finite, signs), bounded_quotient(total, g.scale)), state

    return Metric(stateless, ascent)


def _sign(x: jax.Array) -> jax.Array:
    """X / |x|, or zero where x is subnormal."""
    if not jnp.iscomplexobj(x):
        return jnp.where(jnp.abs(x) >= jnp.finfo(x.dtype).tiny, jnp.sign(x), 0.0)
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag)))
    nonzero = largest >= jnp.finfo(x.dtype).tiny
    size = jnp.where(nonzero, largest, 1.0)  # the modulus of the largest numbers is out of range
    y = jax.lax.complex(jnp.where(nonzero, x.real, 1.0) / size, x.imag / size)
    return jnp.where(nonzero, y / jnp.abs(y).astype(y.dtype), 0.0)


def spectral(*, reduction_axis: Axes | None = None, output_axis: Axes = -1) -> Metric:
    r"""The ball of the largest singular value of each matrix, all of one radius.

    .. math::
        g_k = U \Sigma V^\top, \qquad \delta^*_k = \rho \, U V^\top, \qquad
        \|g\|_* = \sum_k \operatorname{tr} \Sigma_k

    The steepest ascent of Muon: all directions that a matrix has a gradient in are moved alike. A
    leaf of rank two is a matrix; one of a higher rank is a matrix of its output axis and all others
    (a convolution's kernel of Flax, as Muon flattens it), or a stack of matrices, see the
    arguments. Leaves of rank one and zero have the Euclidean ball.

    :math:`U V^\top` comes from Newton-Schulz iterations: eight with Muon's coefficients, and two
    that converge. Singular values above 3e-5 times the Frobenius norm of their matrix end within
    1 % of one, none above 1.0001; smaller ones, down to those of a matrix of deficient rank, end
    between zero and that, where the step is inside the ball and not on its surface. The dual norm
    is :math:`\langle g, \delta^* \rangle / \rho`, what the step that is taken gains.

    A matrix of m rows and n >= m columns (or transposed) takes 30 products of matrices, 10 steps of
    4 m^2 n + 2 m^3 operations: as much as a gradient at 7 to 10 m inputs of the layer. They are of
    JAX's default precision for products of matrices; with those of bfloat16 singular values end
    within 1 % of one too.

    Args:
      reduction_axis: axis or axes of a leaf of rank three or more that are the matrix's rows; None
        is all axes but those of the output.
      output_axis: those that are its columns. Axes in neither are of a stack of matrices with a
        ball each: spectral(reduction_axis=-2) for layers stacked along the first. Leaves that
        need others go into a group of their own, by `grouped`.

    Returns:
      The metric, without state.

    Raises:
      ValueError: at a use, a leaf does not have these axes, or one is in both.

    References:
      Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024; Bernstein and
      Newhouse, Old Optimizer, New Norm: An Anthology, 2024.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import spectral, worst_case_perturbation
    >>> g = jnp.array([[3.0, 0.0], [0.0, -0.01]])
    >>> worst_case_perturbation(spectral(), g, g, rho=0.5).round(2)
    Array([[ 0.5,  0. ],
           [ 0. , -0.5]], dtype=float32)
    """

    def ascent(grads: Grads, params: Params, state: State) -> tuple[Ascent, State]:
        del params
        dtype = working_dtype(grads)
        leaves, tree = jax.tree.flatten(grads)
        stacks = [_matrices(widen(leaf, dtype), reduction_axis, output_axis) for leaf in leaves]
        scaled = [jax.vmap(scaled_norm)(matrices) for matrices, _ in stacks]
        factors = _polar_factors(
            [g.unit / g.unit_norm.reshape(-1, 1, 1).astype(g.unit.dtype) for g in scaled]
        )

        ascents = []
        for g, factor, (_, restore) in zip(scaled, factors, stacks, strict=True):
            gains = jax.vmap(lambda a, b: inner_product(a, b, dtype))(g.unit, factor)
            norms = bounded_quotient(gains, g.scale)
            limit = jnp.finfo(dtype).max / max(norms.size, 1)
            ascents.append(Ascent(restore(factor), jnp.sum(jnp.minimum(norms, limit))))
        tangents, dual_norm, length = product_of_balls(ascents, dtype)
        return Ascent(jax.tree.unflatten(tree, tangents), dual_norm, length), state

    return Metric(stateless, ascent)


def _matrices(
    x: jax.Array, reduction_axis: Axes | None, output_axis: Axes
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """`x` as a stack of matrices with no more rows than columns, and the way back."""
    if x.ndim < 2:
        return x.reshape(1, 1, x.size), lambda y: y.reshape(x.shape)
    if x.ndim == 2:
        reduction_axis, output_axis = 0, 1

    def normalized(axes: Axes) -> list[int]:
        axes = [axes] if isinstance(axes, int) else list(axes)
        if not all(-x.ndim <= axis < x.ndim for axis in axes):
            raise ValueError(f"a leaf of shape {x.shape} has no axes {axes}; {ADVICE}")
        return [axis % x.ndim for axis in axes]

    columns = normalized(output_axis)
    if reduction_axis is None:
        rows = [axis for axis in range(x.ndim) if axis not in columns]
    else:
        rows = normalized(reduction_axis)
    if len({*rows, *columns}) < len(rows + columns):
        raise ValueError(
            f"reduction_axis={reduction_axis} and output_axis={output_axis} have an axis of a leaf "
            f"of shape {x.shape} twice; {ADVICE}"
        )

    def count(axes: list[int]) -> int:
        return math.prod(x.shape[axis] for axis in axes)

    batch = [axis for axis in range(x.ndim) if axis not in rows + columns]
    rows, columns = sorted((rows, columns), key=count)
    order = batch + rows + columns
    permuted = x.transpose(order)
    matrices = permuted.reshape(count(batch), count(rows), count(columns))
    back = [order.index(axis) for axis in range(x.ndim)]
    return matrices, lambda y: y.reshape(permuted.shape).transpose(back)


def _polar_factors(stacks: list[jax.Array]) -> list[jax.Array]:
    """U V^T of stacks of matrices U S V^T with Frobenius norms of one, or zero."""

    def step(xs: list[jax.Array], coefficients: jax.Array) -> tuple[list[jax.Array], None]:
        def polynomial(x: jax.Array) -> jax.Array:
            a, b, c = coefficients.astype(x.dtype)
            gram = x @ x.conj().swapaxes(-1, -2)
            return a * x + (b * gram + c * (gram @ gram)) @ x

        return [polynomial(x) for x in xs], None

    is_vector = [min(x.shape[1:]) < 2 for x in stacks]  # its own polar factor
    matrices = [x for x, alone in zip(stacks, is_vector, strict=True) if not alone]
    coefficients = jnp.asarray(COEFFICIENTS, working_dtype(matrices))
    # One loop for all leaves: unrolled, hundreds of them would take minutes to compile.
    found = iter(jax.lax.scan(step, matrices, coefficients)[0])
    return [x if alone else next(found) for x, alone in zip(stacks, is_vector, strict=True)]
