"""`monge-sam clip`: all cells of the grid from every seed, and what they come to."""

import dataclasses
import functools
import math
import zlib
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from monge_sam_jax.experiments.clip import data as clip_data
from monge_sam_jax.experiments.clip import report as clip_report
from monge_sam_jax.experiments.clip.data import Corpus
from monge_sam_jax.experiments.clip.latents import evaluate_file, panel
from monge_sam_jax.experiments.clip.options import Clip
from monge_sam_jax.experiments.clip.plots import Panel, figure_7, mechanism_figure
from monge_sam_jax.experiments.clip.training import (
    Cell,
    evaluate,
    grid,
    moments,
    pretrain,
    record,
    whole_batches,
)
from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.kept import fingerprint, kept
from monge_sam_jax.experiments.common.progress import steps


def run(options: Clip) -> None:
    """Trains, or evaluates embeddings; writes the results and prints the tables.

    Args:
      options: unchecked ones.

    Raises:
      InputError: an option, the data or the output folder cannot be used.
    """
    options.check()
    if options.embeddings is not None:
        evaluate_file(options.embeddings, options)
    else:
        train(options)


def train(options: Clip) -> None:
    """Trains, writes results.json, tables.md, figure7.png and mechanism.png, prints the tables.

    Args:
      options: checked ones.

    Raises:
      InputError: the data or the output folder cannot be used.
    """
    report.prepare_output(options.output, configuration(options), options.overwrite)
    results, panels = study(options)
    report.write_json(options.output / "results.json", results)
    tables = clip_report.markdown(results)
    (options.output / "tables.md").write_text(tables, encoding="utf-8")
    figure_7(panels).savefig(options.output / "figure7.png")
    mechanism_figure(results).savefig(options.output / "mechanism.png")
    console = Console()
    console.print(Markdown(tables))
    for drawn in panels:
        console.print(
            f"{drawn.title}: first principal component has correlation {drawn.correlation:.3f} "
            f"with the modality, and {drawn.explained:.0%} of the variance"
        )
    console.print(
        f"Wrote results.json, tables.md, figure7.png and mechanism.png to {options.output}",
        soft_wrap=True,
    )


def configuration(options: Clip) -> dict[str, Any]:
    """The options as they are in results.json."""
    return dataclasses.asdict(options) | options.size._asdict()


def study(options: Clip) -> tuple[dict[str, Any], list[Panel]]:
    """The content of results.json, and the panels of figure 7, of the first seed."""
    size, corpus = options.size, load(options, options.seed)
    test = whole_batches(len(corpus.test.words), size.batch_size)
    chance = {"alignment": options.k / (test - 1), "loss": math.log(size.batch_size)}
    cells = [
        clip_report.summarise_cell(cell, chance["loss"])
        for cell in report.jsonable(_train_all(options, corpus))
    ]
    params = _start(options, corpus, options.seed)
    panels = _panels(options, corpus, params, cells)
    results = {
        "configuration": configuration(options),
        **report.environment(),
        "data": {
            "name": "generated" if options.data is None else options.data.name,
            "pairs": {
                name: len(getattr(corpus, name).words) for name in ("pretrain", *clip_data.SPLITS)
            },
        },
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "chance": chance,
        "cells": cells,
        "mechanism": clip_report.mechanism(cells),
        "figure7": [
            {name: getattr(p, name) for name in ("title", "correlation", "explained")}
            for p in panels
        ],
    }
    claims = clip_report.claims(cells, panels[0].correlation)
    results["claims"] = report.without_verdicts(claims, results["configuration"])
    return report.jsonable(results), panels


def load(options: Clip, seed: int) -> Corpus:
    """The pairs of a seed; those of a folder are the same for all."""
    if options.data is None:
        return clip_data.generated(options.size, options.image_size, seed)
    return clip_data.from_folder(options.data, options.image_size, options.size.batch_size)


def _train_all(options: Clip, corpus: Corpus) -> list[dict[str, Any]]:
    """The records of every cell from all seeds, behind a progress bar."""
    size = options.size
    cells = [{**cell._asdict(), "seeds": []} for cell in grid(options)]
    with steps("", size.seeds * (1 + len(cells)), unit="runs") as told:
        for seed in range(options.seed, options.seed + size.seeds):
            told.begin(f"seed {seed}, pre-training")
            if options.data is None and seed > options.seed:
                corpus = load(options, seed)
            params = _start(options, corpus, seed)
            folder = _folder(options, corpus)
            told.end(f"seed {seed}: pre-trained")
            for entry, cell in zip(cells, grid(options), strict=True):
                label = f"seed {seed}, {clip_report.LABELS[cell.method]}"
                told.begin(label)
                curves = kept(
                    folder / f"{_name(cell)}_seed{seed}.npz",
                    functools.partial(record, cell, params, corpus, options, seed),
                )
                lists = {name: curve.tolist() for name, curve in curves.items()}
                entry["seeds"].append({"seed": seed, **lists})
                radius = "" if cell.rho is None else f", rho {cell.rho:g}"
                told.end(f"{label}, learning rate {cell.learning_rate:g}{radius}")
    return cells


def _start(options: Clip, corpus: Corpus, seed: int) -> chex.ArrayTree:
    """The pre-trained params."""
    path = _folder(options, corpus) / f"start_seed{seed}.npz"
    return kept(path, functools.partial(pretrain, corpus, options, seed))


def _name(cell: Cell) -> str:
    return "_".join(str(part) for part in cell if part is not None)


def _folder(options: Clip, corpus: Corpus) -> Path:
    """Of the finished runs, named after all that decides them beside cell and seed."""
    size = options.size._replace(seeds=0, sgd_rates=(), adam_rates=(), rho=())
    pairs = b"".join(np.asarray(array).tobytes() for array in jax.tree.leaves(corpus[:4]))
    decisive = {
        **size._asdict(),
        "base": options.base,
        "k": options.k,
        "pairs": zlib.crc32(pairs),
        "versions": report.environment()["versions"],
    }
    return options.output / "finished" / fingerprint(decisive)


def _panels(
    options: Clip, corpus: Corpus, params: chex.ArrayTree, cells: list[dict[str, Any]]
) -> list[Panel]:
    """Figure 7: before fine-tuning, and at the best steps of the chosen cells."""
    stages = {"before": params}
    for method in ("sam", "monge_sam"):
        chosen = clip_report.choose(cells, method)
        cell = Cell(method, chosen["learning_rate"], chosen["rho"])
        step = chosen["best"][0]["alignment_step"]
        runs = moments(cell, params, corpus, options, options.seed)
        title = f"{clip_report.LABELS[method]}, step {step}"
        stages[title] = next(moment.params for moment in runs if moment.step == step)
    panels = []
    for title, at in stages.items():
        found = evaluate(at, corpus.test, batch_size=options.size.batch_size, k=options.k)
        image, text = np.asarray(found.latents.image), np.asarray(found.latents.text)
        labels = None if corpus.labels is None else corpus.labels[: len(image)]
        panels.append(panel(title, image, text, labels))
    return panels
