"""The data of `monge-sam train`, the user's own among them."""

from pathlib import Path

import numpy as np

from monge_sam_jax.experiments.common.data import (
    Dataset,
    handwritten_digits,
    load_arrays,
    make_dataset,
    split,
)
from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.train.options import Train

FEWEST_PER_CLASS = 5
EXPECTED = "an .npz file with numbers x (n, ...) and integer labels y (n,)"


def load(options: Train) -> Dataset:
    """The data set of the options in their dtype, checked against the other options."""
    dataset = handwritten_digits() if options.data is None else from_file(options.data)
    samples, *shape = dataset.train.x.shape
    if options.model == "cnn" and len(shape) not in (2, 3):
        raise InputError(
            "the cnn needs images x, (n, height, width) or (n, height, width, channels), "
            f"got (n, {', '.join(map(str, shape))})"
        )
    if options.batch_size > samples:
        raise InputError(
            f"--batch-size {options.batch_size} is larger than the training set of {samples}"
        )
    train, test = (part._replace(x=part.x.astype(options.dtype)) for part in dataset[:2])
    return Dataset(train, test, dataset.classes)


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
        x, y = load_arrays(path, EXPECTED, ("x", "y")).values()
        _check(x, y)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    _, labels = np.unique(y, return_inverse=True)
    x_train, x_test, y_train, y_test = split(x.astype(np.float64), labels)
    axes = tuple(range(3 if x.ndim == 3 else x.ndim - 1))
    varies = x_train.max(axes) > x_train.min(axes)
    mean, scale = x_train.mean(axes), np.where(varies, x_train.std(axes), 1.0)
    return make_dataset((x_train - mean) / scale, (x_test - mean) / scale, y_train, y_test)


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
