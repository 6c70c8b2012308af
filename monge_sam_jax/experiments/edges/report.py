"""The tables of `monge-sam edges`."""

from collections.abc import Mapping
from typing import Any

from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.statistics import LEVEL
from monge_sam_jax.experiments.edges.claims import AT_EDGE, COLLAPSED, LATE, SAME_RADIUS
from monge_sam_jax.experiments.edges.training import EVALUATIONS

# Quantities late in training: title, key, and digits after the point.
TABLES = (
    ("sharpness, in units of the predicted edge", "sharpness / edge", 2),
    ("effective radius times sharpness, r lambda", "r lambda", 2),
    ("sharpness (largest eigenvalue of the Hessian)", "sharpness", 2),
    ("training loss", "loss", 4),
    ("training accuracy in %", "train_accuracy", 1),
    ("test accuracy in %", "test_accuracy", 1),
)


def markdown(results: Mapping[str, Any]) -> str:
    """The verdicts, and tables of what is measured late in training, with standard errors.

    Args:
      results: content of results.json.

    Returns:
      Tables of verdicts, and of rows of methods and columns of radii.
    """
    configuration = results["configuration"]
    radii = configuration["rho"]
    seeds = report.count(configuration["seeds"], "seed")
    batch = configuration["batch_size"]
    images = f"{configuration['images']} images"
    lines = [
        f"{results['steps'][-1]} steps on {images}, "
        f"{'all of them at each step' if batch is None else f'{batch} at a step'}; {seeds}. "
        f"What a run comes to is its mean over the last {LATE} of {EVALUATIONS} evaluations. It "
        f"has collapsed if its training accuracy is below {COLLAPSED:g} %. Intervals over seeds "
        f"are of {100 * LEVEL:g} %. Sharpness is at the edge if the interval of its distance from "
        f"the edge, in the mean over radii without collapse, ends below {100 * AT_EDGE:g} %; "
        "collapse follows r lambda = 1 if the interval of the factor between both radii is within "
        f"{SAME_RADIUS:g}.",
        "",
        *report.claims_table(
            results, {"claim": "prediction", "measured": "measured", "verdict": "verdict"}
        ),
        "",
    ]
    for title, key, digits in TABLES:
        lines += [
            f"**{title}**",
            "",
            "| method | " + " | ".join(f"rho = {rho:g}" for rho in radii) + " |",
            "|---" * (1 + len(radii)) + "|",
        ]
        for label in dict.fromkeys(run["label"] for run in results["runs"]):
            cells = [
                report.estimate(run["late"][key], digits)
                for run in results["runs"]
                if run["label"] == label
            ]
            cells += [""] * (len(radii) - len(cells))
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)
