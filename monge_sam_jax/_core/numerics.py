"""Norms of gradient trees that neither overflow nor underflow.

`optax.tree.norm` accumulates in the leaf's dtype: infinite for float16 gradients of 20, zero for
float32 gradients of 1e-30. The norms here are accumulated in float32 or wider, on entries brought
to order one first.
"""

import functools
import numbers
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any


def as_arrays(tree: PyTree) -> PyTree:
    """`tree` with arrays in place of Python numbers."""
    is_number = lambda x: isinstance(x, numbers.Number) and not hasattr(x, "dtype")  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(x) if is_number(x) else x, tree)


def without_variables(tree: PyTree) -> PyTree:
    """`tree` with arrays in place of the `Variable`s of Flax NNX."""
    nnx = sys.modules.get("flax.nnx")  # no Variable is there before Flax is
    if nnx is None:
        return tree
    return nnx.as_pure(tree) if hasattr(nnx, "as_pure") else nnx.pure(tree)  # Flax before 0.12


def rounded(x: jax.Array) -> jax.Array:
    """`x`, in its own precision also where XLA would go on in float32 with one of 16 bits."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating) or jnp.finfo(x.dtype).bits >= 32:
        return x
    return as_it_is(x)


def as_it_is(x: jax.Array) -> jax.Array:
    """`x`, of its own dtype, in an operation of its own."""
    if jnp.iscomplexobj(x):
        return x
    info = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)


def working_dtype(tree: PyTree) -> jnp.dtype:
    """Real dtype, float32 or wider, in which scalars over `tree` are computed."""
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(tree)]
    return jnp.finfo(_promote(jnp.float32, *dtypes)).dtype


def widen(leaf: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`leaf` in `dtype`, a real one, or in the complex counterpart of it for a complex leaf."""
    return leaf.astype(_promote(leaf.dtype, dtype))


def widened(tree: PyTree) -> PyTree:
    """`tree` with every leaf in float32 or wider; the leaves may be `jax.ShapeDtypeStruct`s."""

    def wide(leaf: Any) -> Any:
        dtype = _promote(leaf.dtype, working_dtype(leaf))
        is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
        return leaf.update(dtype=dtype) if is_shape else leaf.astype(dtype)

    return jax.tree.map(wide, tree)


def _promote(*dtypes: jnp.dtype) -> jnp.dtype:
    with jax.numpy_dtype_promotion("standard"):  # the casts are explicit, so strict mode has no say
        return jnp.result_type(*dtypes)


def tree_scale(scalar: jax.Array, tree: PyTree) -> PyTree:
    """`scalar * tree`, each leaf at least as wide as `scalar`."""

    def scale(leaf: jax.Array) -> jax.Array:
        leaf = widen(leaf, scalar.dtype)
        return leaf * scalar.astype(leaf.dtype)

    return jax.tree.map(scale, tree)


