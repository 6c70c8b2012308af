"""What is wrong with an argument, said in terms of what to write instead."""

import difflib
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

PyTree = Any
FLOATS_ALONE = (
    "and sharpness-aware steps take float and complex ones: differentiate with respect to the "
    "float leaves alone, and give the optimizer those"
)


def check_at_least(name: str, value: Any, least: int) -> None:
    """Raises ValueError unless `value` is an integer, `least` or more."""
    if not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be an integer, {least} or more, got {value!r}")


def check_nonnegative(name: str, value: Any) -> None:
    """Raises unless `value` is a finite real scalar >= 0; traced values pass unchecked.

    Raises:
      TypeError: value is no real number.
      ValueError: value is negative, NaN, infinite or not a scalar.
    """
    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
    else:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real:
        kind = type(value).__name__
        raise TypeError(f"{name} must be a real number, got {value!r} of type {kind}")
    if np.shape(value) != ():
        raise ValueError(f"{name} must be a scalar, got an array of shape {np.shape(value)}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")


def check_fraction(name: str, value: Any, *, zero: bool = True, one: bool = False) -> None:
    """As `check_nonnegative`, and raises ValueError unless `value` is between zero and one.

    `zero` and `one` say whether those are allowed.
    """
    check_nonnegative(name, value)
    if isinstance(value, jax.core.Tracer):
        return
    if not (value < 1 or (one and value == 1)) or not (zero or value > 0):
        allowed = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
        raise ValueError(f"{name} must be in {allowed}, got {value!r}")


def check_positive(name: str, value: Any, *, zero: str) -> None:
    """As `check_nonnegative`, and raises ValueError if `value` is zero, with the advice `zero`."""
    check_nonnegative(name, value)
    if not isinstance(value, jax.core.Tracer) and value == 0:
        raise ValueError(f"{name} must be positive, got {value!r}: {zero}")


def broadcast_prefix(what: str, prefix: PyTree, tree: PyTree) -> PyTree:
    """`tree` with the leaves of `prefix` in place of its own; ValueError if that is no prefix."""
    try:
        return jax.tree.map(lambda x, part: jax.tree.map(lambda _: x, part), prefix, tree)
    except ValueError as error:
        raise ValueError(f"{what} that is a prefix of the params: {error}") from error


def check_params(params: PyTree) -> None:
    """Raises TypeError unless all leaves are float or complex arrays, or such numbers."""
    _check_arrays(params)
    for path, leaf in jax.tree.leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(f"{_at(path)} has dtype {dtype.name}, {FLOATS_ALONE}")


def check_real(params: PyTree) -> None:
    """Raises TypeError unless all params are real floats."""
    for leaf in jax.tree.leaves(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(f"params must be real floats, got dtype {jnp.result_type(leaf)}")


def _check_arrays(params: PyTree) -> None:
    for path, leaf in jax.tree.leaves_with_path(params):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, numbers.Number):
            raise TypeError(
                f"the leaf {_at(path)} is a {type(leaf).__name__} and no array: give the arrays "
                "alone to tx.init, tx.update and the gradient function. With Equinox, arrays, "
                "static = eqx.partition(model, eqx.is_inexact_array), and the gradient is that of "
                "lambda arrays: loss_fn(eqx.combine(arrays, static))"
            )


def check_state(state: Any, kind: type, builder: str) -> None:
    """Raises TypeError unless `state` is the state of this transformation."""
    if not isinstance(state, kind):
        name = type(state).__name__
        if isinstance(state, tuple):
            name += f" of {', '.join(type(link).__name__ for link in state)}"
        raise TypeError(
            f"{builder} was given a {name} in place of its state: make that by tx.init(params), "
            "with the same tx, and restore a checkpoint into the form of it"
        )


def check_params_and_gradient(params: PyTree, grads: PyTree) -> None:
    """Raises unless `grads` is a gradient of something with respect to `params`.

    Raises:
      TypeError: a gradient is float0 or of an integer dtype.
      ValueError: a leaf has been masked by Optax, or structures or shapes differ.
    """
    is_masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    for tree in (params, grads):
        for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_masked):
            if is_masked(leaf):
                raise ValueError(
                    f"{_at(path)} is a MaskedNode, so the gradient function cannot be evaluated: "
                    "the sharpness-aware transformation is inside optax.masked, optax.partition or "
                    "the like. Place it outside, first in the chain. The leaves to perturb are "
                    "chosen by its own argument mask=, and a radius for each group of leaves by "
                    'sharpness_aware(grad_fn, metric=grouped({"a": monge(), "b": scaled(monge(), '
                    "0.1)}, labels)), not by a second transformation"
                )
    _check_arrays(params)
    for path, leaf in jax.tree.leaves_with_path(grads):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            name = "float0" if dtype == jax.dtypes.float0 else dtype.name
            raise TypeError(f"the gradient {_at(path)} has dtype {name}, {FLOATS_ALONE}")
    _check_same_form(
        params,
        grads,
        compare_dtypes=False,
        difference="the gradient does not have the form of the params",
    )


