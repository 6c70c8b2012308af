"""What a comparison of optimizers comes to: a dictionary that is valid JSON, and a table."""

import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

import monge_sam_jax
from monge_sam_jax.experiments import InputError
from monge_sam_jax.experiments.training import Run

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


def prepare_output(folder: Path) -> None:
    """Makes the folder before the work, which an error after it would waste.

    Raises:
      InputError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output {folder}: no permission to write")


def progress_bar(*, disable: bool = False) -> Progress:
    """Bars on standard error that count, tell the time, and vanish in the end."""
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=disable)


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


def summarise(seeds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard error over seeds of every quantity.

    The mean is NaN if it is not finite for every seed; then, and for a single seed, there is no
    standard error.
    """
    summary: dict[str, dict[str, float | None]] = {}
    for quantity in seeds[0]:
        values = [seed[quantity] for seed in seeds]
        mean, error = math.nan, None
        if all(map(math.isfinite, values)):
            mean = statistics.fmean(values)
            if len(values) > 1:
                error = statistics.stdev(values) / math.sqrt(len(values))
        summary[quantity] = {"mean": mean, "standard_error": error}
    return summary


def environment() -> dict[str, Any]:
    """Versions of the packages, and the device."""
    device = jax.devices()[0]
    return {
        "versions": {
            "monge_sam_jax": monge_sam_jax.__version__,
            "jax": jax.__version__,
            "optax": optax.__version__,
            "flax": flax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file of strict JSON."""
    text = json.dumps(jsonable(content), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def jsonable(tree: Any) -> Any:
    """`tree` as strict JSON has it: null for NaN and infinity, text for paths."""
    if isinstance(tree, Mapping):
        return {name: jsonable(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [jsonable(value) for value in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return None
    return str(tree) if isinstance(tree, Path) else tree


def estimate(summary: Mapping[str, float | None], digits: int = 1, sign: str = "") -> str:
    """A mean with its standard error, if there is one.

    >>> estimate({"mean": 97.64, "standard_error": 0.125})
    '97.6 ± 0.1'
    >>> estimate({"mean": float("nan"), "standard_error": None})
    'diverged'
    """
    mean, error = summary["mean"], summary["standard_error"]
    if mean is None or not math.isfinite(mean):
        return "diverged"
    return f"{mean:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


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
            f"{_count(configuration['epochs'], 'epoch')}, {_count(configuration['seeds'], 'seed')}"
        ),
        caption=(
            f"{errors}Sharpness: rise of the training loss at distance "
            f"{configuration['sharpness_rho']:g} along its gradient."
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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
