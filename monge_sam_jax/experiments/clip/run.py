"""`monge-sam clip`: all cells of the grid from every seed, and what they come to."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import numpy as np

from monge_sam_jax.experiments.clip import data as clip_data
from monge_sam_jax.experiments.clip import report as clip_report
from monge_sam_jax.experiments.clip.data import Corpus
from monge_sam_jax.experiments.clip.latents import evaluate_file, panel
from monge_sam_jax.experiments.clip.options import Clip
from monge_sam_jax.experiments.clip.plots import Panel, figure_7, mechanism_figure
from monge_sam_jax.experiments.clip.training import (
    Cell,
    evaluate,
    evaluation_steps,
    grid,
    moments,
    pretrain,
    record,
    whole_batches,
)
from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.grid import train_grid
from monge_sam_jax.experiments.common.kept import Store, checksum
from monge_sam_jax.experiments.common.progress import Steps


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
    report.prepare_output(options.output, configuration(options), options.overwrite, may_grow=True)
    results, panels = study(options)
    files = {
        report.RESULTS: results,
        "tables.md": clip_report.markdown(results),
        "figure7.png": figure_7(panels),
        "mechanism.png": mechanism_figure(results),
    }
    components = (
        f"{drawn.title}: first principal component has correlation {drawn.correlation:.3f} "
        f"with the modality, and {drawn.explained:.0%} of the variance"
        for drawn in panels
    )
    report.publish(options.output, files, *components)


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
            "cut_captions": corpus.cut,
            "unknown_words": clip_data.unknown_words(corpus.test),
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
    """The records of every cell from all seeds."""
    seeds = range(options.seed, options.seed + options.size.seeds)
    begin = functools.partial(_begin, options, corpus)
    _, curves = train_grid(seeds, grid(options), begin, start="pre-trained")
    return [
        {
            **cell._asdict(),
            "seeds": [{"seed": seed, **run} for seed, run in zip(seeds, runs, strict=True)],
        }
        for cell, runs in curves.items()
    ]


def _begin(
    options: Clip, corpus: Corpus, seed: int, told: Steps
) -> tuple[None, Callable[[Cell], dict[str, list[float]]]]:
    """What fine-tunes a cell from the pre-trained params of a seed."""
    if options.data is None and seed > options.seed:
        corpus = load(options, seed)
    store, params = _store(options, corpus), _start(options, corpus, seed)

    def train(cell: Cell) -> dict[str, list[float]]:
        told.begin_part("", len(evaluation_steps(options)) - 1, "part")
        make = functools.partial(record, cell, params, corpus, options, seed, told.end_part)
        return {name: curve.tolist() for name, curve in store.kept(cell, seed, make).items()}

    return None, train


def _start(options: Clip, corpus: Corpus, seed: int) -> chex.ArrayTree:
    """The pre-trained params."""
    make = functools.partial(pretrain, corpus, options, seed)
    return _store(options, corpus).kept(("start",), seed, make)


def _store(options: Clip, corpus: Corpus) -> Store:
    """Of the finished runs, by all that decides them beside cell and seed."""
    size = options.size._replace(seeds=0, sgd_rates=(), adam_rates=(), rho=())
    decisive = {"base": options.base, "k": options.k, "checksum": checksum(corpus[:4])}
    return Store(options.output, size._asdict() | decisive)


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