def check_second_gradient(first: PyTree, second: PyTree) -> None:
    """Raises ValueError unless what `grad_fn` returned has the form of the first gradient."""
    difference = "grad_fn must return a gradient of the form of the one given to update"
    if second is None and first is not None:
        raise ValueError(f"{difference}, but it returned None; does it lack a return statement?")
    structure: Any = jax.tree.structure(first)
    is_pair = isinstance(second, tuple) and len(second) == 2
    if is_pair and structure != jax.tree.structure(second):
        if structure == jax.tree.structure(second[1]):
            raise ValueError(
                f"{difference}, but it returned a pair whose second part is a gradient, such as "
                "(value, grad); use jax.grad in place of jax.value_and_grad"
            )
        if structure == jax.tree.structure(second[0]):
            raise ValueError(
                f"{difference}, but it returned a pair whose first part is a gradient, such as "
                "(grad, aux); drop the auxiliary output: lambda params: grad_fn(params)[0]"
            )
    _check_same_form(first, second, compare_dtypes=True, difference=difference)


def _check_same_form(
    expected: PyTree, actual: PyTree, *, compare_dtypes: bool, difference: str
) -> None:
    expected_leaves = dict(jax.tree.leaves_with_path(expected))
    actual_leaves = dict(jax.tree.leaves_with_path(actual))
    for path in expected_leaves:
        if path not in actual_leaves:
            raise ValueError(f"{difference}: it has nothing {_at(path)}")
    for path in actual_leaves:
        if path not in expected_leaves:
            raise ValueError(f"{difference}: it has something additional {_at(path)}")
    containers: Any = jax.tree.structure(expected)
    if containers != jax.tree.structure(actual):
        raise ValueError(
            f"{difference}: its containers differ, {jax.tree.structure(actual)} in place of "
            f"{containers}"
        )
    for path, leaf in expected_leaves.items():
        other = actual_leaves[path]
        if jnp.shape(leaf) != jnp.shape(other):
            raise ValueError(
                f"{difference}: {_at(path)} its shape is {jnp.shape(other)} in place of "
                f"{jnp.shape(leaf)}; was a batch, device or ensemble axis not averaged over?"
            )
        if compare_dtypes and jnp.iscomplexobj(leaf) != jnp.iscomplexobj(other):
            raise ValueError(
                f"{difference}: {_at(path)} its dtype is {jnp.result_type(other)} in place of "
                f"{jnp.result_type(leaf)}"
            )


def _at(path: tuple[Any, ...]) -> str:
    return f"at params{jax.tree_util.keystr(path)}"


OF_TWO_PASSES = {
    "descent": ": it has one gradient to follow, not two. Use sharpness_aware(descent=...)",
    "period": ": it takes one gradient at every update, so perturbing seldom saves nothing. To "
    "perturb at some updates alone, when=lambda count: count % 2 == 0",
    "measure": ": there is no second gradient to measure with. Use sharpness_aware(measure=True)",
    "grad_fn": ": it needs no gradient function; update gets the gradient at the params",
    "axis_name": ": average the gradient over the axis before you give it to update",
    "alpha": ": give it to the metric, metric=monge(alpha=...)",
    "loss_budget": ": metric=lambda rho: monge(alpha=rho / loss_budget) is one",
}


def check_of_one_pass(options: Mapping[str, Any]) -> None:
    """Raises TypeError if there are options that `one_pass_sam` does not take."""
    for name in options:
        raise TypeError(
            f"one_pass_sam takes no {name}" + OF_TWO_PASSES.get(name, "; see help(one_pass_sam)")
        )


CAUSES = (
    "flax.training's TrainState.apply_gradients (monge_sam_jax.linen has one that passes grad_fn "
    "on), optax.MultiSteps(...).gradient_transformation() and optax.lookahead around the "
    "transformation are the usual causes: call tx.update(grads, state, params, grad_fn=...) "
    "yourself, with the transformation first in the chain, or with optax.lookahead around it build "
    "it with a grad_fn of the params alone"
)
OF_PARAMS_ALONE = "tx.update(grads, state, params, grad_fn=lambda params: grad_fn(params, ...))"
RESERVED = ("updates", "state", "params", "grad_fn")  # what `update` itself takes by name


