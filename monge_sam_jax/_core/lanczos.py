"""Lanczos' iteration on trees of arrays, each leaf sharded as its param, with a basis kept in full.

Nothing is ravelled, so that only scalars move between devices. A library would be here if one did
not ravel, and did not go wrong where the Krylov space is exhausted before the steps are: on
matrices of low rank, or with few distinct eigenvalues.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from monge_sam_jax._core.numerics import inner_product, scaled_norm, tree_scale, working_dtype

PyTree = Any
Product = Callable[[PyTree], PyTree]

BLOCK = 8  # rows of the basis that are subtracted at once
KEPT = 0.7  # of a vector's norm, that has to be left by one projection


class Lanczos(NamedTuple):
    """The iteration after i steps.

    Attributes:
      vector: the next vector of the basis, q_i.
      basis: q_0, ..., q_i along new first axes, and zeros; of two rows, q_{i-1} and q_i, in turn.
      diagonal: of the tridiagonal matrix.
      off_diagonal: the entries below it, and the norm of the residual in the end.
      key: for vectors that begin anew.
    """

    vector: PyTree
    basis: PyTree
    diagonal: jax.Array
    off_diagonal: jax.Array
    key: chex.PRNGKey


def tridiagonalize(
    product: Product, params: PyTree, key: chex.PRNGKey, num_steps: int, rows: int
) -> Lanczos:
    """Lanczos' iteration from random signs.

    Under a transformation it is one loop that is compiled with the rest. Otherwise the loop is
    Python's, and only the product and what follows it are compiled: XLA's loops on a CPU slow
    convolutions down, and a product may be a loop over batches on the host.
    """
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, key))):
        start = begin(params, key, num_steps, rows)
        return jax.lax.fori_loop(
            0, num_steps, lambda i, now: advance(now, product(now.vector), i), start
        )
    state = compiled_begin(params, key, num_steps, rows)
    for i in range(num_steps):
        state = compiled_advance(state.basis, state._replace(basis=None), product(state.vector), i)
    return state


def begin(params: PyTree, key: chex.PRNGKey, num_steps: int, rows: int) -> Lanczos:
    """The state before the first step."""
    dtype = working_dtype(params)
    key, signs = jax.random.split(key)
    vector = normalize(random_tree(signs, params, jax.random.rademacher))[0]
    # From the vector, so that it is sharded alike; zeros alone would be whole on every device.
    basis = jax.tree.map(
        lambda q: jnp.tensordot(jnp.eye(rows, 1, dtype=q.dtype), q[None], 1), vector
    )
    zeros = jnp.zeros(num_steps, dtype)
    return Lanczos(vector, basis, zeros, zeros, key)


def advance(state: Lanczos, image: PyTree, i: chex.Numeric) -> Lanczos:
    """The state after step i, by the matrix's product with its vector."""
    q, basis, diagonal, off_diagonal, key = state
    num_steps, rows = diagonal.size, jax.tree.leaves(basis)[0].shape[0]

    # The three terms of the recurrence, and then what rounding has left along the whole basis. One
    # pass over that, instead of two, is a third of the time: the second is needed where the first
    # has taken away most of the vector (Daniel, Gragg, Kaufman and Stewart 1976).
    dtype = working_dtype(q)
    alpha = inner_product(q, image, dtype)
    beta = jnp.where(i > 0, off_diagonal[i - 1], 0.0)

    def three_terms(x: jax.Array, q: jax.Array, Q: jax.Array) -> jax.Array:
        previous = jax.lax.dynamic_index_in_dim(Q, (i - 1) % rows, keepdims=False)
        return x - alpha.astype(x.dtype) * q - beta.astype(x.dtype) * previous

    residual = jax.tree.map(three_terms, image, q, basis)
    before = scaled_norm(residual).norm
    residual, norm = normalize(project_out(residual, basis, i + 1))
    residual, part = jax.lax.cond(
        norm < KEPT * before,
        lambda r: normalize(project_out(r, basis, i + 1)),
        lambda r: (r, jnp.ones((), dtype)),
        residual,
    )
    norm = norm * part
    diagonal = diagonal.at[i].set(alpha)

    # All that is left is rounding errors where the Krylov space is invariant: it goes on from
    # another random vector, with a zero in the matrix, and finds what is orthogonal to the space.
    largest = jnp.maximum(jnp.max(jnp.abs(diagonal)), jnp.maximum(jnp.max(off_diagonal), norm))
    exhausted = norm <= 10 * jnp.finfo(norm.dtype).eps * largest
    off_diagonal = off_diagonal.at[i].set(jnp.where(exhausted, 0.0, norm))
    key, fresh_key = jax.random.split(key)

    def fresh() -> PyTree:
        vector = project_out(random_tree(fresh_key, q, jax.random.normal), basis, i + 1)
        return normalize(project_out(vector, basis, i + 1))[0]

    vector = jax.lax.cond(exhausted, fresh, lambda: residual)

    # What is written depends on all that reads the basis, so that XLA need not copy it.
    def write(Q: jax.Array, x: jax.Array) -> jax.Array:
        row = (i + 1) % rows
        old = jax.lax.dynamic_index_in_dim(Q, row, keepdims=False)
        x = jnp.where(i + 1 < num_steps, x, old)  # the last one has no row
        return jax.lax.dynamic_update_index_in_dim(Q, x, row, 0)

    return Lanczos(vector, jax.tree.map(write, basis, vector), diagonal, off_diagonal, key)


