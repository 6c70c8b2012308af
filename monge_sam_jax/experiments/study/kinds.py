"""What a task of `monge-sam study` is made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from monge_sam_jax.experiments.common.data import Batch


class Size(NamedTuple):
    """How large a study is.

    Attributes:
      width: units of a hidden layer.
      epochs: passes over the training set of a method with two gradients a step.
      confusion_epochs: passes over the spoilt copies, on the way to a bad minimum.
      channels: of the first stage of a residual network.
      text_width: of a language model.
      text_layers: of it.
      text_steps: of its training by a method with two gradients a step.
    """

    width: int
    epochs: int
    confusion_epochs: int
    channels: int = 8
    text_width: int = 16
    text_layers: int = 1
    text_steps: int = 10


class Problem(NamedTuple):
    """A task from one seed.

    Attributes:
      params: where training starts.
      train: the training samples.
      validation: those that radii and learning rates are chosen by.
      test: those that are reported.
      notes: what was measured on the way to the start.
      later: what the kind's `after` needs.
    """

    params: chex.ArrayTree
    train: Batch
    validation: Batch
    test: Batch
    notes: dict[str, float]
    later: Any = None


class Kind(NamedTuple):
    """What is fitted, and how it is measured.

    Attributes:
      model: (params, x) -> outputs.
      output_loss: (outputs, y) -> mean loss.
      score: (outputs, y) -> what is reported; the larger, the better.
      unit: of the score (digits right are -log10 of the relative error).
      error: score -> what is left to zero, for performance profiles.
      optimizer: learning rate -> the base optimizer.
      batch_size: samples of a step.
      scanned: whether steps run in a compiled loop; gradients of convolutions are many times slower
        in one on CPU.
      after: (trained params, problem) -> curves by name of what is done with the trained network,
        each (2, points): on validation and on test samples. Their ends are reported.
      decisive: the name of the curve whose end is chosen by, and takes the place of the score.
    """

    model: Callable[[chex.ArrayTree, jax.Array], jax.Array]
    output_loss: Callable[[jax.Array, jax.Array], jax.Array]
    score: Callable[[jax.Array, jax.Array], jax.Array]
    unit: str
    error: Callable[[np.ndarray], np.ndarray]
    optimizer: Callable[[Any], optax.GradientTransformation]
    batch_size: int
    scanned: bool = True
    after: Callable[[chex.ArrayTree, Problem], dict[str, np.ndarray]] | None = None
    decisive: str = ""

    def loss(self, params: chex.ArrayTree, batch: Batch) -> jax.Array:
        """The mean loss of a batch."""
        return self.output_loss(self.model(params, batch.x), batch.y)

    def measure(self, params: chex.ArrayTree, samples: Batch) -> jax.Array:
        """The score on samples."""
        return self.score(self.model(params, samples.x), samples.y)


class Task(NamedTuple):
    """A row of the table of tasks.

    Attributes:
      make: (seed, size) -> problem.
      kind: of its problems.
      learning_rate: of the base optimizer, before it is tuned.
      radii: the line of radii, as Euclidean lengths.
      sizes: names of what of a size decides about it.
      methods: those that are compared where none are named.
      epochs: size -> passes over the training set of a method with two gradients a step.
    """

    make: Callable[[int, Size], Problem]
    kind: Kind
    learning_rate: float
    radii: tuple[float, ...]
    sizes: tuple[str, ...]
    methods: tuple[str, ...]
    epochs: Callable[[Size], int] = lambda size: size.epochs


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Mean over all labels, in nats."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def accuracy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """In percent."""
    return 100 * jnp.mean(jnp.argmax(logits, axis=-1) == y)


def error_of_accuracy(score: np.ndarray) -> np.ndarray:
    """What is wrong, in percent."""
    return 100 - score
