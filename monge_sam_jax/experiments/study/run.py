"""`monge-sam study`: every task with every method, radius, learning rate and seed."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import jax
import numpy as np

from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.grid import devices_of_this_machine, train_grid
from monge_sam_jax.experiments.common.kept import Store, fingerprint
from monge_sam_jax.experiments.common.progress import Steps
from monge_sam_jax.experiments.study import training
from monge_sam_jax.experiments.study.cures import all_ends, cures_figure, table
from monge_sam_jax.experiments.study.kinds import Problem, Size
from monge_sam_jax.experiments.study.methods import METHODS
from monge_sam_jax.experiments.study.options import CureName, Study, factors
from monge_sam_jax.experiments.study.plots import frontier_figure, profiles_figure, study_figure
from monge_sam_jax.experiments.study.report import markdown
from monge_sam_jax.experiments.study.summary import Curves, choices, summarise
from monge_sam_jax.experiments.study.tasks import MOST, TASKS
from monge_sam_jax.experiments.study.training import Cell

SUMMARY = "summary.json"


def run(options: Study) -> None:
    """Trains what is not finished, writes the files, and prints the tables.

    Args:
      options: unchecked ones.

    Raises:
      InputError: an option, or the output folder, cannot be used.
    """
    options.check()
    devices = devices_of_this_machine(options.devices)
    size = options.size
    configuration = dataclasses.asdict(options) | size._asdict()
    report.prepare_output(
        options.output,
        configuration,
        options.overwrite,
        indifferent=("tasks", "methods"),  # whose runs are kept, whichever are shown
        may_grow=True,
    )
    decisive = {name: getattr(size, name) for name in Size._fields}
    store = Store(options.output, decisive)
    done = {task: _task(options, Size(**decisive), store, devices, task) for task in options.tasks}
    tasks = {task: summarised for task, (_, summarised) in done.items()}
    about = {"configuration": configuration, **report.environment()}
    # Made to be kept with a page, so it does not say where it was written.
    decided = {name: x for name, x in configuration.items() if name not in report.PLACES}
    summary = report.jsonable({**about, "configuration": decided, "tasks": tasks})
    results = report.jsonable({**about, "runs": {task: runs for task, (runs, _) in done.items()}})
    files: dict[str, Any] = {
        "study.md": markdown(summary),
        "study.png": study_figure(summary),
        "profiles.png": profiles_figure(summary),
    }
    if any(entry["after"] for entry in tasks.values()):
        files["frontier.png"] = frontier_figure(summary)
    cures = {*options.methods} & {*get_args(CureName)} - {*MOST}
    if cures and 1 in size.rates:  # what is told of them is at the task's learning rate
        ends = all_ends(results["runs"])
        files |= {"cures.md": table(ends), "cures.png": cures_figure(ends)}
    report.publish(options.output, {SUMMARY: summary, report.RESULTS: results, **files})


def grid(options: Study, task: str) -> list[Cell]:
    """The cells of a task: as many for every method."""
    default = options.size.methods or TASKS[task].methods
    radii, rates = options.radii(TASKS[task].radii), options.size.rates
    cells = []
    for name in options.methods or default:
        if METHODS[name].has_radius:
            cells += [Cell(task, name, rho, rate) for rho in radii for rate in rates]
        else:
            cells += [Cell(task, name, None, rate) for rate in factors(len(radii) * len(rates))]
    return cells


def _task(
    options: Study, size: Size, store: Store, devices: Sequence[jax.Device], task: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All runs of a task, and its aggregates."""
    epochs = TASKS[task].epochs(size)
    seeds = range(options.seed, options.seed + options.size.seeds)
    tuning = options.size.tuning_seeds
    cells = grid(options, task)

    indifferent = set(Size._fields) - set(TASKS[task].sizes)
    kept = functools.partial(store.kept, indifferent=indifferent)

    @functools.lru_cache(1)
    def made(seed: int) -> Problem:
        return TASKS[task].make(seed, size)

    making = threading.Lock()

    def problem(seed: int) -> Problem:
        with making:  # once for all threads
            return made(seed)

    def begin(seed: int, told: Steps) -> tuple[dict[str, float], Callable[[Cell], Any]]:
        del told

        def notes() -> dict[str, Any]:
            start = problem(seed)
            score = jax.jit(TASKS[task].kind.measure)(start.params, start.test)
            return start.notes | {"test": float(score)}

        def train(cell: Cell) -> Any:
            make = lambda: training.learn(problem(seed), cell, epochs, seed)  # noqa: E731
            return kept(cell, seed, make)

        noted = kept((task, "start"), seed, notes)
        return {name: float(value) for name, value in noted.items()}, train

    train = functools.partial(train_grid, begin=begin, start="start", devices=devices)
    starts, tried = train(seeds[:tuning], cells, label=f"{task}, choosing")
    selected = choices(tried)
    best = list(dict.fromkeys(cell for cells in selected.values() for cell in cells.values()))
    curves: Curves = {cell: tried[cell] for cell in best}
    if seeds[tuning:]:
        others, more = train(seeds[tuning:], best, label=task)
        starts = starts + others
        curves = {cell: [*tried[cell], *more[cell]] for cell in best}
    timed = list(selected["tuned"].values())
    name = (task, "seconds", fingerprint({"methods": [cell.method for cell in timed]}))
    make = lambda: training.measure_seconds(problem(seeds[-1]), timed, epochs)  # noqa: E731
    seconds = kept(name, seeds[-1], make)
    runs = [
        {
            **cell._asdict(),
            "label": METHODS[cell.method].label,
            "runs": [_lists(run) for run in curves.get(cell, tried[cell])],
        }
        for cell in cells
    ]
    return runs, summarise(task, starts, tried, curves, selected, seconds)


def _lists(tree: Any) -> Any:
    """Arrays as lists."""
    if isinstance(tree, Mapping):
        return {name: _lists(part) for name, part in tree.items()}
    return np.asarray(tree).tolist()
