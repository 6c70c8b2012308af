"""`monge-sam bench --compile-for`: compiles every step for an accelerator, and counts."""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from monge_sam_jax.experiments.bench.counts import LARGE
from monge_sam_jax.experiments.bench.measure import (
    CLOCKS,
    Clock,
    Program,
    Start,
    compile_steps,
    describe,
    interleave,
    ratios,
    summarise,
    without_compilation_cache,
)
from monge_sam_jax.experiments.bench.models import MODELS, Problem
from monge_sam_jax.experiments.bench.options import Bench
from monge_sam_jax.experiments.bench.report import plain_table
from monge_sam_jax.experiments.bench.steps import METHODS, Carry
from monge_sam_jax.experiments.bench.targets import mesh_of
from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.common.placement import AXIS, Placement
from monge_sam_jax.experiments.common.progress import steps

COLLECTIVES = {
    "all_reduces": "all-\nreduce",
    "all_gathers": "all-\ngather",
    "reduce_scatters": "reduce\nscatter",
    "other_collectives": "other",
    "large_collectives": "large",
}

EFFORT: dict[str, dict[str, Any]] = {
    "full": {},
    "little": {"exec_time_optimization_effort": -1.0},
}


def compile_all(options: Bench, target: str) -> None:
    """Compiles, writes counts.json and prints the tables.

    Args:
      options: checked and resolved ones.
      target: what for, as `mesh_of` takes it.

    Raises:
      InputError: there is no such target here, or the output folder cannot be used.
    """
    mesh = mesh_of(target)
    device = mesh.devices.flat[0]
    clock = "wall" if options.clock == "wall" else "cpu"
    shardings = options.sharding or (("data", "fsdp") if mesh.size > 1 else ("data",))
    configuration = dataclasses.asdict(options) | {
        "clock": clock,
        "sharding": shardings if mesh.size > 1 else None,
    }
    report.prepare_output(options.output, configuration, options.overwrite, file="counts.json")
    console = Console()
    results: dict[str, Any] = {
        "configuration": configuration,
        **report.environment(),
        "target": {"kind": device.device_kind, "platform": device.platform, "count": mesh.size},
        "programs": [],
    }
    turns = [
        (model, batch_size, sharding)
        for model in options.models
        for batch_size in options.batch_size or (None,)
        for sharding in shardings
    ]
    for turn, (model, batch_size, sharding) in enumerate(turns):
        placement = Placement(mesh, fully_sharded=sharding == "fsdp")
        label = model + (f", batch {batch_size}" if batch_size else "")
        label += f", {sharding}" if mesh.size > 1 else ""
        entry = compile_model(
            model, batch_size, options, placement, clock, f"{label} ({turn + 1} of {len(turns)})"
        )
        results["programs"].append(entry | {"sharding": sharding if mesh.size > 1 else None})
        report.write_json(options.output / "counts.json", results)  # after each: a run is long
        console.print(counts_table(results["programs"][-1], results["target"]), "")
    report.publish(options.output, {"counts.json": results})


def compile_model(
    model: str,
    batch_size: int | None,
    options: Bench,
    placement: Placement,
    clock_name: str,
    label: str,
) -> dict[str, Any]:
    """Compiles all methods for a model.

    Args:
      model: key of `MODELS`.
      batch_size: samples on a device; None is the preset's.
      options: checked and resolved ones.
      placement: on what devices, and what lies where.
      clock_name: key of `CLOCKS`.
      label: of the progress.

    Returns:
      The model's part of counts.json.
    """
    clock = CLOCKS[clock_name]
    problem = per_device(model, options.preset, batch_size, placement.mesh.size)
    begin = abstract_start(problem, placement)
    turns = np.random.default_rng(options.seed)
    programs: dict[str, Program | None] = {}
    names, compilations = options.methods or (), options.compilations or 1
    total = compilations * len(names)
    done = iter(range(1, total + 1))

    with without_compilation_cache(), steps(label, total) as told:

        def compile_once(name: str) -> float:
            told.begin(f"compiling {name}")
            program, left = None, total - next(done)
            try:
                how = {"compiler_options": EFFORT[options.effort]}
                program = compile_for(problem, name, begin, placement, clock, **how)
                result = (
                    f"compiled in {program.compile_seconds:.1f} s "
                    f"to {program.counts.kernels} kernels"
                )
            except jax.errors.JaxRuntimeError as error:
                if "No such compile option" in str(error):  # JAX 0.12 has it no more
                    raise InputError(
                        f"--effort {options.effort} is not known to this version of JAX's "
                        "compiler for the target: leave it out, for full effort"
                    ) from None
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                result = "is too large for the device's memory"
            programs[name] = program
            told.end(f"{name} {result}, {left} left to compile")
            return program.compile_seconds if program else math.nan

        _load_compiler(placement, clock)
        times = interleave(names, compilations, turns, compile_once)

    described = describe(model, problem, begin)
    return described | {
        "methods": {
            name: {
                "what": inspect.getdoc(METHODS[name]).splitlines()[0],  # type: ignore[union-attr]
                **program.counts._asdict(),
                "temporary_bytes": program.temporary_bytes,
                "temporaries": program.temporary_bytes / described["params_bytes"],
                "compile_seconds": summarise(times[name]),
                "compile_ratio_to_plain": ratios(times, name, "plain"),
            }
            if (program := programs[name])
            else None
            for name in names
        },
    }


