"""Which leaves of the params are perturbed."""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

from monge_sam_jax._core.checks import broadcast_prefix
from monge_sam_jax._core.injection import NOT_A_SCHEDULE

PyTree = Any

# A tree of bools, a prefix of the params; or a function of the params that returns one.
Mask: TypeAlias = Any


def check_mask(mask: Mask) -> None:
    """Raises ValueError if the mask is a single leaf that chooses nothing."""
    if mask is None or callable(mask) or not jax.tree_util.all_leaves([mask]):
        return
    if not (isinstance(mask, (bool, np.bool_)) and mask):
        raise ValueError(
            f"mask={mask!r} leaves nothing to perturb: it must be a tree of bools, or a function "
            f"of the params that returns one. {NOT_A_SCHEDULE}"
        )


def broadcast_mask(mask: Mask, params: PyTree) -> Any:
    """A bool for every leaf of the params, or None where all of them are perturbed."""
    if mask is None:
        return None
    tree = _evaluate_mask(mask, params) if callable(mask) else mask

    chosen = broadcast_prefix("mask must be a tree of bools", tree, params)
    for leaf in jax.tree.leaves(chosen):
        if not isinstance(leaf, (bool, np.bool_)):
            raise TypeError(f"the leaves of mask must be bools, got {leaf!r}")
    return jax.tree.map(bool, chosen)


def _evaluate_mask(mask: Callable[..., Any], params: PyTree) -> Any:
    try:
        inspect.signature(mask).bind(params)
    except TypeError as error:
        raise TypeError(
            f"mask must be a function of the params that returns a tree of bools, but {error}. One "
            "of path and leaf is mapped over them: "
            "mask=lambda params: jax.tree.map_with_path(function, params)"
        ) from None
    except ValueError:  # some callables written in C have no signature
        pass
    return mask(params)


def chosen_leaves(mask: Mask, params: PyTree) -> Any:
    """A bool for every leaf of the params: whether it is perturbed."""
    # Optax looks for what is like the params in a state by `init` on a placeholder without leaves.
    return broadcast_mask(True if mask is None or not jax.tree.leaves(params) else mask, params)


def select(chosen: Any, tree: Any) -> Any:
    """`tree` with None at the leaves that are not chosen."""
    if chosen is None:
        return tree
    return jax.tree.map(lambda choose, leaf: leaf if choose else None, chosen, tree)


def merge(chosen: Any, selected: Any, tree: Any) -> Any:
    """`tree` with the chosen leaves taken from `selected`."""
    if chosen is None:
        return selected
    return jax.tree.map(lambda choose, s, leaf: s if choose else leaf, chosen, selected, tree)
