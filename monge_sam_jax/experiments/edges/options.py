"""The options of `monge-sam edges`; light to import, so that the command line's help is quick."""

import dataclasses
from pathlib import Path
from typing import Literal, TypeAlias

from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.common.options import check_numbers, check_seed, flag

Direction: TypeAlias = Literal["gradient", "momentum"]
MOST_IMAGES = 898  # of the training half


@dataclasses.dataclass(frozen=True)
class Edges:
    """Compare the sharpness that training settles at with the predicted edge of stability.

    Gradient descent, SAM and M-SAM in two passes and in one, on all images at every step, of
    scikit-learn's handwritten digits, with the squared error of a network of two hidden layers of
    ReLU units. The largest eigenvalue of the Hessian is compared with the edge at the effective
    radius that the optimizer's diagnostics have at the time.

    Attributes:
      rho: Radii, each a column of the tables.
      learning_rate: Of gradient descent.
      momentum: Of the same, as in optax.sgd.
      direction: What one pass perturbs along, the gradient or the momentum.
      seeds: Number of seeds: of the initial params, and of the choice of images.
      seed: The first of them; the others follow it.
      images: Number of training images; 898 at most.
      width: Units of a hidden layer.
      steps: Number of steps; of more than ten, as many as ten equal parts have.
      output: Folder for results.json, edges.md and edges.png. Those of an earlier run with the same
        options are overwritten.
      overwrite: Write over the results of other options, if the output folder has some.
    """

    rho: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0)
    learning_rate: float = 0.1
    momentum: float = 0.0
    direction: Direction = "gradient"
    seeds: int = 3
    seed: int = 0
    images: int = 500
    width: int = 64
    steps: int = 2000
    output: Path = Path("runs/edges")
    overwrite: bool = False

    def check(self) -> None:
        """Raises an InputError where an option cannot be used."""
        check_numbers({"rho": self.rho, "momentum": self.momentum})
        if self.momentum >= 1:
            raise InputError(f"--momentum must be less than 1, got {self.momentum}")
        if self.direction == "momentum" and self.momentum == 0:
            raise InputError("--direction momentum needs a --momentum above zero")
        if not self.rho:
            raise InputError("--rho needs at least one number")
        check_numbers({"learning_rate": self.learning_rate}, positive=True)
        for name, least in (("seeds", 1), ("images", 1), ("width", 1), ("steps", 10)):
            if getattr(self, name) < least:
                raise InputError(
                    f"{flag(name)} must be at least {least}, got {getattr(self, name)}"
                )
        if self.images > MOST_IMAGES:
            raise InputError(f"--images must be at most {MOST_IMAGES}, got {self.images}")
        check_seed(self.seed)
