"""The options of `monge-sam edges`; light to import, so that the command line's help is quick."""

import dataclasses
from pathlib import Path
from typing import Literal, TypeAlias

from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.common.options import (
    check_counts,
    check_list,
    check_numbers,
    check_seed,
    flag,
)

Direction: TypeAlias = Literal["gradient", "momentum"]
MOST_IMAGES = 898  # of the training half


@dataclasses.dataclass(frozen=True)
class Edges:
    """Compare the sharpness that training settles at with the predicted edge of stability.

    Gradient descent, SAM and M-SAM in two passes and in one, on all images at every step or on
    mini-batches, of scikit-learn's handwritten digits, with the squared error of a network of two
    hidden layers of ReLU units. The largest eigenvalue of the Hessian of all images is compared
    with the edge at the effective radius that the optimizer's diagnostics have at the time. Two
    predictions are judged: that sharpness settles at that edge, and that training collapses from
    the rho on at which that radius times the sharpness is one.

    Attributes:
      rho: Radii, each a column of the tables.
      batch_size: Images of a step, drawn anew in every epoch without replacement; all of them if it
        is not given.
      learning_rate: Of gradient descent.
      momentum: Of the same, as in optax.sgd.
      direction: What one pass perturbs along, the gradient or the momentum.
      seeds: Number of seeds: of the initial params, and of the choice and order of images.
      seed: The first of them; the others follow it.
      images: Number of training images; 898 at most.
      width: Units of a hidden layer.
      steps: Number of steps; of more than ten, as many as ten equal parts have.
      output: Folder for results.json, edges.md and edges.png. Those of an earlier run with the same
        options are overwritten.
      overwrite: Write over the results of other options, if the output folder has some.
    """

    rho: tuple[float, ...] = (0.03, 0.1, 0.3, 0.5, 0.7, 1.0)
    batch_size: int | None = None
    learning_rate: float = 0.2
    momentum: float = 0.0
    direction: Direction = "gradient"
    seeds: int = 10
    seed: int = 0
    images: int = 150
    width: int = 24
    steps: int = 1000
    output: Path = Path("runs/edges")
    overwrite: bool = False

    def check(self) -> None:
        """Raises an InputError where an option cannot be used."""
        check_numbers({"rho": self.rho, "momentum": self.momentum})
        if self.momentum >= 1:
            raise InputError(f"--momentum must be less than 1, got {self.momentum}")
        if self.direction == "momentum" and self.momentum == 0:
            raise InputError("--direction momentum needs a --momentum above zero")
        check_list("rho", self.rho, "number")
        check_counts({"batch_size": self.batch_size})
        check_numbers({"learning_rate": self.learning_rate}, positive=True)
        for name, least in (("seeds", 1), ("images", 1), ("width", 1), ("steps", 10)):
            if getattr(self, name) < least:
                raise InputError(
                    f"{flag(name)} must be at least {least}, got {getattr(self, name)}"
                )
        if self.images > MOST_IMAGES:
            raise InputError(f"--images must be at most {MOST_IMAGES}, got {self.images}")
        if self.batch_size is not None and self.batch_size > self.images:
            raise InputError(
                f"--batch-size must be at most --images, {self.images}, got {self.batch_size}"
            )
        check_seed(self.seed)
