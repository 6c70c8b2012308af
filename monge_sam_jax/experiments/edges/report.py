"""The tables of `monge-sam edges`."""

from collections.abc import Mapping
from typing import Any

from monge_sam_jax.experiments.common import report

# Quantities at the end: title, key, and digits after the point.
TABLES = (
    ("sharpness, in units of the predicted edge", "sharpness / edge", 2),
    ("sharpness (largest eigenvalue of the Hessian)", "sharpness", 2),
    ("training loss", "loss", 4),
    ("test accuracy in %", "test_accuracy", 1),
)


def markdown(results: Mapping[str, Any]) -> str:
    """A table for each quantity at the end of training, with standard errors over seeds.

    Args:
      results: content of results.json.

    Returns:
      Rows of methods and columns of radii.
    """
    configuration = results["configuration"]
    radii = configuration["rho"]
    seeds = report.count(configuration["seeds"], "seed")
    lines = []
    for title, key, digits in TABLES:
        lines += [
            f"**{title}** (after {results['steps'][-1]} steps, {seeds})",
            "",
            "| method | " + " | ".join(f"rho = {rho:g}" for rho in radii) + " |",
            "|---" * (1 + len(radii)) + "|",
        ]
        for label in dict.fromkeys(run["label"] for run in results["runs"]):
            cells = [
                report.estimate(run["at_end"][key], digits)
                for run in results["runs"]
                if run["label"] == label
            ]
            cells += [""] * (len(radii) - len(cells))
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)
