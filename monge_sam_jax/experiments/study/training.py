"""How `monge-sam study` trains a cell of its grid, and what it measures on the way."""

import functools
import itertools
import time
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from monge_sam_jax.experiments.common.data import Batch, shuffled_rows
from monge_sam_jax.experiments.study.methods import METHODS, Setting, Trainer
from monge_sam_jax.experiments.study.tasks import TASKS, Kind, Problem

EVALUATIONS = 10


class Cell(NamedTuple):
    """One training from each seed.

    Attributes:
      task: its name.
      method: its name.
      rho: of the line, or None.
      doubled: whether it takes twice the steps.
      factor: of the baseline's learning rate.
    """

    task: str
    method: str
    rho: float | None
    doubled: bool = False
    factor: float = 1.0

    def __str__(self) -> str:
        radius = "" if self.rho is None else f", rho = {self.rho:g}"
        factor = "" if self.factor == 1 else f", learning rate x {self.factor:g}"
        twice = ", twice the steps" if self.doubled else ""
        return f"{self.task}, {METHODS[self.method].label}{radius}{twice}{factor}"

    @property
    def gradients(self) -> int:
        """Gradients taken, in those of a plain training of single length."""
        return METHODS[self.method].gradients * (2 if self.doubled else 1)


def learn(problem: Problem, cell: Cell, epochs: int, seed: int) -> dict[str, Any]:
    """Curves over the training of a cell, at even distances from the start to the end.

    Returns:
      Of the numbers of steps "steps", the scores "validation" and "test", "train_loss" of the last
      batch before, and "seconds", of the steps alone.
    """
    task = TASKS[cell.task]
    kind = task.kind
    rng = np.random.default_rng((seed, 3))
    rows = shuffled_rows(len(problem.train.y), kind.batch_size, rng, 2 * epochs)
    apart = max(1, len(rows) // 2 // EVALUATIONS)  # equal distances are compiled once
    parts = min(EVALUATIONS, len(rows) // 2) * (2 if cell.doubled else 1)
    at = [part * apart for part in range(parts + 1)]
    rates = jnp.float32(cell.factor * task.learning_rate), jnp.float32(cell.rho or 0.0), at[-1]
    fixed = {"kind": kind, "method": cell.method}
    carry = _begin(problem.params, *rates, **fixed)
    seconds, losses = 0.0, [float(kind.loss(problem.params, problem.train))]
    scores = [_scores(carry, problem, *rates, **fixed)]
    for first, last in itertools.pairwise(at):
        start = time.perf_counter()
        carry, loss = _advance(carry, problem.train, rows[first:last], *rates, **fixed)
        losses.append(float(loss))
        seconds += time.perf_counter() - start
        scores.append(_scores(carry, problem, *rates, **fixed))
    validation, test = np.asarray(scores, float).T
    return {
        "steps": np.asarray(at),
        "validation": validation,
        "test": test,
        "train_loss": np.asarray(losses),
        "seconds": np.asarray(seconds),
    }


def _trainer(
    params: chex.ArrayTree, learning_rate: Any, rho: Any, steps: Any, *, kind: Kind, method: str
) -> Trainer:
    shapes = jax.eval_shape(lambda: params)
    base = kind.optimizer(learning_rate)
    return METHODS[method].build(Setting(kind, base, rho, steps, shapes))


@functools.partial(jax.jit, static_argnames=("kind", "method"))
def _begin(params: chex.ArrayTree, *rates: Any, **fixed: Any) -> Any:
    return params, _trainer(params, *rates, **fixed).optimizer.init(params)


@functools.partial(jax.jit, static_argnames=("kind", "method"))
def _scores(carry: Any, problem: Problem, *rates: Any, **fixed: Any) -> Any:
    params, opt_state = carry
    params = _trainer(params, *rates, **fixed).evaluated(opt_state, params)
    kind = fixed["kind"]
    return kind.measure(params, problem.validation), kind.measure(params, problem.test)


@functools.partial(jax.jit, static_argnames=("kind", "method"))
def _advance(
    carry: Any, samples: Batch, rows: jax.Array, *rates: Any, **fixed: Any
) -> tuple[Any, jax.Array]:
    """Params and optimizer state after a step on each row of indices, and the last batch's loss."""
    trainer = _trainer(carry[0], *rates, **fixed)

    def step(carry: Any, row: jax.Array) -> tuple[Any, None]:
        params, opt_state = carry
        batch = Batch(samples.x[row], samples.y[row])
        grads = trainer.gradient(params, batch)
        updates, opt_state = trainer.optimizer.update(grads, opt_state, params, batch=batch)
        return (optax.apply_updates(params, updates), opt_state), None

    carry, _ = jax.lax.scan(step, carry, rows)
    params = trainer.evaluated(carry[1], carry[0])
    last = Batch(samples.x[rows[-1]], samples.y[rows[-1]])
    return carry, fixed["kind"].loss(params, last)
