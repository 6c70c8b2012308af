"""`monge-sam bad-minimum`: minima, runs from them, and what is written about them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from monge_sam_jax.experiments.bad_minimum import training
from monge_sam_jax.experiments.bad_minimum.claims import claims
from monge_sam_jax.experiments.bad_minimum.data import CLASSES, Source, Splits
from monge_sam_jax.experiments.bad_minimum.options import BadMinimum, Recipe
from monge_sam_jax.experiments.bad_minimum.plots import accuracy_figure, mechanism_figure
from monge_sam_jax.experiments.bad_minimum.report import LABELS, final, markdown
from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.data import shuffled_rows
from monge_sam_jax.experiments.common.grid import train_grid
from monge_sam_jax.experiments.common.kept import Store, Tree
from monge_sam_jax.experiments.common.progress import Steps

SCRATCH = "scratch"  # the baseline, among the names of methods

# What of a recipe does not decide the bad minimum, and what does not decide a run from it.
AFTER_THE_START = ("scratch_epochs", "epochs", "learning_rate", "momentum", "evaluations", "rho")
BESIDE_A_RUN = ("rho",)


class Cell(NamedTuple):
    """A method with its radius; None for methods without."""

    method: str
    rho: float | None = None

    def __str__(self) -> str:
        return LABELS[self.method] + ("" if self.rho is None else f", rho = {self.rho:g}")


def cells(recipe: Recipe) -> list[Cell]:
    """All of a recipe, the baseline first."""
    perturbed = [Cell(method, rho) for rho in recipe.rho for method in ("sam", "monge_sam")]
    return [Cell(SCRATCH), Cell("sgd"), *perturbed]


def run(options: BadMinimum) -> None:
    """Trains, writes the files, and prints the table and the claims.

    Args:
      options: unchecked ones.

    Raises:
      InputError: an option, the data or the output folder cannot be used, or a minimum is not
        reached.
    """
    options.check()
    report.prepare_output(options.output, configuration(options), options.overwrite, may_grow=True)
    results = compare(options)
    files = {
        report.RESULTS: results,
        "bad_minimum.md": markdown(results),
        "figure6.png": accuracy_figure(results),
        "mechanism.png": mechanism_figure(results),
    }
    report.publish(options.output, files)


def configuration(options: BadMinimum) -> dict[str, Any]:
    """The options as they are in results.json."""
    return {**dataclasses.asdict(options), **dataclasses.asdict(options.recipe)}


def compare(options: BadMinimum) -> dict[str, Any]:
    """Trains what is not kept yet.

    Args:
      options: checked ones.

    Returns:
      The content of results.json.

    Raises:
      InputError: the data cannot be used, or a minimum is not reached.
    """
    comparison = _Comparison(options)
    seeds = range(options.seed, options.seed + options.seeds)
    starts, curves = train_grid(seeds, cells(options.recipe), comparison.begin, start="bad minimum")
    results = {
        "configuration": configuration(options),
        **report.environment(),
        "data": comparison.sizes,
        "parameters": comparison.parameters,
        "starts": [{name: x.item() for name, x in notes.items()} for notes in starts],
        "runs": [_entry(cell, trees, seeds) for cell, trees in curves.items()],
    }
    judged = report.without_verdicts(claims(results), results["configuration"])
    return report.jsonable(results | {"claims": judged})


def _entry(cell: Cell, trees: list[Tree], seeds: range) -> dict[str, Any]:
    curves = [{name: x.tolist() for name, x in tree.items()} for tree in trees]
    finals = [final(entry) for entry in curves]
    return {
        "method": cell.method,
        "label": LABELS[cell.method],
        "rho": cell.rho,
        "epoch": curves[0]["epoch"],
        "summary": report.summarise(finals),
        "seeds": [
            {"seed": seed, "final": ending, "curves": entry}
            for seed, ending, entry in zip(seeds, finals, curves, strict=True)
        ],
    }


class _Comparison:
    """What all seeds share."""

    def __init__(self, options: BadMinimum) -> None:
        self._recipe = options.recipe
        self._source = Source(options)
        decisive = dataclasses.asdict(self._recipe) | {"checksum": self._source.checksum}
        self._store = Store(options.output, decisive)
        splits = self._source.splits(options.seed)
        self._trainer = training.Trainer(self._recipe, splits.train)
        self.sizes = {
            "name": self._recipe.data,
            "classes": CLASSES,
            **{f"{name}_samples": len(part.y) for name, part in splits._asdict().items()},
        }
        fresh = self._trainer.fresh(options.seed)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(fresh["params"]))

    def begin(self, seed: int, told: Steps) -> tuple[Tree, Callable[[Cell], Tree]]:
        """The notes on a seed's bad minimum, and what gives the curves of a cell from there."""
        splits = self._source.splits(seed)

        def minimum() -> Tree:
            variables, notes = training.find_bad_minimum(
                self._trainer, self._recipe, splits, seed, told.end_part
            )
            return {"variables": variables, "notes": notes}

        told.begin_part("", self._recipe.confusion_epochs, "epoch")
        start = self._store.kept(("start",), seed, minimum, AFTER_THE_START)

        def train(cell: Cell) -> Tree:
            epochs = self._recipe.scratch_epochs if cell.method == SCRATCH else self._recipe.epochs
            told.begin_part("", epochs, "epoch")
            make = functools.partial(self._curves, cell, seed, splits, start, told.end_part)
            return self._store.kept(cell, seed, make, BESIDE_A_RUN)

        return start["notes"], train

    def _curves(
        self, cell: Cell, seed: int, splits: Splits, start: Tree, on_epoch: training.OnEpoch
    ) -> Tree:
        recipe = self._recipe
        rng = np.random.default_rng((seed, 3))
        if cell.method == SCRATCH:
            variables = self._trainer.fresh(seed)
            epochs, method = recipe.scratch_epochs, "sgd"
            descent = recipe.confusion_learning_rate, training.MOMENTUM
        else:
            variables, epochs, method = start["variables"], recipe.epochs, cell.method
            descent = recipe.learning_rate, recipe.momentum
        return training.train(
            self._trainer,
            self._trainer.begin(variables, *descent),
            splits,
            lambda: shuffled_rows(len(splits.train.y), recipe.batch_size, rng),
            training.evaluation_epochs(epochs, min(recipe.evaluations, epochs)),
            method=method,
            rho=cell.rho or 0.0,
            on_epoch=on_epoch,
        )
