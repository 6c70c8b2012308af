"""The options of `monge-sam quality`; light to import, so that the command line's help is quick."""

import dataclasses
from pathlib import Path
from typing import Literal

from monge_sam_jax.experiments.common.options import (
    check_counts,
    check_list,
    check_numbers,
    check_seed,
    presets_in_help,
)

RADII = {"bad-minimum": (0.1, 0.5, 2.0, 4.0), "label-noise": (0.05, 0.1, 0.2, 0.5)}


@presets_in_help({"radii": RADII}, noun="Default ")
@dataclasses.dataclass(frozen=True)
class Quality:
    """Compare what methods reach with what they cost: test accuracy against gradients taken.

    SGD with momentum 0.9, SAM and M-SAM in two passes (two gradients a step) and in one, on
    scikit-learn's handwritten digits with a network of two hidden layers. Every method takes the
    same number of steps; the table also tells where it was when SGD's gradients were spent. The
    one-pass forms are measured at their unperturbed params.

    Attributes:
      tasks: bad-minimum starts where a network ends that was first fitted to spoilt copies of 500
        images with random labels, and then to the true labels (Liu et al. 2020). label-noise starts
        at random with 30 % of the training labels drawn anew.
      rho: Radii, each a column of the tables. By default those above.
      seeds: Number of seeds: of the initial params, the random labels and the order of the batches.
      seed: The first of them; the others follow it.
      width: Units of a hidden layer.
      epochs: Passes over the training set.
      confusion_epochs: Passes over the spoilt copies, for bad-minimum.
      output: Folder for results.json, quality.md and quality.png. Those of an earlier run
        with the same options are overwritten.
      overwrite: Write over the results of other options, if the output folder has some.
    """

    tasks: tuple[Literal["bad-minimum", "label-noise"], ...] = ("bad-minimum", "label-noise")
    rho: tuple[float, ...] = ()
    seeds: int = 5
    seed: int = 0
    width: int = 256
    epochs: int = 400
    confusion_epochs: int = 150
    output: Path = Path("runs/quality")
    overwrite: bool = False

    def radii(self, task: str) -> tuple[float, ...]:
        """Those that were given, or the task's own."""
        return self.rho or RADII[task]

    def check(self) -> None:
        """Raises an InputError where an option cannot be used."""
        check_list("tasks", self.tasks)
        check_numbers({"rho": self.rho})
        check_list("rho", self.rho, "number", may_be_empty=True)
        counts = ("seeds", "width", "epochs", "confusion_epochs")
        check_counts({name: getattr(self, name) for name in counts})
        check_seed(self.seed)
