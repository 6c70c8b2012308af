"""The options of `monge-sam study`; light to import, so that the command line's help is quick."""

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.common.options import (
    PRESET,
    InFolderOfPreset,
    check_counts,
    check_list,
    check_numbers,
    check_seed,
    presets_in_help,
)

TaskName = Literal[
    "bad-minimum",
    "bad-minimum-mnist",
    "bad-minimum-resnet",
    "large-init",
    "label-noise-0",
    "label-noise-30",
    "label-noise-60",
    "regression",
    "forgetting",
]
MethodName = Literal[
    "plain",
    "plain_half",
    "average",
    "sam",
    "late_sam",
    "adaptive_sam",
    "monge_sam",
    "annealed_sam",
    "budget",
    "friendly",
    "one_pass_sam",
    "one_pass_monge",
    "annealed_one_pass_sam",
    "annealed_one_pass_monge",
    "averaged_monge",
    "geodesic",
    "functional",
    "layerwise",
    "supremum",
    "spectral",
]
CureName = Literal[
    "cosine_one_pass_sam",
    "warm_one_pass_sam",
    "warm_annealed_one_pass_sam",
    "momentum_one_pass_sam",
    "mixed_one_pass_sam",
    "capped_one_pass_sam",
    "ahead_one_pass_sam",
    "extra_one_pass_sam",
    "cosine_one_pass_monge",
    "warm_one_pass_monge",
    "warm_annealed_one_pass_monge",
    "momentum_one_pass_monge",
    "mixed_one_pass_monge",
    "capped_one_pass_monge",
    "ahead_one_pass_monge",
    "extra_one_pass_monge",
    "against_momentum",
]
# Words for several names of --methods.
GroupName = Literal["all", "one-pass"]
GROUPS: dict[str, tuple[str, ...]] = {
    "all": (*MethodName.__args__, "warm_annealed_one_pass_monge"),  # type: ignore[attr-defined]
    "one-pass": (
        *("plain", "sam", "monge_sam", "one_pass_sam", "one_pass_monge"),
        *("annealed_one_pass_sam", "annealed_one_pass_monge", *CureName.__args__),  # type: ignore[attr-defined]
    ),
}


class Preset(NamedTuple):
    """What a preset decides."""

    seeds: int
    tuning_seeds: int
    width: int
    epochs: int
    confusion_epochs: int
    channels: int
    text_width: int
    text_layers: int
    text_steps: int
    radii: int
    rates: tuple[float, ...]
    methods: tuple[MethodName, ...] = ()


PRESETS = {
    "smoke": Preset(
        seeds=2,
        tuning_seeds=1,
        width=16,
        epochs=2,
        confusion_epochs=1,
        channels=4,
        text_width=16,
        text_layers=1,
        text_steps=10,
        radii=2,
        rates=(1.0,),
        methods=("plain", "sam", "one_pass_monge"),
    ),
    "small": Preset(
        seeds=10,
        tuning_seeds=3,
        width=128,
        epochs=150,
        confusion_epochs=150,
        channels=4,
        text_width=32,
        text_layers=1,
        text_steps=200,
        radii=4,
        rates=(0.1, 1.0, 10.0),
    ),
    "full": Preset(
        seeds=10,
        tuning_seeds=3,
        width=256,
        epochs=400,
        confusion_epochs=150,
        channels=16,
        text_width=256,
        text_layers=4,
        text_steps=4000,
        radii=4,
        rates=(0.1, 0.3, 1.0, 3.0, 10.0),
    ),
}
MOST_FACTOR = 10.0  # of a learning rate, or one over it, where no radius is chosen


def factors(trials: int) -> tuple[float, ...]:
    """Of the learning rate, for methods that have no radius to choose.

    They are as many trials as others have, or one more, so that the task's own rate is the middle.

    >>> factors(5), factors(2), factors(1)
    ((0.1, 0.316, 1.0, 3.16, 10.0), (0.1, 1.0, 10.0), (1.0,))
    """
    half = trials // 2
    powers = (place / max(half, 1) for place in range(-half, half + 1))
    return tuple(float(f"{MOST_FACTOR**power:.3g}") for power in powers)


