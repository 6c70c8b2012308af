"""Trees in which markers stand for the leaves of which no perturbation is kept."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from monge_sam_jax._core.momentum import find_momentum, is_from_momentum, is_marker
from monge_sam_jax._core.numerics import tree_scale, widen

PyTree = Any


def map_kept(function: Callable[..., Any], kept: PyTree, *trees: Any) -> Any:
    """Maps over the leaves of `kept`, markers among them, and what the other trees have there."""
    return jax.tree.map(function, kept, *trees, is_leaf=is_marker)


def without_masked(tree: Any) -> Any:
    """`tree` with None for what Optax has masked."""
    return map_kept(lambda x: None if is_marker(x) else x, tree)


def subtract(params: PyTree, delta: PyTree) -> PyTree:
    """What is left of the params without delta, in the dtypes of the params."""
    return map_kept(
        lambda d, p: p if is_marker(d) else (widen(p, d.dtype) - d).astype(p.dtype), delta, params
    )


class Move(NamedTuple):
    update: Any
    delta: Any


def map_moves(function: Callable[[Move], Any], moves: Any) -> Any:
    return jax.tree.map(function, moves, is_leaf=lambda x: isinstance(x, Move))


def describe(delta: PyTree) -> list[Any]:
    """What the state keeps of every leaf."""
    leaves = jax.tree.leaves(delta, is_leaf=is_marker)
    return [type(x) if is_marker(x) else (jnp.shape(x), x.dtype) for x in leaves]


def held_perturbation(state: Any, params: PyTree) -> PyTree:
    """What the params of a `OnePassState` hold; `optax.MaskedNode` where that is nothing."""
    if not any(map(is_from_momentum, jax.tree.leaves(state.delta, is_leaf=is_marker))):
        return state.delta
    momentum = find_momentum(state.base_state, state.delta, params)
    delta = tree_scale(state.multiple, tree_scale(state.inverse_scale, momentum))
    return map_kept(lambda kept, d: d if is_from_momentum(kept) else kept, state.delta, delta)
