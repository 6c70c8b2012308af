"""Training of one model with several optimizers side by side.

The optimizers take turns, an epoch each, so that whatever else keeps the machine busy slows all of
them alike. Steps are jitted one by one and called from Python: inside a loop of XLA the gradient of
a convolution is many times slower on CPU.
"""

import dataclasses
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from monge_sam_jax import adaptive_sam, fisher_sam, get_diagnostics, monge_sam, sam
from monge_sam_jax.experiments.data import Batch
from monge_sam_jax.experiments.task import Task

BUILDERS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "sam": sam,
    "monge_sam": monge_sam,
    "adaptive_sam": adaptive_sam,
    "fisher_sam": fisher_sam,
}
BASES: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "sgd": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
}
LOGGED = ("effective_radius", "perturbation_norm", "grad_norm")


class Optimizer(NamedTuple):
    """An optimizer, and a jitted step with it.

    Attributes:
      tx: the Optax transformation.
      step: (params, state, batch) -> (params, state, what is `LOGGED` as a vector, or an empty one
        where nothing is perturbed); params and state are donated.
    """

    tx: optax.GradientTransformationExtraArgs
    step: Callable[
        [chex.ArrayTree, optax.OptState, Batch], tuple[chex.ArrayTree, optax.OptState, jax.Array]
    ]


@dataclasses.dataclass
class Run:
    """One optimizer on its way from one seed.

    Attributes:
      params: where it is.
      opt_state: its state.
      curves: what `Task.measure` gives after every epoch, and means over the steps of every epoch
        of what is `LOGGED`.
      seconds_per_step: mean over the steps of every epoch.
    """

    params: chex.ArrayTree
    opt_state: optax.OptState
    curves: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    seconds_per_step: list[float] = dataclasses.field(default_factory=list)


def radius(name: str, rho: float | None) -> float | None:
    """The rho that an optimizer takes: that of its builder if None is given, none for "sgd"."""
    if name == "sgd":
        return None
    return inspect.signature(BUILDERS[name]).parameters["rho"].default if rho is None else rho


def make_optimizer(
    name: str,
    base: optax.GradientTransformation,
    task: Task,
    *,
    rho: float | None = None,
    alpha: float = 1.0,
) -> Optimizer:
    """The optimizer of that name on a task.

    Args:
      name: key of `BUILDERS`, or "sgd" for the base optimizer alone.
      base: what takes the gradient at the perturbed params.
      task: whose loss is minimised.
      rho: radius; None leaves the builder's own.
      alpha: of "monge_sam".

    Returns:
      The transformation and its step.
    """
    grad_fn = jax.grad(task.loss)
    if name == "sgd":
        tx = optax.with_extra_args_support(base)
    else:
        metric_options = {"alpha": alpha} if name == "monge_sam" else {}
        tx = optax.chain(BUILDERS[name](grad_fn, rho=radius(name, rho), **metric_options), base)

    def step(
        params: chex.ArrayTree, opt_state: optax.OptState, batch: Batch
    ) -> tuple[chex.ArrayTree, optax.OptState, jax.Array]:
        grads = grad_fn(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, batch=batch)
        logged = () if name == "sgd" else _logged(opt_state)
        return optax.apply_updates(params, updates), opt_state, jnp.array(logged)

    return Optimizer(tx, jax.jit(step, donate_argnums=(0, 1)))


def _logged(opt_state: optax.OptState) -> list[jax.Array]:
    diagnostics = get_diagnostics(opt_state)
    return [getattr(diagnostics, quantity) for quantity in LOGGED]


def compile_steps(task: Task, optimizers: Mapping[str, Optimizer], batch_size: int) -> None:
    """Runs every step once, so that no epoch's time holds a compilation."""
    batch = epoch_batches(task.dataset.train, batch_size, seed=0, epoch=0)[0]
    for optimizer in optimizers.values():
        params = task.init(seed=0)
        jax.block_until_ready(optimizer.step(params, optimizer.tx.init(params), batch))


def train(
    task: Task,
    optimizers: Mapping[str, Optimizer],
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    on_epoch: Callable[[], None] = lambda: None,
) -> dict[str, Run]:
    """Trains with every optimizer from the same params on the same batches.

    Args:
      task: what is learnt.
      optimizers: by name.
      seed: of the params, the batches and the order in which the optimizers take turns.
      epochs: passes over the training set.
      batch_size: samples in a step; those left over at the end of an epoch are not used in it.
      on_epoch: called whenever an optimizer has ended an epoch.

    Returns:
      The runs by name.
    """
    runs = {}
    for name, optimizer in optimizers.items():
        params = task.init(seed)
        runs[name] = Run(params, optimizer.tx.init(params))
    turns = np.random.default_rng(seed)
    for epoch in range(epochs):
        batches = epoch_batches(task.dataset.train, batch_size, seed, epoch)
        for name in turns.permutation(list(runs)):
            _train_epoch(runs[name], optimizers[name], batches)
            for quantity, value in task.measure(runs[name].params).items():
                runs[name].curves.setdefault(quantity, []).append(value)
            on_epoch()
    return runs


def epoch_batches(samples: Batch, batch_size: int, seed: int, epoch: int) -> list[Batch]:
    """The whole batches of an epoch, in an order that seed and epoch decide."""
    order = np.random.default_rng((seed, epoch)).permutation(len(samples.y))
    rows = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
    return [Batch(x, y) for x, y in zip(samples.x[rows], samples.y[rows], strict=True)]


def _train_epoch(run: Run, optimizer: Optimizer, batches: Sequence[Batch]) -> None:
    logged = []
    start = time.perf_counter()
    for batch in batches:
        run.params, run.opt_state, vector = optimizer.step(run.params, run.opt_state, batch)
        logged.append(vector)
    jax.block_until_ready(run.params)
    run.seconds_per_step.append((time.perf_counter() - start) / len(batches))
    means = np.array(jax.device_get(logged), np.float64).mean(axis=0)
    for quantity, mean in zip(LOGGED, means, strict=False):  # plain SGD has none
        run.curves.setdefault(quantity, []).append(float(mean))
