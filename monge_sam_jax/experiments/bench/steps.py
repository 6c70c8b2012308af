"""The training steps that `monge-sam bench` compares, each as one would write it.

All of them minimise the same loss with the same base optimizer, and take the running statistics
from the pass at the params. `METHODS` is the table of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import optax

from monge_sam_jax import (
    adaptive_sam,
    fisher_sam,
    m_sharpness,
    monge,
    monge_sam,
    one_pass_sam,
    sam,
    sharpness_aware_value_and_grad,
)
from monge_sam_jax.experiments.bench.models import HEAD, Problem, Stats
from monge_sam_jax.experiments.bench.options import MICROBATCHES
from monge_sam_jax.experiments.common.data import Batch
from monge_sam_jax.one_pass import Direction
from monge_sam_jax.parallel import How

RHO = 0.05
PERIOD = 5
LATE = 10  # of which a tenth perturbs
ASCENT_FRACTION = 0.25

Params: TypeAlias = chex.ArrayTree
# (params, stats, batch) -> ((loss, stats), gradient)
ValueAndGrad: TypeAlias = Callable[[Params, Stats, Batch], Any]


class Carry(NamedTuple):
    """What a training step takes over from the one before."""

    params: Params
    opt_state: optax.OptState
    stats: Stats


Step: TypeAlias = Callable[[Carry, Batch], tuple[Carry, jax.Array]]


class Method(NamedTuple):
    """A way to train.

    Attributes:
      init: params -> state of the optimizer.
      cycle: (carry, batch) -> (carry, loss), functions to jit and to call in turn, over and over.
      descents: how many steps of the base optimizer a cycle makes.
    """

    init: Callable[[Params], optax.OptState]
    cycle: tuple[Step, ...]
    descents: int = 1


# --- what all of them share ---


def value_and_grad_of(problem: Problem) -> ValueAndGrad:
    """The ordinary gradient."""
    return jax.value_and_grad(problem.loss_fn, has_aux=True)


def descend(tx: optax.GradientTransformationExtraArgs, value_and_grad: ValueAndGrad) -> Step:
    """A step of an ordinary training loop."""

    def step(carry: Carry, batch: Batch) -> tuple[Carry, jax.Array]:
        (loss, stats), grads = value_and_grad(carry.params, carry.stats, batch)
        updates, opt_state = tx.update(grads, carry.opt_state, carry.params)
        return Carry(optax.apply_updates(carry.params, updates), opt_state, stats), loss

    return step


def with_gradient(problem: Problem, value_and_grad: ValueAndGrad) -> Method:
    """The base optimizer, given that gradient."""
    tx = optax.with_extra_args_support(problem.base_optimizer)
    return Method(tx.init, (descend(tx, value_and_grad),))


def perturbed_twice(problem: Problem, perturb: Callable[[Params, Params], Params]) -> Method:
    """Two gradients in a row, with (params, gradient) -> perturbed params written by hand."""
    value_and_grad = value_and_grad_of(problem)

    def value_and_second_grad(params: Params, stats: Stats, batch: Batch) -> Any:
        first, grads = value_and_grad(params, stats, batch)
        _, grads = value_and_grad(perturb(params, grads), stats, batch)
        return first, grads

    return with_gradient(problem, value_and_second_grad)


def in_chain(
    problem: Problem, builder: Callable[..., optax.GradientTransformationExtraArgs], **options: Any
) -> Method:
    """One of the package's transformations in front of the base optimizer."""
    value_and_grad = value_and_grad_of(problem)

    def grad_fn(params: Params, stats: Stats, batch: Batch) -> Params:
        return value_and_grad(params, stats, batch)[1]

    tx = optax.chain(builder(grad_fn, rho=RHO, **options), problem.base_optimizer)

    def step(carry: Carry, batch: Batch) -> tuple[Carry, jax.Array]:
        params, opt_state, _ = carry
        (loss, stats), grads = value_and_grad(params, carry.stats, batch)
        updates, opt_state = tx.update(grads, opt_state, params, stats=carry.stats, batch=batch)
        return Carry(optax.apply_updates(params, updates), opt_state, stats), loss

    return Method(tx.init, (step,))


def robust(problem: Problem, **options: Any) -> ValueAndGrad:
    """The functional form of Monge SAM."""
    return sharpness_aware_value_and_grad(
        problem.loss_fn, metric=monge(), rho=RHO, has_aux=True, **options
    )


