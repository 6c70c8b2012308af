"""Whether a value differs along a mapped axis.

Under `shard_map` with its default check_vma=True every value knows the axes over which it varies,
and the gradient with respect to a value that does not vary over an axis is summed over it on the
way. Under `pmap`, `vmap` and check_vma=False nothing is known and nothing is summed.
"""

from collections.abc import Hashable
from typing import Any

import jax

PyTree = Any


def check_varying(grads: PyTree, axis_name: Hashable, *, source: str) -> None:
    """Raises ValueError if a gradient leaf was summed or averaged over an axis already."""
    axes = _tracked_axes(axis_name)
    for path, leaf in jax.tree.leaves_with_path(grads):
        constant_over = [axis for axis in axes if axis not in _varying_axes(leaf)]
        if constant_over:
            raise ValueError(
                f"axis_name={axis_name!r} was given, but {source} "
                f"{jax.tree_util.keystr(path) or 'gradient'} does not vary over "
                f"{constant_over[0]!r}: it was summed over that axis (shard_map does so by itself "
                "for the gradient of replicated params) or averaged, and nobody can tell which. "
                "Differentiate with respect to params that vary, "
                f"jax.lax.pcast(params, {axis_name!r}, to='varying') (jax.lax.pvary before JAX "
                "0.9), so that each device hands in the gradient of its own share of the batch"
            )


def make_varying(params: PyTree, axis_name: Hashable) -> PyTree:
    """`params`, so marked that their gradient is not summed over the axis."""
    axes = _tracked_axes(axis_name)

    def cast(leaf: jax.Array) -> jax.Array:
        missing = tuple(axis for axis in axes if axis not in _varying_axes(leaf))
        if not missing:
            return leaf
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(leaf, missing, to="varying")
        return jax.lax.pvary(leaf, missing)  # type: ignore[attr-defined]  # JAX before 0.9

    return jax.tree.map(cast, params)


def average_varying(tree: PyTree, axis_name: Hashable) -> PyTree:
    """`tree` with the mean over the axis in place of what varies over it."""
    axes = _tracked_axes(axis_name)

    def average(leaf: jax.Array) -> jax.Array:
        varying = tuple(axis for axis in axes if axis in _varying_axes(leaf))
        return jax.lax.pmean(leaf, varying) if varying else leaf

    return jax.tree.map(average, tree)


def _tracked_axes(axis_name: Hashable) -> tuple[Hashable, ...]:
    """Those of the named axes whose variation JAX tracks here."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    return tuple(name for name in names if name in _varying_axes(jax.lax.axis_index(name)))


def _varying_axes(x: jax.Array) -> frozenset[Hashable]:
    kind = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return kind.manual_axis_type.varying
    return kind.vma  # JAX before 0.10
