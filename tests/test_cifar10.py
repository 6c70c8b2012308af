"""CIFAR-10 from files in its format, which are made here."""

import io
import os
import pickle
import struct
from typing import ClassVar

import numpy as np
import pytest

from monge_sam_jax.experiments.bad_minimum import cifar10
from monge_sam_jax.experiments.bad_minimum.data import Source
from monge_sam_jax.experiments.bad_minimum.options import BadMinimum
from monge_sam_jax.experiments.common.errors import InputError

RECONSTRUCT = np.empty(0).__reduce__()[0]


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 did: strings of bytes, and the module that NumPy had then."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        value = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string

    def save_global(self, value, name=None):
        if value is RECONSTRUCT:
            self.write(pickle.GLOBAL + b"numpy.core.multiarray\n_reconstruct\n")
            self.memoize(value)
        else:
            super().save_global(value, name)

    dispatch[type(RECONSTRUCT)] = save_global


def as_python2(content):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue()


def as_python3(content):
    return pickle.dumps(content, protocol=2)


def batch(rng, n=6):
    return {
        b"batch_label": b"a batch",
        b"labels": rng.integers(10, size=n).tolist(),
        b"data": rng.integers(256, size=(n, 3072), dtype=np.uint8),
        b"filenames": [b"image.png"] * n,
    }


@pytest.fixture
def folder(tmp_path):
    """The folder in its parent, with the batches in it; files 1, 2, ... begin with pixel 1, 2."""
    (tmp_path / cifar10.FOLDER).mkdir()
    rng = np.random.default_rng(0)
    for number, name in enumerate((*cifar10.TRAINING_FILES, cifar10.TEST_FILE), start=1):
        content = batch(rng)
        content[b"data"][:, 0] = number
        (tmp_path / cifar10.FOLDER / name).write_bytes(as_python2(content))
    return tmp_path / cifar10.FOLDER


@pytest.mark.parametrize("write", [as_python2, as_python3])
def test_images_are_those_of_the_files(folder, write):
    contents = [batch(np.random.default_rng(i)) for i in range(6)]
    for name, content in zip((*cifar10.TRAINING_FILES, cifar10.TEST_FILE), contents, strict=True):
        (folder / name).write_bytes(write(content))
    train, test = cifar10.load(folder)
    assert train.x.shape == (30, 32, 32, 3)
    assert test.x.shape == (6, 32, 32, 3)
    assert train.x.dtype == np.uint8
    for image, channel, i, j in [(0, 0, 0, 1), (7, 1, 3, 30), (29, 2, 31, 0)]:
        expected = contents[image // 6][b"data"][image % 6, 1024 * channel + 32 * i + j]
        assert train.x[image, i, j, channel] == expected
    labels = np.array([content[b"labels"] for content in contents])
    np.testing.assert_array_equal(train.y, labels[:5].ravel())
    np.testing.assert_array_equal(test.y, labels[5])


def test_folder_around_will_do(folder):
    for a, b in zip(cifar10.load(folder.parent)[0], cifar10.load(folder)[0], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({b"data": np.zeros((6, 3072), np.float32)}, "uint8, found (6, 3072) in float32"),
        ({b"data": np.zeros((6, 3073), np.uint8)}, "(n, 3072) in uint8, found (6, 3073)"),
        ({b"data": [1, 2]}, "found list of 2"),
        ({b"labels": [1, 2]}, "expected a list of 6 labels, found list of 2"),
        ({b"labels": [0, 1, 2, 3, 4, 10]}, "expected labels from 0 to 9, found 10"),
        ({b"labels": [0, 1, 2, 3, 4, [5]]}, "expected labels from 0 to 9, found [5]"),
        ({b"labels": None}, "found NoneType"),
        (
            {b"data": np.zeros((0, 3072), np.uint8), b"labels": []},
            "expected a list of some labels, found list of 0",
        ),
    ],
)
def test_malformed_batch(folder, changes, message):
    content = batch(np.random.default_rng(0)) | changes
    (folder / "data_batch_3").write_bytes(as_python2(content))
    with pytest.raises(InputError) as error:
        cifar10.load(folder)
    assert message in str(error.value)
    assert "data_batch_3" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a batch of CIFAR-10"),
        (b"PK\x03\x04 no pickle at all", "cannot be read as a batch of CIFAR-10"),
        (as_python2(batch(np.random.default_rng(0)))[:-2000], "cannot be read"),
        (pickle.dumps([1, 2]), "expected a dictionary, found list"),
        (pickle.dumps({b"fine_labels": []}), "keys data and labels, found b'fine_labels'"),
    ],
)
def test_no_batch(folder, content, message):
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(InputError, match="test_batch") as error:
        cifar10.load(folder)
    assert message in str(error.value)


def test_code_in_a_file_is_not_run(folder):
    trace = folder / "trace"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": Payload()}))
    with pytest.raises(InputError, match=r"it holds (posix|nt)\.mkdir"):
        cifar10.load(folder)
    assert not trace.exists()


def test_missing_files(folder, tmp_path):
    (folder / "data_batch_2").unlink()
    with pytest.raises(InputError, match=r"no file data_batch_2; expected .* found data_batch_1"):
        cifar10.load(folder)
    with pytest.raises(InputError, match="found no such folder"):
        cifar10.load(tmp_path / "elsewhere")


def test_training_images_come_from_training_files(folder):
    options = BadMinimum(preset="paper", train_size=20, validation_size=2, data_dir=folder)
    splits = Source(options).splits(seed=3)
    files = [np.rint(255 * np.asarray(part.x)[:, 0, 0, 0]) for part in splits]
    assert [len(part.y) for part in splits] == [20, 2, 4]
    assert set(files[0]) <= {1, 2, 3, 4, 5}
    assert set(files[1]) | set(files[2]) == {6}
    held_out = np.concatenate([splits.validation.x, splits.test.x])
    assert len(np.unique(held_out.reshape(6, -1), axis=0)) == 6
    assert 0.99 < np.max(splits.train.x) <= 1


@pytest.mark.parametrize(("train", "validation"), [(31, 2), (20, 6)])
def test_too_few_images(folder, train, validation):
    options = BadMinimum(
        preset="paper", train_size=train, validation_size=validation, data_dir=folder
    )
    with pytest.raises(InputError, match="leave nothing to test on"):
        Source(options)
