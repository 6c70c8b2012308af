"""How `monge-sam bad-minimum` trains: to the bad minimum, from it, and from scratch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from monge_sam_jax.experiments.bad_minimum.data import CLASSES, Splits
from monge_sam_jax.experiments.bad_minimum.options import Recipe
from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.confusion import confusion_set, reach_bad_minimum
from monge_sam_jax.experiments.common.data import Batch, Dataset, shuffled_rows
from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.common.models import MLP, ResNet
from monge_sam_jax.experiments.common.task import Task, Variables, variables_of
from monge_sam_jax.linen import SharpnessAwareTrainState, make_train_step
from monge_sam_jax.metrics import Metric, euclidean, monge
from monge_sam_jax.perturbation import worst_case_perturbation

MOMENTUM = 0.9  # of everything but fine-tuning and the fit to the true labels
LARGEST_CHUNK = 2000  # samples that an evaluation holds at once
PROBED = 4  # batches of an epoch on which the perturbation is looked at

METRICS: dict[str, Metric | None] = {"sgd": None, "sam": euclidean(), "monge_sam": monge()}

Curves: TypeAlias = dict[str, np.ndarray]
OnEpoch: TypeAlias = Callable[[chex.Numeric], None]


def make_model(recipe: Recipe) -> nn.Module:
    """The network of a recipe."""
    if recipe.model == "mlp":
        return MLP(CLASSES, recipe.width)
    blocks = (1, 1) if recipe.model == "resnet" else (2, 2, 2, 2)
    return ResNet(CLASSES, recipe.width, blocks)


@functools.cache  # one object for equal arguments, for jit to know it by
def _sgd(learning_rate: float, momentum: float) -> optax.GradientTransformation:
    return optax.sgd(learning_rate, momentum or None)


class Trainer:
    """A network, and steps that are compiled once for all seeds and radii."""

    def __init__(self, recipe: Recipe, example: Batch) -> None:
        self._recipe = recipe
        one = jax.tree.map(lambda x: x[:1], example)
        self._task = Task(Dataset(one, one, CLASSES), make_model(recipe))
        # On CPU the gradient of a convolution is many times slower inside a loop.
        self._scans = recipe.model == "mlp" or jax.default_backend() != "cpu"
        self._advance = jax.jit(self._steps, static_argnames="method", donate_argnums=0)
        self._measure = jax.jit(self._task.loss_and_accuracy)
        self._probe = jax.jit(self._probe_batch, static_argnames="method")

    def fresh(self, seed: int) -> Variables:
        """New variables."""
        return jax.tree.map(np.asarray, self._task.init(seed))

    def begin(
        self, variables: Variables, learning_rate: float, momentum: float
    ) -> SharpnessAwareTrainState:
        """The state from which SGD starts at these variables, of which it holds a copy."""
        tx = _sgd(learning_rate, momentum)
        variables = jax.tree.map(jnp.array, variables)
        return SharpnessAwareTrainState(
            step=jnp.zeros((), jnp.int32),
            apply_fn=self._task.model.apply,
            params=variables["params"],
            tx=tx,
            opt_state=tx.init(variables["params"]),
            batch_stats=variables.get("batch_stats"),
        )

    def epoch(
        self,
        state: SharpnessAwareTrainState,
        samples: Batch,
        rows: np.ndarray,
        method: str = "sgd",
        rho: float = 0.0,
    ) -> tuple[SharpnessAwareTrainState, list[jax.Array]]:
        """A step on each row of indices; the new state, and the losses at the params.

        The state is donated.
        """
        losses = []
        for part in np.split(rows, 1 if self._scans else len(rows)):
            state, loss = self._advance(state, samples, part, rho, method=method)
            losses.append(loss)
        return state, losses

    def _steps(
        self,
        state: SharpnessAwareTrainState,
        samples: Batch,
        rows: jax.Array,
        rho: chex.Numeric,
        *,
        method: str,
    ) -> tuple[SharpnessAwareTrainState, jax.Array]:
        metric = METRICS[method]
        options: Any = {} if metric is None else {"metric": metric, "rho": rho}
        train_step = make_train_step(self._task.train_loss, **options)

        def step(
            state: SharpnessAwareTrainState, row: jax.Array
        ) -> tuple[SharpnessAwareTrainState, jax.Array]:
            state, loss, _ = train_step(state, Batch(samples.x[row], samples.y[row]))
            return state, loss

        if self._scans:
            return jax.lax.scan(step, state, rows)
        state, loss = step(state, rows[0])
        return state, loss[None]

    def measure(self, variables: Variables, samples: Batch) -> tuple[float, float]:
        """Mean loss in nats and accuracy in percent, with the running statistics."""
        count, total, right = len(samples.y), 0.0, 0
        for start in range(0, count, LARGEST_CHUNK):
            rows = slice(start, start + LARGEST_CHUNK)
            chunk = Batch(samples.x[rows], samples.y[rows])
            loss, fraction = self._measure(variables, chunk)
            total += len(chunk.y) * float(loss)
            right += round(len(chunk.y) * float(fraction))  # all of them are exactly 100 %
        return total / count, 100 * right / count

    def probe(
        self, variables: Variables, samples: Batch, rows: np.ndarray, method: str, rho: float
    ) -> dict[str, float]:
        """What a step's perturbation would be at these variables: means over batches.

        Args:
          variables: where.
          samples: those that `rows` are indices of.
          rows: the batches.
          method: key of `METRICS`; SGD's perturbation is zero.
          rho: its radius.

        Returns:
          batch_loss at the params, grad_norm there, perturbation_norm, effective_radius (the ratio
          of the last two) and perturbed_loss, at params + perturbation.
        """
        batches = [Batch(samples.x[row], samples.y[row]) for row in rows]
        probed = [self._probe(variables, batch, rho, method=method) for batch in batches]
        return {name: float(np.mean([p[name] for p in probed])) for name in probed[0]}

    def _probe_batch(
        self, variables: Variables, batch: Batch, rho: chex.Numeric, *, method: str
    ) -> dict[str, jax.Array]:
        def loss_fn(params: chex.ArrayTree) -> jax.Array:
            return self._task.train_loss({**variables, "params": params}, batch, {})[0]

        params = variables["params"]
        loss, grads = jax.value_and_grad(loss_fn)(params)
        metric = METRICS[method]
        delta = worst_case_perturbation(
            metric or euclidean(), grads, params, 0.0 if metric is None else rho
        )
        n, length = optax.tree.norm(grads), optax.tree.norm(delta)
        return {
            "batch_loss": loss,
            "grad_norm": n,
            "perturbation_norm": length,
            "effective_radius": jnp.where(n > 0, length / jnp.where(n > 0, n, 1.0), 0.0),
            "perturbed_loss": loss_fn(optax.apply_updates(params, delta)),
        }


def find_bad_minimum(
    trainer: Trainer, recipe: Recipe, splits: Splits, seed: int, on_epoch: OnEpoch
) -> tuple[Variables, dict[str, float]]:
    """The variables at a bad minimum, and what was measured there.

    Raises:
      InputError: the network does not become right on all training samples.
    """
    rng = np.random.default_rng((seed, 2))

    def descend(
        variables: Variables, samples: Batch, epochs: int, learning_rate: float, momentum: float
    ) -> Variables:
        state = trainer.begin(variables, learning_rate, momentum)
        for _ in range(epochs):
            rows = shuffled_rows(len(samples.y), recipe.batch_size, rng)
            state, losses = trainer.epoch(state, samples, rows)
            on_epoch(losses[-1][-1])
        return variables_of(state)

    variables, notes = reach_bad_minimum(
        trainer.fresh(seed),
        splits.train,
        confusion_set(splits.train, CLASSES, recipe.copies, rng),
        memorise=lambda variables, samples: descend(
            variables, samples, recipe.confusion_epochs, recipe.confusion_learning_rate, MOMENTUM
        ),
        fit=lambda variables, samples: descend(
            variables, samples, 1, recipe.fitting_learning_rate, 0.0
        ),
        accuracy=lambda variables, samples: trainer.measure(variables, samples)[1],
        most_fits=recipe.fitting_epochs,
    )
    if notes["train_accuracy"] < 100:
        raise InputError(
            f"seed {seed}: {notes['train_accuracy']:.1f} % of the training images are fitted after "
            f"{report.count(recipe.fitting_epochs, 'epoch')}, and a bad minimum fits all; raise "
            "--fitting-epochs or --fitting-learning-rate"
        )
    notes["fitting_epochs"] = notes.pop("fits")
    notes["test_accuracy"] = trainer.measure(variables, splits.test)[1]
    return jax.tree.map(np.asarray, variables), notes


def evaluation_epochs(epochs: int, evaluations: int) -> list[int]:
    """Numbers of epochs after which is evaluated: none, and then further and further apart.

    Most happens in the beginning. What rounding makes equal is evaluated once.

    >>> evaluation_epochs(100, 6)
    [0, 3, 11, 25, 44, 69, 100]
    """
    marks = [round(epochs * (part / evaluations) ** 2) for part in range(evaluations + 1)]
    return sorted(set(marks))


def train(
    trainer: Trainer,
    state: SharpnessAwareTrainState,
    splits: Splits,
    rows: Callable[[], np.ndarray],
    marks: list[int],
    *,
    method: str = "sgd",
    rho: float = 0.0,
    on_epoch: OnEpoch,
) -> Curves:
    """Trains with a method, and evaluates on the way.

    Args:
      trainer: of the network.
      state: where it starts; donated.
      splits: the samples.
      rows: gives the batches of the next epoch.
      marks: numbers of epochs after which is evaluated, from 0 to the last.
      method: key of `METRICS`.
      rho: radius of the perturbation.
      on_epoch: called after every epoch with the loss of its last batch.

    Returns:
      By name a value for every mark: the marks (epoch), accuracies on the three sets in percent,
      losses on training and test set in nats, what `Trainer.probe` gives for the first batches of
      the epoch that follows, and the largest loss that a step has seen since the last mark
      (peak_loss; at the start, of the batches probed).
    """
    points: list[Mapping[str, float]] = []
    losses: list[jax.Array] = []
    for epoch in range(marks[-1] + 1):
        batches = rows()
        if epoch in marks:
            peak = float(np.max(np.concatenate(losses))) if losses else None
            points.append(_point(trainer, state, splits, batches[:PROBED], method, rho, peak))
            losses = []
        if epoch < marks[-1]:
            state, new = trainer.epoch(state, splits.train, batches, method, rho)
            losses += new
            on_epoch(new[-1][-1])
    curves = {name: np.array([point[name] for point in points]) for name in points[0]}
    return {"epoch": np.array(marks), **curves}


def _point(
    trainer: Trainer,
    state: SharpnessAwareTrainState,
    splits: Splits,
    batches: np.ndarray,
    method: str,
    rho: float,
    peak: float | None,
) -> dict[str, float]:
    variables = variables_of(state)
    train_loss, train_accuracy = trainer.measure(variables, splits.train)
    test_loss, test_accuracy = trainer.measure(variables, splits.test)
    probed = trainer.probe(variables, splits.train, batches, method, rho)
    return {
        "train_loss": train_loss,
        "test_loss": test_loss,
        "train_accuracy": train_accuracy,
        "validation_accuracy": trainer.measure(variables, splits.validation)[1],
        "test_accuracy": test_accuracy,
        "peak_loss": probed["batch_loss"] if peak is None else peak,
        **probed,
    }
