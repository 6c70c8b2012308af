"""CIFAR-10 from the files of its Python version."""

import codecs
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from monge_sam_jax.experiments.common.errors import InputError

FOLDER = "cifar-10-batches-py"
TRAINING_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_FILE = "test_batch"
CLASSES = 10
SIDE = 32

# What such a file names: NumPy's own functions, in the modules of all its versions.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
}


class Images(NamedTuple):
    """Images x (n, 32, 32, 3) in uint8 with labels y (n,), from 0 to 9."""

    x: np.ndarray
    y: np.ndarray


class _Unpickler(pickle.Unpickler):
    """Makes arrays and plain containers; anything else in a file is an error, and not run."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it holds {module}.{name}") from None


def load(folder: Path) -> tuple[Images, Images]:
    """The training and the test images.

    Args:
      folder: `cifar-10-batches-py` as the archive has it, or the folder that it is in.

    Returns:
      Both sets.

    Raises:
      InputError: a file is missing, or is not what it should be; it says which, what was expected
        and what was found.
    """
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    missing = [name for name in (*TRAINING_FILES, TEST_FILE) if not (folder / name).is_file()]
    if missing:
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        raise InputError(
            f"--data-dir {folder}: no file {', '.join(missing)}; expected the folder {FOLDER} of "
            f"CIFAR-10's Python version, found "
            f"{', '.join(found[:8]) or ('nothing' if folder.is_dir() else 'no such folder')}"
        )
    parts = [_read(folder / name) for name in TRAINING_FILES]
    train = Images(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return train, _read(folder / TEST_FILE)


def _read(path: Path) -> Images:
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
    # Bytes that are no pickle make it raise whatever the operations that they spell raise.
    except Exception as error:
        raise InputError(f"{path}: cannot be read as a batch of CIFAR-10: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a dictionary, found {type(content).__name__}")
    for key in (b"data", b"labels"):
        if key not in content:
            raise InputError(
                f"{path}: expected the keys data and labels, found "
                f"{', '.join(sorted(map(str, content))) or 'none'}"
            )
    return _checked(path, content[b"data"], content[b"labels"])


def _checked(path: Path, data: Any, labels: Any) -> Images:
    values = 3 * SIDE * SIDE
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (values,):
        raise InputError(
            f"{path}: expected data of shape (n, {values}) in uint8, found {_described(data)}"
        )
    if not isinstance(labels, list) or len(labels) != len(data) or not labels:
        raise InputError(
            f"{path}: expected a list of {len(data) or 'some'} labels, found {_described(labels)}"
        )
    wrong = [y for y in labels if not (isinstance(y, int) and 0 <= y < CLASSES)]
    if wrong:
        raise InputError(f"{path}: expected labels from 0 to {CLASSES - 1}, found {wrong[0]!r:.40}")
    images = data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return Images(images, np.array(labels, np.int32))


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.shape} in {value.dtype}"
    size = f" of {len(value)}" if hasattr(value, "__len__") else ""
    return f"{type(value).__name__}{size}"
