"""Results kept in files, so that they are computed once."""

import functools
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.options import FINISHED

# Dictionaries of dictionaries, with arrays at the ends.
Tree: TypeAlias = dict[str, Any]


def fingerprint(decisive: Mapping[str, Any]) -> str:
    """A short name for what decides a result, equal for equal mappings of JSON values.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1})
    True
    """
    text = json.dumps(decisive, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def kept(path: Path, make: Callable[[], Tree]) -> Tree:
    """The tree in an .npz file, which is made and written if there is none yet.

    A file is complete or not there: it is written under another name and renamed.

    Args:
      path: of the file, whose name should hold the fingerprint of what decides the tree.
      make: computes the tree.

    Returns:
      The tree, of NumPy arrays with all their bits.
    """
    if path.exists():
        with np.load(path, allow_pickle=False) as arrays:
            return unflatten_dict(dict(arrays), sep="/")
    tree = jax.tree.map(np.asarray, make())
    unfinished = path.with_suffix(".unfinished")
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished.open("wb") as file:
        np.savez(file, **flatten_dict(tree, sep="/"))
    os.replace(unfinished, path)
    return tree


def checksum(arrays: Any) -> int:
    """Of all numbers in a tree of arrays."""
    return functools.reduce(
        lambda crc, x: zlib.crc32(np.asarray(x).tobytes(), crc), jax.tree.leaves(arrays), 0
    )


class Store:
    """The finished parts of a study in its output folder, by what decides them."""

    def __init__(self, output: Path, decisive: Mapping[str, Any]) -> None:
        """A store.

        Args:
          output: the folder of the study.
          decisive: what decides its parts, beside their names and seeds and the environment.
        """
        self._folder = output / FINISHED
        environment = report.environment()
        del environment["device"]["count"]  # a part is computed on one
        self._decisive = dict(decisive) | environment

    def kept(
        self,
        name: tuple[Any, ...],
        seed: int,
        make: Callable[[], Tree],
        indifferent: Collection[str] = (),
    ) -> Tree:
        """The part, as `kept` gives it.

        Args:
          name: what it is, with None for what it has not.
          seed: of which seed.
          make: computes it.
          indifferent: names in what is decisive that do not decide this part.
        """
        decisive = {key: x for key, x in self._decisive.items() if key not in indifferent}
        parts = [str(part) for part in name if part is not None]
        file = "_".join([*parts, f"seed{seed}", fingerprint(decisive)])
        return kept(self._folder / f"{file}.npz", make)
