"""Optimizer states for sharded params."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from monge_sam_jax.metrics import Params

__all__ = ["init_sharded"]
__dir__ = __all__.copy


def init_sharded(tx: optax.GradientTransformation, params: Params) -> optax.OptState:
    """`tx.init(params)` with the shardings of the params, made in place on their devices.

    `jax.jit(tx.init)(params)` puts the whole state on one device or on all of them.

    Args:
      tx: an Optax transformation.
      params: arrays on a mesh (with a `NamedSharding`), of one process or several.

    Returns:
      The state. What mirrors a param (momenta, copies: of the shape of the param, at a path that
      ends in its path) is sharded as the param is; everything else, such as counts, is on every
      device of the mesh.

    Raises:
      ValueError: a param has no `NamedSharding`.

    >>> import jax, jax.numpy as jnp, optax
    >>> from jax.sharding import NamedSharding, PartitionSpec as P
    >>> from monge_sam_jax import init_sharded, monge_sam
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
    >>> params = jax.device_put(jnp.ones((16, 2)), NamedSharding(mesh, P("data")))
    >>> state = init_sharded(optax.chain(monge_sam(), optax.sgd(0.1, momentum=0.9)), params)
    >>> optax.tree.get(state, "trace").sharding == params.sharding
    True
    """
    for path, leaf in jax.tree.leaves_with_path(params):
        if not isinstance(getattr(leaf, "sharding", None), NamedSharding):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} is not on a mesh; place the params first: "
                "jax.device_put(params, NamedSharding(mesh, PartitionSpec(...)))"
            )
    leaves = jax.tree.leaves(params)
    if not leaves:
        return tx.init(params)
    everywhere = NamedSharding(leaves[0].sharding.mesh, PartitionSpec())
    by_path = dict(jax.tree.leaves_with_path(params))

    def like_param(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        for start in range(len(path) + 1):
            param = by_path.get(path[start:])
            if param is not None and param.shape == leaf.shape:
                return param.sharding
        return everywhere

    shardings = jax.tree.map_with_path(like_param, jax.eval_shape(tx.init, params))
    return jax.jit(tx.init, out_shardings=shardings)(params)
