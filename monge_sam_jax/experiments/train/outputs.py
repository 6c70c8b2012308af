"""What a comparison leaves beside its results: final params, and what was logged every epoch."""

import collections
import csv
import importlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.serialization import msgpack_serialize
from jax.experimental import multihost_utils

from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.common.task import Variables
from monge_sam_jax.experiments.train.checkpoints import Records, Stage

PARAMS = "params"
EPOCHS = "epochs.csv"
EVENTS = "tensorboard"
SUFFIX = ".msgpack"
WRITERS = ("tensorboardX", "torch.utils.tensorboard")  # modules with a SummaryWriter


def run_name(optimizer: str, seed: int) -> str:
    """What the files of a run are called."""
    return f"{optimizer}_seed{seed}"


def forget_params(output: Path) -> None:
    """Deletes what an earlier run left, which may have had more seeds."""
    for path in (output / PARAMS).glob(f"*{SUFFIX}"):
        path.unlink()


def write_params(output: Path, optimizer: str, seed: int, variables: Variables) -> None:
    """Writes the variables of a run for `flax.serialization.msgpack_restore`.

    To be called by all processes, of which the first one writes. A file is complete or not there.
    """
    whole = jax.tree.map(_whole, dict(variables))
    if jax.process_index() > 0:
        return
    path = output / PARAMS / (run_name(optimizer, seed) + SUFFIX)
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(msgpack_serialize(whole))
    os.replace(unfinished, path)


def _whole(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _rows(records: Records) -> Iterator[dict[str, Any]]:
    """Optimizer, seed and epoch, from 1, with every quantity that was logged."""
    for optimizer, seeds in records.items():
        for entry in seeds:
            logged = entry["curves"] | {"seconds_per_step": entry["seconds_per_step"]}
            for epoch in range(len(entry["seconds_per_step"])):
                yield {
                    "optimizer": optimizer,
                    "seed": entry["seed"],
                    "epoch": epoch + 1,
                    **{quantity: values[epoch] for quantity, values in logged.items()},
                }


def write_epochs(output: Path, records: Records) -> None:
    """Writes a table of everything that was logged; a cell is empty where there is no value."""
    rows = list(_rows(records))
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (output / EPOCHS).open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, names, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def event_writer() -> Callable[..., Any]:
    """The class that writes the files of TensorBoard.

    Raises:
      InputError: none of the packages that have one is installed.
    """
    for name in WRITERS:
        try:
            return importlib.import_module(name).SummaryWriter
        except ImportError:
            continue
    raise InputError(
        "--tensorboard needs a package that writes its files; pip install tensorboardX"
    )


class Events:
    """A folder of TensorBoard's files for every run, in place of those of an earlier command."""

    def __init__(self, output: Path) -> None:
        self._folder = output / EVENTS
        self._make_writer = event_writer()
        self._writers: dict[str, Any] = {}
        self._written: collections.Counter[str] = collections.Counter()
        shutil.rmtree(self._folder, ignore_errors=True)

    def write(self, stage: Stage) -> None:
        """Writes what has been logged since the last time, of a resumed run all that was before."""
        records = {name: [*stage.records[name], stage.logged(name)] for name in stage.runs}
        for row in _rows(records):
            name, epoch = run_name(row.pop("optimizer"), row.pop("seed")), row.pop("epoch")
            if epoch <= self._written[name]:
                continue
            if name not in self._writers:
                self._writers[name] = self._make_writer(str(self._folder / name))
            for quantity, value in row.items():
                if math.isfinite(value):
                    self._writers[name].add_scalar(quantity, value, epoch)
            self._writers[name].flush()
            self._written[name] = epoch

    def close(self) -> None:
        """Ends all files."""
        for writer in self._writers.values():
            writer.close()
