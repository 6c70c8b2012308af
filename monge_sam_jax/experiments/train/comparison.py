"""Several optimizers side by side on one task: what one process does, alone or among others."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.data import Dataset
from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.common.placement import make_placement
from monge_sam_jax.experiments.common.plots import LABELS
from monge_sam_jax.experiments.common.progress import Steps, steps
from monge_sam_jax.experiments.common.task import Task
from monge_sam_jax.experiments.train import outputs
from monge_sam_jax.experiments.train.agreement import agreed
from monge_sam_jax.experiments.train.checkpoints import (
    FREE,
    Checkpoints,
    Records,
    Stage,
    fingerprint,
    refuse_others,
)
from monge_sam_jax.experiments.train.data import load
from monge_sam_jax.experiments.train.models import MODELS
from monge_sam_jax.experiments.train.options import Train
from monge_sam_jax.experiments.train.plots import training_figure
from monge_sam_jax.experiments.train.report import BASE_LABELS, final_metrics, results_table
from monge_sam_jax.experiments.train.training import (
    BASES,
    Optimizer,
    begin,
    compile_steps,
    make_optimizer,
    radius,
    train,
)


def run(options: Train) -> None:
    """Trains, writes the results and the final params, and prints the table.

    Of several processes, the first one alone writes and prints.

    Args:
      options: checked ones.

    Raises:
      InputError: the data, the output folder or the checkpoints in it cannot be used.
    """
    common = dataclasses.replace(options, process_id=None)
    dataset = agreed(
        lambda: prepare(options), lambda found: f"{common} {fingerprint(options, found)}"
    )
    results = compare(options, dataset)
    if jax.process_index() > 0:
        return
    records = {name: entry["seeds"] for name, entry in results["optimizers"].items()}
    outputs.write_epochs(options.output, records)
    report.publish(
        options.output,
        {report.RESULTS: results, "training.png": training_figure(results)},
        results_table(results),
        others=(outputs.EPOCHS, f"{outputs.PARAMS}/"),
    )


def prepare(options: Train) -> Dataset:
    """The data set of the options, checked against the other options, and the output folder."""
    dataset = load(options)
    devices = jax.device_count() if options.layout else 1
    if options.batch_size % devices:
        raise InputError(
            f"--batch-size {options.batch_size} cannot be divided among {devices} devices"
        )
    if jax.process_index() == 0:
        report.prepare_output(
            options.output,
            configuration(options),
            options.overwrite or options.resume,  # what is resumed the checkpoints tell
            indifferent=FREE,
        )
        refuse_others(options, dataset)
        if options.tensorboard:
            outputs.event_writer()
        if not options.resume:
            outputs.forget_params(options.output)
    return dataset


def configuration(options: Train) -> dict[str, Any]:
    """The options as they are in results.json."""
    return dataclasses.asdict(options) | {"learning_rate": options.base_learning_rate}


def compare(options: Train, dataset: Dataset) -> dict[str, Any]:
    """Trains with every optimizer from every seed.

    Args:
      options: checked ones.
      dataset: what is learnt.

    Returns:
      The content of results.json.
    """
    model = MODELS[options.model](dataset.classes, dtype=jnp.dtype(options.dtype))
    task = Task(dataset, model, make_placement(options.layout))
    records = _train_all(options, task)
    labels = LABELS | {"sgd": BASE_LABELS[options.base]}
    results = {
        "configuration": configuration(options),
        **report.environment(),
        "data": {
            "name": "Handwritten digits" if options.data is None else options.data.name,
            "train_samples": len(dataset.train.y),
            "test_samples": len(dataset.test.y),
            "sample_shape": dataset.train.x.shape[1:],
            "classes": dataset.classes,
        },
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(task.init(options.seed)["params"])),
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
    """Trains from the beginning or the last checkpoint on."""
    base = BASES[options.base](options.base_learning_rate)
    optimizers: dict[str, Optimizer] = {
        name: make_optimizer(
            name,
            base,
            task,
            rho=options.rho,
            alpha=options.alpha,
            widen_params=options.widen_params,
            perturbation=options.perturbation,
        )
        for name in options.optimizers
    }
    with contextlib.closing(Checkpoints(options, task.dataset)) as checkpoints:
        stage = checkpoints.first_stage(optimizers)
        return _train_from(stage, options, task, optimizers, checkpoints)


def _train_from(
    stage: Stage,
    options: Train,
    task: Task,
    optimizers: Mapping[str, Optimizer],
    checkpoints: Checkpoints,
) -> Records:
    """Trains one seed after the other, and tells of it."""
    behind = checkpoints.epochs_behind(stage)
    is_first = jax.process_index() == 0
    log = outputs.Events(options.output) if options.tensorboard and is_first else None
    with (
        contextlib.closing(log) if log else contextlib.nullcontext(),
        steps(
            "",
            options.seeds * options.epochs,
            completed=behind,
            unit="epoch",
            silent=not is_first,
        ) as told,
    ):
        if log:
            log.write(stage)
        told.begin("compiling")
        compile_steps(task, optimizers, options.batch_size)
        for seed in range(stage.seed, options.seed + options.seeds):
            told.begin(f"seed {seed}")
            if seed > stage.seed:
                stage = Stage(seed, begin(optimizers, seed), stage.records)
            told.begin_part("", len(optimizers), "optimizer")
            train(
                task,
                optimizers,
                stage.runs,
                seed=seed,
                epochs=options.epochs,
                batch_size=options.batch_size,
                on_turn=told.end_part,
                on_epoch=functools.partial(_end_epoch, stage, told, checkpoints, log),
            )
            _record(stage, task, options.sharpness_rho)
            for name, run in stage.runs.items():
                outputs.write_params(options.output, name, seed, run.variables)
    return stage.records


def _end_epoch(
    stage: Stage, told: Steps, checkpoints: Checkpoints, log: outputs.Events | None
) -> None:
    losses = {name: run.curves["train_loss"][-1] for name, run in stage.runs.items()}
    epoch = min(len(run.seconds_per_step) for run in stage.runs.values())
    listed = ", ".join(f"{name} {loss:.4g}" for name, loss in losses.items())
    told.end(f"seed {stage.seed}, epoch {epoch}: train loss {listed}", min(losses.values()))
    told.begin_part("", len(stage.runs), "optimizer")
    checkpoints.save_if_due(stage)
    if log:
        log.write(stage)


def _record(stage: Stage, task: Task, sharpness_rho: float) -> None:
    """Adds what the runs came to to the records."""
    sharpness = {
        name: task.sharpness(run.variables, sharpness_rho) for name, run in stage.runs.items()
    }
    for name, final in final_metrics(stage.runs, sharpness).items():
        stage.records[name].append({**stage.logged(name), "final": final})
