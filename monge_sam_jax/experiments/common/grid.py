"""Runs of every cell of a grid from every seed."""

import contextlib
import queue
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax

from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.common.progress import Steps, steps

Note = TypeVar("Note")
Cell = TypeVar("Cell", bound=Hashable)
Curves = TypeVar("Curves", bound=Mapping[str, Any])


def train_grid(
    seeds: Iterable[int],
    cells: Sequence[Cell],
    begin: Callable[[int, Steps], tuple[Note, Callable[[Cell], Curves]]],
    *,
    start: str,
    label: str = "",
    devices: Sequence[jax.Device] = (),
) -> tuple[list[Note], dict[Cell, list[Curves]]]:
    """Finds the start of every seed, trains all cells from it, and tells of both.

    Args:
      seeds: one after the other.
      cells: whose texts are their names.
      begin: gives the start of a seed as what is to be noted of it, and what trains a cell from
        there, of whose curves the end of `train_loss` is told.
      start: what a start is.
      label: what all of it is.
      devices: where there are several, each trains a cell at a time, in a thread of its own.

    Returns:
      The notes by seed, and by cell the curves by seed.
    """
    notes: list[Note] = []
    curves: dict[Cell, list[Curves]] = {cell: [] for cell in cells}
    numbers = list(seeds)
    with steps(label, len(numbers) * (1 + len(cells)), unit="run") as told:
        for seed in numbers:
            told.begin(f"seed {seed}, {start}")
            note, train = begin(seed, told)
            notes.append(note)
            told.end(f"seed {seed}: {start}")
            with contextlib.closing(_in_order(train, cells, devices)) as runs:
                for cell in cells:
                    told.begin(f"seed {seed}, {cell}")
                    curves[cell].append(next(runs))
                    loss = float(curves[cell][-1]["train_loss"][-1])
                    told.end(f"seed {seed}: {cell}, train loss {loss:.4g}", loss)
    return notes, curves


def _in_order(
    train: Callable[[Cell], Curves], cells: Iterable[Cell], devices: Sequence[jax.Device]
) -> Generator[Curves]:
    """The curves of the cells; where they are not taken, those in training are the last."""
    if len(devices) < 2:
        yield from map(train, cells)
        return
    free: queue.SimpleQueue[jax.Device] = queue.SimpleQueue()
    for device in devices:
        free.put(device)

    def train_on_a_free_device(cell: Cell) -> Curves:
        device = free.get()
        try:
            with jax.default_device(device):
                return train(cell)
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as pool:
        yield from pool.map(train_on_a_free_device, cells)


def devices_of_this_machine(number: int) -> list[jax.Device]:
    """So many of them, where a CPU is as many as are asked for before JAX has begun.

    Raises:
      InputError: there are fewer.
    """
    if number > 1:
        with contextlib.suppress(RuntimeError):  # JAX has begun
            jax.config.update("jax_num_cpu_devices", number)
    found = jax.local_devices()
    if len(found) < number:
        raise InputError(f"--devices {number}: JAX has {len(found)} here, which is the most")
    return found[:number]
