"""What Optax has built around a transformation, as far as an update can see it.

A link of a chain is told nothing of the others, so that uses that cannot be right (two links that
perturb, a wrapper that accumulates the first gradient alone) would pass in silence. What is around
an update stands in one place only: the call stack, where the functions of Optax hold the whole
state. Nothing is kept between updates; under `jax.jit` this runs while tracing.
"""

import collections
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import jax
import optax

# Frames between an update and those of Optax; what stands further out belongs to the caller.
THROUGH = ("optax", "jax", "jaxlib", "monge_sam_jax", "contextlib", "functools")

ONE_LINK = (
    "the optimizer holds more than one sharpness-aware transformation, and each throws away the "
    'gradient of the one before: keep one. Its metric=grouped({"a": monge(), "b": scaled(monge(), '
    "0.1)}, labels) is a radius for each group of leaves, and its mask= leaves some out"
)
LAST = (
    "something comes after one_pass_sam in optax.chain and changes what it moves the params by, "
    "the perturbation with it: put it inside, one_pass_sam(optax.chain(...)), or before"
)
WRAPPERS = {
    "MultiSteps": (
        "optax.MultiSteps is around a sharpness-aware transformation: the first gradient would be "
        "that of all micro-batches and the second that of the last one. Put the transformation "
        "first, optax.chain(monge_sam(grad_fn), optax.MultiSteps(optax.adamw(1e-3), "
        "k).gradient_transformation()), where each micro-batch perturbs for itself; or accumulate "
        "both gradients, sharpness_aware_value_and_grad(..., value_and_grad=accumulated(k)), "
        "before an optimizer without either"
    ),
    "flatten": (
        "optax.flatten is around a sharpness-aware transformation, whose gradient function would "
        "get one long vector in place of the params: put the transformation first, "
        "optax.chain(monge_sam(grad_fn), optax.flatten(optax.adamw(1e-3)))"
    ),
    "split_real_and_imaginary": (
        "optax.contrib.split_real_and_imaginary is around a sharpness-aware transformation, whose "
        "gradient function would get pairs in place of the complex params: put the transformation "
        "first, optax.chain(monge_sam(grad_fn), "
        "optax.contrib.split_real_and_imaginary(optax.adamw(1e-3)))"
    ),
    "sam": (
        "optax.contrib.sam is around a sharpness-aware transformation, and both would perturb: use "
        "one of the two"
    ),
}


class Surrounding(NamedTuple):
    """An update function of Optax on the call stack.

    Attributes:
      builder: the name of the function or class of Optax that made it, such as "chain".
      owner: the object whose method it is, or None.
      trees: the trees among its arguments, the optimizer's state among them.
    """

    builder: str
    owner: Any
    trees: tuple[Any, ...]


def surroundings() -> Iterator[Surrounding]:
    """The functions of Optax that the caller was called by, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in THROUGH:
            return
        if package == "optax":
            values, code = frame.f_locals, frame.f_code
            arguments = (values.get(name) for name in code.co_varnames[: code.co_argcount])
            trees = tuple(x for x in arguments if isinstance(x, (tuple, dict)))
            yield Surrounding(code.co_qualname.partition(".")[0], values.get("self"), trees)
        frame = frame.f_back


def check_surroundings(is_link: Callable[[Any], bool], params: Any) -> None:
    """Raises ValueError if the optimizer around the caller, such a link, cannot be right."""
    for around in surroundings():
        fits = around.builder not in WRAPPERS
        if around.builder == "MultiSteps":
            fits = _steps(around.owner) == 1
        elif around.builder == "split_real_and_imaginary":
            fits = "SplitRealAndImaginaryArrays" not in str(jax.tree.structure(params))
        if not fits:
            raise ValueError(WRAPPERS[around.builder])
        if any(count_links(is_link, tree) > 1 for tree in around.trees):
            raise ValueError(ONE_LINK)


def check_last(is_link: Callable[[Any], bool], is_other: Callable[[Any], bool]) -> None:
    """Raises ValueError if a link of a chain comes after the caller's, or one of another kind."""
    for around in surroundings():
        if any(count_links(is_other, tree) for tree in around.trees):
            raise ValueError(ONE_LINK)
        if any(is_followed(is_link, tree) for tree in around.trees):
            raise ValueError(LAST)


def count_links(is_link: Callable[[Any], bool], state: Any) -> int:
    """How many states of a kind there are in a tree."""
    return sum(map(is_link, jax.tree.leaves(state, is_leaf=is_link)))


def is_followed(is_link: Callable[[Any], bool], state: Any) -> bool:
    """Whether a link comes after one of that kind in a chain, and is not masked."""

    def is_chain(x: Any) -> bool:  # of optax.chain, or of optax.named_chain
        return type(x) in (tuple, collections.OrderedDict)

    def is_bound(x: Any) -> bool:
        return is_link(x) or isinstance(x, optax.MaskedState)

    def is_node(x: Any) -> bool:
        return x is not state and (is_chain(x) or is_bound(x))

    def holds(link: Any) -> bool:
        return any(map(is_link, jax.tree.leaves(link, is_leaf=is_bound)))

    if is_chain(state):
        links = list(state.values() if isinstance(state, dict) else state)
        if any(map(holds, links[:-1])):
            return True
    nodes = jax.tree.leaves(state, is_leaf=is_node)
    return any(is_followed(is_link, x) for x in nodes if is_node(x))


def _steps(wrapper: Any) -> Any:
    """The number of micro-batches of an `optax.MultiSteps`, None if it is not constant."""
    schedule = getattr(wrapper, "_every_k_schedule", None)
    every = None if schedule is None else schedule(0)
    return every if isinstance(every, int) else None
