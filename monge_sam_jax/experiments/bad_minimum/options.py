"""The options of `monge-sam bad-minimum`; light to import, so that the command's help is quick."""

import dataclasses
from pathlib import Path
from typing import Literal, TypeAlias

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

Data: TypeAlias = Literal["digits", "cifar10"]
Model: TypeAlias = Literal["mlp", "resnet", "resnet18"]
Preset: TypeAlias = Literal["smoke", "digits", "digits-resnet", "paper"]

LEARNING_RATES = ("learning_rate", "confusion_learning_rate", "fitting_learning_rate")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a preset decides; the fields are those of `BadMinimum`, which explains them."""

    data: Data = "digits"
    model: Model = "mlp"
    width: int = 256
    train_size: int = 500
    validation_size: int = 297
    batch_size: int = 125
    copies: int = 20
    confusion_epochs: int = 150
    confusion_learning_rate: float = 0.05
    fitting_epochs: int = 2000
    fitting_learning_rate: float = 0.05
    scratch_epochs: int = 100
    epochs: int = 800
    learning_rate: float = 0.01
    momentum: float = 0.9
    rho: tuple[float, ...] = (0.1, 0.5, 2.0, 4.0, 6.0, 8.0)
    evaluations: int = 80


PRESETS: dict[Preset, Recipe] = {
    "smoke": Recipe(
        width=64,
        train_size=100,
        batch_size=50,
        copies=5,
        confusion_epochs=60,
        scratch_epochs=40,
        epochs=20,
        rho=(0.1, 2.0),
        evaluations=10,
    ),
    "digits": Recipe(),
    "digits-resnet": Recipe(
        model="resnet",
        width=16,
        copies=5,
        confusion_epochs=180,
        epochs=100,
        rho=(0.1, 1.0, 3.0, 6.0, 12.0),
        evaluations=40,
    ),
    "paper": Recipe(
        data="cifar10",
        model="resnet18",
        width=64,
        train_size=50_000,
        validation_size=2_000,
        batch_size=128,
        copies=5,
        confusion_epochs=100,
        fitting_epochs=500,
        epochs=500,
        learning_rate=0.001,
        momentum=0.0,
        rho=(0.005, 0.01, 0.03, 0.05),
        evaluations=100,
    ),
}


@presets_in_help(PRESETS)
@dataclasses.dataclass(frozen=True)
class BadMinimum(InFolderOfPreset):
    """Fine-tune from a bad global minimum with SGD, SAM and M-SAM (figure 6 of the paper).

    A network is first fitted to a confusion set: copies of every training image in which a tenth of
    the entries (of a pixel and a channel) is zero and the label is drawn at random. Then it is
    fitted to the true images and labels by plain SGD, until it is right on all of them. It
    generalises badly (Liu et al. 2020). From there SGD, SAM and M-SAM are run over a row of radii,
    on the same batches.

    Of the images that are not trained on, one part is for validation: it chooses the best epoch of
    a run. Test accuracies are those of the rest. The minima and all finished runs are kept in the
    output folder, by what decides them: the same command goes on where an interrupted one ended,
    with the same results, if it has as many processor cores: sums are divided among them, and
    training makes much of their last bits.

    Attributes:
      preset: What all options below it but seeds, seed, data_dir and output are, unless given.
        smoke takes seconds, digits about eight minutes on two cores, digits-resnet (a small
        ResNet with BatchNorm) twenty. paper is the paper's: ResNet-18 on CIFAR-10, for an
        accelerator, 8 GB of memory for the confusion set and --data-dir.
      data: digits are scikit-learn's 1797 handwritten digits of 8 x 8 pixels, divided anew for
        every seed. Of cifar10 the training images are those of the training files, all others those
        of the test file.
      model: mlp has two hidden layers, resnet two stages of one block with BatchNorm, resnet18 is
        the usual one for CIFAR-10.
      width: Units of a hidden layer, or channels of the first stage.
      train_size: Number of training images.
      validation_size: Number of images for validation.
      batch_size: Samples in a step; those left over at the end of an epoch are not used in it.
      copies: Copies of every training image in the confusion set.
      confusion_epochs: Passes over the confusion set, by SGD with momentum 0.9.
      confusion_learning_rate: Learning rate there, and of the baseline from scratch.
      fitting_epochs: Most passes over the true labels, by SGD without momentum.
      fitting_learning_rate: Learning rate there.
      scratch_epochs: Passes of the baseline, SGD with momentum 0.9 from fresh params.
      epochs: Passes of fine-tuning.
      learning_rate: Learning rate of fine-tuning.
      momentum: Momentum of fine-tuning, for all methods.
      rho: Radii of the perturbation, each a panel of the figure.
      evaluations: How often a run is evaluated after its start, more often in the beginning.
      seeds: Number of seeds: of the images, the initial params, the random labels and the batches.
        More of them in the same folder are added to those that are there.
      seed: The first of them; the others follow it.
      data_dir: The folder cifar-10-batches-py of CIFAR-10's Python version, or the one it is in.
      output: Folder for results.json, bad_minimum.md, figure6.png and mechanism.png, which are
        overwritten if they are of the same options, and for minima and finished runs.
      overwrite: Write over the results of other options, if the output folder has some.
    """

    preset: Preset = "digits"
    data: Data | None = None
    model: Model | None = None
    width: int | None = None
    train_size: int | None = None
    validation_size: int | None = None
    batch_size: int | None = None
    copies: int | None = None
    confusion_epochs: int | None = None
    confusion_learning_rate: float | None = None
    fitting_epochs: int | None = None
    fitting_learning_rate: float | None = None
    scratch_epochs: int | None = None
    epochs: int | None = None
    learning_rate: float | None = None
    momentum: float | None = None
    rho: tuple[float, ...] | None = None
    evaluations: int | None = None
    seeds: int = 5
    seed: int = 0
    data_dir: Path | None = None
    output: Path = Path("runs/bad-minimum", PRESET)
    overwrite: bool = False

    @property
    def recipe(self) -> Recipe:
        """The preset with what was given in place of its values."""
        names = [field.name for field in dataclasses.fields(Recipe)]
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return dataclasses.replace(PRESETS[self.preset], **given)

    def check(self) -> None:
        """Raises an InputError where an option cannot be used."""
        recipe = self.recipe
        counts = {"seeds": self.seeds, **dataclasses.asdict(recipe)}
        check_counts({name: value for name, value in counts.items() if isinstance(value, int)})
        rates = {name: getattr(recipe, name) for name in LEARNING_RATES}
        check_numbers(rates | {"rho": recipe.rho}, positive=True)
        check_numbers({"momentum": recipe.momentum})
        check_list("rho", recipe.rho, "number")
        if list(recipe.rho) != sorted(recipe.rho):
            raise InputError(f"--rho needs radii that increase, got {recipe.rho}")
        if recipe.batch_size > recipe.train_size:
            raise InputError(
                f"--batch-size {recipe.batch_size} is larger than --train-size {recipe.train_size}"
            )
        if recipe.evaluations > recipe.epochs:
            raise InputError(
                f"--evaluations {recipe.evaluations} are more than --epochs {recipe.epochs}"
            )
        check_seed(self.seed)
        if (recipe.data == "cifar10") != (self.data_dir is not None):
            raise InputError(
                "--data cifar10 needs --data-dir, the folder cifar-10-batches-py"
                if self.data_dir is None
                else "--data-dir is for --data cifar10 (or --preset paper) alone"
            )
