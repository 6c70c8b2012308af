"""What Optax has built around a transformation, as far as an update can see it.

A link of a chain is told nothing of the others, so that uses that cannot be right (two links that
perturb, a wrapper that averages the first gradient alone) would pass in silence. What is around an
update stands in one place only: the call stack, whose functions of Optax hold the whole state.
Nothing is kept between updates; under `jax.jit` this runs while tracing.
"""

import collections
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optax

# Frames between an update and Optax's own: what stands further out belongs to the caller.
THROUGH = ("optax", "jax", "jaxlib", "monge_sam_jax", "contextlib", "functools")
GROUPS = (
    'metric=grouped({"a": monge(), "b": scaled(monge(), 0.1)}, labels) is a radius for each group '
    "of leaves"
)
ONE_LINK = (
    "the optimizer holds more than one sharpness-aware transformation, and each throws away the "
    f"gradient of the one before: keep one. Its {GROUPS}, and mask= leaves some out"
)


class Surrounding(NamedTuple):
    """An update function of Optax on the call stack.

    Attributes:
      module: the name of its module.
      owner: the object whose method it is, or None.
      states: the trees among its arguments, the optimizer's state among them.
    """

    module: str
    owner: Any
    states: tuple[Any, ...]


def surroundings() -> Iterator[Surrounding]:
    """The functions of Optax that the caller was called by, the innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        package = module.partition(".")[0]
        if package not in THROUGH:
            return
        if package == "optax":
            values, code = frame.f_locals, frame.f_code
            arguments = (values.get(name) for name in code.co_varnames[: code.co_argcount])
            trees = tuple(x for x in arguments if isinstance(x, (tuple, dict)))
            yield Surrounding(module, values.get("self"), trees)
        frame = frame.f_back


def count_links(is_link: Callable[[Any], bool], state: Any) -> int:
    """How many states of that kind there are in a tree."""
    return sum(map(is_link, jax.tree.leaves(state, is_leaf=is_link)))


def check_only_link(is_link: Callable[[Any], bool], *, most: int = 1) -> None:
    """Raises ValueError if the optimizer around the caller perturbs elsewhere too.

    It is allowed `most` states of the kind that `is_link` tells.
    """
    for around in surroundings():
        if around.module == "optax.contrib._sam":
            raise ValueError(
                "optax.contrib.sam is around a sharpness-aware transformation, and both perturb: "
                "use one of the two"
            )
        for state in around.states:
            if count_links(is_link, state) > most:
                raise ValueError(ONE_LINK)


def check_not_accumulated() -> None:
    """Raises ValueError inside `optax.MultiSteps`, which accumulates the first gradient alone."""
    for around in surroundings():
        if isinstance(around.owner, optax.MultiSteps) and _steps(around.owner) != 1:
            raise ValueError(
                "optax.MultiSteps is around a sharpness-aware transformation: the first gradient "
                "would be accumulated, the second be that of the last micro-batch alone. Put it "
                "first, optax.chain(monge_sam(grad_fn), optax.MultiSteps(optax.adamw(1e-3), k)), "
                "where each micro-batch perturbs for itself; or accumulate both gradients, without "
                "MultiSteps: sharpness_aware_value_and_grad(..., value_and_grad=accumulated(k))"
            )


def _steps(wrapper: optax.MultiSteps) -> Any:
    """The number of steps it accumulates over, None if it is not constant."""
    schedule = getattr(wrapper, "_every_k_schedule", None)
    every = schedule(0) if schedule is not None else None
    return every if isinstance(every, int) else None


def check_last(is_link: Callable[[Any], bool]) -> None:
    """Raises ValueError if a link of a chain comes after the caller's."""
    for around in surroundings():
        for state in around.states:
            if is_followed(state, is_link):
                raise ValueError(
                    "something comes after one_pass_sam in optax.chain and would change what it "
                    "moves the params by, the perturbation with it: put it inside, "
                    "one_pass_sam(optax.chain(...)), or before"
                )


def is_followed(state: Any, is_link: Callable[[Any], bool]) -> bool:
    """Whether a link comes after the one of the given kind in a chain, and is not masked."""

    def is_chain(x: Any) -> bool:  # of optax.chain, or of optax.named_chain
        return type(x) in (tuple, collections.OrderedDict)

    def is_node(x: Any) -> bool:
        return x is not state and (is_chain(x) or is_bound(x))

    def is_bound(x: Any) -> bool:
        return is_link(x) or isinstance(x, optax.MaskedState)

    def holds(link: Any) -> bool:
        return any(map(is_link, jax.tree.leaves(link, is_leaf=is_bound)))

    if is_chain(state):
        links = list(state.values() if isinstance(state, dict) else state)
        if any(map(holds, links[:-1])):
            return True
    nodes = jax.tree.leaves(state, is_leaf=is_node)
    return any(is_followed(x, is_link) for x in nodes if is_node(x))
