"""One gradient from many: over micro-batches, and over the shards of a batch on many devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec

from monge_sam_jax._core.batches import WHOLE, describe, sample_dimensions
from monge_sam_jax._core.numerics import widen, working_dtype

__all__ = ["How", "ValueAndGrad", "accumulated", "m_sharpness", "per_shard"]
__dir__ = __all__.copy

PyTree = Any
ValueAndGrad: TypeAlias = Callable[..., Any]
How: TypeAlias = Literal["scan", "vmap", "unroll"]

REPLICATED = PartitionSpec()


def m_sharpness(
    value_and_grad_fn: ValueAndGrad,
    num_microbatches: int,
    *,
    axis: int | Sequence[int | None] = 0,
    how: How = "scan",
) -> ValueAndGrad:
    r"""Mean over micro-batches, each of which perturbs for itself.

    .. math::
        \frac{1}{k} \sum_{i=1}^k \nabla \ell_i(\theta + \delta_i^*), \qquad
        \delta_i^* = \rho \, \frac{G^{-1} g_i}{\sqrt{g_i^\top G^{-1} g_i}}, \quad
        g_i = \nabla \ell_i(\theta)

    The objective is then the mean over micro-batches of m = n / k samples of the worst loss nearby
    (m-sharpness), and the memory that of one micro-batch. Gradients of micro-batches are longer
    than that of the batch, so the perturbations of the Monge metric are shorter.

    Args:
      value_and_grad_fn: a function of the params and other arguments that returns (value, gradient)
        or any tree of arrays, such as `sharpness_aware_value_and_grad(...)` returns.
      num_microbatches: k, which divides the batch.
      axis: the axis of all arrays of the other arguments that is cut into k pieces: sample j goes
        to micro-batch j modulo k, so that a batch sharded over devices stays where it is. Or one
        axis for each other positional argument, None for one that every micro-batch gets whole;
        keyword arguments are cut along 0 then. Of random keys among those (`jax.random.key`, not
        the raw ones of `jax.random.PRNGKey`, which look like data) micro-batch i gets
        `fold_in(key, i)`, and so a dropout mask of its own; for one that all share, close over the
        key.
      how: "scan" is a loop of XLA, which keeps the program small; "unroll" writes the micro-batches
        out one after the other (on CPU the gradient of a convolution is many times slower in a
        loop); "vmap" runs them at once, at the memory of the whole batch and more, since each has
        params of its own.

    Returns:
      A function of the same arguments that returns the mean of what `value_and_grad_fn` returns:
      of value, auxiliary output (running statistics, metrics), gradient and diagnostics. It is
      accumulated in float32 or wider and has their dtype; integers and bools become floats.

    Raises:
      TypeError: num_microbatches or axis is no integer.
      ValueError: num_microbatches is less than one, or how unknown; at a call, an array cannot be
        cut, differs in length from another, or looks like a random key; or there is none.

    References:
      Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, 2020.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import m_sharpness, euclidean, sharpness_aware_value_and_grad
    >>> def loss_fn(params, batch):
    ...     return jnp.mean((batch * params) ** 2)
    >>> fn = sharpness_aware_value_and_grad(loss_fn, metric=euclidean(), rho=1.0)
    >>> batch = jnp.array([1.0, 2.0])
    >>> m_sharpness(fn, 2)(jnp.array(1.0), batch)  # (1 + 4) / 2, and (2 + 8) / 2 * (1 + 1)
    (Array(2.5, dtype=float32), Array(10., dtype=float32))
    """
    _check_microbatches(num_microbatches, axis, how)

    def mean_value_and_grad(params: PyTree, *args: PyTree, **kwargs: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten_with_path((args, kwargs))
        dimensions = sample_dimensions("axis", axis, args, kwargs)
        cut = [
            None if at == WHOLE else _cut(path, x, num_microbatches, at)
            for (path, x), at in zip(leaves, dimensions, strict=True)
        ]
        if not jax.tree.leaves(cut):
            raise ValueError(
                "there is no array to cut into micro-batches; pass the batch as an argument after "
                "the params"
            )

        def evaluate(microbatch: PyTree) -> PyTree:
            number, pieces = microbatch
            some = [
                _own_key(x, number) if piece is None else piece
                for (_, x), piece in zip(leaves, pieces, strict=True)
            ]
            some_args, some_kwargs = jax.tree.unflatten(structure, some)
            output = value_and_grad_fn(params, *some_args, **some_kwargs)
            return jax.tree.map(jnp.asarray, output)  # auxiliary outputs may be Python numbers

        microbatches = (jnp.arange(num_microbatches), cut)
        return MEANS[how](evaluate, microbatches, num_microbatches)

    return mean_value_and_grad


def accumulated(
    num_microbatches: int, *, axis: int | Sequence[int | None] = 0, how: How = "scan"
) -> ValueAndGrad:
    """`jax.value_and_grad` that accumulates over micro-batches, at the memory of one of them.

    For the argument `value_and_grad` of `sharpness_aware_value_and_grad`: one perturbation, from
    the gradient of the whole batch, and the gradient of the whole batch there. In a chain, use it
    for the gradient given to `update` and for `grad_fn`.

    Args:
      num_microbatches: as in `m_sharpness`, like the rest.
      axis: as in `m_sharpness`; also of the random keys, which are the same ones in both passes.
      how: as in `m_sharpness`.

    Returns:
      A function of the signature of `jax.value_and_grad` for the first argument. Value, auxiliary
      output and gradient are means over micro-batches, so the loss must be a mean over samples.

    Raises:
      TypeError, ValueError: as `m_sharpness`; ValueError also if argnums is not 0.

    >>> import jax.numpy as jnp
    >>> from monge_sam_jax import accumulated, euclidean, sharpness_aware_value_and_grad
    >>> def loss_fn(params, batch):
    ...     return jnp.mean((batch * params) ** 2)
    >>> fn = sharpness_aware_value_and_grad(
    ...     loss_fn, metric=euclidean(), rho=1.0, value_and_grad=accumulated(2)
    ... )
    >>> fn(jnp.array(1.0), jnp.array([1.0, 2.0]))  # (1 + 4) / 2, and (2 + 8) / 2 * (1 + 1)
    (Array(2.5, dtype=float32), Array(10., dtype=float32))
    """
    _check_microbatches(num_microbatches, axis, how)

    def value_and_grad(
        fun: Callable[..., Any], argnums: int = 0, has_aux: bool = False
    ) -> ValueAndGrad:
        if argnums != 0:
            raise ValueError(
                f"accumulated differentiates the first argument, got argnums={argnums}"
            )
        each = jax.value_and_grad(fun, has_aux=has_aux)
        return m_sharpness(each, num_microbatches, axis=axis, how=how)

    return value_and_grad


def per_shard(
    value_and_grad_fn: ValueAndGrad,
    axis_name: str,
    *,
    axis: int | Sequence[int | None] = 0,
    params_specs: PyTree = REPLICATED,
    mesh: Mesh | None = None,
) -> ValueAndGrad:
    r"""Mean over the shards of a batch, each of which perturbs for itself, under `jax.jit`.

    What `m_sharpness` is for the micro-batches of one device: `jax.jit` alone computes with sharded
    arrays as if there was one device, and so with one perturbation. This hands every device its own
    share of the batch (through `jax.shard_map`), without communication between the two passes.

    Args:
      value_and_grad_fn: a function of the params and other arguments that returns (value, gradient)
        and possibly more, such as `sharpness_aware_value_and_grad(...)` without axis_name.
      axis_name: axis of the mesh over which the batch is sharded. Other axes of the mesh stay with
        `jax.jit`.
      axis: the axis along which all arrays of the other arguments are sharded, or one for each
        other positional argument, None for one that every device gets whole, a random key as it is;
        keyword arguments are sharded along 0 then.
      params_specs: how the params are sharded, a tree of `PartitionSpec` that is a prefix of the
        params, such as `jax.tree.map(lambda x: x.sharding.spec, params)`. The default is for params
        that are whole on every device. Fully sharded ones are gathered for the length of the call,
        since every device takes the gradient at a perturbed copy of its own, and the averaged
        gradient is scattered again.
      mesh: the mesh; None for that of `jax.set_mesh`.

    Returns:
      A function of the same arguments that returns the mean over the shards of what
      `value_and_grad_fn` returns; over the axis, the gradient is sharded as the params are.

    Raises:
      TypeError: axis is no integer; at a call, params_specs holds no `PartitionSpec`, or
        `value_and_grad_fn` does not return a value and a gradient.
      ValueError: at a call, axis is of the wrong length, params_specs no prefix of the params, or
        an array cannot be sharded, differs in length from another, or looks like a random key.

    References:
      Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, 2020.

    >>> import jax, jax.numpy as jnp
    >>> from jax.sharding import NamedSharding, PartitionSpec as P
    >>> from monge_sam_jax import monge, per_shard, sharpness_aware_value_and_grad
    >>> def loss_fn(params, batch):
    ...     return jnp.mean((batch * params) ** 2)
    >>> fn = sharpness_aware_value_and_grad(loss_fn, metric=monge(), rho=0.0)
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
    >>> params = jax.device_put(jnp.ones(()), NamedSharding(mesh, P()))
    >>> batch = jax.device_put(jnp.ones(16), NamedSharding(mesh, P("data")))
    >>> jax.jit(per_shard(fn, "data", mesh=mesh))(params, batch)
    (Array(1., dtype=float32), Array(2., dtype=float32))
    """
    _check_axis(axis)

    def mean_value_and_grad(params: PyTree, *args: PyTree, **kwargs: PyTree) -> PyTree:
        gathered_along = _dimensions(params_specs, axis_name, params)

        def on_shard(params: PyTree, args: PyTree, kwargs: PyTree) -> PyTree:
            whole = jax.tree.map(gather, gathered_along, params)
            value, grads, *rest = _check_pair(value_and_grad_fn(whole, *args, **kwargs))
            means = jax.lax.pmean((value, rest), axis_name)
            return jax.tree.map(scatter, gathered_along, grads), means

        def gather(along: int, x: jax.Array) -> jax.Array:
            if along == WHOLE:
                return x
            return _with_auto_axes(
                lambda x: jax.lax.all_gather(x, axis_name, axis=along, tiled=True), x
            )

        def scatter(along: int, g: jax.Array) -> jax.Array:
            if along == WHOLE:
                return jax.lax.pmean(g, axis_name)
            total = _with_auto_axes(
                lambda g: jax.lax.psum_scatter(g, axis_name, scatter_dimension=along, tiled=True), g
            )
            return total / jax.lax.psum(1, axis_name)

        specs = jax.tree.map(lambda along: _spec(along, axis_name), gathered_along)
        dimensions = sample_dimensions("axis", axis, args, kwargs)
        argument_specs = jax.tree.unflatten(
            jax.tree.structure((args, kwargs)), [_spec(at, axis_name) for at in dimensions]
        )
        mapped = jax.shard_map(
            on_shard,
            mesh=mesh,
            axis_names={axis_name},
            in_specs=(specs, *argument_specs),
            out_specs=(specs, REPLICATED),
            check_vma=False,  # with it, a loop in the loss could not start from constants
        )
        grads, (value, rest) = mapped(params, args, kwargs)
        return (value, grads, *rest)

    return mean_value_and_grad


def _check_microbatches(num_microbatches: Any, axis: Any, how: Any) -> None:
    if isinstance(num_microbatches, bool) or not isinstance(num_microbatches, int):
        raise TypeError(f"num_microbatches must be an integer, got {num_microbatches!r}")
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches must be at least one, got {num_microbatches}")
    _check_axis(axis)
    if how not in MEANS:
        raise ValueError(f"how must be one of {', '.join(map(repr, MEANS))}, got {how!r}")


def _check_axis(axis: Any) -> None:
    axes = axis if isinstance(axis, Sequence) else [axis]
    if axis is None or not all(along is None or isinstance(along, int) for along in axes):
        raise TypeError(f"axis must be an integer, or one or None for each argument, got {axis!r}")


def _check_pair(output: Any) -> tuple[PyTree, ...]:
    if not isinstance(output, tuple) or len(output) < 2:
        raise TypeError(
            f"value_and_grad_fn must return (value, gradient), got {type(output).__name__}; use "
            "sharpness_aware_value_and_grad, or jax.value_and_grad in place of jax.grad"
        )
    return output


def _dimensions(specs: PyTree, axis_name: str, params: PyTree) -> PyTree:
    """The dimension of every param that is sharded over the axis, or `WHOLE`."""

    def find(spec: Any) -> int:
        if not isinstance(spec, PartitionSpec):
            raise TypeError(
                "the leaves of params_specs must be PartitionSpecs, such as x.sharding.spec, got "
                f"{spec!r}"
            )
        over_axis = (axis_name in (n if isinstance(n, tuple) else (n,)) for n in spec)
        return next((dimension for dimension, over in enumerate(over_axis) if over), WHOLE)

    found = jax.tree.map(find, specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    try:
        return jax.tree.map(lambda at, subtree: jax.tree.map(lambda _: at, subtree), found, params)
    except ValueError as error:
        message = f"params_specs must be a tree that is a prefix of the params: {error}"
        raise ValueError(message) from error


def _spec(dimension: int, axis_name: str) -> PartitionSpec:
    if dimension == WHOLE:
        return REPLICATED
    return PartitionSpec(*[None] * dimension, axis_name)


def _with_auto_axes(collective: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`collective(x)`, where x may also be sharded over explicit axes, and the result stays so.

    JAX (0.7 to 0.10) has no rule for gathering and scattering beside explicit axes.
    """
    kind = jax.typeof(x).sharding
    explicit = tuple(
        name
        for name, axis_type in zip(kind.mesh.axis_names, kind.mesh.axis_types, strict=True)
        if axis_type == AxisType.Explicit
    )
    if not explicit:
        return collective(x)
    return jax.sharding.auto_axes(collective, axes=explicit, out_sharding=kind.spec)(x)


