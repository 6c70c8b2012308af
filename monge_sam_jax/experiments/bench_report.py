"""`monge-sam bench`: runs the measurements, writes and prints what they come to."""

import dataclasses
import inspect
import os
import platform
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from monge_sam_jax.experiments import InputError, bench_models, report
from monge_sam_jax.experiments.bench_measure import (
    CLOCKS,
    Measurement,
    Program,
    compile_method,
    cycles_for,
    interleave,
    measure,
    ratios,
    start,
    summarise,
    tree_bytes,
    without_compilation_cache,
)
from monge_sam_jax.experiments.bench_models import Problem
from monge_sam_jax.experiments.bench_steps import METHODS
from monge_sam_jax.experiments.benchmark import REFERENCES, Bench
from monge_sam_jax.plotting_bench import benchmark_figure

MODELS: dict[str, Callable[[str, int | None], Problem]] = {
    "mlp": bench_models.mlp,
    "resnet": bench_models.resnet,
    "transformer": bench_models.transformer,
}
SECONDS = {"tiny": 0.02, "small": 0.4, "gpu": 0.5}  # that a measurement takes


def run(options: Bench) -> None:
    """Measures, writes results.json and benchmark.png, and prints the tables.

    Args:
      options: checked ones.

    Raises:
      InputError: the options do not fit the machine, or the output folder cannot be used.
    """
    clock = choose_clock(options)
    report.prepare_output(options.output)
    console = Console()
    names = [name for name in METHODS if name in {*REFERENCES, *options.methods}]
    results = {
        "configuration": dataclasses.asdict(options) | {"clock": clock, "methods": names},
        **report.environment(),
        "machine": {"architecture": platform.machine(), "cores": usable_cores()},
        "models": {},
    }
    for model in options.models:
        results["models"][model] = run_model(model, names, options, clock)
        console.print(model_table(results["models"][model], clock))
    report.write_json(options.output / "results.json", results)
    benchmark_figure(results).savefig(options.output / "benchmark.png")
    console.print(f"Wrote results.json and benchmark.png to {options.output}", soft_wrap=True)


def choose_clock(options: Bench) -> str:
    """The clock, by name.

    Raises:
      InputError: the options do not fit the device.
    """
    on_cpu = jax.default_backend() == "cpu"
    if options.preset == "gpu" and on_cpu:
        raise InputError("--preset gpu needs an accelerator, and JAX has found none")
    if options.clock == "cpu" and not on_cpu:
        raise InputError(
            f"--clock cpu does not see the work of the {jax.default_backend()}; use wall"
        )
    if options.clock == "auto":
        return "cpu" if on_cpu else "wall"
    return options.clock


def usable_cores() -> int | None:
    """Processor cores that the process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def run_model(model: str, names: list[str], options: Bench, clock_name: str) -> dict[str, Any]:
    """Measures all methods on a model.

    Args:
      model: key of `MODELS`.
      names: of the methods, the references among them.
      options: the options.
      clock_name: key of `CLOCKS`.

    Returns:
      The model's part of results.json.
    """
    problem, clock = MODELS[model](options.preset, options.batch_size), CLOCKS[clock_name]
    turns = np.random.default_rng(options.seed)
    begin = start(problem, options.seed)
    programs: dict[str, Program] = {}
    cycles: dict[str, int] = {}
    last: dict[str, Measurement] = {}

    with (
        without_compilation_cache(),
        report.progress_bar() as progress,
    ):
        total = (options.compilations + 1 + options.rounds) * len(names)
        bar = progress.add_task(f"{model}: compiling", total=total)

        def compile_once(name: str) -> float:
            programs[name] = compile_method(problem, name, begin, clock)
            progress.advance(bar)
            return programs[name].compile_seconds

        def measure_once(name: str) -> float:
            last[name] = measure(programs[name], begin, cycles[name], clock)
            progress.advance(bar)
            return last[name].seconds

        compile_method(problem, "plain", begin, clock)  # loads what all compilations need
        compile_times = interleave(names, options.compilations, turns, compile_once)
        for name in names:
            progress.update(bar, description=f"{model}: calibrating", advance=1)
            cycles[name] = cycles_for(programs[name], begin, SECONDS[options.preset], clock)
        progress.update(bar, description=f"{model}: measuring")
        times = interleave(names, options.rounds, turns, measure_once)

    params_bytes = tree_bytes(begin.params)
    return {
        "description": problem.description,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(begin.params)),
        "params_bytes": params_bytes,
        "methods": {
            name: {
                "what": inspect.getdoc(METHODS[name]).splitlines()[0],  # type: ignore[union-attr]
                "seconds": summarise(times[name]),
                "ratio_to_plain": ratios(times, name, "plain"),
                "ratio_to_two_gradients": ratios(times, name, "two_gradients"),
                "compile_seconds": summarise(compile_times[name]),
                "compile_ratio_to_plain": ratios(compile_times, name, "plain"),
                "instructions": program.instructions,
                "temporary_bytes": program.temporary_bytes,
                "temporaries": program.temporary_bytes / params_bytes,
                "state_bytes": program.state_bytes,
                "state": program.state_bytes / params_bytes,
                "descents_per_measurement": cycles[name] * program.method.descents,
                "loss": last[name].loss,
                "rounds": {"seconds": times[name], "compile_seconds": compile_times[name]},
            }
            for name, program in ((name, programs[name]) for name in names)
        },
    }


def model_table(results: Mapping[str, Any], clock: str) -> Table:
    """The measurements on a model as a table, a row for every method.

    Args:
      results: the model's part of results.json.
      clock: key of `CLOCKS`.

    Returns:
      The table. Quartiles are in brackets.
    """
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        title=f"{results['description']}: {results['parameters']:,} params",
        caption=(
            f"{'Processor time' if clock == 'cpu' else 'Time'} of a descent step, and its ratios "
            "to plain and to two_gradients: medians, with half the interquartile ranges. Time to "
            "compile as a ratio to plain. Number of HLO instructions. Temporary arrays and state "
            "of the optimizer in units of the params."
        ),
    )
    table.add_column("method", no_wrap=True)
    for header in ("ms", "/ plain", "/ two", "compile", "HLO", "temp.", "state"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, entry in results["methods"].items():
        table.add_row(
            name,
            f"{1000 * entry['seconds']['median']:.3g}",
            _with_spread(entry["ratio_to_plain"]),
            _with_spread(entry["ratio_to_two_gradients"]),
            f"{entry['compile_ratio_to_plain']['median']:.2f}",
            f"{entry['instructions']}",
            f"{entry['temporaries']:.2f}",
            f"{entry['state']:.2f}",
        )
    return table


def _with_spread(summary: Mapping[str, float]) -> str:
    return f"{summary['median']:.3f} ±{(summary['upper'] - summary['lower']) / 2:.3f}"