def keep_unless(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` in the dtypes of `old` if the condition is true, else `old`."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x.astype(y.dtype), y), new, old)


def inner_product(a: PyTree, b: PyTree, dtype: jnp.dtype) -> jax.Array:
    """Re <a, b>, accumulated in `dtype`."""

    def products(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = widen(x, dtype), widen(y, dtype)
        return x.real * y.real + x.imag * y.imag if jnp.iscomplexobj(x) else x * y

    pairs = list(zip(*(jax.tree.leaves(tree) for tree in (a, b)), strict=True))
    terms = []
    for alike in _by_shape(pairs):
        entries = _pairwise_sum([products(x, y) for x, y in alike], dtype)
        # This changes nothing, and keeps XLA's reductions on CPU from a copy of every factor.
        terms.append(jnp.sum(as_it_is(entries)))
    return _pairwise_sum(terms, dtype)


# An H100 reads so much in the 5 microseconds that launching a kernel takes, so that smaller leaves
# are bound by launches. Larger ones stay by themselves: alike in shape, they may be sharded along
# different axes, and would be moved to be added.
LAUNCH_BYTES = 2**24
# A loop over hundreds of leaves takes compilers longer than all that it replaces: of 302 leaves,
# for an H100, a third of the whole step's compilation.
LAUNCH_LEAVES = 24


def _by_shape(items: list[tuple[jax.Array, ...]]) -> list[list[tuple[jax.Array, ...]]]:
    """Tuples of leaves in groups of one type each, to be reduced together: one kernel, not many."""
    groups: dict[Any, list[tuple[jax.Array, ...]]] = {}
    for i, leaves in enumerate(items):
        is_small = all(leaf.size * leaf.dtype.itemsize <= LAUNCH_BYTES for leaf in leaves)
        kind = tuple(jax.typeof(leaf) for leaf in leaves) if is_small else i
        groups.setdefault(kind, []).append(leaves)
    starts = [(alike, i) for alike in groups.values() for i in range(0, len(alike), LAUNCH_LEAVES)]
    return [alike[i : i + LAUNCH_LEAVES] for alike, i in starts]


def _pairwise_sum(terms: list[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """Sum of arrays in a balanced tree: in a row, 300 equal ones are off by 2e-6 in float32."""
    while len(terms) > 1:
        pairs = [x + y for x, y in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(pairs) * 2 :]
    return terms[0] if terms else jnp.zeros((), dtype)


def euclidean_norm(tree: PyTree, dtype: jnp.dtype) -> jax.Array:
    """Norm of a tree with entries of order one, or zero: then a small positive number.

    The floor (5e-7 in float32) keeps all derivatives finite at zero that are multiplied by zero.
    """
    floor = jnp.finfo(dtype).tiny ** (1 / 3)
    return jnp.sqrt(jnp.maximum(inner_product(tree, tree, dtype), floor))


def bounded_quotient(x: jax.Array, y: jax.Array) -> jax.Array:
    """The quotient of x >= 0 by y > 0; one beyond the dtype's range is its largest number."""
    largest = jnp.finfo(x.dtype).max
    beyond = x > largest * jnp.minimum(y, 1.0)
    return jnp.where(beyond, largest, jnp.where(beyond, 0.0, x) / y)


def bounded_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """The product of x, y >= 0; one beyond the dtype's range is its largest number."""
    largest = jnp.finfo(x.dtype).max
    beyond = x > largest / jnp.maximum(y, 1.0)
    return jnp.where(beyond, largest, jnp.where(beyond, 0.0, x) * y)


class ScaledNorm(NamedTuple):
    """A tree as unit / inverse_scale, with unit's entries of order one.

    Attributes:
      unit: the tree divided by a power of two near its largest entry; zero for a zero tree.
      unit_norm: Euclidean norm of unit, not zero.
      inverse_scale: the factor, a power of two; zero for a zero tree.
    """

    unit: PyTree
    unit_norm: jax.Array
    inverse_scale: jax.Array

    @property
    def norm(self) -> jax.Array:
        """Euclidean norm of the tree; one beyond the dtype's range is its largest number."""
        unit_norm = jnp.where(self.inverse_scale != 0, self.unit_norm, 0.0)
        return bounded_quotient(unit_norm, self.scale)

    @property
    def scale(self) -> jax.Array:
        """`inverse_scale`, or one for a zero tree: the tree is unit / scale too."""
        return jnp.where(self.inverse_scale != 0, self.inverse_scale, 1.0)

    def divided(self, divisor: jax.Array) -> jax.Array:
        """`norm / divisor`, where zero stands for an infinite divisor of a zero tree."""
        return bounded_quotient(self.norm, jnp.where(divisor != 0, divisor, 1.0))


def _largest_part(x: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag)) if jnp.iscomplexobj(x) else jnp.abs(x)


def scaled_norm(tree: PyTree) -> ScaledNorm:
    """Euclidean norm of `tree` that neither overflows nor underflows.

    Zero trees (and subnormal ones) have zero derivatives. If any entry of the tree is not finite,
    every entry of unit is NaN, and so are the scalars.

    The scalars that leaves or many other scalars read are results of a divide or a square root on
    purpose: XLA copies cheaper chains of scalars into the loop of every reader, which costs minutes
    of compilation for hundreds of leaves.
    """
    dtype = working_dtype(tree)
    smallest = jnp.finfo(dtype).tiny
    tree = jax.tree.map(lambda leaf: widen(leaf, dtype), tree)

    # The scale cancels in every result, so it is a constant to differentiation.
    leaves = jax.tree.leaves(jax.lax.stop_gradient(tree))
    largest = jnp.zeros((), dtype)
    for alike in _by_shape([(leaf,) for leaf in leaves]):
        sizes = [_largest_part(leaf) for (leaf,) in alike]
        largest = jnp.maximum(largest, jnp.max(functools.reduce(jnp.maximum, sizes), initial=0.0))
    power_of_two = jax.lax.reduce_precision(
        jnp.clip(largest, smallest, 1 / smallest),
        exponent_bits=jnp.finfo(dtype).nexp,
        mantissa_bits=0,
    )
    one = jnp.where(largest >= smallest, jnp.ones((), dtype), 0.0)
    inverse_scale = jnp.where(jnp.isfinite(largest), one, jnp.nan) / power_of_two

    unit = tree_scale(inverse_scale, tree)
    return ScaledNorm(unit, euclidean_norm(unit, dtype), inverse_scale)


def lift_factors(x: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Factors (u, r) of sqrt(1 + k^2 x^2) = r / u, where r is of order one, for real x, k >= 0.

    Both stay in range where the square, or k x itself, would overflow, and `y * u / r` is safe
    where `y / (r / u)` is not. u is a constant to differentiation.
    """
    info = jnp.finfo(x.dtype)
    u = jax.lax.stop_gradient(1 / jnp.clip(bounded_product(x, k), 1.0, 1 / info.tiny))
    scaled = jnp.minimum(bounded_product(x * u, k), info.max ** (1 / 4))
    return u, jnp.sqrt(u**2 + scaled**2)