def _cut(path: tuple[Any, ...], x: Any, pieces: int, axis: int) -> jax.Array:
    """The array cut into pieces along `axis`, stacked along a new first axis.

    Neighbours go to different pieces: pieces of neighbours would lie on few devices each where the
    axis is sharded, so that every device would gather and evaluate the whole batch.
    """
    shape = jnp.shape(x)
    if shape[axis] % pieces:
        raise ValueError(
            f"{describe(path, x)} cannot be cut into {pieces} micro-batches along axis {axis}"
        )
    split = (*shape[:axis], shape[axis] // pieces, pieces, *shape[axis + 1 :])
    return jnp.moveaxis(jnp.reshape(x, split), axis + 1, 0)


def _own_key(x: Any, number: jax.Array) -> Any:
    """What a micro-batch gets of an argument that is not cut: keys with its number folded in."""
    if not (isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)):
        return x
    fold_in = jax.random.fold_in
    for _ in range(x.ndim):
        fold_in = jax.vmap(fold_in, in_axes=(0, None))
    return fold_in(x, number)


def _mean_by_scan(evaluate: Callable[..., PyTree], microbatches: PyTree, pieces: int) -> PyTree:
    def add(total: PyTree, microbatch: PyTree) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, _widen(evaluate(microbatch))), None

    kinds = jax.eval_shape(lambda xs: evaluate(jax.tree.map(lambda x: x[0], xs)), microbatches)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(_widen, kinds))
    total, _ = jax.lax.scan(add, zeros, microbatches)
    return _divide(total, pieces, kinds)


