"""How `monge-sam study` trains a cell of its grid, and what it measures on the way."""

import functools
import itertools
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from monge_sam_jax.experiments.common.data import Batch, shuffled_rows
from monge_sam_jax.experiments.study.kinds import Kind, Problem
from monge_sam_jax.experiments.study.methods import METHODS, Setting, Trainer
from monge_sam_jax.experiments.study.tasks import TASKS

EVALUATIONS = 10
ROUNDS = 5  # of measuring seconds


class Cell(NamedTuple):
    """One training from each seed.

    Attributes:
      task: its name.
      method: its name.
      rho: of the line, or None.
      factor: of the task's learning rate.
    """

    task: str
    method: str
    rho: float | None
    factor: float = 1.0

    def __str__(self) -> str:
        radius = "" if self.rho is None else f", rho = {self.rho:g}"
        factor = "" if self.factor == 1 else f", learning rate x {self.factor:g}"
        return f"{self.task}, {METHODS[self.method].label}{radius}{factor}"

    @property
    def fixed(self) -> dict[str, Any]:
        """What its programs are compiled for."""
        return {"kind": TASKS[self.task].kind, "method": self.method}

    def numbers(self, steps: int) -> tuple[jax.Array, jax.Array, int]:
        """What its programs are given: learning rate, radius, and steps of the training."""
        rate = jnp.float32(self.factor * TASKS[self.task].learning_rate)
        return rate, jnp.float32(self.rho or 0.0), steps


def steps_of(cell: Cell, problem: Problem, epochs: int) -> int:
    """Steps between two of `EVALUATIONS` evaluations, so that all methods take as many gradients.

    Args:
      cell: of what.
      problem: on what.
      epochs: passes over the training set of a method with two gradients a step.
    """
    method = METHODS[cell.method]
    gradients = 2 * epochs * (len(problem.train.y) // TASKS[cell.task].kind.batch_size)
    return max(1, round(method.share * gradients / method.gradients / EVALUATIONS))


def learn(problem: Problem, cell: Cell, epochs: int, seed: int) -> dict[str, Any]:
    """Curves over the training of a cell, at even distances from the start to the end.

    Args:
      problem: where it starts.
      cell: how it is trained.
      epochs: of a method with two gradients a step; another takes as many gradients.
      seed: of the batches, whose order is the same for all methods.

    Returns:
      Of the numbers of steps "steps", the scores "validation" and "test", "train_loss" of the last
      batch before, or the first one; and if anything comes after, its curves by name "after".
    """
    kind = TASKS[cell.task].kind
    apart = steps_of(cell, problem, epochs)  # equal distances are compiled once
    at = [part * apart for part in range(EVALUATIONS + 1)]
    per_epoch = len(problem.train.y) // kind.batch_size
    passes = max(2 * epochs, -(-at[-1] // per_epoch))
    rng = np.random.default_rng((seed, 3))
    rows = shuffled_rows(len(problem.train.y), kind.batch_size, rng, passes)
    numbers, fixed = cell.numbers(at[-1]), cell.fixed
    carry = _begin(problem.params, *numbers, **fixed)
    first = Batch(problem.train.x[rows[0]], problem.train.y[rows[0]])
    losses = [float(_loss(problem.params, first, kind=kind))]
    scores = [_scores(carry, problem[:4], *numbers, **fixed)]
    for start, end in itertools.pairwise(at):
        carry, loss = _steps(carry, problem.train, rows[start:end], *numbers, **fixed)
        losses.append(float(loss))
        scores.append(_scores(carry, problem[:4], *numbers, **fixed))
    validation, test = np.asarray(scores, float).T
    after = {}
    if kind.after is not None:
        after["after"] = kind.after(_evaluated(carry, *numbers, **fixed), problem)
    return {
        "steps": np.asarray(at),
        "validation": validation,
        "test": test,
        "train_loss": np.asarray(losses),
        **after,
    }


def measure_seconds(problem: Problem, cells: Iterable[Cell], epochs: int) -> dict[str, Any]:
    """Seconds of a step, of all methods in turns, so that what else the machine does is shared.

    Args:
      problem: where they start.
      cells: one of each method, plain training among them.
      epochs: as in `learn`.

    Returns:
      By method the medians over rounds of the "seconds" of a step, and of their "ratio" to those of
      plain training in the same round.
    """
    seconds: dict[str, list[float]] = {}
    carries: dict[str, Any] = {}
    for turn in range(ROUNDS + 1):  # the first is compilation
        for cell in cells:
            apart, kind = steps_of(cell, problem, epochs), TASKS[cell.task].kind
            numbers = cell.numbers(EVALUATIONS * apart)
            rng = np.random.default_rng(turn)
            rows = rng.integers(len(problem.train.y), size=(apart, kind.batch_size))
            if not turn:
                carries[cell.method] = _begin(problem.params, *numbers, **cell.fixed)
            start = time.perf_counter()
            carry = _steps(carries[cell.method], problem.train, rows, *numbers, **cell.fixed)
            jax.block_until_ready(carry)
            if turn:
                seconds.setdefault(cell.method, []).append((time.perf_counter() - start) / apart)
    of_plain = np.array(seconds["plain"])
    return {
        name: {"seconds": np.median(of_it), "ratio": np.median(np.array(of_it) / of_plain)}
        for name, of_it in seconds.items()
    }


def _steps(
    carry: Any, samples: Batch, rows: np.ndarray, *numbers: Any, kind: Kind, method: str
) -> tuple[Any, jax.Array]:
    for part in np.split(rows, 1 if kind.scanned else len(rows)):
        carry, loss = _advance(carry, samples, part, *numbers, kind=kind, method=method)
    return carry, loss


def _trainer(
    params: chex.ArrayTree, learning_rate: Any, rho: Any, steps: Any, *, kind: Kind, method: str
) -> Trainer:
    shapes = jax.eval_shape(lambda: params)
    base = kind.optimizer(learning_rate)
    return METHODS[method].build(Setting(kind, base, rho, steps, shapes))


@functools.partial(jax.jit, static_argnames="kind")
def _loss(params: chex.ArrayTree, batch: Batch, *, kind: Kind) -> jax.Array:
    return kind.loss(params, batch)


@functools.partial(jax.jit, static_argnames=("kind", "method"))
def _begin(params: chex.ArrayTree, *numbers: Any, **fixed: Any) -> Any:
    return params, _trainer(params, *numbers, **fixed).optimizer.init(params)


@functools.partial(jax.jit, static_argnames=("kind", "method"))
def _evaluated(carry: Any, *numbers: Any, **fixed: Any) -> Any:
    params, opt_state = carry
    return _trainer(params, *numbers, **fixed).evaluated(opt_state, params)


@functools.partial(jax.jit, static_argnames=("kind", "method"))
def _scores(carry: Any, parts: Any, *numbers: Any, **fixed: Any) -> Any:
    params, kind = _evaluated(carry, *numbers, **fixed), fixed["kind"]
    _, _, validation, test = parts
    return kind.measure(params, validation), kind.measure(params, test)


@functools.partial(jax.jit, static_argnames=("kind", "method"))
def _advance(
    carry: Any, samples: Batch, rows: jax.Array, *numbers: Any, **fixed: Any
) -> tuple[Any, jax.Array]:
    """Params and optimizer state after a step on each row of indices, and the last batch's loss."""
    trainer = _trainer(carry[0], *numbers, **fixed)

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
