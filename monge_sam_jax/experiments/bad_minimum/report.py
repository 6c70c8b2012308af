"""What the runs of `monge-sam bad-minimum` come to."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.plots import LABELS as METHOD_LABELS

LABELS = {"scratch": "SGD from scratch", "sgd": "SGD", **METHOD_LABELS}

COLUMNS = {
    "test_accuracy": "test at the end",
    "best_test_accuracy": "test at the best epoch",
    "best_epoch": "best epoch",
    "train_accuracy": "train at the end",
    "lowest_train_accuracy": "lowest train",
    "peak_loss": "largest loss of a batch (nats)",
}


def final(curves: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """What a run comes to.

    Args:
      curves: as `training.train` gives them.

    Returns:
      Accuracies in percent at the end; epoch and test accuracy of the best validation accuracy (the
      first, of equals); the lowest training accuracy and the largest loss of a batch on the way.
    """
    best = int(np.argmax(curves["validation_accuracy"]))
    return {
        "test_accuracy": curves["test_accuracy"][-1],
        "validation_accuracy": curves["validation_accuracy"][-1],
        "train_accuracy": curves["train_accuracy"][-1],
        "best_epoch": curves["epoch"][best],
        "best_test_accuracy": curves["test_accuracy"][best],
        "lowest_train_accuracy": min(curves["train_accuracy"]),
        "peak_loss": float(np.max(curves["peak_loss"])),
    }


def markdown(results: Mapping[str, Any]) -> str:
    """The runs as a table, and the claims with their verdicts as another.

    Args:
      results: content of results.json.

    Returns:
      Both tables. Accuracies are in percent; with several seeds, as mean and standard error.
    """
    starts = report.summarise(results["starts"])
    train, test = (report.estimate(starts[f"{name}_accuracy"]) for name in ("train", "test"))
    data, configuration = results["data"], results["configuration"]
    seeds = report.count(configuration["seeds"], "seed")
    lines = [
        f"{data['name']}, {configuration['model']} ({results['parameters']:,} params), "
        f"{data['train_samples']} images to train on, {data['validation_samples']} to choose the "
        f"best epoch by, {data['test_samples']} to test on; {seeds}. The "
        f"bad minimum: training accuracy {train} %, test accuracy {test} %.",
        "",
        "| method | rho | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (2 + len(COLUMNS)) + "|",
    ]
    for run in results["runs"]:
        digits = {"peak_loss": 2, "best_epoch": 0}
        cells = [report.estimate(run["summary"][name], digits.get(name, 1)) for name in COLUMNS]
        radius = "" if run["rho"] is None else f"{run['rho']:g}"
        lines.append(f"| {run['label']} | {radius} | " + " | ".join(cells) + " |")
    headers = {
        "claim": "claim of the paper",
        "verdict": "holds here?",
        "measured": "by count",
    }
    lines += ["", *report.claims_table(results, headers)]
    return "\n".join([*lines, ""])
