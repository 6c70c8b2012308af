"""`monge-sam bench`: runs the measurements, writes and prints what they come to."""

import dataclasses
import inspect
import itertools
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from monge_sam_jax.experiments import InputError, report
from monge_sam_jax.experiments.bench_measure import (
    CLOCKS,
    HASTY,
    Measurement,
    Program,
    compile_method,
    cycles_for,
    interleave,
    measure,
    peak_bytes,
    ratios,
    start,
    summarise,
    tree_bytes,
    without_compilation_cache,
)
from monge_sam_jax.experiments.bench_models import MODELS
from monge_sam_jax.experiments.bench_progress import steps
from monge_sam_jax.experiments.bench_steps import METHODS
from monge_sam_jax.experiments.benchmark import BY_HAND, Bench
from monge_sam_jax.plotting_bench import benchmark_figure

SECONDS = {"tiny": 0.02, "small": 0.4, "gpu": 0.5}  # that a measurement takes


def run(options: Bench) -> None:
    """Measures, writes results.json and benchmark.png, and prints the tables.

    Args:
      options: checked and resolved ones.

    Raises:
      InputError: the options do not fit the machine, or the output folder cannot be used.
    """
    clock = choose_clock(options)
    report.prepare_output(options.output)
    console = Console()
    results: dict[str, Any] = {
        "configuration": dataclasses.asdict(options) | {"clock": clock},
        **report.environment(),
        "machine": {"architecture": platform.machine(), "cores": usable_cores()},
        "measurements": [],
    }
    turns = [(m, size) for m in options.models for size in options.batch_size or (None,)]
    for turn, (model, size) in enumerate(turns):
        label = f"{model}{f', batch {size}' if size else ''} ({turn + 1} of {len(turns)})"
        entry = run_model(model, size, options, clock, label)
        results["measurements"].append(entry)
        console.print(times_table(entry, clock))
        console.print(programs_table(entry))
        report.write_json(options.output / "results.json", results)  # after each: a run is long
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


def run_model(
    model: str, batch_size: int | None, options: Bench, clock_name: str, label: str
) -> dict[str, Any]:
    """Measures all methods on a model.

    Args:
      model: key of `MODELS`.
      batch_size: None is the preset's.
      options: checked and resolved ones.
      clock_name: key of `CLOCKS`.
      label: of the progress.

    Returns:
      The model's part of results.json.
    """
    problem, clock = MODELS[model](options.preset, batch_size), CLOCKS[clock_name]
    names, compilations = options.methods or (), options.compilations or 1
    how: dict[str, Any] = {"compiler_options": HASTY} if options.preset == "tiny" else {}
    turns = np.random.default_rng(options.seed)
    begin = start(problem, options.seed)
    programs: dict[str, Program] = {}
    cycles: dict[str, int] = {}
    peaks: dict[str, int | None] = {}
    last: dict[str, Measurement] = {}
    compiled, measured = itertools.count(1), itertools.count(1)

    with (
        without_compilation_cache(),
        steps(label, (compilations + 1 + options.rounds) * len(names)) as told,
    ):

        def compile_once(name: str) -> float:
            told.begin(f"compiling {name}")
            programs[name] = compile_method(problem, name, begin, clock, **how)
            seconds = programs[name].compile_seconds
            left = compilations * len(names) - next(compiled)
            told.end(f"{name} compiled in {seconds:.1f} s, {left} left to compile")
            return seconds

        def measure_once(name: str) -> float:
            told.begin(f"measuring {name}")
            last[name] = measure(programs[name], begin, cycles[name], clock)
            rounds, rest = divmod(next(measured), len(names))
            told.end(None if rest else f"round {rounds} of {options.rounds} measured")
            return last[name].seconds

        compile_method(problem, "plain", begin, clock, **how)  # loads what all compilations need
        compile_times = interleave(names, compilations, turns, compile_once)
        for name in names:
            told.begin(f"calibrating {name}")
            cycles[name] = cycles_for(programs[name], begin, SECONDS[options.preset], clock)
            peaks[name] = peak_bytes(programs[name], begin)
            told.end()
        times = interleave(names, options.rounds, turns, measure_once)

    params_bytes = tree_bytes(begin.params)

    def entry(name: str, program: Program) -> dict[str, Any]:
        by_hand = BY_HAND.get(name)
        return {
            "what": inspect.getdoc(METHODS[name]).splitlines()[0],  # type: ignore[union-attr]
            "by_hand": by_hand,
            "seconds": summarise(times[name]),
            "ratio_to_plain": ratios(times, name, "plain"),
            "ratio_to_two_gradients": ratios(times, name, "two_gradients"),
            "ratio_to_by_hand": ratios(times, name, by_hand) if by_hand else None,
            "compile_seconds": summarise(compile_times[name]),
            "compile_ratio_to_plain": ratios(compile_times, name, "plain"),
            "compile_ratio_to_by_hand": ratios(compile_times, name, by_hand) if by_hand else None,
            "kernels": program.counts.kernels,
            "instructions": program.counts.instructions,
            "temporary_bytes": program.temporary_bytes,
            "temporaries": program.temporary_bytes / params_bytes,
            "state_bytes": program.state_bytes,
            "state": program.state_bytes / params_bytes,
            "peak_bytes": peaks[name],
            "descents_per_measurement": cycles[name] * program.method.descents,
            "loss": last[name].loss,
            "rounds": {"seconds": times[name], "compile_seconds": compile_times[name]},
        }

    return {
        "model": model,
        "batch_size": len(begin.batch.x),
        "description": problem.description,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(begin.params)),
        "leaves": len(jax.tree.leaves(begin.params)),
        "params_bytes": params_bytes,
        "methods": {name: entry(name, programs[name]) for name in names},
    }


