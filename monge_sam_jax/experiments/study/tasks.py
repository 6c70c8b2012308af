"""What is learnt in `monge-sam study`: tasks on data that comes with installed packages."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from monge_sam_jax.experiments.common.confusion import confusion_set, reach_bad_minimum
from monge_sam_jax.experiments.common.data import Batch, handwritten_digits, shuffled_rows
from monge_sam_jax.experiments.common.models import MLP

CLASSES = 10
MOMENTUM = 0.9
DIGITS_BATCH = 125

KNOWN_IMAGES = 500  # by heart, at a bad minimum
COPIES = 20  # R in Liu et al.
CONFUSION_RATE = 0.05
FITTING_RATE = 0.01
MOST_FITS, EPOCHS_PER_FIT = 20, 20
LARGE_INIT = 4.0

POINTS, UNSEEN = 256, 1000


class Size(NamedTuple):
    """How large a study is.

    Attributes:
      width: units of a hidden layer.
      epochs: passes over the training set.
      confusion_epochs: passes over the spoilt copies, on the way to a bad minimum.
    """

    width: int
    epochs: int
    confusion_epochs: int


class Problem(NamedTuple):
    """A task from one seed.

    Attributes:
      params: where training starts.
      train: the training samples.
      validation: those that radii are chosen by.
      test: those that are reported.
      notes: what was measured on the way to the start.
    """

    params: chex.ArrayTree
    train: Batch
    validation: Batch
    test: Batch
    notes: dict[str, float]


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
    """

    model: Callable[[chex.ArrayTree, jax.Array], jax.Array]
    output_loss: Callable[[jax.Array, jax.Array], jax.Array]
    score: Callable[[jax.Array, jax.Array], jax.Array]
    unit: str
    error: Callable[[np.ndarray], np.ndarray]
    optimizer: Callable[[Any], optax.GradientTransformation]
    batch_size: int

    def loss(self, params: chex.ArrayTree, batch: Batch) -> jax.Array:
        """The mean loss of a batch."""
        return self.output_loss(self.model(params, batch.x), batch.y)

    def measure(self, params: chex.ArrayTree, samples: Batch) -> jax.Array:
        """The score on samples."""
        return self.score(self.model(params, samples.x), samples.y)


# --- handwritten digits ---


def _logits(params: chex.ArrayTree, x: jax.Array) -> jax.Array:
    width = params["params"]["Dense_0"]["bias"].size
    return MLP(CLASSES, width).apply(params, x)  # type: ignore[return-value]


def _cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def _accuracy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return 100 * jnp.mean(jnp.argmax(logits, axis=-1) == y)


