"""The curvature that one gradient a step shows, between the points where two were taken."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from monge_sam_jax._core.numerics import bounded_quotient, scaled_norm, widen, working_dtype

PyTree = Any


class Secant(NamedTuple):
    """Where the last gradient was taken, and what it was.

    Attributes:
      point: the params, at the leaves that are perturbed.
      gradient: the gradient there, in the dtypes of the params.
      curvature: the last slope of the gradient that was seen; zero before the first.
    """

    point: PyTree
    gradient: PyTree
    curvature: jax.Array


def no_secant(params: PyTree) -> Secant:
    """That before the first gradient."""
    point, gradient = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
    return Secant(point, gradient, jnp.zeros((), working_dtype(params)))


def next_secant(secant: Secant, count: jax.Array, params: PyTree, grads: PyTree) -> Secant:
    """The secant from the last point to the params, |dg| / |dy|.

    Where they have not moved, as in the end of every descent in finite precision, it tells nothing,
    and the curvature stays.
    """
    dtype = secant.curvature.dtype
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)

    def change(new: PyTree, old: PyTree) -> PyTree:
        differ = lambda x, y: widen(x, dtype) - widen(y, dtype)  # noqa: E731
        return scaled_norm(jax.tree.map(differ, new, old))

    moved, changed = change(params, secant.point).norm, change(grads, secant.gradient).norm
    known = (count > 0) & (moved > 0)
    slope = bounded_quotient(changed, jnp.where(known, moved, 1.0))
    return Secant(params, grads, jnp.where(known, slope, secant.curvature))


def shortening(secant: Secant, margin: chex.Numeric, radius: jax.Array) -> jax.Array:
    """The factor, at most one, that brings an effective radius down to margin / curvature."""
    margin = jnp.asarray(margin, radius.dtype)
    curved = secant.curvature > 0
    longest = bounded_quotient(margin, jnp.where(curved, secant.curvature, 1.0))
    too_long = curved & (radius > longest)
    return jnp.where(too_long, longest / jnp.where(too_long, radius, 1.0), 1.0)
