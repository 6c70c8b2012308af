"""The momentum in the state of an Optax optimizer."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any


class FromMomentum(optax.MaskedNode):
    """Stands in `OnePassState.delta` for a leaf that params and momentum determine."""


def is_marker(x: Any) -> bool:
    """Whether `x` stands in the place of a leaf: `FromMomentum`, or `optax.MaskedNode`."""
    return isinstance(x, optax.MaskedNode)


def is_from_momentum(x: Any) -> bool:
    """Whether `x` is `FromMomentum`."""
    return isinstance(x, FromMomentum)


def find_momentum(base_state: optax.OptState, wanted: PyTree, params: PyTree) -> PyTree:
    """The momentum of gradients in `base_state`, of the form of the params.

    Args:
      base_state: state of an Optax optimizer, with a `trace` or a `mu`.
      wanted: a tree of the form of the params with `optax.MaskedNode` for leaves of which none is
        needed; those of the params stand there in the result.
      params: the params.

    Raises:
      ValueError: there is none, there are several, or it accumulates steps.
    """
    if isinstance(_last_link(base_state), optax.TraceState):
        raise ValueError(
            "the base optimizer's momentum is the last of its links, as in optax.lars and "
            "optax.rmsprop(momentum=...), so it is one of steps and not of gradients: put "
            "optax.trace before the learning rate, or use direction='gradient'"
        )

    def expand(tree: Any) -> Any:
        """`tree` with what Optax has masked leaf by leaf."""

        def fill(m: Any, p: Any) -> Any:
            if is_marker(m):
                return jax.tree.map(lambda _: m, p)
            if getattr(p, "shape", None) != jnp.shape(m):
                raise ValueError
            return m

        return jax.tree.map(fill, tree, params, is_leaf=is_marker)

    parts = []
    for field in ("trace", "mu"):
        for _, tree in optax.tree.get_all_with_path(base_state, field):
            with contextlib.suppress(ValueError):  # what is not of the form of the params
                parts.append(expand(tree))

    def pick(needed: Any, p: Any, *parts: Any) -> Any:
        if is_marker(needed) and not is_from_momentum(needed):
            return p
        found = [m for m in parts if not is_marker(m)]
        if len(found) != 1:
            raise ValueError(
                "direction='momentum' needs one momentum of the form of the params in the base "
                f"optimizer's state, by the name of trace or mu, but found {len(found)}: use "
                "optax.sgd(0.1, momentum=0.9), optax.adam(1e-3) or the like, or "
                "direction='gradient'"
            )
        return found[0]

    return jax.tree.map(pick, wanted, params, *parts, is_leaf=is_marker)


def _last_link(state: optax.OptState) -> Any:
    """State of the last link of the outermost chain."""
    while True:
        if type(state) is tuple and state:
            state = state[-1]
        elif hasattr(state, "inner_state"):
            state = state.inner_state
        else:
            return state
