"""`monge-sam bad-minimum`: minima, runs from them, and what is written about them."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from monge_sam_jax.experiments.bad_minimum import training
from monge_sam_jax.experiments.bad_minimum.claims import claims
from monge_sam_jax.experiments.bad_minimum.data import CLASSES, Source, Splits
from monge_sam_jax.experiments.bad_minimum.options import BadMinimum, Recipe
from monge_sam_jax.experiments.bad_minimum.plots import accuracy_figure, mechanism_figure
from monge_sam_jax.experiments.bad_minimum.report import LABELS, final, markdown
from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.data import shuffled_rows
from monge_sam_jax.experiments.common.kept import Tree, fingerprint, kept
from monge_sam_jax.experiments.common.progress import Steps, steps

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
    report.prepare_output(options.output, configuration(options), options.overwrite)
    results = compare(options)
    report.write_json(options.output / "results.json", results)
    tables = markdown(results)
    (options.output / "bad_minimum.md").write_text(tables, encoding="utf-8")
    accuracy_figure(results).savefig(options.output / "figure6.png")
    mechanism_figure(results).savefig(options.output / "mechanism.png")
    console = Console()
    console.print(Markdown(tables))
    console.print(
        f"Wrote results.json, bad_minimum.md, figure6.png and mechanism.png to {options.output}",
        soft_wrap=True,
    )


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
    recipe = options.recipe
    curves: dict[Cell, list[Tree]] = {cell: [] for cell in cells(recipe)}
    starts = []
    seeds = range(options.seed, options.seed + options.seeds)
    with steps("", len(seeds) * (1 + len(curves)), unit="runs") as told:
        for seed in seeds:
            for cell, tree in comparison.results_of(seed, told):
                if cell is None:
                    starts.append({name: x.item() for name, x in tree.items()})
                else:
                    curves[cell].append(tree)
                told.begin(f"seed {seed}")
                told.end(f"seed {seed}: {'bad minimum' if cell is None else cell}")
    results = {
        "configuration": configuration(options),
        **report.environment(),
        "data": comparison.sizes,
        "parameters": comparison.parameters,
        "starts": starts,
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
        self._folder = options.output / "kept"
        splits = self._source.splits(options.seed)
        self._trainer = training.Trainer(self._recipe, splits.train)
        self.sizes = {
            "name": self._recipe.data,
            "classes": CLASSES,
            **{f"{name}_samples": len(part.y) for name, part in splits._asdict().items()},
        }
        fresh = self._trainer.fresh(options.seed)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(fresh["params"]))

    def results_of(self, seed: int, told: Steps) -> Iterator[tuple[Cell | None, Tree]]:
        """The notes on a seed's bad minimum, under None, and then the curves of all cells."""
        splits = self._source.splits(seed)

        def minimum() -> Tree:
            variables, notes = training.find_bad_minimum(
                self._trainer, self._recipe, splits, seed, told.end_part
            )
            return {"variables": variables, "notes": notes}

        told.begin_part("bad minimum", self._recipe.confusion_epochs, "epochs")
        start = kept(self._path("start", seed, AFTER_THE_START), minimum)
        yield None, start["notes"]
        for cell in cells(self._recipe):
            epochs = self._recipe.scratch_epochs if cell.method == SCRATCH else self._recipe.epochs
            told.begin_part(str(cell), epochs, "epochs")
            name = cell.method + ("" if cell.rho is None else f"_{cell.rho}")
            path = self._path(name, seed, BESIDE_A_RUN)
            make = functools.partial(self._curves, cell, seed, splits, start, told.end_part)
            yield cell, kept(path, make)

    def _path(self, name: str, seed: int, indifferent: tuple[str, ...]) -> Path:
        decisive = dataclasses.asdict(self._recipe) | {
            "checksum of the data": self._source.checksum,
            **report.environment(),
        }
        decisive = {key: x for key, x in decisive.items() if key not in indifferent}
        return self._folder / f"{name}_seed{seed}_{fingerprint(decisive)}.npz"

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
