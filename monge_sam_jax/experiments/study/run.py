"""`monge-sam study`: every task with every method, radius and seed."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.grid import train_grid
from monge_sam_jax.experiments.common.kept import Store
from monge_sam_jax.experiments.common.progress import Steps
from monge_sam_jax.experiments.study import statistics, training
from monge_sam_jax.experiments.study.methods import METHODS
from monge_sam_jax.experiments.study.options import Study
from monge_sam_jax.experiments.study.plots import profiles_figure, study_figure
from monge_sam_jax.experiments.study.report import markdown
from monge_sam_jax.experiments.study.tasks import TASKS, Problem, Size
from monge_sam_jax.experiments.study.training import Cell

DEFAULT_RHO = 0.05
Curves = dict[Cell, list[Mapping[str, Any]]]


def run(options: Study) -> None:
    """Trains what is not finished, writes the files, and prints the tables.

    Args:
      options: unchecked ones.

    Raises:
      InputError: an option, or the output folder, cannot be used.
    """
    options.check()
    size = options.size
    configuration = dataclasses.asdict(options) | size._asdict()
    report.prepare_output(options.output, configuration, options.overwrite, may_grow=True)
    decisive = {name: getattr(size, name) for name in Size._fields}
    store = Store(options.output, decisive)
    tasks: dict[str, Any] = {}
    for task in options.tasks:
        cells = grid(options, task)
        begin = functools.partial(_begin, Size(**decisive), store, task)
        seeds = range(options.seed, options.seed + size.seeds)
        starts, curves = train_grid(seeds, cells, begin, start="start", label=task)
        tasks[task] = summarise(task, starts, curves)
    results = report.jsonable(
        {"configuration": configuration, **report.environment(), "tasks": tasks}
    )
    files = {
        "study.md": markdown(results),
        "study.png": study_figure(results),
        "profiles.png": profiles_figure(results),
    }
    report.publish(options.output, {report.RESULTS: results, **files})


def grid(options: Study, task: str) -> list[Cell]:
    """The cells of a task."""
    cells = []
    for name in options.methods:
        method = METHODS[name]
        radii = options.radii(TASKS[task].radii) if method.has_radius else (None,)
        for doubled in (False, True) if method.gradients == 1 else (False,):
            cells += [
                Cell(task, name, rho, doubled, rate) for rho in radii for rate in options.size.rates
            ]
    return cells


def _begin(
    size: Size, store: Store, task: str, seed: int, told: Steps
) -> tuple[dict[str, float], Callable[[Cell], Any]]:
    """What was measured on the way to the start of a seed, and what trains a cell from there."""
    del told

    @functools.cache
    def problem() -> Problem:
        return TASKS[task].make(seed, size)

    def notes() -> dict[str, Any]:
        start = problem()
        score = float(TASKS[task].kind.measure(start.params, start.test))
        return start.notes | {"test": score}

    def train(cell: Cell) -> Any:
        name = (*cell[:3], cell.factor, "twice" if cell.doubled else None)
        make = lambda: training.learn(problem(), cell, size.epochs, seed)  # noqa: E731
        return store.kept(name, seed, make)

    return {k: float(x) for k, x in store.kept((task, "start"), seed, notes).items()}, train


def summarise(task: str, starts: Sequence[Mapping[str, float]], curves: Curves) -> dict[str, Any]:
    """What results.json has of a task: all curves, and a row of the table for each method."""
    # Those of more than two gradients a step are compared at equal steps.
    rows = [
        row
        for gradients in (1, 2)
        for row in _rows({c: x for c, x in curves.items() if min(c.gradients, 2) == gradients})
    ]
    return {
        "unit": TASKS[task].kind.unit,
        "start": report.summarise([{"test": start["test"]} for start in starts])["test"],
        "starts": starts,
        "steps": int(next(iter(curves.values()))[0]["steps"][-1]),
        "rows": rows,
        "cells": [
            {
                **cell._asdict(),
                "label": METHODS[cell.method].label,
                "gradients": cell.gradients,
                **{key: [np.asarray(run[key]).tolist() for run in runs] for key in runs[0]},
            }
            for cell, runs in curves.items()
        ],
    }


def _rows(curves: Curves) -> list[dict[str, Any]]:
    """Rows of the table for cells that have taken the same number of gradients."""
    by_method: dict[str, Curves] = {}
    for cell, runs in curves.items():
        by_method.setdefault(cell.method, {})[cell] = runs
    best = {name: _chosen(cells) for name, cells in by_method.items()}
    if not best:
        return []
    plain = _ends(curves[best["plain"]], "test")
    comparisons = statistics.judged(
        {
            name: statistics.compare(_ends(curves[cell], "test"), plain)
            for name, cell in best.items()
            if name != "plain"
        }
    )

    def row(name: str, cell: Cell) -> dict[str, Any]:
        default = cell._replace(rho=DEFAULT_RHO)
        return {
            "method": name,
            "label": METHODS[name].label,
            "gradients": cell.gradients,
            "rho": cell.rho,
            "factor": cell.factor,
            "test": _summary(curves[cell]),
            "at_default": _summary(curves[default]) if default in curves else None,
            "over_plain": comparisons[name]._asdict() if name in comparisons else None,
            "time": _seconds(curves[cell]) / _seconds(curves[best["plain"]]),
        }

    return [row(name, cell) for name, cell in best.items()]


def _chosen(cells: Curves) -> Cell:
    """By the validation samples."""
    return statistics.chosen({cell: _ends(runs, "validation") for cell, runs in cells.items()})


def _ends(runs: Sequence[Mapping[str, Any]], quantity: str) -> list[float]:
    return [float(run[quantity][-1]) for run in runs]


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    return report.summarise([{"test": end} for end in _ends(runs, "test")])["test"]


def _seconds(runs: Sequence[Mapping[str, Any]]) -> float:
    """Of a step, the median over seeds."""
    return float(np.median([run["seconds"] / run["steps"][-1] for run in runs]))
