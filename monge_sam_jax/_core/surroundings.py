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
    "process": (
        "optax.experimental.aggregating.process accumulates around a sharpness-aware "
        "transformation: the first gradient would be that of all micro-batches and the second that "
        "of the last one. Put the transformation first, optax.chain(monge_sam(grad_fn), "
        "process(...)), where each micro-batch perturbs for itself"
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
        "optax.contrib.sam is in the optimizer of a sharpness-aware transformation, and both would "
        "perturb: use one of the two; a radius for each group of leaves is metric=grouped(...)"
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


def surroundings(state: Any) -> Iterator[Surrounding]:
    """The functions of Optax that the caller's update of `state` was called by, innermost first.

    Beyond a function of the user's, which may be a wrapper or a training loop, those alone whose
    arguments hold the very `state`.
    """
    frame: FrameType | None = sys._getframe(1)
    is_direct = True
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        is_direct &= package in THROUGH
        if package == "optax":
            around = _surrounding(frame)
            if is_direct or any(_holds(tree, state) for tree in around.trees):
                yield around
        frame = frame.f_back


def _surrounding(frame: FrameType) -> Surrounding:
    values, code = frame.f_locals, frame.f_code
    arguments = (values.get(name) for name in code.co_varnames[: code.co_argcount])
    trees = tuple(x for x in arguments if isinstance(x, (tuple, dict)))
    builder = code.co_qualname.partition(".")[0]
    if builder == "named_chain":  # in Optax 0.2.5 a dict, which jax.jit sorts
        names = [name for name, _ in values.get("transforms", ())]
        trees = tuple(
            tuple(tree[name] for name in names) if names and set(names) == set(tree) else tree
            for tree in trees
        )
    return Surrounding(builder, values.get("self"), trees)


def _holds(tree: Any, state: Any) -> bool:
    is_state = lambda x: x is state  # noqa: E731
    return any(map(is_state, jax.tree.leaves(tree, is_leaf=is_state)))


def check_surroundings(is_link: Callable[[Any], bool], state: Any, params: Any) -> None:
    """Raises ValueError if the optimizer around the caller, such a link, cannot be right."""
    for around in surroundings(state):
        fits = around.builder not in WRAPPERS
        if around.builder == "MultiSteps":
            fits = _is_one_step(around.owner)
        elif around.builder == "process":
            fits = not any(optax.tree.get_all_with_path(t, "ready") for t in around.trees)
        elif around.builder == "split_real_and_imaginary":
            fits = "SplitRealAndImaginaryArrays" not in str(jax.tree.structure(params))
        if not fits:
            raise ValueError(WRAPPERS[around.builder])
        for tree in around.trees:
            check_optax_sam(tree)
            if count_links(is_link, tree) > 1:
                raise ValueError(ONE_LINK)


def check_last(is_link: Callable[[Any], bool], is_other: Callable[[Any], bool], state: Any) -> None:
    """Raises ValueError if a link of a chain comes after the caller's, or one of another kind.

    Several of the caller's kind may stand side by side, each for leaves of its own.
    """
    for around in surroundings(state):
        if around.builder == "sam":
            raise ValueError(WRAPPERS["sam"])
        for tree in around.trees:
            check_optax_sam(tree)
            if count_links(is_other, tree) or _overlap(is_link, tree):
                raise ValueError(ONE_LINK)
            if is_followed(is_link, tree):
                raise ValueError(LAST)


def _overlap(is_link: Callable[[Any], bool], tree: Any) -> bool:
    """Whether two states of one pass are for the same leaf."""
    seen: set[Any] = set()
    for link in filter(is_link, jax.tree.leaves(tree, is_leaf=is_link)):
        own = jax.tree.leaves_with_path(link.delta, is_leaf=_is_masked)
        paths = {path for path, leaf in own if type(leaf) is not optax.MaskedNode}
        if seen & paths:
            return True
        seen |= paths
    return False


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def count_links(is_link: Callable[[Any], bool], state: Any) -> int:
    """How many states of a kind there are in a tree."""
    return sum(map(is_link, jax.tree.leaves(state, is_leaf=is_link)))


def check_optax_sam(state: Any) -> None:
    """Raises ValueError if `optax.contrib.sam` is in an optimizer too."""
    if count_links(lambda x: isinstance(x, optax.contrib.SAMState), state):
        raise ValueError(WRAPPERS["sam"])


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


def _is_one_step(wrapper: Any) -> bool:
    """Whether an `optax.MultiSteps` accumulates nothing: k is the number one, and no schedule."""
    k = getattr(wrapper, "_every_k_schedule", None)
    is_number = getattr(k, "__qualname__", "").startswith("MultiSteps.__init__")
    return is_number and k is not None and k(0) == 1