# --- references ---


def plain(problem: Problem) -> Method:
    """One gradient and the base optimizer."""
    return with_gradient(problem, value_and_grad_of(problem))


def two_gradients(problem: Problem) -> Method:
    """A second gradient at params + rho * gradient: the least that depends on the first."""
    return perturbed_twice(
        problem, lambda params, grads: jax.tree.map(lambda p, g: p + RHO * g, params, grads)
    )


# --- written by hand, without any guard ---


def sam_by_hand(problem: Problem) -> Method:
    """SAM: params + rho * g / norm(g)."""

    def perturb(params: Params, grads: Params) -> Params:
        k = RHO / optax.tree.norm(grads)
        return jax.tree.map(lambda p, g: p + k * g, params, grads)

    return perturbed_twice(problem, perturb)


def monge_by_hand(problem: Problem) -> Method:
    """Monge SAM: params + rho * g / (n * sqrt(1 + n^2)), n = norm(g)."""
    return perturbed_twice(problem, monge_perturbed)


def monge_perturbed(params: Params, grads: Params) -> Params:
    """Eq. 9 as it stands in the paper."""
    n = optax.tree.norm(grads)
    k = RHO / (n * jnp.sqrt(1 + n**2))
    return jax.tree.map(lambda p, g: p + k * g, params, grads)


def adaptive_by_hand(problem: Problem) -> Method:
    """ASAM: params + rho * T^2 g / norm(T g), T = abs(params) + 0.01."""

    def perturb(params: Params, grads: Params) -> Params:
        size = jax.tree.map(lambda p: jnp.abs(p) + 0.01, params)
        h = jax.tree.map(lambda t, g: t * g, size, grads)
        k = RHO / optax.tree.norm(h)
        return jax.tree.map(lambda p, t, h: p + k * t * h, params, size, h)

    return perturbed_twice(problem, perturb)


def fisher_by_hand(problem: Problem) -> Method:
    """Fisher SAM: params + rho * h / sqrt(g^T h), h = g / (1 + g^2)."""

    def perturb(params: Params, grads: Params) -> Params:
        h = jax.tree.map(lambda g: g / (1 + g**2), grads)
        k = RHO / jnp.sqrt(optax.tree.vdot(grads, h))
        return jax.tree.map(lambda p, h: p + k * h, params, h)

    return perturbed_twice(problem, perturb)


def one_pass_by_hand(problem: Problem) -> Method:
    """One pass: theta is kept beside the params, which are theta + Monge's step along g."""
    value_and_grad, base = value_and_grad_of(problem), problem.base_optimizer

    def step(carry: Carry, batch: Batch) -> tuple[Carry, jax.Array]:
        theta, base_state = carry.opt_state
        (loss, stats), grads = value_and_grad(carry.params, carry.stats, batch)
        updates, base_state = base.update(grads, base_state, theta)
        theta = optax.apply_updates(theta, updates)
        return Carry(monge_perturbed(theta, grads), (theta, base_state), stats), loss

    return Method(lambda params: (params, base.init(params)), (step,))


# --- Optax's SAM ---


def optax_opaque(problem: Problem) -> Method:
    """optax.contrib.sam, opaque: both gradients in one update."""
    value_and_grad = value_and_grad_of(problem)
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    tx = optax.contrib.sam(problem.base_optimizer, ascent, opaque_mode=True)

    def step(carry: Carry, batch: Batch) -> tuple[Carry, jax.Array]:
        params, opt_state, _ = carry

        def grad_fn(params: Params, _: int) -> Params:
            return value_and_grad(params, carry.stats, batch)[1]

        (loss, stats), grads = value_and_grad(params, carry.stats, batch)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
        return Carry(optax.apply_updates(params, updates), opt_state, stats), loss

    return Method(tx.init, (step,))


def optax_transparent(problem: Problem) -> Method:
    """optax.contrib.sam, transparent: two calls of an ordinary step make one descent step.

    The running statistics are updated by both calls.
    """
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    tx = optax.contrib.sam(problem.base_optimizer, ascent, sync_period=2)
    step = descend(tx, value_and_grad_of(problem))
    return Method(tx.init, (step, step))


# --- this package, two gradients ---


def chained_sam(problem: Problem) -> Method:
    """chain(sam(grad_fn), base)."""
    return in_chain(problem, sam)