def per_device(model: str, preset: str, batch_size: int | None, devices: int) -> Problem:
    """The problem with so many samples, or as many as is usual, on every device."""
    build = MODELS[model]
    if batch_size is None:
        init = build(preset, None).init
        batch_size = len(jax.eval_shape(init, jax.random.key(0))[2].x)
    # No target is a CPU, whose compiler alone wants convolutions outside of loops.
    return build(preset, batch_size * devices)._replace(has_convolutions=False)


def abstract_start(problem: Problem, placement: Placement) -> Start:
    """Shapes in place of arrays, and where they lie."""
    params, stats, batch = jax.eval_shape(problem.init, jax.random.key(0))
    return Start(
        params=_placed(params, placement.of_params(params)),
        stats=_placed(stats, jax.tree.map(lambda _: placement.everywhere, stats)),
        batch=_placed(batch, jax.tree.map(lambda _: _by_samples(placement), batch)),
    )


def compile_for(
    problem: Problem, name: str, begin: Start, placement: Placement, clock: Clock, **options: Any
) -> Program:
    """A method, compiled for the devices of a placement; the carry stays where it was.

    Args:
      problem: what is trained.
      name: key of `METHODS`.
      begin: from `abstract_start`.
      placement: where all of it is.
      clock: which times the compilation.
      **options: of `jax.jit`.

    Returns:
      The program, which cannot run here.
    """
    method = METHODS[name](problem)
    opt_state = jax.eval_shape(method.init, begin.params)
    # Of a shape, params and what mirrors them lie alike.
    opt_state = _placed(opt_state, placement.of_params(opt_state))
    carry = Carry(begin.params, opt_state, begin.stats)
    places = jax.tree.map(lambda x: x.sharding, carry)
    options["out_shardings"] = (places, placement.everywhere)
    return compile_steps(method, carry, begin.batch, clock, **options)


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def _by_samples(placement: Placement) -> NamedSharding:
    return NamedSharding(placement.mesh, PartitionSpec(AXIS))


def _load_compiler(placement: Placement, clock: Clock) -> None:
    """So that the first method is not charged for what all compilations need."""
    problem = per_device("mlp", "tiny", None, placement.mesh.size)
    compile_for(problem, "plain", abstract_start(problem, placement), placement, clock)


def counts_table(results: Mapping[str, Any], target: Mapping[str, Any]) -> Table:
    """The counts for a model as a table, a row for every method.

    Args:
      results: the model's part of counts.json.
      target: what it was compiled for.

    Returns:
      The table.
    """
    several = target["count"] > 1
    collectives = (
        f"Collectives, those of more than {LARGE} numbers apart; what is in a loop counts once. "
    )
    methods = results["methods"]
    columns = {"kernels": ("kernels", "d"), "instructions": ("HLO", "d")}
    if several:
        columns |= {name: (header, "d") for name, header in COLLECTIVES.items()}
        if not any(entry and entry["other_collectives"] for entry in methods.values()):
            del columns["other_collectives"]
    columns["temporaries"] = ("temp", ".2f")
    seconds = [] if several else ["compile s"]  # eighty characters are full with collectives
    table = plain_table(
        f"{results['description']}: {results['parameters']:,} params in {results['leaves']} "
        f"leaves; compiled for {target['count']} x {target['kind']}"
        + (f", {results['sharding']}" if several else ""),
        "Kernels (fusions and custom calls) and instructions of the compiled program. "
        + (collectives if several else "")
        + "Temporary arrays of a device in units of all params. Time to compile as a ratio to "
        "plain.",
        [*(header for header, _ in columns.values()), *seconds, "compile\n/ plain"],
    )
    table.show_edge = False
    for name, entry in methods.items():
        if entry is None:
            table.add_row(name, "no room")
            continue
        table.add_row(
            name,
            *(f"{entry[quantity]:{form}}" for quantity, (_, form) in columns.items()),
            *([] if several else [f"{entry['compile_seconds']['median']:.3g}"]),
            f"{entry['compile_ratio_to_plain']['median']:.2f}",
        )
    return table
