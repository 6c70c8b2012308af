"""The tables of `monge-sam quality`."""

from collections.abc import Mapping
from typing import Any

from monge_sam_jax.experiments.common import report


def markdown(results: Mapping[str, Any]) -> str:
    """A table for each task, of test accuracies in percent with their standard errors.

    Args:
      results: content of results.json.

    Returns:
      Rows of methods and columns of radii; a cell reads "at equal gradients / at equal steps".
    """
    seeds = report.count(results["configuration"]["seeds"], "seed")
    lines = []
    for task, entry in results["tasks"].items():
        radii = entry["rho"]
        start = report.summarise(
            [{"accuracy": run[0]} for run in entry["runs"][0]["test_accuracy"]]
        )
        lines += [
            f"**{task}** (start {report.estimate(start['accuracy'])}, "
            f"{report.count(entry['steps'][-1], 'step')}, "
            f"{seeds}; test accuracy in % when as many gradients "
            "were taken as SGD takes / as many steps)",
            "",
            "| method | " + " | ".join(f"rho = {rho:g}" for rho in radii) + " |",
            "|---" * (1 + len(radii)) + "|",
        ]
        for label in dict.fromkeys(run["label"] for run in entry["runs"]):
            cells = [_both(run) for run in entry["runs"] if run["label"] == label]
            cells += [""] * (len(radii) - len(cells))
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _both(run: Mapping[str, Any]) -> str:
    if run["at_equal_gradients"] == run["at_equal_steps"]:
        return report.estimate(run["at_equal_steps"])
    return (
        f"{report.estimate(run['at_equal_gradients'])} / {report.estimate(run['at_equal_steps'])}"
    )