@presets_in_help(PRESETS)
@dataclasses.dataclass(frozen=True)
class Study(InFolderOfPreset):
    """Ask whether sharpness-aware training helps, on several tasks, at equal gradients and time.

    Every method starts from the same params, sees the same batches, takes as many gradients and has
    as many trials: radii of a line times learning rates, or learning rates alone where there is no
    radius. The mean score on validation samples chooses, over the first seeds, and what is chosen
    is trained from all seeds. What is finished is kept in the output folder: the same command goes
    on after an interruption, and with more seeds, tasks and methods. So `--tasks` does a part, and
    parts may run at once with one folder; the whole command then finds all of it there. Trainings
    are small and many, so --devices divides them, and no batch.

    Attributes:
      preset: Sizes, which the options below change one by one. smoke takes three minutes on two
        cores; small 75 minutes in two parts at once, two and a half hours of processor time; full
        is for days of cores, or for a GPU.
      tasks: bad-minimum and large-init start where a network knows 500 images by heart and little
        else, the first after learning noise (Liu et al. 2020), the second from large weights; two
        more do the first on MNIST and with a ResNet. label-noise-30 starts at random with 30 % of
        the labels drawn anew. regression is the temperature of a rod, where losses are tiny.
        forgetting is a language model of Python's standard library that is fine-tuned on English.
      methods: What is compared with plain training; by default fourteen methods, nine where no
        label is wrong, on MNIST and on text, five on the ResNet. all adds other balls, geodesics
        and the like; one-pass stands for all that may keep one pass from falling apart at large
        radii: schedules of the radius, other directions, a margin of stability, a second gradient
        at every fourth step.
      seeds: Number of seeds: of params, samples, labels and batches.
      seed: The first of them; the others follow it.
      tuning_seeds: How many of them choose.
      rho: Radii in place of each task's line, as Euclidean lengths.
      rates: Factors of the learning rate, tried with every radius.
      width: Units of a hidden layer.
      epochs: Passes over the training set of a method with two gradients a step.
      confusion_epochs: Passes over the spoilt copies, for bad-minimum.
      channels: Of the ResNet's first stage.
      text_width: Of the language model.
      text_layers: Of it.
      text_steps: Of its training by a method with two gradients a step.
      devices: How many of the machine's devices train, each a run at a time. Without a GPU the CPU
        is as many, but two parts at once use two cores better.
      output: Folder for summary.json, results.json, study.md, figures and what is finished.
      overwrite: Write over the results of other options, if the output folder has some.
    """

    preset: Literal["smoke", "small", "full"] = "small"
    tasks: tuple[TaskName, ...] = TaskName.__args__  # type: ignore[attr-defined]
    methods: tuple[MethodName | CureName | GroupName, ...] = ()
    seeds: int | None = None
    seed: int = 0
    tuning_seeds: int | None = None
    rho: tuple[float, ...] = ()
    rates: tuple[float, ...] = ()
    width: int | None = None
    epochs: int | None = None
    confusion_epochs: int | None = None
    channels: int | None = None
    text_width: int | None = None
    text_layers: int | None = None
    text_steps: int | None = None
    devices: int = 1
    output: Path = Path("runs", "study", PRESET)
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Resolves the default folder, and groups of methods."""
        super().__post_init__()
        names = (name for word in self.methods for name in GROUPS.get(word, (word,)))
        object.__setattr__(self, "methods", tuple(dict.fromkeys(names)))

    @property
    def size(self) -> Preset:
        """The preset with what was given instead."""
        given = {name: getattr(self, name) for name in Preset._fields if name != "radii"}
        return PRESETS[self.preset]._replace(**{name: v for name, v in given.items() if v})

    def radii(self, line: tuple[float, ...]) -> tuple[float, ...]:
        """Those that were given, or as many of a task's line as the preset has."""
        return self.rho or line[: self.size.radii]

    def check(self) -> None:
        """Raises an InputError where an option cannot be used."""
        check_list("tasks", self.tasks, "name")
        check_list("methods", self.methods, "name", may_be_empty=True)
        if self.methods and "plain" not in self.methods:
            raise InputError("--methods needs plain too, with which the others are compared")
        for name in ("rho", "rates"):
            check_list(name, getattr(self, name), "number", may_be_empty=True)
            check_numbers({name: getattr(self, name)}, positive=True)
        own = ("radii", "rates", "methods")
        check_counts({name: getattr(self, name) for name in Preset._fields if name not in own})
        check_counts({"devices": self.devices})
        check_seed(self.seed)
        if self.size.channels % 4:
            raise InputError(
                f"--channels must be a multiple of 4, for its groups, got {self.channels}"
            )
