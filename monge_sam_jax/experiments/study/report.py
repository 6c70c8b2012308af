"""The tables of `monge-sam study`."""

from collections.abc import Mapping
from typing import Any

from monge_sam_jax.experiments.common import report

PROTOCOL = """
Protocol, written before the runs. Every method starts from the same params and sees the same
batches in the same order; {seeds}. The radius (and the factor of the learning rate, if there are
several) is the one with the best mean score on validation samples; reported is the score on test
samples at the end of training. Methods of one gradient a step are trained for as many steps as
those of two (1 in the column of gradients), and for twice as many (2): there all have taken as many
gradients, but for those of more than two a step.
Differences are paired by seed, with bootstrap intervals of 95 %; a verdict needs a sign-flip test
below 5 % after Holm's correction for all methods of a task at the same number of gradients. Time
is that of the steps in this run, over that of plain training of the same number of steps.
"""


def markdown(results: Mapping[str, Any]) -> str:
    """The protocol, and a table for each task.

    Args:
      results: content of results.json.
    """
    configuration = results["configuration"]
    seeds = report.count(configuration["seeds"], "seed")
    reason = report.too_little(configuration)
    lines = [" ".join(PROTOCOL.format(seeds=seeds).split()), ""]
    if reason:
        lines += [reason, ""]
    for task, entry in results["tasks"].items():
        lines += [
            f"**{task}** ({entry['unit']}; start {report.estimate(entry['start'])}, "
            f"{report.count(entry['steps'], 'step')} and twice as many)",
            "",
            *_table(entry, verdicts=not reason),
            "",
        ]
    return "\n".join(lines)


def _table(entry: Mapping[str, Any], *, verdicts: bool) -> list[str]:
    headers = ["method", "gradients", "rho", "test", "at rho = 0.05", "over plain", "time"]
    headers += ["verdict"] * verdicts
    lines = [f"| {' | '.join(headers)} |", "|---" * len(headers) + "|"]
    for row in entry["rows"]:
        cells = [
            row["label"],
            str(row["gradients"]),
            "" if row["rho"] is None else f"{row['rho']:g}",
            report.estimate(row["test"], 2),
            report.estimate(row["at_default"], 2) if row["at_default"] else "",
            _difference(row["over_plain"]),
            f"{row['time']:.1f}",
        ]
        cells += [_verdict(row["over_plain"])] * verdicts
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _difference(comparison: Mapping[str, Any] | None) -> str:
    if comparison is None:
        return ""
    if comparison["difference"] is None:
        return "diverged"
    low, high = comparison["low"], comparison["high"]
    return f"{comparison['difference']:+.2f} ({low:+.2f} to {high:+.2f})"


def _verdict(comparison: Mapping[str, Any] | None) -> str:
    return "" if comparison is None else comparison["verdict"]
