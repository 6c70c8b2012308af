"""A Flax `TrainState` that hands extra arguments to its Optax transformation."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState

from monge_sam_jax.metrics import Grads, Params
from monge_sam_jax.transforms import GradFn

PyTree = Any


class SharpnessAwareTrainState(TrainState, kw_only=True):
    """A Flax `TrainState` whose `apply_gradients` reaches `tx.update` with more than gradients.

    Flax's own keeps its keyword arguments from the transformation. All else is as in `TrainState`.

    Attributes:
      batch_stats: the running statistics of the model, or None if it has none.
      dropout_key: a random key that stays the same during training; each step folds its number in.
        Orbax stores keys of both kinds, `flax.serialization` those of `jax.random.PRNGKey` alone.
      dynamic_scale: a `flax.training.dynamic_scale.DynamicScale`, or None for no loss scaling.

    >>> import jax, optax
    >>> import jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from monge_sam_jax import monge_sam
    >>> from monge_sam_jax.linen import SharpnessAwareTrainState
    >>> model, x = nn.Dense(1), jnp.ones((4, 2))
    >>> state = SharpnessAwareTrainState.create(
    ...     apply_fn=model.apply,
    ...     params=model.init(jax.random.key(0), x)["params"],
    ...     tx=optax.chain(monge_sam(rho=0.05), optax.adamw(1e-3)),
    ... )
    >>> grad_fn = jax.grad(lambda params: jnp.mean(state.apply_fn({"params": params}, x) ** 2))
    >>> state = state.apply_gradients(grads=grad_fn(state.params), grad_fn=grad_fn)
    >>> state.step
    1
    """

    batch_stats: PyTree = None
    dropout_key: jax.Array | None = None
    dynamic_scale: DynamicScale | None = None

    def apply_gradients(
        self,
        *,
        grads: Grads,
        grad_fn: GradFn | None = None,
        extra_args: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> "SharpnessAwareTrainState":
        """One update: the state after the step, with its number increased by one.

        Args:
          grads: the gradient at the params.
          grad_fn: params -> gradient of the loss, with the batch, the random numbers, the running
            statistics and the loss scale of `grads`; for a sharpness-aware transformation in `tx`.
            It is given those of `extra_args` that its signature accepts by name.
          extra_args: what else `tx.update` is to get by name, such as the `batch` of a gradient
            function that the transformation has been built with, or `value`.
          **changes: new values of fields, such as batch_stats.

        Returns:
          The new state.

        Raises:
          TypeError: a change is of no field of the state.
        """
        unknown = changes.keys() - {field.name for field in dataclasses.fields(self)}
        if unknown:
            name = min(unknown)
            raise TypeError(
                f"{name} is no field of {type(self).__name__}; an argument of tx.update goes to "
                f"extra_args={{{name!r}: ...}}"
            )
        extra = dict(extra_args or {})
        if grad_fn is not None:
            extra["grad_fn"] = grad_fn
        bound: Any = self.replace(tx=bind(self, extra))
        return TrainState.apply_gradients(bound, grads=grads, **{"tx": self.tx, **changes})


def bind(state: TrainState, extra_args: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
    """The state's transformation with the extra arguments of `update` filled in."""
    tx, filled = optax.with_extra_args_support(state.tx), dict(extra_args)
    if OVERWRITE_WITH_GRADIENT in state.params:  # the transformation never sees the scales of fp8

        def of_trainable(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def at_trainable(params: Params, *args: Any, **kwargs: Any) -> Any:
                return function({**state.params, "params": params}, *args, **kwargs)

            return at_trainable

        if "grad" in filled:
            filled["grad"] = filled["grad"]["params"]
        if "value_fn" in filled:
            filled["value_fn"] = of_trainable(filled["value_fn"])
        if "grad_fn" in filled:
            grad_fn = of_trainable(filled["grad_fn"])
            filled["grad_fn"] = functools.wraps(grad_fn)(lambda *a, **k: grad_fn(*a, **k)["params"])

    def update(
        grads: Grads, opt_state: optax.OptState, params: Params | None = None, **more: Any
    ) -> tuple[PyTree, optax.OptState]:
        extra = {**filled, **more}
        if "value_fn" in extra:
            extra["value_fn"] = _naming(extra["value_fn"], extra)
        return tx.update(grads, opt_state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _naming(value_fn: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    """`value_fn` with the names in its signature, of which it gets those that its own accepts.

    Optax's line searches refuse the extra arguments of an update that `value_fn` does not name.
    """
    parameters = inspect.signature(value_fn).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def naming(params: Params, **extra: Any) -> jax.Array:
        own = {name: x for name, x in extra.items() if takes_all or name in parameters}
        return value_fn(params, **own)

    kind = inspect.Parameter.KEYWORD_ONLY
    by_name = [inspect.Parameter(name, kind, default=None) for name in names]
    first = inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    naming.__signature__ = inspect.Signature([first, *by_name])  # type: ignore[attr-defined]
    return naming
