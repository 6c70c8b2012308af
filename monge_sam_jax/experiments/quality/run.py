"""`monge-sam quality`: every task with every method, radius and seed."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.grid import train_grid
from monge_sam_jax.experiments.common.progress import Steps
from monge_sam_jax.experiments.quality import training
from monge_sam_jax.experiments.quality.options import Quality
from monge_sam_jax.experiments.quality.plots import quality_figure
from monge_sam_jax.experiments.quality.report import markdown
from monge_sam_jax.experiments.quality.tasks import TASKS, Problem
from monge_sam_jax.experiments.quality.training import METHODS


def run(options: Quality) -> None:
    """Trains, writes the files, and prints the tables.

    Args:
      options: unchecked ones.

    Raises:
      InputError: an option, or the output folder, cannot be used.
    """
    options.check()
    report.prepare_output(options.output, dataclasses.asdict(options), options.overwrite)
    results = compare(options)
    files = {"quality.md": markdown(results), "quality.png": quality_figure(results)}
    report.publish(options.output, {report.RESULTS: results, **files})


def compare(options: Quality) -> dict[str, Any]:
    """The content of results.json: for every task, method and radius a curve for every seed."""
    tasks: dict[str, Any] = {}
    seeds = range(options.seed, options.seed + options.seeds)
    for task in options.tasks:
        begin = functools.partial(_begin, options, task)
        cells = _cells(options, task)
        problems, curves = train_grid(seeds, cells, begin, start="start", label=task)
        evaluated = training.evaluation_steps(options.epochs, len(problems[0].train.y))
        tasks[task] = {
            "rho": options.radii(task),
            "starts": [problem.notes for problem in problems],
            "steps": evaluated,
            "runs": [_entry(cell, runs, evaluated) for cell, runs in curves.items()],
        }
    configuration = dataclasses.asdict(options)
    return report.jsonable({"configuration": configuration, **report.environment(), "tasks": tasks})


def _begin(
    options: Quality, task: str, seed: int, told: Steps
) -> tuple[Problem, Callable[["_Cell"], training.Curves]]:
    """A task's start from a seed, and what trains a cell from there."""
    del told
    problem = TASKS[task](seed, options.width, options.confusion_epochs)
    return problem, lambda cell: training.learn(problem, *cell, options.epochs, seed)


class _Cell(NamedTuple):
    method: str
    rho: float | None

    def __str__(self) -> str:
        return METHODS[self.method].label + ("" if self.rho is None else f", rho = {self.rho:g}")


def _cells(options: Quality, task: str) -> list[_Cell]:
    """Methods with the radii that they have."""
    return [
        _Cell(name, rho)
        for name, method in METHODS.items()
        for rho in ((None,) if method.metric is None else options.radii(task))
    ]


def _entry(cell: _Cell, runs: list[training.Curves], evaluated: list[int]) -> dict[str, Any]:
    method, accuracies = METHODS[cell.method], [run["test_accuracy"] for run in runs]
    return {
        "method": cell.method,
        "label": method.label,
        "rho": cell.rho,
        "gradients": [method.gradients * step for step in evaluated],
        "test_accuracy": accuracies,
        "train_loss": [run["train_loss"] for run in runs],
        "at_equal_gradients": _at(accuracies, method.gradients),
        "at_equal_steps": _at(accuracies, 1),
    }


def _at(curves: list[list[float]], gradients: int) -> dict[str, float | None]:
    """Mean and standard error over seeds when a method has taken as many gradients as SGD has."""
    last = [{"test_accuracy": curve[training.EVALUATIONS // gradients]} for curve in curves]
    return report.summarise(last)["test_accuracy"]
