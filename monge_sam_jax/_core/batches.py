"""Which arrays run over the samples of a batch, along which axis, and a part of the samples."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
Path = tuple[Any, ...]

WHOLE = -1  # in place of a dimension: not divided
RAW_KEYS = [(2,), (4,)]  # shapes of the keys of `jax.random.PRNGKey`


def sample_dimensions(
    option: str,
    axis: int | Sequence[int | None],
    args: Sequence[PyTree],
    kwargs: Mapping[str, PyTree],
) -> list[int]:
    """For every leaf of (args, kwargs), the dimension that runs over the samples, or `WHOLE`.

    Args:
      option: the name of the option that `axis` was given for.
      axis: that of all arrays, or one for each positional argument, None for one that is not
        divided; keyword arguments are divided along the first then.
      args: the positional arguments besides the params.
      kwargs: the keyword arguments.

    Returns:
      The dimensions, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: an array cannot be divided, or differs in length from another; or there is not one
        axis for each argument.
    """
    if not isinstance(axis, int) and len(axis) != len(args):
        fitting = (*axis, *[0] * len(args))[: len(args)]
        raise ValueError(
            f"{option} must hold one axis for each of the {len(args)} positional arguments besides "
            f"the params, got {axis!r}; write {option}={fitting!r}, with None for an argument that "
            "is needed whole"
        )
    leaves = jax.tree.leaves_with_path((args, kwargs))
    divided = [(path, x, at) for path, x in leaves if (at := _axis_at(axis, path)) is not None]

    def advice(*paths: Path, alone: bool) -> str:
        """How to pass what is needed whole, as which the argument of each path is if `alone`."""
        axes = dict.fromkeys(
            f"{option}={_with_none(axis, len(args), bool(kwargs), path, alone)!r}" for path in paths
        )
        return (
            "pass what is needed whole as an argument of its own, by position, with None in its "
            f"place, such as {' or '.join(axes)}"
        )

    for path, x, at in divided:
        if problem := _problem(x, at):
            beside = [_problem(y, b) for other, y, b in divided if other[:2] == path[:2]]
            raise ValueError(f"{describe(path, x)} {problem}; {advice(path, alone=all(beside))}")
    for path, x, at in divided:
        first_path, first, first_at = divided[0]
        length, first_length = jnp.shape(x)[at], jnp.shape(first)[first_at]
        if length != first_length:
            apart = first_path[:2] != path[:2]
            raise ValueError(
                f"{describe(first_path, first)} has {first_length} samples along axis {first_at}, "
                f"and {describe(path, x)} has {length} along axis {at}: they cannot be one batch; "
                + advice(first_path, path, alone=apart)
            )
    dimensions = {path: at % jnp.ndim(x) for path, x, at in divided}
    return [dimensions.get(path, WHOLE) for path, _ in leaves]


def part_of_batch(
    fraction: float,
    option: str,
    axis: int | Sequence[int | None],
    args: Sequence[PyTree],
    kwargs: Mapping[str, PyTree],
) -> tuple[Sequence[PyTree], dict[str, PyTree]]:
    """The arguments with a part of the samples; `option` and the rest as in `sample_dimensions`.

    The part is spread evenly over the batch where 1 / fraction is whole, and so over all devices
    where the batch is.
    """

    def take(x: Any, dimension: int) -> Any:
        if dimension == WHOLE:
            return x
        size = x.shape[dimension]
        kept = max(1, round(fraction * size))
        stride = max(1, size // kept)
        return jax.lax.slice_in_dim(x, 0, (kept - 1) * stride + 1, stride, dimension)

    leaves, structure = jax.tree.flatten((args, kwargs))
    dimensions = sample_dimensions(option, axis, args, kwargs)
    return jax.tree.unflatten(structure, map(take, leaves, dimensions))


def describe(path: Path, x: Any) -> str:
    """Where in (args, kwargs) an array is, and its shape, for an error message."""
    where = "args" if _is_positional(path) else "kwargs"
    return f"{where}{jax.tree_util.keystr(path[1:])} of shape {jnp.shape(x)}"


def _is_positional(path: Path) -> bool:
    return path[0].idx == 0


def _axis_at(axis: int | Sequence[int | None], path: Path) -> int | None:
    if isinstance(axis, int):
        return axis
    return axis[path[1].idx] if _is_positional(path) else 0


def _problem(x: Any, axis: int) -> str | None:
    """Why an array cannot be divided along the axis."""
    if not -jnp.ndim(x) <= axis < jnp.ndim(x):
        return f"has no axis {axis} to divide"
    if jnp.shape(x) in RAW_KEYS and getattr(x, "dtype", None) == jnp.uint32:
        return (
            "and type uint32 looks like a random key, which cannot be divided (if it holds "
            "samples, cast them to another type of integer, such as int32)"
        )
    return None


def _with_none(
    axis: int | Sequence[int | None], num_args: int, by_name: bool, path: Path, alone: bool
) -> tuple[int | None, ...]:
    """The axes with None for what is at the path: for its argument, or for another one."""
    axes: list[int | None] = [axis] * num_args if isinstance(axis, int) else list(axis)
    if alone and _is_positional(path):
        axes[path[1].idx] = None
    else:
        axes.append(None)
    nothing_left = not by_name and all(at is None for at in axes)
    return (0, None) if nothing_left else tuple(axes)
