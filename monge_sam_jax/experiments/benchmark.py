"""The options of `monge-sam bench`; light to import, so that the command line's help is quick."""

import dataclasses
from pathlib import Path
from typing import Literal, TypeAlias

from monge_sam_jax.experiments import InputError

LARGEST_SEED = 2**31 - 1
MICROBATCHES = 4
REFERENCES = ("plain", "two_gradients")

Model: TypeAlias = Literal["mlp", "resnet", "transformer"]
Method: TypeAlias = Literal[
    "plain",
    "two_gradients",
    "sam_by_hand",
    "monge_by_hand",
    "optax_opaque",
    "optax_transparent",
    "sam",
    "monge_sam",
    "adaptive_sam",
    "fisher_sam",
    "monge_m_sharpness",
    "monge_period_5",
    "monge_last_layer",
    "monge_quarter_batch",
    "one_pass_gradient",
    "one_pass_momentum",
]


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure what a training step costs with each method, on this machine.

    For every model a table: the time of a descent step, as a ratio to that of plain (one gradient
    and the base optimizer) and to that of two_gradients (the least that a second gradient costs),
    the time to compile, the instructions of the compiled program, and its temporary arrays and the
    optimizer's state in units of the params. All methods are compiled first, then run in turns, in
    a new order each round. Ratios are between times of the same round, so that drift cancels; the
    table has their medians over rounds, and half their interquartile ranges.

    The base optimizer is SGD with momentum, AdamW for the transformer. Steps are jitted and take
    over the memory of params and state.

    Attributes:
      models: What to train, on generated data: an MLP, a ResNet with BatchNorm, a causal
        transformer.
      methods: What to compare. plain and two_gradients are always measured. *_by_hand are SAM
        and Monge SAM written out with two gradients and without any guard, optax_* is
        optax.contrib.sam (transparent takes two calls for a descent step, which count together),
        the others are this package's.
      preset: Size of models and batches. tiny takes a minute, nearly all of it to compile, and its
        ratios mean little; small takes some minutes on two processor cores; gpu is for one large
        accelerator and computes in bfloat16.
      batch_size: Samples in a batch, in place of the preset's. What a method adds to the plain step
        beside gradients does not depend on it.
      rounds: Measurements of each method.
      compilations: How often each method is compiled.
      clock: What time is. cpu is processor time of the process, over all its threads: the work
        done, also on a machine that is busy with other things. wall is time elapsed, which is what
        counts on an accelerator; on CPU it needs an idle machine. auto is cpu on CPU, and wall
        elsewhere.
      seed: Of params, data and turns.
      output: Folder for results.json and benchmark.png. Those of an earlier run are overwritten.
    """

    models: tuple[Model, ...] = ("mlp", "resnet", "transformer")
    methods: tuple[Method, ...] = Method.__args__  # type: ignore[attr-defined]
    preset: Literal["tiny", "small", "gpu"] = "small"
    batch_size: int | None = None
    rounds: int = 9
    compilations: int = 2
    clock: Literal["auto", "cpu", "wall"] = "auto"
    seed: int = 0
    output: Path = Path("runs/bench")

    def check(self) -> None:
        """Raises an InputError where an option cannot be used."""
        for name in ("models", "methods"):
            names = getattr(self, name)
            if not names:
                raise InputError(f"--{name} needs at least one name")
            if len(set(names)) < len(names):
                raise InputError(f"--{name} has a name twice: {' '.join(names)}")
        for name in ("rounds", "compilations"):
            if (count := getattr(self, name)) < 1:
                raise InputError(f"--{name} must be at least 1, got {count}")
        if self.batch_size is not None and (self.batch_size < 1 or self.batch_size % MICROBATCHES):
            raise InputError(
                f"--batch-size must be a positive multiple of {MICROBATCHES}, the number of "
                f"micro-batches, got {self.batch_size}"
            )
        if not 0 <= self.seed <= LARGEST_SEED:
            raise InputError(f"--seed must be from 0 to {LARGEST_SEED}, got {self.seed}")

    def run(self) -> None:
        """Measures, writes the results and prints them as tables.

        Raises:
          InputError: an option cannot be used, on this machine or at all.
        """
        self.check()
        from monge_sam_jax.experiments import bench_report

        bench_report.run(self)