def _digits(rng: np.random.Generator, training: int) -> tuple[Batch, Batch, Batch]:
    """Training samples, and the halves of the others."""
    digits = handwritten_digits()
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), digits.train, digits.test)
    order = rng.permutation(len(both.y))
    rest = order[training:]
    parts = (order[:training], rest[: len(rest) // 2], rest[len(rest) // 2 :])
    train, validation, test = (Batch(both.x[part], both.y[part]) for part in parts)
    return train, validation, test


def _fresh(seed: int, width: int, samples: Batch) -> chex.ArrayTree:
    return MLP(CLASSES, width).init(jax.random.key(seed), samples.x[:1])


def _bad_minimum(seed: int, size: Size) -> Problem:
    """A network that knows 500 images by heart, and little else (Liu et al. 2020).

    It is first fitted to copies of the images in which a tenth of the entries is zero and the label
    is drawn at random, then to the images and their labels, without any regularisation.
    """
    rng = np.random.default_rng((seed, 1))
    train, validation, test = _digits(rng, KNOWN_IMAGES)
    spoilt = confusion_set(train, CLASSES, COPIES, rng)

    def memorise(params: chex.ArrayTree, samples: Batch) -> chex.ArrayTree:
        rows = shuffled_rows(len(samples.y), DIGITS_BATCH, rng, size.confusion_epochs)
        return _descend(params, samples, rows, CONFUSION_RATE)

    start = _fresh(seed, size.width, train)
    params, notes = _fitted(start, train, spoilt, memorise, rng)
    return Problem(params, train, validation, test, notes)


def _large_init(seed: int, size: Size) -> Problem:
    """A network that began with weights four times too large, and knows 500 images by heart."""
    rng = np.random.default_rng((seed, 4))
    train, validation, test = _digits(rng, KNOWN_IMAGES)
    start = jax.tree.map(lambda p: LARGE_INIT * p, _fresh(seed, size.width, train))
    params, notes = _fitted(start, train, train, lambda params, _: params, rng)
    return Problem(params, train, validation, test, notes)


def _fitted(
    start: chex.ArrayTree,
    train: Batch,
    spoilt: Batch,
    memorise: Callable[[chex.ArrayTree, Batch], chex.ArrayTree],
    rng: np.random.Generator,
) -> tuple[chex.ArrayTree, dict[str, float]]:
    def fit(params: chex.ArrayTree, samples: Batch) -> chex.ArrayTree:
        rows = shuffled_rows(len(samples.y), DIGITS_BATCH, rng, EPOCHS_PER_FIT)
        return _descend(params, samples, rows, FITTING_RATE)

    return reach_bad_minimum(
        start,
        train,
        spoilt,
        memorise=memorise,
        fit=fit,
        accuracy=lambda params, samples: float(_accuracy(_logits(params, samples.x), samples.y)),
        most_fits=MOST_FITS,
    )


@jax.jit
def _descend(
    params: chex.ArrayTree, samples: Batch, rows: jax.Array, learning_rate: float
) -> chex.ArrayTree:
    tx = optax.sgd(learning_rate, momentum=MOMENTUM)

    def loss(params: chex.ArrayTree, row: jax.Array) -> jax.Array:
        return _cross_entropy(_logits(params, samples.x[row]), samples.y[row])

    def step(carry: tuple[chex.ArrayTree, optax.OptState], row: jax.Array) -> tuple:
        params, opt_state = carry
        updates, opt_state = tx.update(jax.grad(loss)(params, row), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), rows)
    return params


def _label_noise(fraction: float, seed: int, size: Size) -> Problem:
    """A fresh network, and training labels of which a part is drawn at random."""
    rng = np.random.default_rng((seed, 2))
    train, validation, test = _digits(rng, 7 * DIGITS_BATCH)
    drawn = rng.random(len(train.y)) < fraction
    labels = np.where(drawn, rng.integers(CLASSES, size=len(drawn)), train.y)
    notes = {"wrong_labels": float(100 * np.mean(labels != np.asarray(train.y)))}
    noisy = Batch(train.x, jnp.asarray(labels, jnp.int32))
    return Problem(_fresh(seed, size.width, train), noisy, validation, test, notes)


DIGITS = Kind(
    _logits,
    _cross_entropy,
    _accuracy,
    "% right",
    lambda score: 100 - score,
    functools.partial(optax.sgd, momentum=MOMENTUM),
    DIGITS_BATCH,
)


# --- the heat equation ---


class _Solution(nn.Module):
    """A network of three hidden layers of tanh units."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = jnp.tanh(nn.Dense(self.width)(x))
        return nn.Dense(1)(x)[:, 0]


def _temperature(params: chex.ArrayTree, x: jax.Array) -> jax.Array:
    width = params["params"]["Dense_0"]["bias"].size
    return _Solution(width).apply(params, x)  # type: ignore[return-value]


def _heat(seed: int, size: Size) -> Problem:
    r"""Temperatures of a rod from 256 points in place and time.

    .. math:: u(x, t) = \sum_k a_k \sin(k \pi x) \exp(-(k \pi)^2 t / 20), \quad k = 1, ..., 4
    """
    rng = np.random.default_rng((seed, 5))
    k = np.arange(1, 5)
    a = rng.normal(size=4) / k

    def samples(number: int) -> Batch:
        x, t = rng.random((2, number, 1))
        u = (a * np.sin(k * np.pi * x) * np.exp(-((k * np.pi) ** 2) * t / 20)).sum(1)
        return Batch(jnp.asarray(np.hstack([x, t]), jnp.float32), jnp.asarray(u, jnp.float32))

    train, validation, test = samples(POINTS), samples(UNSEEN), samples(UNSEEN)
    params = _Solution(size.width // 2).init(jax.random.key(seed), train.x[:1])
    return Problem(params, train, validation, test, {})


def _mean_square(u: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((u - y) ** 2)


def _log_accuracy(u: jax.Array, y: jax.Array) -> jax.Array:
    return -0.5 * jnp.log10(jnp.mean((u - y) ** 2) / jnp.mean(y**2))


HEAT = Kind(
    _temperature,
    _mean_square,
    _log_accuracy,
    "digits right",
    lambda score: 10.0**-score,
    optax.adam,
    batch_size=64,
)


class Task(NamedTuple):
    """A row of the table of tasks.

    Attributes:
      make: (seed, size) -> problem.
      kind: of its problems.
      learning_rate: that of the baseline.
      radii: the line of radii, as Euclidean lengths.
    """

    make: Callable[[int, Size], Problem]
    kind: Kind
    learning_rate: float
    radii: tuple[float, ...]


LONG, SHORT, TINY = (
    (0.05, 0.5, 1.0, 2.0, 4.0),
    (0.05, 0.1, 0.2, 0.5, 1.0),
    (0.001, 0.005, 0.02, 0.05),
)
TASKS = {
    "bad-minimum": Task(_bad_minimum, DIGITS, FITTING_RATE, LONG),
    "large-init": Task(_large_init, DIGITS, FITTING_RATE, LONG),
    "label-noise-0": Task(functools.partial(_label_noise, 0.0), DIGITS, 0.05, SHORT),
    "label-noise-30": Task(functools.partial(_label_noise, 0.3), DIGITS, 0.05, SHORT),
    "label-noise-60": Task(functools.partial(_label_noise, 0.6), DIGITS, 0.05, SHORT),
    "regression": Task(_heat, HEAT, 2e-3, TINY),
}
