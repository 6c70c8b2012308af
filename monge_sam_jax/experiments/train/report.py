"""What a comparison of optimizers comes to, for every seed and as a table."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.train.training import Run

BASE_LABELS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}

# The table's quantities: the header, and what a value is multiplied by for display.
COLUMNS: dict[str, tuple[str, float]] = {
    "train_loss": ("train loss (nats)", 1),
    "test_accuracy": ("test accuracy (%)", 1),
    "test_loss": ("test loss (nats)", 1),
    "sharpness": ("sharpness (nats)", 1),
    "seconds_per_step": ("time per step (ms)", 1000),
    "ratio_to_sgd": ("time / {base}'s", 1),
}

_OVERHEADS = " Small steps are bound by overheads; monge-sam bench measures larger models."


def final_metrics(
    runs: Mapping[str, Run], sharpness: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """What the runs of one seed end with: the table's quantities, by optimizer.

    Time is the median over epochs; there is a ratio to SGD's if SGD is among the runs.
    """
    seconds = {name: statistics.median(run.seconds_per_step) for name, run in runs.items()}
    metrics = {}
    for name, run in runs.items():
        metrics[name] = {
            "train_loss": run.curves["train_loss"][-1],
            "test_loss": run.curves["test_loss"][-1],
            "test_accuracy": run.curves["test_accuracy"][-1],
            "sharpness": sharpness[name],
            "seconds_per_step": seconds[name],
        }
        if "sgd" in runs:
            metrics[name]["ratio_to_sgd"] = seconds[name] / seconds["sgd"]
    return metrics


def results_table(results: Mapping[str, Any]) -> Table:
    """The summaries as a table, a row for every optimizer.

    Args:
      results: content of results.json.

    Returns:
      The table. A mean that is not finite, because a seed's value is not, reads "diverged"; the
      ratio to an SGD that was not run "-".
    """
    configuration = results["configuration"]
    base = BASE_LABELS[configuration["base"]]
    errors = "Mean and standard error over seeds. " if configuration["seeds"] > 1 else ""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=(
            f"{results['data']['name']}: {configuration['model']}, base optimizer {base}, "
            f"{report.count(configuration['epochs'], 'epoch')}, "
            f"{report.count(configuration['seeds'], 'seed')}"
        ),
        caption=(
            f"{errors}Sharpness: rise of the training loss at distance "
            f"{configuration['sharpness_rho']:g} along its gradient."
            + _OVERHEADS
            * ("sgd" in results["optimizers"])
        ),
    )
    table.add_column("optimizer", no_wrap=True)
    for header, _ in COLUMNS.values():
        table.add_column(header.format(base=base), justify="right")
    for entry in results["optimizers"].values():
        summary = entry["summary"]
        cells = [
            _cell(summary[quantity], factor) if quantity in summary else "-"
            for quantity, (_, factor) in COLUMNS.items()
        ]
        table.add_row(entry["label"], *cells)
    return table


def _cell(summary: Mapping[str, float | None], factor: float) -> str:
    mean, error = summary["mean"], summary["standard_error"]
    if mean is None:
        return "diverged"
    return format_estimate(mean * factor, None if error is None else error * factor)


def format_estimate(mean: float, error: float | None) -> str:
    """A mean above its standard error to two significant digits, or alone to four.

    >>> print(format_estimate(97.6418, 0.0957))
    97.642
    ±0.096
    >>> print(format_estimate(0.00028, 1.2e-5))
    2.80e-04
    ±1.2e-05
    >>> print(format_estimate(2.0, None))
    2
    """
    if not error:
        return f"{mean:.4g}"
    if not 1e-3 <= max(abs(mean), error) < 1e6:
        return f"{mean:.2e}\n±{error:.1e}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:.{decimals}f}\n±{error:.{decimals}f}"
