"""Labelled samples, split into a training and a test set."""

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from monge_sam_jax.experiments import InputError

TEST_FRACTION = 0.5
SPLIT_SEED = 0
FEWEST_PER_CLASS = 5

# What `np.load` and its archive raise for files that are not what they should be.
UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)


class Batch(NamedTuple):
    """Samples x (n, ...) in float32 with labels y (n,) in int32, counted from zero."""

    x: jax.Array
    y: jax.Array


def shuffled_rows(
    samples: int, batch_size: int, rng: np.random.Generator, epochs: int = 1
) -> np.ndarray:
    """Indices (steps, batch_size) of the whole batches of epochs, each in an order of its own."""
    whole = samples // batch_size * batch_size
    orders = [rng.permutation(samples)[:whole] for _ in range(epochs)]
    return np.concatenate(orders).reshape(-1, batch_size)


class Dataset(NamedTuple):
    """A training and a test set, and the number of classes."""

    train: Batch
    test: Batch
    classes: int


def handwritten_digits() -> Dataset:
    """The 1797 images (8, 8) of scikit-learn's handwritten digits, scaled to [0, 1]."""
    digits = load_digits()
    return _dataset(*_split(digits.images / 16, digits.target))


def from_file(path: Path) -> Dataset:
    """The user's arrays x (n, ...) and y (n,), standardised.

    Args:
      path: an .npz file.

    Returns:
      The data set. Its x is centred and divided by the standard deviation of the training set: of
      every feature of a table (n, features), every channel of images (n, height, width, channels),
      and of everything together in images (n, height, width). What does not vary is only centred.

    Raises:
      InputError: the file is no .npz file with such arrays, or they cannot be learnt from.
    """
    try:
        x, y = _read(path)
        _check(x, y)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    _, labels = np.unique(y, return_inverse=True)
    x_train, x_test, y_train, y_test = _split(x.astype(np.float64), labels)
    axes = tuple(range(3 if x.ndim == 3 else x.ndim - 1))
    varies = x_train.max(axes) > x_train.min(axes)
    mean, scale = x_train.mean(axes), np.where(varies, x_train.std(axes), 1.0)
    return _dataset((x_train - mean) / scale, (x_test - mean) / scale, y_train, y_test)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    arrays = {}
    try:
        # NumPy leaves a file open if it is no archive although it begins like one.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.lib.npyio.NpzFile):
                arrays = {name: archive[name] for name in ("x", "y") if name in archive}
    except FileNotFoundError:
        raise InputError("no such file") from None
    except UNREADABLE as error:
        raise InputError(f"cannot be read as an .npz file of plain arrays: {error}") from error
    for name in ("x", "y"):
        if name not in arrays:
            raise InputError(f"no array {name}; an .npz file with arrays x and y is needed")
    return np.asarray(arrays["x"]), np.asarray(arrays["y"])


def _check(x: np.ndarray, y: np.ndarray) -> None:
    if x.dtype.kind not in "iuf":
        raise InputError(f"x must hold integers or floats, got {x.dtype}")
    if y.dtype.kind not in "iu":
        raise InputError(f"the labels y must be integers, got {y.dtype}")
    if x.ndim < 2 or y.ndim != 1:
        raise InputError(f"x must be (n, ...) and y (n,), got {x.shape} and {y.shape}")
    if len(x) != len(y):
        raise InputError(f"x and y differ in length: {len(x)} and {len(y)}")
    if x.size == 0:
        raise InputError(f"x is empty: its shape is {x.shape}")
    if not np.all(np.abs(x.astype(np.float64)) <= np.finfo(np.float32).max):
        raise InputError("x is not finite: it holds NaN, infinity or what float32 cannot hold")
    if y.min() < 0:
        raise InputError(f"the labels y must not be negative, got {y.min()}")
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) == 1:
        raise InputError(f"y has a single class, {classes[0]}")
    if counts.min() < FEWEST_PER_CLASS:
        raise InputError(
            f"too few samples: class {classes[counts.argmin()]} has {counts.min()}, "
            f"and every class needs {FEWEST_PER_CLASS}"
        )


def _split(x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    return train_test_split(x, y, test_size=TEST_FRACTION, stratify=y, random_state=SPLIT_SEED)


def _dataset(
    x_train: np.ndarray, x_test: np.ndarray, y_train: np.ndarray, y_test: np.ndarray
) -> Dataset:
    def batch(x: np.ndarray, y: np.ndarray) -> Batch:
        return Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32))

    return Dataset(batch(x_train, y_train), batch(x_test, y_test), classes=int(y_train.max()) + 1)
