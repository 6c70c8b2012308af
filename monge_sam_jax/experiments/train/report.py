"""What a comparison of optimizers comes to, for every seed and as a table."""

import math
import statistics
from collections.abc import Mapping, Sequence
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

_KEYS = ("mean", "standard_error")
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
    summaries = [dict(entry["summary"]) for entry in results["optimizers"].values()]
    if "sgd" in results["optimizers"]:  # to itself, which no error belongs to
        own = {"ratio_to_sgd": {"mean": 1.0, "standard_error": None}}
        summaries[list(results["optimizers"]).index("sgd")] |= own
    columns = [
        format_column([summary.get(quantity) for summary in summaries], factor)
        for quantity, (_, factor) in COLUMNS.items()
    ]
    for entry, *cells in zip(results["optimizers"].values(), *columns, strict=True):
        table.add_row(entry["label"], *cells)
    return table


def format_column(
    summaries: Sequence[Mapping[str, float | None] | None], factor: float = 1
) -> list[str]:
    """Means above their standard errors, with the same decimals in all cells of a column.

    The largest error has two significant digits; if there are no errors, the largest mean has four.
    Very large and very small columns are in powers of ten.

    >>> print(*format_column([{"mean": 97.6418, "standard_error": 0.0957}]))
    97.642
    ±0.096
    >>> format_column([{"mean": 2.0, "standard_error": None}, None, {"mean": 0.5}])
    ['2.000', '-', '0.500']
    """
    scaled = [
        None if summary is None else [_times(summary.get(k), factor) for k in _KEYS]
        for summary in summaries
    ]
    means = [abs(pair[0]) for pair in scaled if pair and pair[0] is not None]
    errors = [pair[1] for pair in scaled if pair and pair[0] is not None and pair[1]]
    largest, error = max(means, default=0.0), max(errors, default=0.0)
    leading, digits = error or largest, None
    if not leading or 1e-3 <= max(largest, error) < 1e6:
        digits = report.decimals(leading, 2 if error else 4)
    return ["-" if pair is None else _cell(pair[0], pair[1], digits) for pair in scaled]


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None or not math.isfinite(value) else value * factor


def _cell(mean: float | None, error: float | None, digits: int | None) -> str:
    """In powers of ten if there are no digits."""
    if mean is None:
        return "diverged"
    text = f"{mean:.2e}" if digits is None else f"{mean:.{digits}f}"
    if error is None:
        return text
    return f"{text}\n±{f'{error:.1e}' if digits is None else report.error_text(error, digits)}"
