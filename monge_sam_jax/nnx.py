"""Sharpness-aware training of Flax NNX models.

The loss runs twice, and a model is mutable: running statistics, random counters and metrics would
be updated twice, and the two passes would see different dropout masks. So the model and the other
arguments are copied before the first pass (the `Variable`s are, their arrays are shared); the
second pass runs on a copy of the copy, which is dropped. The model ends up as after
`nnx.value_and_grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.nnx import filterlib

from monge_sam_jax._core.collectives import make_varying
from monge_sam_jax.descent import Descent
from monge_sam_jax.gradients import conjugate, memoryless
from monge_sam_jax.metrics import Grads, Params
from monge_sam_jax.one_pass import unperturbed_params
from monge_sam_jax.perturbation import AxisName, Mask, MetricOrFunction
from monge_sam_jax.running_statistics import refresh_running_statistics

__all__ = ["evaluation_model", "grad_fn", "refresh_batch_stats", "sharpness_aware_value_and_grad"]
__dir__ = __all__.copy

if hasattr(nnx, "as_pure"):
    _as_pure: Callable[[Any], Any] = nnx.as_pure
else:  # Flax before 0.12
    _as_pure = nnx.pure


def sharpness_aware_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    metric: MetricOrFunction,
    rho: chex.Numeric,
    ascent: optax.GradientTransformation | None = None,
    descent: Descent | None = None,
    wrt: filterlib.Filter = nnx.Param,
    has_aux: bool = False,
    mask: Mask = None,
    when: bool | jax.Array = True,
    diagnostics: bool = False,
    measure: bool = False,
    widen_params: bool = False,
    axis_name: AxisName | None = None,
    sync_perturbation: bool = True,
    value_and_grad: Callable[..., Any] = nnx.value_and_grad,
) -> Callable[..., Any]:
    r"""`nnx.value_and_grad` with the gradient at the worst-case perturbation of the params.

    .. math::
        \big(\ell(\theta), \nabla \ell(\theta + \delta^*)\big), \qquad
        \delta^* = \rho \, \frac{G^{-1} g}{\sqrt{g^\top G^{-1} g}}, \quad g = \nabla \ell(\theta)
        \qquad \text{(eqs. 5 and 8)}

    For any NNX training loop: `optimizer.update(model, grads)` comes after it, with an optimizer
    that knows nothing of it. Loss, auxiliary output, and all state outside `wrt`, of the model and
    of other NNX objects among the arguments, are those of the first pass, at theta. Both passes
    draw the same random numbers.

    Args:
      loss_fn: function of the model and other arguments that returns a scalar, or (scalar, aux), as
        `nnx.value_and_grad` takes it.
      metric: the metric G, without a state.
      rho: radius of the ball in the metric's units, a scalar. A traced value is not checked.
      ascent: as in `sharpness_aware`, without a state.
      descent: as in `sharpness_aware`, without a state.
      wrt: the filter of the state that is differentiated and perturbed, such as `nnx.LoRAParam`;
        the same as the optimizer's.
      has_aux: whether `loss_fn` returns (scalar, aux).
      mask: as in `sharpness_aware`, over the `nnx.State` of the params. By path, it is
        `lambda params: nnx.map_state(lambda path, _: path[-1] == "kernel", params)`.
      when: as in `monge_sam_jax.sharpness_aware_value_and_grad`.
      diagnostics: whether to append a `Diagnostics` to what is returned.
      measure: whether it is a `MeasuredDiagnostics`.
      widen_params: as in `sharpness_aware`.
      axis_name: as in `sharpness_aware`, under `nnx.pmap`, `nnx.shard_map`, `jax.shard_map` or
        `nnx.vmap`; the gradient and the diagnostics are averaged over the axis, value and aux are
        the device's own. Replicated params are cast to varying ones for the first pass. Leave it
        out if `loss_fn` averages over the axis itself.
      sync_perturbation: as in `sharpness_aware`.
      value_and_grad: what differentiates, in both passes: a function of the signature of
        `nnx.value_and_grad`, such as `loss_scaled(scale, nnx.value_and_grad)`.

    Returns:
      A function of the model and the other arguments of `loss_fn` that returns (value, gradient),
      ((value, aux), gradient) if has_aux, and with a third part, the diagnostics, if asked for. The
      gradient is as `nnx.value_and_grad` would give it.

    Raises:
      TypeError: metric is no `Metric`, or rho no real number.
      ValueError: rho is negative, NaN or infinite; at a call, the model has no state that matches
        `wrt`, or the loss has been averaged over axis_name.

    References:
      Jacobsen and Arvanitidis, Monge SAM, eqs. 5, 8 and 9.

    >>> import jax.numpy as jnp, optax
    >>> from flax import nnx
    >>> from monge_sam_jax import monge
    >>> from monge_sam_jax.nnx import sharpness_aware_value_and_grad
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(3, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs))
    >>> optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    >>> def loss_fn(model, batch):
    ...     return jnp.mean((model(batch) - 1.0) ** 2)
    >>> value_and_grad = sharpness_aware_value_and_grad(loss_fn, metric=monge(), rho=0.05)
    >>> @nnx.jit
    ... def step(model, optimizer, batch):
    ...     loss, grads = value_and_grad(model, batch)  # the running statistics move once
    ...     optimizer.update(model, grads)
    ...     return loss
    >>> step(model, optimizer, jnp.eye(3))
    Array(1.99, dtype=float32)
    """
    robust_result = memoryless(
        metric=metric,
        rho=rho,
        ascent=ascent,
        descent=descent,
        mask=mask,
        when=when,
        diagnostics=diagnostics,
        measure=measure,
        widen_params=widen_params,
        axis_name=axis_name,
        sync_perturbation=sync_perturbation,
    )
    differentiate = value_and_grad(loss_fn, argnums=nnx.DiffState(0, wrt), has_aux=has_aux)

    def robust_value_and_grad(model: Any, /, *args: Any, **kwargs: Any) -> Any:
        params = _params(model, wrt)
        second = _second_pass(differentiate, wrt, model, args, kwargs)
        if axis_name is not None:  # or shard_map sums the gradient over the devices
            nnx.update(model, make_varying(params, axis_name))
        value, grads = differentiate(model, *args, **kwargs)
        if axis_name is not None:
            nnx.update(model, params)
            _check_local(value[0] if has_aux else value, axis_name)
        first = _as_pure(nnx.state(grads))
        value, robust, *told = robust_result(value, first, second, params)
        return (value, _in_form_of(grads, robust), *told)

    return robust_value_and_grad


def grad_fn(
    loss_fn: Callable[..., Any],
    model: Any,
    /,
    *args: Any,
    wrt: filterlib.Filter = nnx.Param,
    has_aux: bool = False,
    value_and_grad: Callable[..., Any] = nnx.value_and_grad,
    **kwargs: Any,
) -> Callable[[Params], Grads]:
    """The gradient of the loss as a function of the params alone, for `optimizer.update`.

    For optimizers with a sharpness-aware transformation in their chain. Call it before the first
    gradient is taken: model and arguments are kept as they are now, so that the second pass sees
    the running statistics and random counters that the first one saw. It leaves them alone.

    Args:
      loss_fn: as in `sharpness_aware_value_and_grad`.
      model: the model, as it is before the first pass.
      *args: the other arguments of `loss_fn`, of this step.
      wrt: the filter of the optimizer, and of the first gradient.
      has_aux: whether `loss_fn` returns (scalar, aux).
      value_and_grad: what differentiates, as in `sharpness_aware_value_and_grad`; use it for the
        first gradient too.
      **kwargs: more arguments of `loss_fn`.

    Returns:
      A function from params, the `nnx.State` of `wrt`, to the gradient of the loss there, in the
      form of the params. That of complex params is conjugated, as Optax wants it; conjugate the
      first gradient likewise.

    Raises:
      ValueError: the model has no state that matches `wrt`; at a call, the params are not those of
        `wrt`.

    >>> import jax.numpy as jnp, optax
    >>> from flax import nnx
    >>> from monge_sam_jax import monge_sam
    >>> from monge_sam_jax.nnx import grad_fn
    >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    >>> tx = optax.chain(monge_sam(rho=0.05), optax.adamw(1e-3))
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> def loss_fn(model, batch):
    ...     return jnp.mean((model(batch) - 1.0) ** 2)
    >>> @nnx.jit
    ... def step(model, optimizer, batch):
    ...     second = grad_fn(loss_fn, model, batch)  # before the first pass
    ...     loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    ...     optimizer.update(model, grads, grad_fn=second)
    ...     return loss
    >>> bool(step(model, optimizer, jnp.eye(3)) > step(model, optimizer, jnp.eye(3)))
    True
    """
    differentiate = value_and_grad(loss_fn, argnums=nnx.DiffState(0, wrt), has_aux=has_aux)
    second = _second_pass(differentiate, wrt, model, args, kwargs)
    return lambda params: conjugate(second(params))


def _second_pass(
    differentiate: Callable[..., Any],
    wrt: filterlib.Filter,
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Callable[[Params], Grads]:
    """The gradient at given params, of model and arguments as they are now."""
    snapshot = nnx.clone((model, args, kwargs))  # one graph: what they share stays shared
    expected = _paths(_params(model, wrt))

    def second(params: Params) -> Grads:
        arrays = _as_pure(params)
        different = sorted(expected ^ _paths(arrays))
        if different:
            raise ValueError(
                f"grad_fn differentiates with respect to wrt={wrt!r}, but was called with params "
                f"that {'lack' if different[0] in expected else 'have'} {different[0]}; give "
                "nnx.Optimizer and grad_fn the same wrt, and the params as the nnx.State of it"
            )
        model, args, kwargs = nnx.clone(snapshot)
        nnx.update(model, arrays)
        _, grads = differentiate(model, *args, **kwargs)
        return _in_form_of(params, grads)

    return second


def _params(model: Any, wrt: filterlib.Filter) -> Params:
    """The state that matches `wrt`, as an `nnx.State` of arrays, such as `nnx.Optimizer` makes."""
    params = _as_pure(nnx.state(model, wrt))
    if not jax.tree.leaves(params):
        is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        variables = jax.tree.leaves(nnx.state(model), is_leaf=is_variable)
        kinds = sorted({type(variable).__name__ for variable in variables})
        raise ValueError(
            f"the model has no state that matches wrt={wrt!r}, so nothing can be perturbed; what "
            f"it has is of the types {', '.join(kinds) or '(none)'}"
        )
    return params


def _paths(tree: Any) -> set[str]:
    return {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)}


def _in_form_of(form: Any, tree: Any) -> Any:
    """The arrays of `tree` in the containers of `form`, with `nnx.Variable`s or without."""
    return jax.tree.unflatten(jax.tree.structure(form), jax.tree.leaves(tree))


def _check_local(loss: jax.Array, axis_name: AxisName) -> None:
    """Raises ValueError if the loss of varying params does not vary: it has been averaged."""
    if make_varying(loss, axis_name) is not loss:
        raise ValueError(
            f"axis_name={axis_name!r} was given, but loss_fn returns a loss that does not vary "
            "over it: it has been averaged or summed over the axis. Return the device's own loss, "
            "or leave axis_name out if it is the mean"
        )


def evaluation_model(
    model: Any,
    optimizer: nnx.Optimizer[Any],
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    batches: Iterable[Any] | None = None,
    statistics: filterlib.Filter = nnx.BatchStat,
) -> Any:
    """The model to evaluate and save after the steps of `one_pass_sam`, in evaluation mode.

    A copy, which later training leaves alone: with the unperturbed params, running statistics of
    them, and `.eval()` called. Model and optimizer go on as if nothing had been.

    Args:
      model: the model, in the mode in which it is trained.
      optimizer: its optimizer, with `one_pass_sam` in it.
      forward: runs the model, as in `refresh_batch_stats`; None for `model(batch)`.
      batches: training batches of one size, some tens, for the running statistics. They can be left
        out where the model has none.
      statistics: the filter of the running statistics to take anew; False leaves all as they are.

    Returns:
      The copy.

    Raises:
      ValueError: the model has statistics, and there are no batches; or as `unperturbed_params` and
        `refresh_batch_stats`.

    >>> import jax.numpy as jnp, optax
    >>> from flax import nnx
    >>> from monge_sam_jax import one_pass_sam
    >>> from monge_sam_jax.nnx import evaluation_model
    >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
    >>> model.kernel[...] = jnp.array([[0.0], [2.0]])
    >>> optimizer = nnx.Optimizer(model, one_pass_sam(optax.sgd(0.5), rho=0.3), wrt=nnx.Param)
    >>> grads = nnx.grad(lambda model: 0.5 * jnp.sum(model(jnp.eye(2)) ** 2))(model)
    >>> _ = optimizer.update(model, grads)
    >>> evaluation_model(model, optimizer)(jnp.eye(2))[1]  # 2 - 0.5 * 2
    Array([1.], dtype=float32)
    """
    copy = nnx.clone(model)
    if batches is None and jax.tree.leaves(nnx.state(copy, statistics)):
        raise ValueError(
            "the model has running statistics, which belong to the perturbed params: pass training "
            "batches to take them of, evaluation_model(model, optimizer, batches=...), or "
            "statistics=False to leave them as they are"
        )
    params = nnx.state(copy, optimizer.wrt)
    nnx.update(copy, unperturbed_params(optimizer.opt_state, params))
    # Arrays of its own: a training step may donate those of the model and of the optimizer.
    nnx.update(copy, jax.tree.map(jnp.copy, nnx.state(copy)))
    if batches is not None and jax.tree.leaves(nnx.state(copy, statistics)):
        run = (lambda model, batch: model(batch)) if forward is None else forward
        refresh_batch_stats(run, copy, batches, statistics=statistics)
    for _, node in nnx.iter_graph(copy):
        if isinstance(node, nnx.Module):
            node.eval()
    return copy


def refresh_batch_stats(
    forward: Callable[[Any, Any], Any],
    model: Any,
    batches: Iterable[Any],
    *,
    statistics: filterlib.Filter = nnx.BatchStat,
) -> None:
    """Takes the running statistics of a model anew, at the params that it holds, in place.

    `refresh_running_statistics` says why and how; evaluate after it, with `model.eval()`. After
    one-pass steps `evaluation_model` does all of it, and leaves the model that is trained alone.

    Args:
      forward: runs the model in training mode, forward(model, batch); what it returns is not used.
      model: the model, with the params to evaluate; of a copy after one-pass steps, say,
        `nnx.update(model, unperturbed_params(optimizer.opt_state, nnx.state(model, nnx.Param)))`.
      batches: training batches of one size; some tens are enough.
      statistics: the filter of the running statistics. All other state is left alone.

    Raises:
      ValueError: there is no batch, or the statistics are no running averages, as where the model
        is not in training mode.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from monge_sam_jax.nnx import refresh_batch_stats
    >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])]
    >>> refresh_batch_stats(lambda model, batch: model(batch), model, batches)
    >>> float(model.mean[0]), float(model.var[0])
    (4.0000, 1.0000)
    """
    parts: tuple[Any, ...] = nnx.split(model, statistics, ...)
    graphdef, averages, rest = parts

    def update_fn(rest: Any, averages: Any, batch: Any) -> Any:
        copy = nnx.merge(graphdef, averages, rest)
        forward(copy, batch)
        return _as_pure(nnx.state(copy, statistics))

    pure = _as_pure(averages)
    nnx.update(model, refresh_running_statistics(update_fn, _as_pure(rest), pure, batches))
