"""Training of one model with several optimizers side by side.

The optimizers take turns, an epoch each, so that whatever else keeps the machine busy slows all of
them alike. Steps are jitted one by one and called from Python: inside a loop of XLA the gradient of
a convolution is many times slower on CPU.
"""

import dataclasses
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from monge_sam_jax import (
    Metric,
    adaptive,
    adaptive_sam,
    diagonal_fisher,
    euclidean,
    fisher_sam,
    init_sharded,
    monge,
    monge_sam,
    per_shard,
    sam,
    sharpness_aware_value_and_grad,
)
from monge_sam_jax.experiments.common.data import Batch, shuffled_rows
from monge_sam_jax.experiments.common.placement import AXIS
from monge_sam_jax.experiments.common.task import Task, Variables, variables_of
from monge_sam_jax.linen import SharpnessAwareTrainState, make_train_step

BUILDERS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "sam": sam,
    "monge_sam": monge_sam,
    "adaptive_sam": adaptive_sam,
    "fisher_sam": fisher_sam,
}
METRICS: dict[str, Callable[..., Metric]] = {
    "sam": euclidean,
    "monge_sam": monge,
    "adaptive_sam": adaptive,
    "fisher_sam": diagonal_fisher,
}
BASES: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "sgd": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
}
LOGGED = ("effective_radius", "perturbation_norm", "grad_norm")

Step: TypeAlias = Callable[
    [SharpnessAwareTrainState, Batch], tuple[SharpnessAwareTrainState, jax.Array]
]


class Optimizer(NamedTuple):
    """An optimizer on a task.

    Attributes:
      init: seed -> the state before the first step.
      step: (state, batch) -> (state, what is `LOGGED` as a vector, or an empty one where nothing is
        perturbed); jitted, and the state is donated.
    """

    init: Callable[[int], SharpnessAwareTrainState]
    step: Step


@dataclasses.dataclass
class Run:
    """One optimizer on its way from one seed.

    Attributes:
      state: where it is.
      curves: what `Task.measure` gives after every epoch, and means over the steps of every epoch
        of what is `LOGGED`.
      seconds_per_step: mean over the steps of every epoch.
    """

    state: SharpnessAwareTrainState
    curves: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    seconds_per_step: list[float] = dataclasses.field(default_factory=list)

    @property
    def variables(self) -> Variables:
        """Those of the model."""
        return variables_of(self.state)


def radius(name: str, rho: float | None) -> float | None:
    """The rho that an optimizer takes: that of its builder if None is given, none for "sgd"."""
    if name == "sgd":
        return None
    builder = BUILDERS[name]
    return inspect.signature(builder).parameters["rho"].default if rho is None else rho


def make_optimizer(
    name: str,
    base: optax.GradientTransformation,
    task: Task,
    *,
    rho: float | None = None,
    alpha: float = 1.0,
    widen_params: bool = False,
    perturbation: Literal["synchronised", "per-shard"] = "synchronised",
) -> Optimizer:
    """The optimizer of that name on a task.

    Args:
      name: key of `METRICS`, or "sgd" for the base optimizer alone.
      base: what takes the gradient at the perturbed params.
      task: whose loss is minimised.
      rho: radius; None leaves the method's own.
      alpha: of "monge_sam".
      widen_params: whether the perturbed params are in float32 and not in the dtype of the params.
      perturbation: one for all devices, from the averaged gradient, or one for each, from the
        gradient of its part of the batch.

    Returns:
      How it begins, and its step.
    """
    height = {"alpha": alpha} if name == "monge_sam" else {}
    options = {"rho": radius(name, rho), "widen_params": widen_params}
    tx, train_step = base, make_train_step(task.train_loss)
    if name != "sgd" and perturbation == "synchronised":
        tx = optax.chain(BUILDERS[name](**height, **options), base)
        train_step = make_train_step(task.train_loss, diagnostics=True)
    elif name != "sgd":
        differentiate = _robust_per_shard(task, metric=METRICS[name](**height), **options)
        train_step = make_train_step(task.train_loss, value_and_grad=differentiate)

    def init(seed: int) -> SharpnessAwareTrainState:
        variables = task.init(seed)
        return SharpnessAwareTrainState(
            step=jax.device_put(jnp.zeros((), jnp.int32), task.placement.everywhere),
            apply_fn=task.model.apply,
            params=variables["params"],
            tx=tx,
            opt_state=init_sharded(tx, variables["params"]),
            batch_stats=variables.get("batch_stats"),
        )

    def step(
        state: SharpnessAwareTrainState, batch: Batch
    ) -> tuple[SharpnessAwareTrainState, jax.Array]:
        state, *_, diagnostics = train_step(state, batch)
        logged = [] if name == "sgd" else [getattr(diagnostics, quantity) for quantity in LOGGED]
        return state, jnp.array(logged)

    shardings = jax.tree.map(lambda x: x.sharding, init(0))
    out_shardings = (shardings, task.placement.everywhere)
    return Optimizer(init, jax.jit(step, donate_argnums=0, out_shardings=out_shardings))


