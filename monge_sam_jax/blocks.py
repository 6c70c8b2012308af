r"""Curvature layer by layer: the diagonal blocks of the Hessian."""

from __future__ import annotations

import collections
from collections.abc import Hashable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from monge_sam_jax._core.checks import broadcast_prefix
from monge_sam_jax.composite import Labels
from monge_sam_jax.metrics import Params
from monge_sam_jax.products import LossFn, SymmetricOperator
from monge_sam_jax.spectrum import hessian_trace, lanczos_eigenvalues

__all__ = ["layerwise_eigenvalues", "layerwise_traces"]
__dir__ = __all__.copy


def layerwise_eigenvalues(
    loss_fn: LossFn | SymmetricOperator,
    params: Params,
    key: chex.PRNGKey,
    k: int = 1,
    which: str = "LA",
    *,
    num_steps: int = 40,
    labels: Labels = None,
) -> dict[Hashable, tuple[jax.Array, jax.Array]]:
    r"""Eigenvalues of the diagonal blocks of the Hessian, one block for each layer.

    .. math:: H_{ll} = \partial^2 \ell / \partial \theta_l^2

    A product with a block differentiates with respect to the params of that block alone.

    Args:
      loss_fn: as in `lanczos_eigenvalues`.
      params: as there.
      key: as there.
      k: as there, of each block; fewer of a block that is smaller.
      which: as there.
      num_steps: as there, for each block.
      labels: which block each leaf is in, a tree of labels with the structure of the params or a
        prefix of it, or a function of the params that returns one; None: each leaf is a block of
        its own, under its path, such as "dense/kernel".

    Returns:
      For each label, in the order of the leaves, (eigenvalues, residuals).

    Raises:
      TypeError: a param is no real float.
      ValueError: as `lanczos_eigenvalues`, or labels are no prefix of the params.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    >>> loss_fn = lambda p: jnp.sum(p["a"]) ** 2 + jnp.sum(p["b"] ** 2) * jnp.sum(p["a"])
    >>> found = layerwise_eigenvalues(loss_fn, params, jax.random.key(0))
    >>> {label: values for label, (values, _) in found.items()}
    {'a': Array([4.], dtype=float32), 'b': Array([4.], dtype=float32)}
    """
    blocks = _blocks(loss_fn, params, labels)
    keys = jax.random.split(key, len(blocks))
    return {
        label: lanczos_eigenvalues(of_block, block, key, k, which, num_steps=num_steps)
        for key, (label, (of_block, block)) in zip(keys, blocks.items(), strict=True)
    }


def layerwise_traces(
    loss_fn: LossFn | SymmetricOperator,
    params: Params,
    key: chex.PRNGKey,
    num_samples: int = 100,
    *,
    labels: Labels = None,
) -> dict[Hashable, tuple[jax.Array, jax.Array]]:
    r"""Hutchinson's estimates of the traces of the Hessian's diagonal blocks.

    As `hessian_trace`, block by block. The sum of the estimates is one of the whole trace, with
    less variance, since nothing outside of the blocks enters.

    Args:
      loss_fn: as in `lanczos_quadrature`.
      params: as there.
      key: of the random signs.
      num_samples: of each block, at least two; each costs a product with the block.
      labels: as in `layerwise_eigenvalues`.

    Returns:
      For each label, in the order of the leaves, (estimate, standard error), scalars.

    Raises:
      TypeError: a param is no real float.
      ValueError: num_samples is less than two, or labels are no prefix of the params.

    References:
      Yao et al., PyHessian: Neural networks through the lens of the Hessian, 2020.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    >>> loss_fn = lambda p: jnp.sum(p["a"] ** 3) + jnp.sum(p["b"] ** 2) * jnp.sum(p["a"])
    >>> layerwise_traces(loss_fn, params, jax.random.key(0), num_samples=2)["b"]
    (Array(12., dtype=float32), Array(0., dtype=float32))
    """
    blocks = _blocks(loss_fn, params, labels)
    keys = jax.random.split(key, len(blocks))
    return {
        label: hessian_trace(of_block, block, key, num_samples)
        for key, (label, (of_block, block)) in zip(keys, blocks.items(), strict=True)
    }


def _blocks(
    loss_fn: LossFn | SymmetricOperator, params: Params, labels: Labels
) -> dict[Hashable, tuple[LossFn | SymmetricOperator, Params]]:
    """For each label the matrix of its block, and its params: None in place of all others."""
    labels = _paths if labels is None else labels
    tree = labels(params) if callable(labels) else labels
    of = broadcast_prefix("labels must be a tree of labels", tree, params)

    def block(label: Hashable) -> tuple[LossFn | SymmetricOperator, Params]:
        def part(tree: Params) -> Params:
            return jax.tree.map(lambda own, leaf: leaf if own == label else None, of, tree)

        def together(others: Params, block: Params) -> Params:
            return jax.tree.map(lambda own, leaf, x: x if own == label else leaf, of, others, block)

        if isinstance(loss_fn, SymmetricOperator):
            zeros = jax.tree.map(jnp.zeros_like, params)
            product = lambda v: part(loss_fn.product(together(zeros, v)))  # noqa: E731
            return SymmetricOperator(product), part(params)
        return lambda theta: loss_fn(together(params, theta)), part(params)

    return {label: block(label) for label in jax.tree.leaves(of)}


def _paths(params: Params) -> Any:
    paths = jax.tree.map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), params
    )
    for path, times in collections.Counter(jax.tree.leaves(paths)).items():
        if times > 1:
            raise ValueError(
                f"two leaves are at the path {path!r}, and would be one block: give labels"
            )
    return paths
