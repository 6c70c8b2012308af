"""Sharpness-aware training of Flax Linen models.

Two passes over a model with running statistics, dropout or a loss scale go wrong in silence: the
statistics are updated twice, the second dropout mask is another one, a scale is left in the
gradient that perturbs. `make_train_step` writes the step that gets them right, for any Flax
`TrainState`; `SharpnessAwareTrainState` is for those who write their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypedDict, Unpack

import chex
import jax
import jax.numpy as jnp
import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState

from monge_sam_jax._core.collectives import make_varying
from monge_sam_jax._core.train_state import SharpnessAwareTrainState as SharpnessAwareTrainState
from monge_sam_jax._core.train_state import bind
from monge_sam_jax.descent import Descent
from monge_sam_jax.diagnostics import Diagnostics, MeasuredDiagnostics, get_diagnostics
from monge_sam_jax.gradients import sharpness_aware_value_and_grad
from monge_sam_jax.loss_scaling import loss_scaled, update_dynamic_scale
from monge_sam_jax.metrics import Grads, Metric, Params
from monge_sam_jax.perturbation import AxisName, Mask
from monge_sam_jax.transforms import SharpnessAwareState
from monge_sam_jax.when import When, WhenRule, check_when

__all__ = ["SharpnessAwareTrainState", "make_train_step"]
__dir__ = __all__.copy

PyTree = Any


class Options(TypedDict, total=False):
    """Options of `make_train_step` that describe the perturbation of its metric."""

    rho: chex.Numeric | optax.Schedule
    when: When | None
    ascent: optax.GradientTransformation | None
    descent: Descent | None
    mask: Mask
    measure: bool
    widen_params: bool
    sync_perturbation: bool


def make_train_step(
    loss_fn: Callable[..., Any],
    *,
    metric: Metric | None = None,
    mutable: Collection[str] = ("batch_stats",),
    rng_streams: Collection[str] = ("dropout",),
    axis_name: AxisName | None = None,
    diagnostics: bool = False,
    value_and_grad: Callable[..., Any] = jax.value_and_grad,
    **options: Unpack[Options],
) -> Callable[..., Any]:
    """A training step for a Flax `TrainState`, sharpness-aware or not.

    It is `step(state, batch) -> (state, loss, metrics)`, pure and not jitted:
    `jax.jit(step, donate_argnums=0)`. The state may be a `SharpnessAwareTrainState`, or a
    `TrainState` of your own with some of its fields or none. Both passes see the same batch,
    running statistics, random numbers and loss scale; the loss, the metrics and the new running
    statistics are those of the first pass, at the params.

    With a metric, the gradient is taken at the perturbed params, for any optimizer. Without one
    that is left to the state's own transformation, which is handed a gradient function: to
    `optax.chain(monge_sam(rho=0.05), optax.adamw(1e-3))`, or to plain `optax.sgd(0.1)`, which makes
    no use of it.

    If the state has a `dynamic_scale`, the loss of both passes is multiplied by its scale, both
    gradients are divided by it before use, and the scale is updated once. If a gradient is not
    finite the step is skipped: only its number and the scale are new. (A skipped step of Flax's
    ImageNet example takes the new running statistics; after an overflow in the forward pass they
    would never be finite again.) A gradient that a transformation in the chain takes is judged by
    the params and the optimizer state it leads to, so do not add `optax.apply_if_finite` or
    `optax.zero_nans`, which would hide it.

    The state's transformation also gets `value`, `grad` and `value_fn`, for what searches along a
    line: loss and gradient of the first pass, and the loss at other params, of the same batch,
    running statistics and random numbers.

    Args:
      loss_fn: (variables, batch, rngs) -> (loss, (updated, metrics)): variables and rngs are for
        `model.apply`, updated is the dict of collections that it changed, metrics any tree.
      metric: the metric G, or None where the perturbation is the optimizer's, if anybody's.
      mutable: names of the collections beside the params that are fields of the state. Those that
        it does not have, or as None, are not in variables.
      rng_streams: the names in rngs. The keys are split from `fold_in(state.dropout_key,
        state.step)`, on many devices with the number of the device folded in too, and are of the
        kind of `jax.random.key`; without a dropout_key, rngs is empty.
      axis_name: name of the mapped axis, or a tuple of names, over which a batch is split, under
        `jax.pmap` or `jax.shard_map`. Gradients, loss and running statistics are averaged over it,
        metrics are the device's own. A transformation in the chain gets averaged gradients, so it
        takes no axis_name. Not for `jax.jit` with sharded arrays.
      diagnostics: whether the step returns the `Diagnostics` too, as a fourth part.
      value_and_grad: what differentiates, in both passes, a function of params, collections, batch
        and rngs: `jax.value_and_grad`, or `accumulated(k, axis=(None, 0, None))`, with which each
        micro-batch has its own dropout mask (for one that all share, let `loss_fn` close over a
        key).
      **options: rho (0.05, or a schedule of the number of the step), when (a function of the number
        of the step that returns a bool; None for every step), ascent, descent, mask, measure,
        widen_params and sync_perturbation of `sharpness_aware_value_and_grad`, for the metric.

    Returns:
      The step.

    Raises:
      TypeError: an argument is of the wrong type, or there are options without a metric.
      ValueError: rho is negative, NaN or infinite; at a step, loss_fn returns something else or a
        collection that the state lacks, or the state's transformation perturbs beside the metric
        or twice.

    >>> import jax, optax
    >>> import jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from flax.training.train_state import TrainState
    >>> from monge_sam_jax import monge
    >>> from monge_sam_jax.linen import make_train_step
    >>> model, batch = nn.Dense(1), (jnp.ones((4, 2)), jnp.zeros((4, 1)))
    >>> def loss_fn(variables, batch, rngs):
    ...     x, y = batch
    ...     prediction, updated = model.apply(variables, x, rngs=rngs, mutable=["batch_stats"])
    ...     loss = jnp.mean((prediction - y) ** 2)
    ...     return loss, (updated, {"mae": jnp.mean(jnp.abs(prediction - y))})
    >>> params = model.init(jax.random.key(0), batch[0])["params"]
    >>> state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3))
    >>> step = jax.jit(make_train_step(loss_fn, metric=monge(), rho=0.05), donate_argnums=0)
    >>> state, loss, metrics = step(state, batch)
    >>> state.step
    Array(1, dtype=int32, weak_type=True)
    """
    for name, names in {"mutable": mutable, "rng_streams": rng_streams}.items():
        if isinstance(names, str):
            raise TypeError(f"{name} must be a tuple of names, such as ({names!r},), got {names!r}")
    if metric is None:
        if options:
            raise TypeError(
                f"{', '.join(options)} given without a metric: give them to the transformation in "
                "the chain, monge_sam(rho=...), or give the step a metric, such as metric=monge()"
            )
        evaluate = functools.partial(_evaluate_for_chain, axis_name=axis_name)
    else:
        rho, when = options.pop("rho", 0.05), options.pop("when", None)
        check_when(when)
        if isinstance(when, WhenRule):
            raise TypeError(
                "when, a rule that looks at the gradient, keeps a state: give it to the "
                "transformation in the chain, monge_sam(when=...)"
            )
        robust_value_and_grad = functools.partial(
            sharpness_aware_value_and_grad,
            metric=metric,
            has_aux=True,
            diagnostics=True,
            axis_name=axis_name,
            **options,  # type: ignore[arg-type]  # without rho and when
        )
        # Called here too, so that wrong arguments are found before the first step.
        robust_value_and_grad(loss_fn, rho=0.0 if callable(rho) else rho)
        evaluate = functools.partial(
            _evaluate_robust, robust_value_and_grad, rho, when, axis_name=axis_name
        )
    total_loss = functools.partial(_total_loss, loss_fn)

    def step(state: TrainState, batch: PyTree) -> Any:
        scale = getattr(state, "dynamic_scale", None)
        _check_state(state, metric, scale)
        differentiate = value_and_grad
        if scale is not None:
            differentiate = loss_scaled(scale.scale, value_and_grad)
        collections = {k: x for k in mutable if (x := getattr(state, k, None)) is not None}
        inputs = (collections, batch, _step_rngs(state, rng_streams, axis_name))

        evaluation = evaluate(differentiate, total_loss, state, inputs)
        loss, (updated, metrics) = evaluation.output
        _check_updated(updated, collections, mutable)
        loss, updated = _mean((loss, dict(updated)), axis_name)

        value_fn = _value_fn(differentiate, total_loss, inputs, axis_name)
        extra_args = {"value": loss, "value_fn": value_fn, **evaluation.extra_args}
        bound = state.replace(tx=bind(state, extra_args))
        new = bound.apply_gradients(grads=evaluation.grads, tx=state.tx, **updated)
        seen = evaluation.diagnostics
        if diagnostics and seen is None:
            seen = get_diagnostics(new.opt_state)
        if scale is not None:
            # What a transformation in the chain got from grad_fn is known by its effects alone.
            effects = _newly_not_finite(new, state) if metric is None else ()
            new = _skip_unless_finite(new, state, scale, (evaluation.grads, effects))
        return (new, loss, metrics, seen) if diagnostics else (new, loss, metrics)

    return step


class _Evaluation(NamedTuple):
    """What the passes over the model gave; the gradient in Optax's convention."""

    output: Any
    grads: Grads
    extra_args: dict[str, Any]
    diagnostics: Diagnostics | MeasuredDiagnostics | None


