"""How `monge-sam bench` measures: interleaved, in shuffled rounds, after everything is compiled."""

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

from monge_sam_jax.experiments.bench.counts import Counts, count
from monge_sam_jax.experiments.bench.models import Problem
from monge_sam_jax.experiments.bench.steps import METHODS, Carry, Method, Step
from monge_sam_jax.experiments.common.data import Batch

Clock: TypeAlias = Callable[[], float]
CLOCKS: dict[str, Clock] = {"cpu": time.process_time, "wall": time.perf_counter}

# For the smallest models: LLVM's optimisation is half of what compiling them takes.
HASTY = {"xla_backend_optimization_level": 0}


class Start(NamedTuple):
    """Where all methods start from."""

    params: chex.ArrayTree
    stats: chex.ArrayTree
    batch: Batch


class Program(NamedTuple):
    """A method, compiled.

    Attributes:
      method: the method.
      cycle: its steps, jitted; they take over the memory of the carry.
      compile_seconds: to trace, lower and compile the steps, each once.
      counts: of the compiled steps together.
      temporary_bytes: what the steps allocate beside their arguments and results, at most.
      state_bytes: of the optimizer's state.
    """

    method: Method
    cycle: tuple[Step, ...]
    compile_seconds: float
    counts: Counts
    temporary_bytes: int
    state_bytes: int


class Measurement(NamedTuple):
    """What a number of steps took.

    Attributes:
      seconds: for a descent step.
      loss: of the last call.
    """

    seconds: float
    loss: float


def start(problem: Problem, seed: int) -> Start:
    """Params, statistics and a batch."""
    key = jax.random.key(seed, impl="rbg")  # quicker to compile than the default
    return Start(*jax.jit(problem.init)(key))


def describe(model: str, problem: Problem, begin: Start) -> dict[str, Any]:
    """What is trained, for results.json."""
    return {
        "model": model,
        "batch_size": len(begin.batch.x),
        "description": problem.description,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(begin.params)),
        "leaves": len(jax.tree.leaves(begin.params)),
        "params_bytes": tree_bytes(begin.params),
    }


def compile_method(
    problem: Problem, name: str, begin: Start, clock: Clock, **options: Any
) -> Program:
    """Compiles a method anew, and counts what there is to count.

    Args:
      problem: what is trained.
      name: key of `METHODS`.
      begin: whose shapes the steps are compiled for.
      clock: which times the compilation.
      **options: of `jax.jit`.

    Returns:
      The program.
    """
    method = METHODS[name](problem)
    return compile_steps(method, first_carry(method, begin), begin.batch, clock, **options)


def compile_steps(
    method: Method, carry: Carry, batch: Batch, clock: Clock, **options: Any
) -> Program:
    """Compiles a method for such a carry and batch, of which the shapes and places are looked at.

    Args:
      method: the method.
      carry: arrays, or `jax.ShapeDtypeStruct`s.
      batch: likewise.
      clock: which times the compilation.
      **options: of `jax.jit`.

    Returns:
      The program.
    """
    jitted = {step: jax.jit(step, donate_argnums=0, **options) for step in method.cycle}
    before = clock()
    compiled: list[Any] = [step.lower(carry, batch).compile() for step in jitted.values()]
    seconds = clock() - before
    return Program(
        method=method,
        cycle=tuple(jitted[step] for step in method.cycle),
        compile_seconds=seconds,
        counts=functools.reduce(Counts.plus, (count(c.as_text()) for c in compiled)),
        temporary_bytes=max(c.memory_analysis().temp_size_in_bytes for c in compiled),
        state_bytes=tree_bytes(carry.opt_state),
    )


def first_carry(method: Method, begin: Start) -> Carry:
    """A fresh carry, in memory of its own, which a step may take over."""
    carry = Carry(begin.params, method.init(begin.params), begin.stats)
    return jax.tree.map(jnp.copy, carry)


def run_cycle(program: Program, carry: Carry, batch: Batch) -> tuple[Carry, jax.Array]:
    """The steps of a cycle, in turn."""
    for step in program.cycle:
        carry, loss = step(carry, batch)
    return carry, loss


def measure(program: Program, begin: Start, cycles: int, clock: Clock) -> Measurement:
    """Runs cycles of steps from the start, after one to warm up."""
    carry, batch = first_carry(program.method, begin), begin.batch
    carry, loss = jax.block_until_ready(run_cycle(program, carry, batch))
    before = clock()
    for _ in range(cycles):
        carry, loss = run_cycle(program, carry, batch)
    jax.block_until_ready((carry, loss))
    seconds = clock() - before
    return Measurement(seconds / (cycles * program.method.descents), float(loss))


def cycles_for(program: Program, begin: Start, seconds: float, clock: Clock) -> int:
    """How many cycles take about so many seconds, at least one, by a trial."""
    trial = measure(program, begin, 1, clock).seconds * program.method.descents
    return max(1, math.ceil(seconds / max(trial, 1e-6)))


def peak_bytes(program: Program, begin: Start, device: Any = None) -> int | None:
    """The most memory that training holds at a time, beside what it starts from.

    Devices tell the highest mark since the process began. So that this program's is above those
    before, as much is filled with an array as would leave the mark just under what the program is
    expected to reach.

    Args:
      program: the method, which runs for one cycle.
      begin: where it starts from.
      device: what is asked, the first one if None.

    Returns:
      Bytes of carry and temporary arrays; None if the device does not tell, or the mark stood.
    """
    device = device or jax.devices()[0]
    outside = device.memory_stats() or {}
    if "peak_bytes_in_use" not in outside:
        return None
    carry = jax.block_until_ready(first_carry(program.method, begin))
    before = device.memory_stats()
    mark = before["peak_bytes_in_use"]
    expected = before["bytes_in_use"] + int(0.98 * program.temporary_bytes)
    try:
        filling = _fill(max(0, mark - expected))
        jax.block_until_ready((filling, run_cycle(program, carry, begin.batch)))
    except jax.errors.JaxRuntimeError:  # there was no room for it in one piece
        return None
    peak = device.memory_stats()["peak_bytes_in_use"]
    return peak - filling.nbytes - outside["bytes_in_use"] if peak > mark else None


def _fill(size: int) -> jax.Array:
    return jnp.zeros(size, jnp.uint8)


def interleave(
    names: Sequence[str],
    rounds: int,
    turns: np.random.Generator,
    once: Callable[[str], float],
) -> dict[str, list[float]]:
    """Calls once(name) for all names in every round, in an order of its own.

    Args:
      names: what takes turns.
      rounds: number of rounds.
      turns: decides the orders.
      once: does something with a name, and says how long it took.

    Returns:
      By name, a number for every round.
    """
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in turns.permutation(list(names)):
            times[str(name)].append(once(str(name)))
    return times


def summarise(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    lower, median, upper = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(median), "lower": float(lower), "upper": float(upper)}


def ratios(times: Mapping[str, Sequence[float]], name: str, reference: str) -> dict[str, float]:
    """Summary of the ratio of two methods' times in the same round, so that drift cancels.

    >>> ratios({"a": [3.0, 8.0, 4.0], "b": [1.0, 2.0, 2.0]}, "a", "b")
    {'median': 3.0, 'lower': 2.5, 'upper': 3.5}
    """
    return summarise([a / b for a, b in zip(times[name], times[reference], strict=True)])


def tree_bytes(tree: chex.ArrayTree) -> int:
    """Bytes of all arrays of a tree, or of what has their shapes and dtypes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@contextmanager
def without_compilation_cache() -> Iterator[None]:
    """So that a compilation is one, also where the user keeps programs on disk."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
