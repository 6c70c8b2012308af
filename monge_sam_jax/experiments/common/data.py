"""Labelled samples, split into a training and a test set."""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from monge_sam_jax.experiments.common.errors import InputError

TEST_FRACTION = 0.5
SPLIT_SEED = 0
MOST_TOLD = 8  # arrays of a file, in an error

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
    return make_dataset(*split(digits.images / 16, digits.target))


def split(x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """Halves with every class in proportion: x of both, and then y of both."""
    return train_test_split(x, y, test_size=TEST_FRACTION, stratify=y, random_state=SPLIT_SEED)


def make_dataset(
    x_train: np.ndarray, x_test: np.ndarray, y_train: np.ndarray, y_test: np.ndarray
) -> Dataset:
    """A data set of labels counted from zero, in the dtypes of batches."""

    def batch(x: np.ndarray, y: np.ndarray) -> Batch:
        return Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32))

    return Dataset(batch(x_train, y_train), batch(x_test, y_test), classes=int(y_train.max()) + 1)


def load_arrays(
    path: Path, expected: str, needed: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Arrays of an .npz file by name, without optional ones that it has not.

    Args:
      path: of the file.
      expected: what it should hold, in words.
      needed: names of arrays.
      optional: names of others.

    Raises:
      InputError: it cannot be read, or lacks an array that is needed.
    """
    arrays: dict[str, np.ndarray] = {}
    found = "no .npz archive"
    try:
        # NumPy leaves a file open if it is no archive although it begins like one.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.lib.npyio.NpzFile):
                arrays = {name: archive[name] for name in (*needed, *optional) if name in archive}
                found = _contents(archive)
    except FileNotFoundError:
        raise InputError("no such file") from None
    except UNREADABLE as error:
        raise InputError(
            f"cannot be read as an .npz file of plain arrays: {error}; expected {expected}, as "
            f"np.savez(path, {', '.join(f'{name}={name}' for name in needed)}) writes them"
        ) from error
    for name in needed:
        if name not in arrays:
            raise InputError(f"no array {name}; found {found}, expected {expected}")
    return arrays


def _contents(archive: Mapping[str, np.ndarray]) -> str:
    """The arrays with their shapes, of at most `MOST_TOLD` of them."""
    names = list(archive)
    told = [f"{name} {archive[name].shape}" for name in names[:MOST_TOLD]]
    more = [f"{len(names) - MOST_TOLD} more"] if len(names) > MOST_TOLD else []
    return ", ".join(told + more) or "no arrays"
