"""What `monge-sam quality` runs: methods by what a step costs, and the curves they draw."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import optax
from rich.console import Console
from rich.markdown import Markdown

from monge_sam_jax.experiments import report
from monge_sam_jax.experiments.data import Batch, shuffled_rows
from monge_sam_jax.experiments.quality import Quality
from monge_sam_jax.experiments.quality_tasks import (
    BATCH_SIZE,
    MOMENTUM,
    TASKS,
    Problem,
    accuracy,
    mean_loss,
)
from monge_sam_jax.gradients import sharpness_aware_value_and_grad
from monge_sam_jax.metrics import Metric, euclidean, monge
from monge_sam_jax.one_pass import one_pass_sam, unperturbed_params
from monge_sam_jax.plotting_quality import quality_figure

EVALUATIONS = 20


class Method(NamedTuple):
    """How a method takes its gradients.

    Attributes:
      label: its name.
      metric: what it perturbs along, or None.
      one_pass: whether along the gradient of the step before.
    """

    label: str
    metric: Metric | None = None
    one_pass: bool = False

    @property
    def gradients(self) -> int:
        """How many a step takes."""
        return 1 if self.metric is None or self.one_pass else 2

    def optimizer(self, learning_rate: float, rho: float) -> optax.GradientTransformation:
        """The optimizer of the gradients that `gradient` takes."""
        base = optax.sgd(learning_rate, momentum=MOMENTUM)
        if self.metric is not None and self.one_pass:
            return one_pass_sam(base, metric=self.metric, rho=rho)
        return base

    def gradient(self, params: chex.ArrayTree, batch: Batch, rho: float) -> chex.ArrayTree:
        """The gradient of a step, from one pass or two."""
        if self.metric is None or self.one_pass:
            return jax.grad(mean_loss)(params, batch)
        robust = sharpness_aware_value_and_grad(mean_loss, metric=self.metric, rho=rho)
        return robust(params, batch)[1]


METHODS = {
    "sgd": Method("SGD"),
    "sam": Method("SAM", euclidean()),
    "monge_sam": Method("M-SAM", monge()),
    "one_pass_sam": Method("one-pass SAM", euclidean(), one_pass=True),
    "one_pass_monge_sam": Method("one-pass M-SAM", monge(), one_pass=True),
}


def run(options: Quality) -> None:
    """Trains, writes the files, and prints the tables.

    Args:
      options: checked ones.

    Raises:
      InputError: the output folder cannot be used.
    """
    report.prepare_output(options.output)
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
    with report.progress_bar() as progress:
        bar = progress.add_task(
            "",
            total=sum(options.seeds * (1 + len(_cells(options, task))) for task in options.tasks),
        )
        for task in options.tasks:
            cells = _cells(options, task)
            curves: dict[tuple[str, float | None], list[list[float]]] = {cell: [] for cell in cells}
            starts = []
            for seed in range(options.seed, options.seed + options.seeds):
                progress.update(bar, description=f"{task}, seed {seed}")
                problem = TASKS[task](seed, options.width, options.confusion_epochs)
                starts.append(problem.notes)
                progress.advance(bar)
                for name, rho in cells:
                    curves[name, rho].append(learn(problem, name, rho, options.epochs, seed))
                    progress.advance(bar)
            steps = _evaluation_steps(options.epochs, len(problem.train.y))
            tasks[task] = {
                "rho": options.radii(task),
                "starts": starts,
                "steps": steps,
                "runs": [
                    {
                        "method": name,
                        "label": METHODS[name].label,
                        "rho": rho,
                        "gradients": [METHODS[name].gradients * step for step in steps],
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


def _evaluation_steps(epochs: int, samples: int) -> list[int]:
    """Numbers of steps after which is evaluated: none, and then at even distances, to the end."""
    steps = samples // BATCH_SIZE * epochs
    return [round(part * steps / EVALUATIONS) for part in range(EVALUATIONS + 1)]


def _at(curves: list[list[float]], gradients: int) -> dict[str, float | None]:
    """Mean and standard error over seeds when a method has taken as many gradients as SGD has."""
    last = [{"test_accuracy": curve[EVALUATIONS // gradients]} for curve in curves]
    return report.summarise(last)["test_accuracy"]


def learn(problem: Problem, name: str, rho: float | None, epochs: int, seed: int) -> list[float]:
    """Test accuracy in percent at the evaluations, from the start of the problem on."""
    radius = 0.0 if rho is None else rho
    rng = np.random.default_rng((seed, 3))
    rows = shuffled_rows(len(problem.train.y), BATCH_SIZE, rng, epochs)
    optimizer = METHODS[name].optimizer(problem.learning_rate, radius)
    carry = problem.params, optimizer.init(problem.params)
    curve = [float(accuracy(problem.params, problem.test))]
    steps = _evaluation_steps(epochs, len(problem.train.y))
    for first, last in itertools.pairwise(steps):
        carry = _advance(
            carry, problem.train, rows[first:last], problem.learning_rate, radius, name=name
        )
        params, opt_state = carry
        if METHODS[name].one_pass:
            params = unperturbed_params(opt_state, params)
        curve.append(float(accuracy(params, problem.test)))
    return curve


@functools.partial(jax.jit, static_argnames="name")
def _advance(
    carry: tuple[chex.ArrayTree, optax.OptState],
    samples: Batch,
    rows: jax.Array,
    learning_rate: float,
    rho: float,
    *,
    name: str,
) -> tuple[chex.ArrayTree, optax.OptState]:
    """Params and optimizer state after a step on each row of indices."""
    method = METHODS[name]
    optimizer = method.optimizer(learning_rate, rho)

    def step(
        carry: tuple[chex.ArrayTree, optax.OptState], row: jax.Array
    ) -> tuple[tuple[chex.ArrayTree, optax.OptState], None]:
        params, opt_state = carry
        grads = method.gradient(params, Batch(samples.x[row], samples.y[row]), rho)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, carry, rows)[0]


def markdown(results: Mapping[str, Any]) -> str:
    """A table for each task, of test accuracies in percent with their standard errors.

    Args:
      results: content of results.json.

    Returns:
      Rows of methods and columns of radii; a cell reads "at equal gradients / at equal steps".
    """
    lines = []
    for task, entry in results["tasks"].items():
        radii = entry["rho"]
        start = report.summarise(
            [{"accuracy": run[0]} for run in entry["runs"][0]["test_accuracy"]]
        )
        lines += [
            f"**{task}** (start {report.estimate(start['accuracy'])}, {entry['steps'][-1]} steps, "
            f"{results['configuration']['seeds']} seeds; test accuracy in % when as many gradients "
            "were taken as SGD takes / as many steps)",
            "",
            "| method | " + " | ".join(f"rho = {rho:g}" for rho in radii) + " |",
            "|---" * (1 + len(radii)) + "|",
        ]
        for label in dict.fromkeys(run["label"] for run in entry["runs"]):
            cells = [_both(run) for run in entry["runs"] if run["label"] == label]
            cells += [""] * (len(radii) - len(cells))
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _both(run: Mapping[str, Any]) -> str:
    if run["at_equal_gradients"] == run["at_equal_steps"]:
        return report.estimate(run["at_equal_steps"])
    return (
        f"{report.estimate(run['at_equal_gradients'])} / {report.estimate(run['at_equal_steps'])}"
    )
