"""`monge-sam bench`: runs the measurements, writes and prints what they come to."""

import dataclasses
import inspect
import itertools
import os
import platform
from typing import Any

import jax
import numpy as np
from rich.console import Console

from monge_sam_jax.experiments.bench.compile import compile_all
from monge_sam_jax.experiments.bench.measure import (
    CLOCKS,
    HASTY,
    Measurement,
    Program,
    compile_method,
    cycles_for,
    describe,
    interleave,
    measure,
    peak_bytes,
    ratios,
    start,
    summarise,
    without_compilation_cache,
)
from monge_sam_jax.experiments.bench.models import MODELS
from monge_sam_jax.experiments.bench.options import BY_HAND, Bench
from monge_sam_jax.experiments.bench.plots import benchmark_figure
from monge_sam_jax.experiments.bench.report import programs_table, times_table
from monge_sam_jax.experiments.bench.steps import METHODS
from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.common.progress import steps

SECONDS = {"tiny": 0.02, "small": 0.4, "gpu": 0.5}  # that a measurement takes


def run(options: Bench) -> None:
    """Measures or compiles, writes the results and prints them as tables.

    Args:
      options: unchecked ones.

    Raises:
      InputError: an option cannot be used, on this machine or at all.
    """
    options.check()
    if options.compile_for:
        compile_all(options.resolved(), options.compile_for)
    else:
        measure_all(options.resolved())


def measure_all(options: Bench) -> None:
    """Measures, writes results.json and benchmark.png, and prints the tables.

    Args:
      options: checked and resolved ones.

    Raises:
      InputError: the options do not fit the machine, or the output folder cannot be used.
    """
    clock = choose_clock(options)
    configuration = dataclasses.asdict(options) | {"clock": clock}
    report.prepare_output(options.output, configuration, options.overwrite)
    console = Console()
    results: dict[str, Any] = {
        "configuration": configuration,
        **report.environment(),
        "machine": {"architecture": platform.machine(), "cores": usable_cores()},
        "measurements": [],
    }
    turns = [(m, size) for m in options.models for size in options.batch_size or (None,)]
    for turn, (model, size) in enumerate(turns):
        label = f"{model}{f', batch {size}' if size else ''} ({turn + 1} of {len(turns)})"
        entry = run_model(model, size, options, clock, label)
        results["measurements"].append(entry)
        report.write_json(options.output / report.RESULTS, results)  # after each: a run is long
        console.print(times_table(entry, clock))
        console.print(programs_table(entry))
    figure = benchmark_figure(results)
    report.publish(options.output, {report.RESULTS: results, "benchmark.png": figure})


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

    described = describe(model, problem, begin)

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
            "temporaries": program.temporary_bytes / described["params_bytes"],
            "state_bytes": program.state_bytes,
            "state": program.state_bytes / described["params_bytes"],
            "peak_bytes": peaks[name],
            "descents_per_measurement": cycles[name] * program.method.descents,
            "loss": last[name].loss,
            "rounds": {"seconds": times[name], "compile_seconds": compile_times[name]},
        }

    return described | {"methods": {name: entry(name, programs[name]) for name in names}}
