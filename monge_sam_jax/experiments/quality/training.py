"""How `monge-sam quality` trains: methods by what a step costs, and the curves they draw."""

import functools
import itertools
from typing import NamedTuple, TypeAlias

import chex
import jax
import numpy as np
import optax

from monge_sam_jax.experiments.common.data import Batch, shuffled_rows
from monge_sam_jax.experiments.quality.tasks import (
    BATCH_SIZE,
    MOMENTUM,
    Problem,
    accuracy,
    mean_loss,
)
from monge_sam_jax.gradients import sharpness_aware_value_and_grad
from monge_sam_jax.metrics import Metric, euclidean, monge
from monge_sam_jax.one_pass import one_pass_sam, unperturbed_params

EVALUATIONS = 20

Curves: TypeAlias = dict[str, list[float]]


class Method(NamedTuple):
    """How a method takes its gradients.

    Attributes:
      label: its name.
      metric: what it perturbs along, or None.
      one_pass: whether along the gradient of the step before.
    """

    label: str
    metric: Metric | None = None
    one_pass: bool = False

    @property
    def gradients(self) -> int:
        """How many a step takes."""
        return 1 if self.metric is None or self.one_pass else 2

    def optimizer(self, learning_rate: float, rho: float) -> optax.GradientTransformation:
        """The optimizer of the gradients that `gradient` takes."""
        base = optax.sgd(learning_rate, momentum=MOMENTUM)
        if self.metric is not None and self.one_pass:
            return one_pass_sam(base, metric=self.metric, rho=rho)
        return base

    def gradient(self, params: chex.ArrayTree, batch: Batch, rho: float) -> chex.ArrayTree:
        """The gradient of a step, from one pass or two."""
        if self.metric is None or self.one_pass:
            return jax.grad(mean_loss)(params, batch)
        robust = sharpness_aware_value_and_grad(mean_loss, metric=self.metric, rho=rho)
        return robust(params, batch)[1]


METHODS = {
    "sgd": Method("SGD"),
    "sam": Method("SAM", euclidean()),
    "monge_sam": Method("M-SAM", monge()),
    "one_pass_sam": Method("one-pass SAM", euclidean(), one_pass=True),
    "one_pass_monge_sam": Method("one-pass M-SAM", monge(), one_pass=True),
}


def evaluation_steps(epochs: int, samples: int) -> list[int]:
    """Numbers of steps after which is evaluated: none, and then at even distances, to the end."""
    steps = samples // BATCH_SIZE * epochs
    return [round(part * steps / EVALUATIONS) for part in range(EVALUATIONS + 1)]


def learn(problem: Problem, name: str, rho: float | None, epochs: int, seed: int) -> Curves:
    """Test accuracy in percent and training loss in nats, from the start of the problem on."""
    radius = 0.0 if rho is None else rho
    rng = np.random.default_rng((seed, 3))
    rows = shuffled_rows(len(problem.train.y), BATCH_SIZE, rng, epochs)
    optimizer = METHODS[name].optimizer(problem.learning_rate, radius)
    carry = problem.params, optimizer.init(problem.params)
    evaluated = [problem.params]
    steps = evaluation_steps(epochs, len(problem.train.y))
    for first, last in itertools.pairwise(steps):
        carry = _advance(
            carry, problem.train, rows[first:last], problem.learning_rate, radius, name=name
        )
        params, opt_state = carry
        if METHODS[name].one_pass:
            params = unperturbed_params(opt_state, params)
        evaluated.append(params)
    return {
        "test_accuracy": [float(accuracy(params, problem.test)) for params in evaluated],
        "train_loss": [float(mean_loss(params, problem.train)) for params in evaluated],
    }


@functools.partial(jax.jit, static_argnames="name")
def _advance(
    carry: tuple[chex.ArrayTree, optax.OptState],
    samples: Batch,
    rows: jax.Array,
    learning_rate: float,
    rho: float,
    *,
    name: str,
) -> tuple[chex.ArrayTree, optax.OptState]:
    """Params and optimizer state after a step on each row of indices."""
    method = METHODS[name]
    optimizer = method.optimizer(learning_rate, rho)

    def step(
        carry: tuple[chex.ArrayTree, optax.OptState], row: jax.Array
    ) -> tuple[tuple[chex.ArrayTree, optax.OptState], None]:
        params, opt_state = carry
        grads = method.gradient(params, Batch(samples.x[row], samples.y[row]), rho)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, carry, rows)[0]
