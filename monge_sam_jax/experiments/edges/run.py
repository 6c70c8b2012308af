"""`monge-sam edges`: every method with every radius and seed."""

import dataclasses
from typing import Any

import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.progress import steps
from monge_sam_jax.experiments.edges import training
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
    report.write_json(options.output / "results.json", results)
    tables = markdown(results)
    (options.output / "edges.md").write_text(tables, encoding="utf-8")
    edges_figure(results).savefig(options.output / "edges.png")
    console = Console()
    console.print(Markdown(tables))
    console.print(f"Wrote results.json, edges.md and edges.png to {options.output}", soft_wrap=True)


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
            "at_end": report.summarise([_at_end(curve) for curve in seeds]),
            **{key: [curve[key].tolist() for curve in seeds] for key in seeds[0]},
        }
        for (name, rho), seeds in curves.items()
    ]
    return report.jsonable(
        {
            "configuration": dataclasses.asdict(options),
            **report.environment(),
            "steps": [part * i for i in range(training.EVALUATIONS + 1)],
            "runs": runs,
        }
    )


def _at_end(curve: dict[str, np.ndarray]) -> dict[str, float]:
    last = {key: float(values[-1]) for key, values in curve.items()}
    return last | {"sharpness / edge": last["sharpness"] / last["edge"]}
