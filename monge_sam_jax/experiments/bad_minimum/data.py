"""The images of `monge-sam bad-minimum`, divided three ways."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from monge_sam_jax.experiments.bad_minimum import cifar10
from monge_sam_jax.experiments.bad_minimum.options import BadMinimum
from monge_sam_jax.experiments.common.data import Batch, handwritten_digits
from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.common.kept import checksum

CLASSES = 10


class Splits(NamedTuple):
    """Samples to train on, to choose the best epoch by, and to report on."""

    train: Batch
    validation: Batch
    test: Batch


class Source:
    """The images of a data set, of which every seed gets its own division."""

    def __init__(self, options: BadMinimum) -> None:
        """Reads the images.

        Raises:
          InputError: they cannot be read, or are too few.
        """
        self._recipe = recipe = options.recipe
        if options.data_dir is not None:
            (x, y), (others, labels) = cifar10.load(options.data_dir)
            self._trainable, self._scale = len(y), 255
            self._x, self._y = np.concatenate([x, others]), np.concatenate([y, labels])
        else:
            digits = handwritten_digits()
            self._x = np.concatenate([digits.train.x, digits.test.x])
            self._y = np.concatenate([digits.train.y, digits.test.y])
            self._trainable, self._scale = len(self._y), 1
        fixed = len(self._y) - self._trainable  # never to be trained on
        held_out = len(self._y) - recipe.train_size if fixed == 0 else fixed
        if recipe.train_size > self._trainable or recipe.validation_size >= held_out:
            raise InputError(
                f"--train-size {recipe.train_size} and --validation-size {recipe.validation_size} "
                f"leave nothing to test on: there are {self._trainable} images to train on and "
                f"{max(held_out, 0)} others"
            )

    @property
    def checksum(self) -> int:
        """Of all images and labels."""
        return checksum((self._x, self._y))

    def splits(self, seed: int) -> Splits:
        """The division of a seed."""
        rng = np.random.default_rng((seed, 1))
        order = rng.permutation(self._trainable)
        chosen, rest = np.split(order, [self._recipe.train_size])
        if self._trainable < len(self._y):
            rest = rng.permutation(np.arange(self._trainable, len(self._y)))
        parts = chosen, *np.split(rest, [self._recipe.validation_size])
        return Splits(*map(self._batch, parts))

    def _batch(self, rows: np.ndarray) -> Batch:
        x = np.asarray(self._x[rows], np.float32) / self._scale
        return Batch(jnp.asarray(x), jnp.asarray(self._y[rows], jnp.int32))
