"""`monge-sam quality`: every task with every method, radius and seed."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.progress import steps
from monge_sam_jax.experiments.quality import training
from monge_sam_jax.experiments.quality.options import Quality
from monge_sam_jax.experiments.quality.plots import quality_figure
from monge_sam_jax.experiments.quality.report import markdown
from monge_sam_jax.experiments.quality.tasks import TASKS
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
    report.write_json(options.output / "results.json", results)
    tables = markdown(results)
    (options.output / "quality.md").write_text(tables, encoding="utf-8")
    quality_figure(results).savefig(options.output / "quality.png")
    console = Console()
    console.print(Markdown(tables))
    console.print(
        f"Wrote results.json, quality.md and quality.png to {options.output}", soft_wrap=True
    )


def compare(options: Quality) -> dict[str, Any]:
    """The content of results.json: for every task, method and radius a curve for every seed."""
    tasks: dict[str, Any] = {}
    total = sum(options.seeds * (1 + len(_cells(options, task))) for task in options.tasks)
    with steps("", total, unit="runs") as told:
        for task in options.tasks:
            cells = _cells(options, task)
            curves: dict[tuple[str, float | None], list[list[float]]] = {cell: [] for cell in cells}
            starts = []
            for seed in range(options.seed, options.seed + options.seeds):
                label = f"{task}, seed {seed}"
                told.begin(label)
                problem = TASKS[task](seed, options.width, options.confusion_epochs)
                starts.append(problem.notes)
                told.end(f"{label}: the start is found")
                for name, rho in cells:
                    curve = training.learn(problem, name, rho, options.epochs, seed)
                    curves[name, rho].append(curve)
                    radius = "" if rho is None else f", rho = {rho:g}"
                    told.end(
                        f"{label}: {METHODS[name].label}{radius} ends with {curve[-1]:.1f} % right"
                    )
            evaluated = training.evaluation_steps(options.epochs, len(problem.train.y))
            tasks[task] = {
                "rho": options.radii(task),
                "starts": starts,
                "steps": evaluated,
                "runs": [
                    {
                        "method": name,
                        "label": METHODS[name].label,
                        "rho": rho,
                        "gradients": [METHODS[name].gradients * step for step in evaluated],
                        "test_accuracy": curves[name, rho],
                        "at_equal_gradients": _at(curves[name, rho], METHODS[name].gradients),
                        "at_equal_steps": _at(curves[name, rho], 1),
                    }
                    for name, rho in cells
                ],
            }
    configuration = dataclasses.asdict(options)
    return report.jsonable({"configuration": configuration, **report.environment(), "tasks": tasks})


def _cells(options: Quality, task: str) -> list[tuple[str, float | None]]:
    """Methods with the radii that they have."""
    return [
        (name, rho)
        for name, method in METHODS.items()
        for rho in ((None,) if method.metric is None else options.radii(task))
    ]


def _at(curves: list[list[float]], gradients: int) -> dict[str, float | None]:
    """Mean and standard error over seeds when a method has taken as many gradients as SGD has."""
    last = [{"test_accuracy": curve[training.EVALUATIONS // gradients]} for curve in curves]
    return report.summarise(last)["test_accuracy"]
