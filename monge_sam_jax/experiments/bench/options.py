"""The options of `monge-sam bench`; light to import, so that the command line's help is quick."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.common.options import (
    PRESET,
    InFolderOfPreset,
    check_counts,
    check_list,
    check_seed,
    presets_in_help,
)

MICROBATCHES = 4
REFERENCES = ("plain", "two_gradients")
# What a method is, written by hand: its time and its compilation are compared with this one's.
BY_HAND = {
    "optax_opaque": "sam_by_hand",
    "optax_transparent": "sam_by_hand",
    "sam": "sam_by_hand",
    "monge_sam": "monge_by_hand",
    "adaptive_sam": "adaptive_by_hand",
    "fisher_sam": "fisher_by_hand",
    "one_pass_gradient": "one_pass_by_hand",
    "one_pass_momentum": "one_pass_by_hand",
}

# What preset tiny compares, so that it ends soon.
FEW = ("monge_sam", "one_pass_gradient")

Model: TypeAlias = Literal["mlp", "deep_mlp", "resnet", "transformer"]
Preset: TypeAlias = Literal["auto", "tiny", "small", "gpu"]
Sharding: TypeAlias = Literal["data", "fsdp"]
Method: TypeAlias = Literal[
    "plain",
    "two_gradients",
    "sam_by_hand",
    "monge_by_hand",
    "adaptive_by_hand",
    "fisher_by_hand",
    "one_pass_by_hand",
    "optax_opaque",
    "optax_transparent",
    "sam",
    "monge_sam",
    "adaptive_sam",
    "fisher_sam",
    "monge_m_sharpness",
    "monge_period_5",
    "monge_late",
    "monge_last_layer",
    "monge_quarter_batch",
    "one_pass_gradient",
    "one_pass_momentum",
]


class MLPSize(NamedTuple):
    """Of an MLP and its batches."""

    features: int
    width: int
    layers: int
    batch_size: int


class ResNetSize(NamedTuple):
    """Of a ResNet and its batches of square images."""

    pixels: int
    channels: int
    stages: int
    blocks: int
    batch_size: int


class TransformerSize(NamedTuple):
    """Of a transformer and its batches."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    batch_size: int


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "mlp": MLPSize(16, 16, 1, 8),
        "deep_mlp": MLPSize(16, 8, 14, 8),
        "resnet": ResNetSize(10, 4, 1, 1, 4),
        "transformer": TransformerSize(16, 1, 2, 16, 8, 4),
        "dtype": "float32",
    },
    "small": {
        "mlp": MLPSize(784, 512, 3, 1024),
        "deep_mlp": MLPSize(128, 128, 150, 64),
        "resnet": ResNetSize(32, 16, 3, 1, 32),
        "transformer": TransformerSize(128, 2, 4, 256, 64, 16),
        "dtype": "float32",
    },
    "gpu": {
        "mlp": MLPSize(3072, 4096, 4, 4096),
        "deep_mlp": MLPSize(128, 128, 150, 64),
        "resnet": ResNetSize(32, 64, 4, 2, 128),  # ResNet-18
        "transformer": TransformerSize(768, 12, 12, 50257, 1024, 8),  # GPT-2 small
        "dtype": "bfloat16",
    },
}


