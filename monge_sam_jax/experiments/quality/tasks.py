"""The two tasks of `monge-sam quality`: a bad minimum to leave, and labels not to trust."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from monge_sam_jax.experiments.common.confusion import confusion_set, reach_bad_minimum
from monge_sam_jax.experiments.common.data import Batch, handwritten_digits, shuffled_rows
from monge_sam_jax.experiments.common.models import MLP

CLASSES = 10
BATCH_SIZE = 125
MOMENTUM = 0.9

TRAINING_IMAGES = 500
COPIES = 20  # R in Liu et al.
CONFUSION_RATE = 0.05
FITTING_RATE = 0.01
MOST_FITTING_EPOCHS = 400
EPOCHS_PER_FIT = 20
NOISE = 0.3


class Problem(NamedTuple):
    """What is learnt from one seed.

    Attributes:
      params: where training starts.
      train: the training samples; their number is a multiple of `BATCH_SIZE`.
      test: the test samples.
      learning_rate: of SGD.
      notes: what was measured on the way to the start.
    """

    params: chex.ArrayTree
    train: Batch
    test: Batch
    learning_rate: float
    notes: dict[str, float]


@jax.jit
def mean_loss(params: chex.ArrayTree, batch: Batch) -> jax.Array:
    """Mean cross-entropy in nats."""
    losses = optax.softmax_cross_entropy_with_integer_labels(_logits(params, batch.x), batch.y)
    return jnp.mean(losses)


@jax.jit
def accuracy(params: chex.ArrayTree, batch: Batch) -> jax.Array:
    """Fraction of the samples whose largest logit is right, in percent."""
    return 100 * jnp.mean(jnp.argmax(_logits(params, batch.x), axis=-1) == batch.y)


def _logits(params: chex.ArrayTree, x: jax.Array) -> jax.Array:
    width = params["params"]["Dense_0"]["bias"].size
    return MLP(CLASSES, width).apply(params, x)  # type: ignore[return-value]


def bad_minimum(seed: int, width: int, confusion_epochs: int) -> Problem:
    """A network that knows 500 images by heart, and little else (Liu et al. 2020).

    It is first fitted to copies of the images in which a tenth of the entries is zero and the label
    is drawn at random, then to the images and their labels, without any regularisation.
    """
    rng = np.random.default_rng((seed, 1))
    train, test = _shuffled_digits(rng, TRAINING_IMAGES)
    params = _fresh(seed, width, train)
    spoilt = confusion_set(train, CLASSES, COPIES, rng)

    def memorise(params: chex.ArrayTree, samples: Batch) -> chex.ArrayTree:
        rows = shuffled_rows(len(samples.y), BATCH_SIZE, rng, confusion_epochs)
        return _descend(params, samples, rows, CONFUSION_RATE)

    def fit(params: chex.ArrayTree, samples: Batch) -> chex.ArrayTree:
        rows = shuffled_rows(len(samples.y), BATCH_SIZE, rng, EPOCHS_PER_FIT)
        return _descend(params, samples, rows, FITTING_RATE)

    params, notes = reach_bad_minimum(
        params,
        train,
        spoilt,
        memorise=memorise,
        fit=fit,
        accuracy=accuracy,
        most_fits=MOST_FITTING_EPOCHS // EPOCHS_PER_FIT,
    )
    notes["fitting_epochs"] = EPOCHS_PER_FIT * notes.pop("fits")
    notes["test_accuracy"] = float(accuracy(params, test))
    return Problem(params, train, test, FITTING_RATE, notes)


def label_noise(seed: int, width: int, confusion_epochs: int) -> Problem:
    """A fresh network, and training labels of which 30 % are drawn at random."""
    del confusion_epochs
    rng = np.random.default_rng((seed, 2))
    train, test = _shuffled_digits(rng, 7 * BATCH_SIZE)
    drawn = rng.random(len(train.y)) < NOISE
    labels = np.where(drawn, rng.integers(CLASSES, size=len(drawn)), train.y)
    params = _fresh(seed, width, train)
    notes = {"wrong_labels": float(100 * np.mean(labels != np.asarray(train.y)))}
    return Problem(params, Batch(train.x, jnp.asarray(labels, jnp.int32)), test, 0.05, notes)


TASKS: dict[str, Callable[[int, int, int], Problem]] = {
    "bad-minimum": bad_minimum,
    "label-noise": label_noise,
}


def _shuffled_digits(rng: np.random.Generator, training: int) -> tuple[Batch, Batch]:
    digits = handwritten_digits()
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), digits.train, digits.test)
    order = rng.permutation(len(both.y))
    return (
        Batch(both.x[order[:training]], both.y[order[:training]]),
        Batch(both.x[order[training:]], both.y[order[training:]]),
    )


def _fresh(seed: int, width: int, samples: Batch) -> chex.ArrayTree:
    return MLP(CLASSES, width).init(jax.random.key(seed), samples.x[:1])


@jax.jit
def _descend(
    params: chex.ArrayTree, samples: Batch, rows: jax.Array, learning_rate: float
) -> chex.ArrayTree:
    tx = optax.sgd(learning_rate, momentum=MOMENTUM)

    def step(carry: tuple[chex.ArrayTree, optax.OptState], row: jax.Array) -> tuple:
        params, opt_state = carry
        grads = jax.grad(mean_loss)(params, Batch(samples.x[row], samples.y[row]))
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), rows)
    return params
