"""What a comparison leaves beside its results: final params, and what was logged every epoch."""

import csv
import importlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.serialization import msgpack_serialize
from jax.experimental import multihost_utils

from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.common.task import Variables
from monge_sam_jax.experiments.train.checkpoints import Records

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


def write_events(output: Path, records: Records) -> None:
    """Writes a folder of TensorBoard's files for every run, in place of an earlier run's."""
    make_writer = event_writer()
    shutil.rmtree(output / EVENTS, ignore_errors=True)
    writers: dict[str, Any] = {}
    for row in _rows(records):
        name = run_name(row.pop("optimizer"), row.pop("seed"))
        if name not in writers:
            writers[name] = make_writer(str(output / EVENTS / name))
        _write_scalars(writers[name], row.pop("epoch"), row)
    for writer in writers.values():
        writer.close()


def _write_scalars(writer: Any, epoch: int, values: Mapping[str, float | None]) -> None:
    for quantity, value in values.items():
        if value is not None:  # it is where it was not finite
            writer.add_scalar(quantity, value, epoch)
