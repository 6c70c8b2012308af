"""Running statistics of batch normalisation, taken anew at other params.

Averages gathered during training belong to the params that training held. One-pass steps hold the
perturbed ones, weight averaging some of the past: at the unperturbed or averaged params the
statistics are off, and accuracy can be far below what the params are worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from monge_sam_jax._core.numerics import working_dtype
from monge_sam_jax.metrics import Params

__all__ = ["refresh_running_statistics"]
__dir__ = __all__.copy

PyTree = Any
PROBE = 2.0**20  # large against any activation, so that its weight in an average can be read off


def refresh_running_statistics(
    update_fn: Callable[[Params, PyTree, PyTree], PyTree],
    params: Params,
    statistics: PyTree,
    batches: Iterable[PyTree],
) -> PyTree:
    r"""The mean over batches of the statistics that a model takes of each.

    .. math::
        \bar{b} = \frac{1}{k} \sum_{i=1}^k b_i, \qquad
        \text{where the model's update is} \quad s \mapsto m s + (1 - m) \, b_i

    The model's own momentum m is found by a trial and divided out, so the result depends on the
    batches alone, not on their order or on what the statistics were.

    Args:
      update_fn: (params, statistics, batch) -> the statistics after a training pass of the model
        over the batch. It is jitted; give the same function again and nothing is compiled twice.
      params: where the statistics are wanted, such as `unperturbed_params(opt_state, params)`.
      statistics: running averages, a tree of float arrays, for their form; the values do not enter.
      batches: training batches of one size; some tens are enough.

    Returns:
      The statistics, in their dtypes.

    Raises:
      ValueError: there is no batch, or the statistics are no running averages of the batches'.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import refresh_running_statistics
    >>> def update_fn(params, statistics, batch):
    ...     return {"mean": 0.9 * statistics["mean"] + 0.1 * jnp.mean(params * batch)}
    >>> batches = [jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])]
    >>> refresh_running_statistics(update_fn, 2.0, {"mean": jnp.zeros(())}, batches)
    {'mean': Array(5.000, dtype=float32)}
    """
    update = jax.jit(update_fn)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, working_dtype(s)), statistics)
    total, momentum, count = zeros, zeros, 0
    for batch in batches:
        weighted = update(params, zeros, batch)
        if count == 0:
            probes = jax.tree.map(lambda s: jnp.full_like(s, PROBE), zeros)
            probed = update(params, probes, batch)
            momentum = jax.tree.map(lambda p, w: (p - w) / PROBE, probed, weighted)
            _check_momentum(momentum)
        total = jax.tree.map(jnp.add, total, weighted)
        count += 1
    if count == 0:
        raise ValueError("there is no batch to take the statistics of")
    return jax.tree.map(
        lambda t, m, s: (t / (count * (1 - jnp.mean(m)))).astype(s.dtype),
        total,
        momentum,
        statistics,
    )


def _check_momentum(momentum: PyTree) -> None:
    for path, m in jax.tree.leaves_with_path(momentum):
        if not bool(jnp.all((m > -1e-3) & (m < 1) & (jnp.abs(m - jnp.mean(m)) < 1e-3))):
            raise ValueError(
                f"the statistics{jax.tree_util.keystr(path)} are no running average over batches: "
                f"what remains of the old value after a batch is {jnp.ravel(m)[:3]} in place of "
                "one number in [0, 1). Run the model in training mode (use_running_average=False "
                "in Linen, model.train() in NNX), and leave out the statistics of frozen layers"
            )
