"""The tables of `monge-sam study`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.study.methods import METHODS

# Settled before the runs whose results it is printed above, but for the next lower rate: at first
# it was the nearest, which in label-noise-0 is one above, where other methods diverge.
PROTOCOL = """
Protocol. Every method starts from the same params, sees the same batches in the same order, and
takes as many gradients: one of g gradients a step trains for 1 / g of the steps of plain training.
{trials} a method, chosen by the mean score on validation samples at the end, over {tuned}; each is
a radius times a learning rate ({rates} times the task's), and where there is no radius (plain
training, averaged weights) a learning rate from a tenth to ten times the task's, of which there may
be one more. What is chosen is trained from {seeds}, and its score is that on test samples. Gains
are over plain training, paired by seed, with bootstrap intervals of 95 %. A gain is called open
unless a sign-flip test is below 5 % after Holm's correction for all methods of a column and task;
where it is not open its sign says whether the method is better or worse. Equal time: the score,
between two of ten evaluations where need be, when plain training ends; seconds of a step are
medians of interleaved measurements, and a radius that falls to zero has not done so there. Stopped
early: both are evaluated where their mean score on validation samples was best. Less tuned: at the
learning rate that plain training chose, or the next lower one that was tried, with the best radius,
over the same plain training; at the task's learning rate, plain training too; and at that rate with
a radius of 0.05, nothing chosen. A * marks a radius that is the largest of its line, or without one
a learning rate that is at an end of its own.
"""
# What a choice in `summary.choices` is called.
LESS_TUNED = {
    "the_rate_of_plain": "plain training's learning rate",
    "the_rate_of_the_task": "the task's learning rate",
    "default": "and rho = 0.05",
}
DEFINITION = """
Forgetting: a byte-level transformer learns the source of Python's standard library by a method, and
then its English reference by AdamW, the same for all. Scores are losses on held-out windows, in
nats per byte with the other sign, after that: the mean of both texts ("both", which chooses), the
old and the new one, the old one before it, and after it with weights rounded to 8 or 4 bits or with
noise.
"""


def markdown(summary: Mapping[str, Any]) -> str:
    """The protocol, gains over all tasks, and a table for each of them.

    Args:
      summary: content of summary.json.
    """
    reason = report.too_little(summary["configuration"])
    lines = [protocol(summary), "", *([reason, ""] if reason else []), *overview(summary), ""]
    for task, entry in summary["tasks"].items():
        lines += [
            f"**{task}** ({entry['unit']}; start {report.estimate(entry['start'])}, "
            f"{report.count(entry['steps'], 'step')} of plain training)",
            "",
            *_table(entry, verdicts=not reason),
            "",
            *_less_tuned(entry, verdicts=not reason),
            "",
        ]
        if entry["after"]:
            lines += [*forgetting(summary), ""]
    return "\n".join(lines)


def protocol(summary: Mapping[str, Any]) -> str:
    """What was decided before the runs."""
    configuration = summary["configuration"]
    rates = configuration["rates"]
    tuned = min(configuration["tuning_seeds"], configuration["seeds"])
    counts = {entry["trials"] for entry in summary["tasks"].values()}
    trials = " or ".join(map(str, sorted(counts)))
    return " ".join(
        PROTOCOL.format(
            trials=f"{trials} trial{'s' * (counts != {1})}",
            tuned="the first seed" if tuned == 1 else f"the first {tuned} seeds",
            rates=" ".join(f"{rate:g}" for rate in rates),
            seeds=report.count(configuration["seeds"], "seed"),
        ).split()
    )


def overview(summary: Mapping[str, Any], quantity: str = "over_plain") -> list[str]:
    """Gains of all methods on all tasks, a column for each task.

    Args:
      summary: content of summary.json.
      quantity: which gain: over_plain, equal_time, stopped, or one of those that are less tuned.

    Returns:
      Lines of Markdown.
    """
    verdicts = not report.too_little(summary["configuration"])
    columns: dict[str, dict[str, str]] = {}
    for task, entry in summary["tasks"].items():
        cells = {}
        for row in entry["rows"]:
            shown = row | {"over_plain": row.get(quantity)}
            shown |= row["less_tuned"].get(quantity, {})
            if row["method"] == "plain":
                cells["plain"] = f"score {report.estimate(shown['test'], _digits(entry))}"
            elif shown["over_plain"]:
                cells[row["method"]] = _gain(shown["over_plain"], verdicts, _digits(entry))
            else:
                continue
            cells[row["method"]] += _star(shown)
        if set(cells) > {"plain"}:
            columns[task] = cells
    if not columns:
        return []
    rows = [row for entry in summary["tasks"].values() for row in entry["rows"]]
    found = {row["method"]: row["label"] for row in rows}
    return [
        *_head(["gain over plain training", *columns]),
        *(
            f"| {' | '.join([found[name], *(cells.get(name, '') for cells in columns.values())])} |"
            for name in sorted(found, key=list(METHODS).index)
        ),
    ]


def forgetting(summary: Mapping[str, Any]) -> list[str]:
    """What was measured after training on the old text.

    Args:
      summary: content of summary.json, with the task forgetting.

    Returns:
      Lines of Markdown: a definition, and a table of gains in all of it.
    """
    entry = summary["tasks"]["forgetting"]
    verdicts = not report.too_little(summary["configuration"])
    names = list(entry["rows"][0]["after"])
    lines = [" ".join(DEFINITION.split()), "", *_head(["method", *names])]
    for row in entry["rows"]:
        cells = [
            f"score {row['after'][name][-1]:.3f}"
            if row["gains_after"][name] is None
            else _gain(row["gains_after"][name], verdicts, _digits(entry))
            for name in names
        ]
        lines.append(f"| {' | '.join([row['label'], *cells])} |")
    return lines


def _digits(entry: Mapping[str, Any]) -> int:
    return 1 if "%" in entry["unit"] else 3 if entry["after"] else 2


def _table(entry: Mapping[str, Any], *, verdicts: bool) -> list[str]:
    digits = _digits(entry)
    gain: Callable[[Any], str] = functools.partial(_gain, verdicts=verdicts, digits=digits)
    headers = ["method", "gradients a step", "rho", "rate", "test", "at equal gradients"]
    headers += [] if entry["after"] else ["at equal time", "stopped early"]
    lines = _head([*headers, "time of a step"])
    for row in entry["rows"]:
        cells = [
            row["label"],
            f"{row['gradients']:g}",
            "" if row["rho"] is None else f"{row['rho']:g}{_star(row)}",
            f"{row['factor']:g}" + _star(row) * (row["rho"] is None),
            report.estimate(row["test"], digits),
            gain(row["over_plain"]),
        ]
        cells += [] if entry["after"] else [gain(row["equal_time"]), gain(row["stopped"])]
        cells.append(f"{row['time']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _less_tuned(entry: Mapping[str, Any], *, verdicts: bool) -> list[str]:
    """Gains, each with the radius that it takes."""
    lines = _head(["method, and radius", *LESS_TUNED.values()])
    for row in entry["rows"]:
        cells = [row["label"]]
        for name in LESS_TUNED:
            found = row["less_tuned"].get(name)
            if found is None:
                cells.append("")
            elif row["method"] == "plain":
                cells.append(f"score {report.estimate(found['test'], _digits(entry))}")
            else:
                radius = "" if found["rho"] is None else f" at {found['rho']:g}{_star(found)}"
                cells.append(_gain(found["over_plain"], verdicts, _digits(entry)) + radius)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _star(row: Mapping[str, Any]) -> str:
    return "*" * bool(row["at_the_end"])


def _head(headers: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(headers)} |", "|---" * len(headers) + "|"]


def _gain(comparison: Mapping[str, Any] | None, verdicts: bool, digits: int) -> str:
    if comparison is None:
        return ""
    if comparison["difference"] is None:
        return "diverged"
    mean, low, high = (f"{comparison[name]:+.{digits}f}" for name in ("difference", "low", "high"))
    is_open = verdicts and comparison["verdict"] == "open"
    return f"{'open: ' * is_open}{mean} ({low}, {high})"