def _robust_per_shard(task: Task, **options: Any) -> Callable[..., Any]:
    """In place of `jax.value_and_grad`: the gradient at each shard's own perturbation, averaged.

    The diagnostics take the place of the metrics in the loss's auxiliary output.
    """

    def differentiate(loss_fn: Callable[..., Any], *, has_aux: bool) -> Callable[..., Any]:
        robust = per_shard(
            sharpness_aware_value_and_grad(loss_fn, has_aux=has_aux, diagnostics=True, **options),
            AXIS,
            axis=(None, 0, None),  # of the collections, the batch and the random numbers
            params_specs=jax.tree.map(lambda sharding: sharding.spec, task.params_sharding),
            mesh=task.placement.mesh,
        )

        def value_and_grad(*args: Any) -> Any:
            (loss, (updated, _)), grads, diagnostics = robust(*args)
            return (loss, (updated, diagnostics)), grads

        return value_and_grad

    return differentiate


def compile_steps(task: Task, optimizers: Mapping[str, Optimizer], batch_size: int) -> None:
    """Runs every step once, so that no epoch's time holds a compilation."""
    batch = epoch_batches(task, batch_size, seed=0, epoch=0)[0]
    for optimizer in optimizers.values():
        jax.block_until_ready(optimizer.step(optimizer.init(0), batch))


def train(
    task: Task,
    optimizers: Mapping[str, Optimizer],
    runs: Mapping[str, Run],
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    on_turn: Callable[[], None] = lambda: None,
    on_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Trains with every optimizer on the same batches, on from where the runs are.

    Args:
      task: what is learnt.
      optimizers: by name.
      runs: those of the optimizers, from `begin` or from a checkpoint after some epoch.
      seed: of the batches and the order in which the optimizers take turns.
      epochs: passes over the training set, with those that the runs have behind them.
      batch_size: samples in a step; those left over at the end of an epoch are not used in it.
      on_turn: called whenever an optimizer has ended an epoch.
      on_epoch: called whenever all of them have.
    """
    rng = np.random.default_rng(seed)
    turns = [rng.permutation(list(optimizers)) for _ in range(epochs)]
    behind = min(len(run.seconds_per_step) for run in runs.values())
    for epoch in range(behind, epochs):
        batches = epoch_batches(task, batch_size, seed, epoch)
        for name in turns[epoch]:
            _train_epoch(runs[name], optimizers[name].step, batches)
            for quantity, value in task.measure(runs[name].variables).items():
                runs[name].curves.setdefault(quantity, []).append(value)
            on_turn()
        on_epoch()


def begin(optimizers: Mapping[str, Optimizer], seed: int) -> dict[str, Run]:
    """Runs of all optimizers from the same params."""
    return {name: Run(optimizer.init(seed)) for name, optimizer in optimizers.items()}


def epoch_batches(task: Task, batch_size: int, seed: int, epoch: int) -> list[Batch]:
    """The whole batches of an epoch, in an order that seed and epoch decide."""
    samples = jax.tree.map(np.asarray, task.dataset.train)
    rows = shuffled_rows(len(samples.y), batch_size, np.random.default_rng((seed, epoch)))
    return [task.placement.place_batch(samples, row) for row in rows]


def _train_epoch(run: Run, step: Step, batches: Sequence[Batch]) -> None:
    logged = []
    start = time.perf_counter()
    for batch in batches:
        run.state, vector = step(run.state, batch)
        logged.append(vector)
    jax.block_until_ready(run.state)
    run.seconds_per_step.append((time.perf_counter() - start) / len(batches))
    means = np.array(jax.device_get(logged), np.float64).mean(axis=0)
    for quantity, mean in zip(LOGGED, means, strict=False):  # plain SGD has none
        run.curves.setdefault(quantity, []).append(float(mean))