def _mean_by_vmap(evaluate: Callable[..., PyTree], microbatches: PyTree, pieces: int) -> PyTree:
    outputs = jax.vmap(evaluate)(microbatches)
    total = jax.tree.map(lambda x: jnp.sum(x, axis=0), _widen(outputs))
    return _divide(total, pieces, outputs)


def _mean_by_unrolling(
    evaluate: Callable[..., PyTree], microbatches: PyTree, pieces: int
) -> PyTree:
    kinds = evaluate(jax.tree.map(lambda x: x[0], microbatches))
    total = _widen(kinds)
    for i in range(1, pieces):
        output = evaluate(jax.tree.map(lambda x, i=i: x[i], microbatches))
        total = jax.tree.map(jnp.add, total, _widen(output))
    return _divide(total, pieces, kinds)


MEANS = {"scan": _mean_by_scan, "vmap": _mean_by_vmap, "unroll": _mean_by_unrolling}


def _widen(tree: PyTree) -> PyTree:
    def wide(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return widen(x, working_dtype(x))
        return x.astype(jnp.float32)

    return jax.tree.map(wide, tree)


def _divide(total: PyTree, pieces: int, kinds: PyTree) -> PyTree:
    """The quotient in the dtypes of `kinds`, where those are of floats."""

    def divide(x: jax.Array, kind: Any) -> jax.Array:
        mean = x / pieces
        return mean.astype(kind.dtype) if jnp.issubdtype(kind.dtype, jnp.inexact) else mean

    return jax.tree.map(divide, total, kinds)