@presets_in_help(SIZES)
@dataclasses.dataclass(frozen=True)
class Bench(InFolderOfPreset):
    """Measure what a training step costs with each method, on this machine.

    For every model and batch size two tables. Times: that of a descent step, as a ratio to that of
    plain (one gradient and the base optimizer), of two_gradients (the least that a second gradient
    costs) and of the same method written by hand. Programs: the time to compile as ratios to plain
    and to the method by hand, the kernels (fusions and custom calls) and instructions of the
    compiled text, its temporary arrays and the optimizer's state in units of the params, and the
    peak of memory where the device tells. All methods are compiled first, then run in turns, in a
    new order each round. Ratios are between times of the same round, so that drift cancels; the
    tables have their medians over rounds, and half their interquartile ranges.

    The base optimizer is SGD with momentum, AdamW for the transformer. Steps are jitted and take
    over the memory of params and state.

    With --compile-for nothing is run: the programs are compiled for an accelerator that this
    machine need not have, and counted, with what devices say to each other.

    Attributes:
      models: What to train, on generated data: an MLP, one of very many layers, a ResNet with
        BatchNorm, a causal transformer.
      methods: What to compare. plain and two_gradients are always measured, and with a method its
        form by hand. *_by_hand are written out with optax.tree.norm and without any guard, optax_*
        is optax.contrib.sam (transparent takes two calls for a descent step, which count together),
        the others are this package's. The default is all of them; in preset tiny monge_sam and
        one_pass_gradient. monge_late perturbs in the last tenth of training, measured
        as the last one of ten steps.
      preset: Size of models and batches. tiny takes less than a minute, nearly all of it to
        compile (hastily, so that compile times mean as little as ratios); small takes a quarter of
        an hour on two processor cores; gpu is for one large accelerator, takes ten minutes there
        and computes in bfloat16: GPT-2 small with 8 x 1024 tokens, ResNet-18 with 128 images. auto
        is small, and gpu with --compile-for.
      batch_size: Samples in a batch, in place of the preset's; several are measured one after the
        other. What a method adds to the plain step beside gradients does not depend on it. With
        --compile-for they are those of one device.
      rounds: Measurements of each method.
      compilations: How often each method is compiled. The default is 2 in preset small, else 1.
      clock: What time is. cpu is processor time of the process, over all its threads: the work
        done, also on a machine that is busy with other things. wall is time elapsed, which is what
        counts on an accelerator; on CPU it needs an idle machine. auto is cpu on CPU, and wall
        elsewhere.
      seed: Of params, data and turns.
      compile_for: Compile for h100 or a TPU slice such as v5e:2x4, and count; h100:8 are eight of
        them. Needs the extra cuda or tpu (pip install 'monge_sam_jax[cli,cuda]'), and no driver.
      sharding: What lies where if --compile-for is for several devices. data shares out the batch,
        fsdp also the params, each along its largest axis that the devices divide. The default is
        both, one after the other.
      effort: Of --compile-for. Compilers of TPUs take minutes for a step of a large model, with
        little a tenth of that: with the same collectives, other kernels and memory.
      output: Folder for results.json and benchmark.png, or with --compile-for for counts.json.
        Those of an earlier run with the same options are overwritten.
      overwrite: Write over the results of other options, if the output folder has some.
    """

    models: tuple[Model, ...] = ("mlp", "deep_mlp", "resnet", "transformer")
    methods: tuple[Method, ...] | None = None
    preset: Preset = "auto"
    batch_size: tuple[int, ...] | None = None
    rounds: int = 9
    compilations: int | None = None
    clock: Literal["auto", "cpu", "wall"] = "auto"
    seed: int = 0
    compile_for: str | None = None
    sharding: tuple[Sharding, ...] | None = None
    effort: Literal["full", "little"] = "full"
    output: Path = Path("runs/bench", PRESET)
    overwrite: bool = False

    @property
    def resolved_preset(self) -> Preset:
        """The preset that "auto" is."""
        if self.preset == "auto":
            return "gpu" if self.compile_for else "small"
        return self.preset

    def check(self) -> None:
        """Raises an InputError where an option cannot be used."""
        for name in ("models", "methods", "batch_size", "sharding"):
            noun = "number" if name == "batch_size" else "name"
            check_list(name, getattr(self, name), noun)
        check_counts({"rounds": self.rounds, "compilations": self.compilations})
        for size in self.batch_size or ():
            if size < 1 or size % MICROBATCHES:
                raise InputError(
                    f"--batch-size must be a positive multiple of {MICROBATCHES}, the number of "
                    f"micro-batches, got {size}"
                )
        check_seed(self.seed)
        if self.sharding and not self.compile_for:
            raise InputError("--sharding is for --compile-for: measurements are of one device")
        if self.effort != "full" and not self.compile_for:
            raise InputError("--effort is for --compile-for: what is measured is compiled in full")

    def resolved(self) -> "Bench":
        """The same with what depends on other options."""
        preset = self.resolved_preset
        usual = 2 if preset == "small" and not self.compile_for else 1
        methods = self.methods or (FEW if preset == "tiny" else get_args(Method))
        compared = {*REFERENCES, *methods, *(BY_HAND.get(name) for name in methods)}
        return dataclasses.replace(
            self,
            preset=preset,
            compilations=self.compilations or usual,
            methods=tuple(name for name in get_args(Method) if name in compared),
        )
