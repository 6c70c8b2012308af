"""The tables of `monge-sam bench`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from monge_sam_jax.experiments.common import report


def times_table(results: Mapping[str, Any], clock: str) -> Table:
    """What a descent step takes on a model, a row for every method.

    Args:
      results: the model's part of results.json.
      clock: key of `CLOCKS`.

    Returns:
      The table.
    """
    methods = results["methods"].values()
    several = any(entry["seconds"]["upper"] > entry["seconds"]["lower"] for entry in methods)
    table = plain_table(
        f"{results['description']}: {results['parameters']:,} params",
        f"{'Processor time' if clock == 'cpu' else 'Time'} of a descent step, and its ratios to "
        "plain, to two_gradients and to the method by hand"
        + (": medians, with half the interquartile ranges." if several else ", of one round."),
        ("ms", "/ plain", "/ two", "/ by hand"),
    )
    times = _alike(1000 * entry["seconds"]["median"] for entry in methods)
    for (name, entry), time in zip(results["methods"].items(), times, strict=True):
        table.add_row(
            name,
            time,
            _with_spread(entry["ratio_to_plain"], is_known=name == "plain"),
            _with_spread(entry["ratio_to_two_gradients"], is_known=name == "two_gradients"),
            _with_spread(entry["ratio_to_by_hand"]),
        )
    return table


def programs_table(results: Mapping[str, Any]) -> Table:
    """What the compiled programs are, a row for every method.

    Args:
      results: the model's part of results.json.

    Returns:
      The table, with the peak of memory if a device told it.
    """
    methods = results["methods"]
    told = any(entry["peak_bytes"] is not None for entry in methods.values())
    headers = ("compile s", "/ plain", "/ by hand", "kernels", "HLO", "temp.", "state")
    table = plain_table(
        None,
        "Time to compile, and its ratios to plain and to the method by hand. Kernels (fusions and "
        "custom calls) and instructions of the program. Temporary arrays and state of the "
        "optimizer in units of the params."
        + (" Peak of params, state and temporary arrays in MiB." if told else ""),
        headers + (("peak",) if told else ()),
    )
    times = _alike(entry["compile_seconds"]["median"] for entry in methods.values())
    for (name, entry), time in zip(methods.items(), times, strict=True):
        by_hand, peak = entry["compile_ratio_to_by_hand"], entry["peak_bytes"]
        table.add_row(
            name,
            time,
            f"{entry['compile_ratio_to_plain']['median']:.2f}",
            f"{by_hand['median']:.2f}" if by_hand else "-",
            f"{entry['kernels']}",
            f"{entry['instructions']}",
            f"{entry['temporaries']:.2f}",
            f"{entry['state']:.2f}",
            *([f"{peak / 2**20:,.0f}" if peak is not None else "-"] if told else []),
        )
    return table


def plain_table(title: str | None, caption: str, headers: Sequence[str]) -> Table:
    """A table of methods by numbers, which is narrow."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, title=title, caption=caption)
    table.add_column("method", no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _alike(column: Iterable[float]) -> list[str]:
    """Numbers with the same decimals, of which the smallest has three significant digits."""
    values = list(column)
    places = report.decimals(min(values), 3)
    return [f"{value:.{places}f}" for value in values]


def _with_spread(summary: Mapping[str, float] | None, *, is_known: bool = False) -> str:
    """A ratio with half the interquartile range, unless that is zero, as of a single round."""
    if summary is None or is_known:
        return "1" if is_known else "-"
    spread = (summary["upper"] - summary["lower"]) / 2
    if spread == 0:
        return f"{summary['median']:.3f}"
    return f"{summary['median']:.3f} ±{spread:{'.3f' if round(spread, 3) else '.0e'}}"
