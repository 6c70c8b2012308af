"""`monge-sam edges`: every method with every radius and seed."""

import dataclasses
from typing import Any

import numpy as np

from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.progress import steps
from monge_sam_jax.experiments.edges import training
from monge_sam_jax.experiments.edges.claims import claims, late
from monge_sam_jax.experiments.edges.options import Edges
from monge_sam_jax.experiments.edges.plots import edges_figure
from monge_sam_jax.experiments.edges.report import markdown
from monge_sam_jax.experiments.edges.training import METHODS


def run(options: Edges) -> None:
    """Trains, writes the files, and prints the tables.

    Args:
      options: unchecked ones.

    Raises:
      InputError: an option, or the output folder, cannot be used.
    """
    options.check()
    report.prepare_output(options.output, dataclasses.asdict(options), options.overwrite)
    results = compare(options)
    report.publish(
        options.output,
        {
            "results.json": results,
            "edges.md": markdown(results),
            "edges.png": edges_figure(results),
        },
    )


def compare(options: Edges) -> dict[str, Any]:
    """The content of results.json: for every method and radius curves for every seed."""
    cells = [
        (name, rho)
        for name, method in METHODS.items()
        for rho in ((None,) if method.metric is None else options.rho)
    ]
    curves: dict[tuple[str, float | None], list[dict[str, np.ndarray]]] = {c: [] for c in cells}
    with steps("", options.seeds * len(cells), unit="run") as told:
        for seed in range(options.seed, options.seed + options.seeds):
            told.begin(f"seed {seed}")
            problem = training.problem(seed, options)
            for name, rho in cells:
                curve = training.learn(problem, name, rho or 0.0, options)
                curves[name, rho].append(curve)
                radius = "" if rho is None else f", rho = {rho:g}"
                told.end(
                    f"seed {seed}: {METHODS[name].label}{radius} ends at sharpness "
                    f"{curve['sharpness'][-1]:.3g}, the edge is at {curve['edge'][-1]:.3g}"
                )
    part = options.steps // training.EVALUATIONS
    runs = [
        {
            "method": name,
            "label": METHODS[name].label,
            "rho": rho,
            **{key: [curve[key].tolist() for curve in seeds] for key in seeds[0]},
        }
        for (name, rho), seeds in curves.items()
    ]
    results = {
        "configuration": dataclasses.asdict(options),
        **report.environment(),
        "steps": [part * i for i in range(training.EVALUATIONS + 1)],
        "runs": [{**run, "late": _over_seeds(late(run))} for run in runs],
        "claims": claims(dataclasses.asdict(options), runs),
    }
    return report.jsonable(results)


def _over_seeds(quantities: dict[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
    rows = zip(*quantities.values(), strict=True)
    return report.summarise([dict(zip(quantities, map(float, row), strict=True)) for row in rows])
