"""`monge-sam train`: several optimizers side by side on one task."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from monge_sam_jax.experiments import InputError, data, models, report
from monge_sam_jax.experiments.digits import Train
from monge_sam_jax.experiments.task import Task
from monge_sam_jax.experiments.training import (
    BASES,
    Optimizer,
    compile_steps,
    make_optimizer,
    radius,
    train,
)
from monge_sam_jax.plotting import LABELS, training_figure

MODELS = {"mlp": models.MLP, "cnn": models.CNN}

# By optimizer, and for each seed: its final metrics, its curves and its times.
Records: TypeAlias = Mapping[str, Sequence[Mapping[str, Any]]]


def run(options: Train) -> None:
    """Trains, writes results.json and training.png, and prints the table.

    Args:
      options: checked ones.

    Raises:
      InputError: the data or the output folder cannot be used.
    """
    dataset = load(options)
    report.prepare_output(options.output)
    results = compare(options, dataset)
    text = json.dumps(results, indent=1, allow_nan=False)
    (options.output / "results.json").write_text(text + "\n", encoding="utf-8")
    training_figure(results).savefig(options.output / "training.png")
    console = Console()
    console.print(report.results_table(results))
    console.print(f"Wrote results.json and training.png to {options.output}", soft_wrap=True)


def load(options: Train) -> data.Dataset:
    """The data set of the options, checked against the other options."""
    dataset = data.handwritten_digits() if options.data is None else data.from_file(options.data)
    samples, *shape = dataset.train.x.shape
    if options.model == "cnn" and len(shape) not in (2, 3):
        raise InputError(
            "the cnn needs images x, (n, height, width) or (n, height, width, channels), "
            f"got (n, {', '.join(map(str, shape))})"
        )
    if options.batch_size > samples:
        raise InputError(
            f"--batch-size {options.batch_size} is larger than the training set of {samples}"
        )
    return dataset


def compare(options: Train, dataset: data.Dataset) -> dict[str, Any]:
    """Trains with every optimizer from every seed.

    Args:
      options: checked ones.
      dataset: what is learnt.

    Returns:
      The content of results.json.
    """
    task = Task(dataset, MODELS[options.model](dataset.classes))
    records = _train_all(options, task)
    labels = LABELS | {"sgd": report.BASE_LABELS[options.base]}
    results = {
        "configuration": dataclasses.asdict(options)
        | {"learning_rate": options.base_learning_rate},
        **report.environment(),
        "data": {
            "name": "Handwritten digits" if options.data is None else options.data.name,
            "train_samples": len(dataset.train.y),
            "test_samples": len(dataset.test.y),
            "sample_shape": dataset.train.x.shape[1:],
            "classes": dataset.classes,
        },
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(task.init(options.seed))),
        "optimizers": {
            name: {
                "label": labels[name],
                "rho": radius(name, options.rho),
                "summary": report.summarise([seed["final"] for seed in seeds]),
                "seeds": seeds,
            }
            for name, seeds in records.items()
        },
    }
    return report.jsonable(results)


def _train_all(options: Train, task: Task) -> Records:
    """Trains behind a progress bar, one seed after the other."""
    base = BASES[options.base](options.base_learning_rate)
    optimizers: dict[str, Optimizer] = {
        name: make_optimizer(name, base, task, rho=options.rho, alpha=options.alpha)
        for name in options.optimizers
    }
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in optimizers}
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        epochs = options.seeds * options.epochs * len(optimizers)
        bar = progress.add_task("compiling", total=epochs)
        compile_steps(task, optimizers, options.batch_size)
        for seed in range(options.seed, options.seed + options.seeds):
            progress.update(bar, description=f"seed {seed}")
            runs = train(
                task,
                optimizers,
                seed=seed,
                epochs=options.epochs,
                batch_size=options.batch_size,
                on_epoch=lambda: progress.advance(bar),
            )
            sharpness = {
                name: task.sharpness(run.params, options.sharpness_rho)
                for name, run in runs.items()
            }
            for name, final in report.final_metrics(runs, sharpness).items():
                records[name].append(
                    {
                        "seed": seed,
                        "final": final,
                        "curves": runs[name].curves,
                        "seconds_per_step": runs[name].seconds_per_step,
                    }
                )
    return records
