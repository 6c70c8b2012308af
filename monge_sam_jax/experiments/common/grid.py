"""Runs of every cell of a grid from every seed."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

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
) -> tuple[list[Note], dict[Cell, list[Curves]]]:
    """Finds the start of every seed, trains all cells from it, and tells of both.

    Args:
      seeds: one after the other.
      cells: whose texts are their names.
      begin: gives the start of a seed as what is to be noted of it, and what trains a cell from
        there, of whose curves the end of `train_loss` is told.
      start: what a start is.
      label: what all of it is.

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
            for cell in cells:
                told.begin(f"seed {seed}, {cell}")
                curves[cell].append(train(cell))
                loss = float(curves[cell][-1]["train_loss"][-1])
                told.end(f"seed {seed}: {cell}, train loss {loss:.4g}", loss)
    return notes, curves
