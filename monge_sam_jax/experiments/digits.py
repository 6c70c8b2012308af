"""The options of `monge-sam train`; light to import, so that the command line's help is quick."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from monge_sam_jax.experiments import InputError

LEARNING_RATES = {"sgd": 0.05, "adam": 0.001, "adamw": 0.001}
LARGEST_SEED = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a small network with several optimizers and compare them.

    The data are scikit-learn's handwritten digits (1797 images of 8 x 8 pixels, scaled to [0, 1]),
    or your own. Half of them, every class in proportion, are the test set; the split is the same
    for all seeds.

    Attributes:
      optimizers: What to compare. sgd is the base optimizer alone, whichever that is; the others
        hand it the gradient at the worst-case perturbation.
      base: Base optimizer: sgd (with momentum 0.9), adam or adamw.
      learning_rate: Learning rate of the base optimizer. By default 0.05 for sgd, 0.001 for adam
        and adamw.
      rho: Radius of the perturbation, for all methods. By default each method's own: 0.5 for
        adaptive_sam, 0.05 for the others.
      alpha: Height of the loss surface, for monge_sam: 0 is SAM, 1 the paper's M-SAM.
      model: mlp has two hidden layers of 128 units, cnn two convolutions.
      epochs: Passes over the training set.
      batch_size: Samples in a step.
      seeds: Number of seeds: of the initial params and the order of the batches.
      seed: The first of them; the others follow it.
      sharpness_rho: Distance from the final params, along the gradient of the training loss, at
        which the sharpness of all methods is measured.
      data: An .npz file with data of your own: numbers x of shape (n, ...) and integer labels y of
        shape (n,). The cnn needs images, (n, height, width) or (n, height, width, channels). x is
        shifted and scaled to mean zero and variance one on the training set: each feature of a
        table (n, features), each channel of (n, height, width, channels), and all values together
        of (n, height, width).
      output: Folder for results.json and training.png. Those of an earlier run are overwritten.
    """

    optimizers: tuple[Literal["sgd", "sam", "monge_sam", "adaptive_sam", "fisher_sam"], ...] = (
        "sgd",
        "sam",
        "monge_sam",
        "adaptive_sam",
        "fisher_sam",
    )
    base: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: float | None = None
    rho: float | None = None
    alpha: float = 1.0
    model: Literal["mlp", "cnn"] = "mlp"
    epochs: int = 60
    batch_size: int = 32
    seeds: int = 5
    seed: int = 0
    sharpness_rho: float = 0.1
    data: Path | None = None
    output: Path = Path("runs/digits")

    @property
    def base_learning_rate(self) -> float:
        """The learning rate, or the base optimizer's default."""
        if self.learning_rate is None:
            return LEARNING_RATES[self.base]
        return self.learning_rate

    def check(self) -> None:
        """Raises an InputError where an option cannot be used."""
        if not self.optimizers:
            raise InputError("--optimizers needs at least one name")
        if len(set(self.optimizers)) < len(self.optimizers):
            raise InputError(f"--optimizers has a name twice: {' '.join(self.optimizers)}")
        for name in ("epochs", "batch_size", "seeds"):
            if (count := getattr(self, name)) < 1:
                raise InputError(f"{_flag(name)} must be at least 1, got {count}")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise InputError(f"--seed must be from 0 to {LARGEST_SEED}, got {self.seed}")
        for name in ("rho", "alpha", "learning_rate", "sharpness_rho"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{_flag(name)} must be finite and not negative, got {value}")

    def run(self) -> None:
        """Trains, writes the results and prints them as a table.

        Raises:
          InputError: an option or the data cannot be used.
        """
        self.check()
        from monge_sam_jax.experiments import comparison

        comparison.run(self)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