def times_table(results: Mapping[str, Any], clock: str) -> Table:
    """What a descent step takes on a model, a row for every method.

    Args:
      results: the model's part of results.json.
      clock: key of `CLOCKS`.

    Returns:
      The table.
    """
    table = _table(
        f"{results['description']}: {results['parameters']:,} params",
        f"{'Processor time' if clock == 'cpu' else 'Time'} of a descent step, and its ratios to "
        "plain, to two_gradients and to the method by hand: medians, with half the interquartile "
        "ranges.",
        ("ms", "/ plain", "/ two", "/ by hand"),
    )
    for name, entry in results["methods"].items():
        table.add_row(
            name,
            f"{1000 * entry['seconds']['median']:.3g}",
            _with_spread(entry["ratio_to_plain"]),
            _with_spread(entry["ratio_to_two_gradients"]),
            _with_spread(entry["ratio_to_by_hand"]),
        )
    return table


def programs_table(results: Mapping[str, Any]) -> Table:
    """What the compiled programs are, a row for every method.

    Args:
      results: the model's part of results.json.

    Returns:
      The table, with the peak of memory if a device told it.
    """
    methods = results["methods"]
    told = any(entry["peak_bytes"] is not None for entry in methods.values())
    headers = ("compile s", "/ plain", "/ by hand", "kernels", "HLO", "temp.", "state")
    table = _table(
        None,
        "Time to compile, and its ratios to plain and to the method by hand. Kernels (fusions and "
        "custom calls) and instructions of the program. Temporary arrays and state of the "
        "optimizer in units of the params."
        + (" Peak of params, state and temporary arrays in MiB." if told else ""),
        headers + (("peak",) if told else ()),
    )
    for name, entry in methods.items():
        by_hand, peak = entry["compile_ratio_to_by_hand"], entry["peak_bytes"]
        table.add_row(
            name,
            f"{entry['compile_seconds']['median']:.3g}",
            f"{entry['compile_ratio_to_plain']['median']:.2f}",
            f"{by_hand['median']:.2f}" if by_hand else "-",
            f"{entry['kernels']}",
            f"{entry['instructions']}",
            f"{entry['temporaries']:.2f}",
            f"{entry['state']:.2f}",
            *([f"{peak / 2**20:,.0f}" if peak is not None else "-"] if told else []),
        )
    return table


def _table(title: str | None, caption: str, headers: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, title=title, caption=caption)
    table.add_column("method", no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _with_spread(summary: Mapping[str, float] | None) -> str:
    if summary is None:
        return "-"
    return f"{summary['median']:.3f} ±{(summary['upper'] - summary['lower']) / 2:.3f}"