def project_out(vector: PyTree, basis: PyTree, live: chex.Numeric) -> PyTree:
    """The vector less its projections on the first rows of the basis; the others are zero."""
    dtype = working_dtype(vector)

    # A dot product adds millions of entries up one by one on a CPU, and is wrong in the 4th digit.
    # And a part of the rows would be copied for a sum: it is read faster as a whole.
    def of_leaf(x: jax.Array, Q: jax.Array) -> jax.Array:
        return jnp.sum((Q * x[None]).astype(dtype), axis=tuple(range(1, Q.ndim)))

    components = jax.tree.reduce(jnp.add, jax.tree.map(of_leaf, vector, basis))
    block = min(components.size, BLOCK)
    padded = jnp.pad(components, (0, -components.size % block))

    # As many rows at once as one loop over the entries takes, without copies.
    def subtract(k: jax.Array, vector: PyTree) -> PyTree:
        def from_leaf(x: jax.Array, Q: jax.Array) -> jax.Array:
            for row in range(block):
                at = k * block + row
                q = jax.lax.dynamic_index_in_dim(Q, at, keepdims=False)
                x = x - padded[at].astype(x.dtype) * q
            return x

        return jax.tree.map(from_leaf, vector, basis)

    blocks = (jnp.minimum(live, components.size) + block - 1) // block
    return jax.lax.fori_loop(0, blocks, subtract, vector)


def normalize(vector: PyTree) -> tuple[PyTree, jax.Array]:
    """The vector at unit norm, or zero if it is, in its own dtypes; and its norm."""
    scaled = scaled_norm(vector)
    unit = tree_scale(1 / scaled.unit_norm, scaled.unit)
    return jax.tree.map(lambda u, x: u.astype(x.dtype), unit, vector), scaled.norm


def random_tree(key: chex.PRNGKey, like: PyTree, sampler: Callable[..., jax.Array]) -> PyTree:
    """Random numbers in a tree of this form; NaN where that is not finite."""
    numbers = optax.tree.random_like(key, like, sampler=sampler)
    # The sum changes nothing, and has the numbers sharded alike.
    return jax.tree.map(lambda r, x: r + 0 * x, numbers, like)


compiled_begin = jax.jit(begin, static_argnums=(2, 3))


@partial(jax.jit, donate_argnums=0)  # and not the vector: the product may return what it was given
def compiled_advance(basis: PyTree, state: Lanczos, image: PyTree, i: int) -> Lanczos:
    """`advance` in place of the basis, which the state is without."""
    return advance(state._replace(basis=basis), image, i)


@jax.jit
def matrix(state: Lanczos) -> jax.Array:
    """The tridiagonal matrix, densely."""
    beside = state.off_diagonal[:-1]
    return jnp.diag(state.diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1)
