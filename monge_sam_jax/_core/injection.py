"""Options that are functions, kept from `optax.inject_hyperparams`.

That takes every function among the arguments of a builder for a schedule of the count, unless it is
told which are none. Its only look at a builder is the signature, so what the signature binds is
made to look like no function.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

Builder = TypeVar("Builder", bound=Callable[..., Any])
FUNCTIONS = ("grad_fn", "mask", "when", "metric")
NOT_A_SCHEDULE = (
    "optax.inject_hyperparams takes every function for a schedule of the count: tell it which are "
    'none, optax.inject_hyperparams(monge_sam, static_args=("grad_fn", "mask"))(...)'
)


class Fixed(NamedTuple):
    """A function that is no schedule."""

    function: Any


class InjectableSignature(inspect.Signature):
    """A signature that binds functions which are no schedules as `Fixed`."""

    def bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        """As `inspect.Signature.bind`."""
        bound = super().bind(*args, **kwargs)
        for name in FUNCTIONS:
            if callable(bound.arguments.get(name)):
                bound.arguments[name] = Fixed(bound.arguments[name])
        return bound


def injectable(builder: Builder) -> Builder:
    """`builder` with functions among its options that are no schedules; without `**options`."""
    signature = inspect.signature(builder)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    builder.__signature__ = InjectableSignature(  # type: ignore[attr-defined]
        named, return_annotation=signature.return_annotation
    )
    return builder


def spelling_out(names: Iterable[str], of: Callable[..., Any]) -> Callable[[Builder], Builder]:
    """Gives `**options` of a builder the names that they have in another function.

    For `help`, and for `optax.inject_hyperparams`: the builder is `injectable` then.
    """

    def spell_out(builder: Builder) -> Builder:
        own = inspect.signature(builder).parameters.values()
        parameters = [p for p in own if p.kind is not p.VAR_KEYWORD]
        parameters += [inspect.signature(of).parameters[name] for name in names]
        builder.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return injectable(builder)

    return spell_out


def unfixed(option: Any) -> Any:
    """The option as it was given."""
    return option.function if isinstance(option, Fixed) else option