def _evaluate_for_chain(
    differentiate: Callable[..., Any],
    total_loss: Callable[..., Any],
    state: TrainState,
    inputs: tuple[PyTree, ...],
    *,
    axis_name: AxisName | None,
) -> _Evaluation:
    """The gradient at the params, and a gradient function for the state's transformation."""
    value_and_grad = differentiate(total_loss, has_aux=True)

    def evaluate_at(params: Params) -> tuple[Any, Grads]:
        output, grads = value_and_grad(_vary(params, axis_name), *inputs)
        return output, _mean(optax.tree.conj(grads), axis_name)

    def grad_fn(params: Params) -> Grads:
        _, grads = evaluate_at(params)
        scale = getattr(state, "dynamic_scale", None)
        if scale is None:
            return grads
        # A clip or a sign further down the chain would hide a single infinite entry.
        _, is_finite = update_dynamic_scale(scale, grads)
        return jax.tree.map(lambda g: jnp.where(is_finite, g, jnp.nan), grads)

    output, grads = evaluate_at(state.params)
    return _Evaluation(output, grads, {"grad": grads, "grad_fn": grad_fn}, None)


def _evaluate_robust(
    robust_value_and_grad: Callable[..., Any],
    rho: chex.Numeric | optax.Schedule,
    when: Callable[[jax.Array], bool | jax.Array] | None,
    differentiate: Callable[..., Any],
    total_loss: Callable[..., Any],
    state: TrainState,
    inputs: tuple[PyTree, ...],
    *,
    axis_name: AxisName | None,
) -> _Evaluation:
    """The gradient at the perturbed params."""

    def differentiate_and_keep(fun: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        value_and_grad = differentiate(fun, **options)

        def keep(*inputs: Any) -> Any:
            (loss, aux), grads = value_and_grad(*inputs)
            return (loss, (aux, grads)), grads

        return keep

    value_and_grad = robust_value_and_grad(
        total_loss,
        rho=rho(state.step) if callable(rho) else rho,
        when=True if when is None else when(jnp.asarray(state.step)),
        value_and_grad=differentiate_and_keep,
    )
    output, grads, diagnostics = value_and_grad(_vary(state.params, axis_name), *inputs)
    loss, (aux, first) = output
    first = _mean(optax.tree.conj(first), axis_name)
    return _Evaluation((loss, aux), optax.tree.conj(grads), {"grad": first}, diagnostics)


def _value_fn(
    differentiate: Callable[..., Any],
    total_loss: Callable[..., Any],
    inputs: tuple[PyTree, ...],
    axis_name: AxisName | None,
) -> Callable[[Params], jax.Array]:
    """The loss of the first pass as a function of the params."""

    def value_fn(params: Params) -> jax.Array:
        # What differentiates may cut the batch and its keys, so it runs here too, for nothing.
        here = _vary(_with_mean_derivative(params, axis_name), axis_name)
        at_params = lambda _, *inputs: total_loss(here, *inputs)  # noqa: E731
        (loss, _), _ = differentiate(at_params, has_aux=True)(jnp.zeros(()), *inputs)
        return _mean(loss, axis_name)

    return value_fn


def _total_loss(
    loss_fn: Callable[..., Any],
    params: Params,
    collections: Mapping[str, PyTree],
    batch: PyTree,
    rngs: Mapping[str, jax.Array],
) -> Any:
    variables = params if OVERWRITE_WITH_GRADIENT in params else {"params": params}
    output = loss_fn({**variables, **collections}, batch, rngs)
    match output:
        case (_, (Mapping(), _)):
            return output
    raise ValueError(
        "loss_fn must return (loss, (updated, metrics)), where updated is the dict of collections "
        "that model.apply(..., mutable=[...]) returns, or {} if there are none; got "
        f"{jax.tree.structure(output)}"
    )


def _step_rngs(
    state: TrainState, streams: Collection[str], axis_name: AxisName | None
) -> dict[str, jax.Array]:
    key = getattr(state, "dropout_key", None)
    if key is None:
        return {}
    if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # micro-batches cannot tell a raw key from data
    key = jax.random.fold_in(key, state.step)
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    return dict(zip(streams, jax.random.split(key, len(streams)), strict=True))


def _vary(params: Params, axis_name: AxisName | None) -> Params:
    return params if axis_name is None else make_varying(params, axis_name)


def _mean(tree: PyTree, axis_name: AxisName | None) -> PyTree:
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def _with_mean_derivative(params: Params, axis_name: AxisName | None) -> Params:
    """The params; under `jax.pmap` a mean loss has the derivative of the device's own otherwise."""
    if axis_name is None:
        return params
    identity = jax.custom_jvp(lambda params: params)
    identity.defjvp(lambda primals, tangents: (primals[0], jax.lax.pmean(tangents[0], axis_name)))
    return identity(params)


def _skip_unless_finite(
    new: TrainState, old: TrainState, dynamic_scale: DynamicScale, judged: PyTree
) -> TrainState:
    """`new`, or if `judged` is not finite `old`; with the next number and scale in any case."""
    dynamic_scale, is_finite = update_dynamic_scale(dynamic_scale, judged)
    kept = jax.tree.map(functools.partial(jnp.where, is_finite), new, old)
    return kept.replace(step=new.step, dynamic_scale=dynamic_scale)


def _newly_not_finite(new: TrainState, old: TrainState) -> list[jax.Array]:
    """Params and optimizer state, but for what was not finite before (a best loss at the start)."""
    before, after = (jax.tree.leaves((state.params, state.opt_state)) for state in (old, new))
    return [
        jnp.where(jnp.isfinite(b), a, 0)
        for b, a in zip(before, after, strict=True)
        if jnp.issubdtype(jnp.result_type(a), jnp.inexact)
    ]


def _check_state(state: TrainState, metric: Metric | None, dynamic_scale: Any) -> None:
    if OVERWRITE_WITH_GRADIENT in state.params and not (metric is dynamic_scale is None):
        raise ValueError(
            f"params with {OVERWRITE_WITH_GRADIENT} (fp8) go neither with a metric nor with a "
            "dynamic_scale, which would change what is to be overwritten: put the transformation "
            "in the chain, optax.chain(monge_sam(...), ...), and leave both out"
        )
    is_ours = lambda x: isinstance(x, SharpnessAwareState)  # noqa: E731
    links = sum(map(is_ours, jax.tree.leaves(state.opt_state, is_leaf=is_ours)))
    if links > 1:
        raise ValueError(
            f"there are {links} sharpness-aware transformations in the state's, of which only the "
            "last would perturb: keep one. A radius for each group of leaves is one transformation "
            "with metric=grouped({...}, labels)"
        )
    if metric is not None and links:
        raise ValueError(
            "there is a metric, and the state's transformation is sharpness-aware too, so that the "
            "params would be perturbed twice: leave one of the two out"
        )


def _check_updated(
    updated: Collection[str], collections: Collection[str], mutable: Collection[str]
) -> None:
    for name in updated:
        if name not in collections:
            advice = (
                f"the state does not have: create it with {name}=variables[{name!r}]"
                if name in mutable
                else f"is not in mutable={mutable!r}: name it there, or do not return it"
            )
            raise ValueError(f"loss_fn returned the collection {name!r}, which {advice}")