def bind_grad_fn(
    grad_fn: Callable[..., PyTree] | None, params: PyTree, extra: Mapping[str, Any]
) -> Callable[[PyTree], PyTree]:
    """`grad_fn` as a function of the params alone.

    It is given those of the extra arguments that its signature accepts by name.

    Raises:
      ValueError: params or grad_fn are missing, or an argument that its signature requires is, or
        an optional one seems to be misspelt.
    """
    if params is None:
        raise ValueError(
            "a sharpness-aware transformation needs the params: tx.update(grads, state, params). "
            + CAUSES
        )
    if grad_fn is None:
        raise ValueError(
            "a sharpness-aware transformation needs a gradient function: give one when building "
            "it, monge_sam(jax.grad(loss_fn)), or to tx.update(..., grad_fn=...). " + CAUSES
        )
    try:
        parameters = list(inspect.signature(grad_fn).parameters.values())
    except ValueError:  # some callables written in C have no signature
        return functools.partial(grad_fn, **extra)
    if parameters and parameters[0].kind is not inspect.Parameter.VAR_KEYWORD:
        parameters = parameters[1:]  # the params
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    accepts_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    accepted = {name: x for name, x in extra.items() if accepts_all or name in by_name}
    missing = [
        p
        for p in parameters
        if p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and p.name not in accepted
    ]
    if missing:
        raise ValueError(OF_NNX if _is_of_nnx(grad_fn) else _advice(missing))
    if not accepts_all:
        _check_spelling(by_name - accepted.keys(), extra.keys() - accepted.keys())
    bound = functools.partial(grad_fn, **accepted)
    return functools.partial(_call_noting, bound, OF_NNX) if _is_of_nnx(grad_fn) else bound


OF_NNX = (
    "grad_fn is a gradient that flax.nnx took: one of a model cannot be evaluated at given params. "
    "Use monge_sam_jax.nnx.grad_fn(loss_fn, model, batch), made before the first gradient is taken"
)


def _is_of_nnx(grad_fn: Any) -> bool:
    while isinstance(grad_fn, functools.partial):
        grad_fn = grad_fn.func
    return str(getattr(grad_fn, "__module__", None)).startswith("flax.nnx.")


def _call_noting(function: Callable[[PyTree], PyTree], note: str, params: PyTree) -> PyTree:
    """`function(params)`; its exceptions are its own, with a note: it may be of the params."""
    try:
        return function(params)
    except Exception as error:
        error.add_note(note)
        raise


def _advice(missing: list[inspect.Parameter]) -> str:
    names = ", ".join(p.name for p in missing)
    needs = f"grad_fn needs {names}, which update did not get"
    reserved = [p.name for p in missing if p.name in RESERVED]
    if "params" in reserved:
        return (
            f"{needs}, as its first argument has to be the params, whatever argnums is: give one "
            "that takes them first, jax.grad(lambda params, ...: loss_fn(..., params))"
        )
    if reserved:
        return (
            f"{needs}, as update has an argument {reserved[0]} of its own: call it otherwise in "
            f"the loss, or fill it in, {OF_PARAMS_ALONE}"
        )
    if any(p.kind is p.POSITIONAL_ONLY for p in missing):
        return f"{needs}, as it takes them by position only: fill them in, {OF_PARAMS_ALONE}"
    return (
        f"{needs}: pass it by name, tx.update(grads, state, params, {missing[0].name}=...), or "
        "give update a grad_fn= of the params alone. Its first argument has to be the params; a "
        "second one of optax.contrib.sam's, the number of the step, is to be filled in, "
        f"lambda params: grad_fn(params, 0). {CAUSES}"
    )


# What the transformations of Optax take from `update` by name.
OF_OPTAX = ("value", "grad", "value_fn", "obj_fn", "sample_size")


def _check_spelling(not_given: Set[str], not_taken: Set[str]) -> None:
    """Raises ValueError if an argument of `update` looks like one of grad_fn's, misspelt."""
    for name in sorted(not_taken - set(OF_OPTAX)):
        close = difflib.get_close_matches(name, sorted(not_given), n=1, cutoff=0.75)
        if close:
            raise ValueError(
                f"update got {name}, which grad_fn does not take, and not its {close[0]}, for "
                f"which the default would be used: is it misspelt? If it is meant for another "
                f"transformation, fill in {close[0]} too: "
                f"tx.update(..., {close[0]}=..., {name}=...)"
            )