def chained_monge_sam(problem: Problem) -> Method:
    """chain(monge_sam(grad_fn), base)."""
    return in_chain(problem, monge_sam)


def chained_adaptive_sam(problem: Problem) -> Method:
    """chain(adaptive_sam(grad_fn), base)."""
    return in_chain(problem, adaptive_sam)


def chained_fisher_sam(problem: Problem) -> Method:
    """chain(fisher_sam(grad_fn), base)."""
    return in_chain(problem, fisher_sam)


def monge_m_sharpness(problem: Problem) -> Method:
    """m_sharpness over four micro-batches, each of which perturbs for itself."""
    how: How = "scan" if fits_in_loops(problem) else "unroll"
    return with_gradient(
        problem, m_sharpness(robust(problem), MICROBATCHES, axis=(None, 0), how=how)
    )


# --- this package, less than two gradients ---


def monge_period_5(problem: Problem) -> Method:
    """Monge SAM at every fifth step, the base optimizer alone in between."""
    return perturbed_at_times(problem, PERIOD, lambda count: count % PERIOD == 0)


def monge_late(problem: Problem) -> Method:
    """Monge SAM in the last tenth of training, measured as the last one of ten steps."""
    return perturbed_at_times(problem, LATE, lambda count: count % LATE == LATE - 1)


def perturbed_at_times(problem: Problem, steps: int, when: Callable[[Any], Any]) -> Method:
    """A cycle of so many steps: chain(monge_sam(grad_fn, when=when), base).

    Or two programs that take turns, where the gradient does not go into a conditional.
    """
    if fits_in_loops(problem):
        chained = in_chain(problem, monge_sam, when=when)
        return chained._replace(cycle=chained.cycle * steps, descents=steps)
    perturbed, others = with_gradient(problem, robust(problem)), plain(problem)
    cycle = tuple((perturbed if when(count) else others).cycle[0] for count in range(steps))
    return perturbed._replace(cycle=cycle, descents=steps)


def monge_last_layer(problem: Problem) -> Method:
    """Monge SAM with mask= for the last layer: there XLA ends the first backward pass."""

    def mask(params: Params) -> Params:
        return {name: name == HEAD for name in params}

    return with_gradient(problem, robust(problem, mask=mask))


def monge_quarter_batch(problem: Problem) -> Method:
    """Monge SAM with the first gradient on a quarter of the batch."""
    options = {"ascent_batch_fraction": ASCENT_FRACTION, "batch_axis": (None, 0)}
    return with_gradient(problem, robust(problem, **options))


def one_pass(problem: Problem, direction: Direction) -> Method:
    """One gradient at params that are perturbed already."""
    tx = one_pass_sam(problem.base_optimizer, metric=monge(), rho=RHO, direction=direction)
    return Method(tx.init, (descend(tx, value_and_grad_of(problem)),))


def one_pass_gradient(problem: Problem) -> Method:
    """one_pass_sam along the last gradient."""
    return one_pass(problem, "gradient")


def one_pass_momentum(problem: Problem) -> Method:
    """one_pass_sam along the momentum."""
    return one_pass(problem, "momentum")


def fits_in_loops(problem: Problem) -> bool:
    """Whether the gradient is as fast inside XLA's loops and conditionals as outside.

    That of a convolution is not on CPU, by a factor of 4 to 23.
    """
    return not (problem.has_convolutions and jax.default_backend() == "cpu")


METHODS: dict[str, Callable[[Problem], Method]] = {
    "plain": plain,
    "two_gradients": two_gradients,
    "sam_by_hand": sam_by_hand,
    "monge_by_hand": monge_by_hand,
    "adaptive_by_hand": adaptive_by_hand,
    "fisher_by_hand": fisher_by_hand,
    "one_pass_by_hand": one_pass_by_hand,
    "optax_opaque": optax_opaque,
    "optax_transparent": optax_transparent,
    "sam": chained_sam,
    "monge_sam": chained_monge_sam,
    "adaptive_sam": chained_adaptive_sam,
    "fisher_sam": chained_fisher_sam,
    "monge_m_sharpness": monge_m_sharpness,
    "monge_period_5": monge_period_5,
    "monge_late": monge_late,
    "monge_last_layer": monge_last_layer,
    "monge_quarter_batch": monge_quarter_batch,
    "one_pass_gradient": one_pass_gradient,
    "one_pass_momentum": one_pass_momentum,
}
