"""What `monge-sam study` makes of its curves: choices, gains over plain training, aggregates."""

import collections
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.study import statistics
from monge_sam_jax.experiments.study.methods import METHODS
from monge_sam_jax.experiments.study.tasks import TASKS
from monge_sam_jax.experiments.study.training import EVALUATIONS, Cell

Curves = dict[Cell, list[Mapping[str, Any]]]
DIGITS = 4  # significant ones of single runs, in what is kept
DEFAULT_RHO = 0.05
VALIDATION, TEST = "validation", "test"
SPLITS = (VALIDATION, TEST)


def choices(tried: Curves) -> dict[str, dict[str, Cell]]:
    """By how much is tuned, for every method the cell that validation samples choose.

    Args:
      tried: the runs of all cells.

    Returns:
      By name of the choice and method: "tuned" among all cells; at "the_rate_of_plain", or the next
      lower one that was tried, as the best radius; at "the_rate_of_the_task" likewise,
      for plain training too; and at the "default" radius and that rate, without any choice.
    """

    def chosen(keep: Callable[[Cell], bool]) -> dict[str, Cell]:
        by_method: dict[str, dict[Cell, list[float]]] = {}
        for cell, runs in tried.items():
            if keep(cell):
                by_method.setdefault(cell.method, {})[cell] = _ends(cell, runs, VALIDATION)
        return {name: statistics.chosen(cells) for name, cells in by_method.items()}

    tuned = chosen(lambda cell: True)
    own = tuned["plain"].factor
    rates = {cell.factor for cell in tried if cell.rho is not None} or {own}
    near = max((rate for rate in rates if rate <= own), default=min(rates))
    return {
        "tuned": tuned,
        "the_rate_of_plain": chosen(lambda c: c.factor == (own if c.rho is None else near)),
        "the_rate_of_the_task": chosen(lambda c: c.factor == 1),
        "default": chosen(lambda c: c.factor == 1 and c.rho in (None, DEFAULT_RHO)),
    }


def summarise(
    task: str,
    starts: Sequence[Mapping[str, float]],
    tried: Curves,
    curves: Curves,
    selected: Mapping[str, Mapping[str, Cell]],
    seconds: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Aggregates of a task.

    Args:
      task: its name.
      starts: what was noted of every seed's start.
      tried: of all cells the runs from the first seeds.
      curves: of those that were selected the runs from all seeds.
      selected: by which choice, and method, which cell.
      seconds: of a step, by method, and their ratio to those of plain training.

    Returns:
      Unit, start, steps of plain training, whether the score is of something that comes after
      training, a row for every method and, to be drawn, the lines over radii.
    """
    best = {cell: curves[cell] for cell in selected["tuned"].values()}
    after = TASKS[task].kind.after is not None
    tuned = len(next(iter(tried.values())))
    gains = functools.partial(_gains, best)
    at_the_end = lambda cell, runs: _ends(cell, runs, TEST)  # noqa: E731
    compared = {"over_plain": gains(at_the_end)}
    if not after:
        until = {cell: _equal_time(seconds[cell.method]["ratio"], cell) for cell in best}
        stops = {cell: _stop(runs[:tuned]) for cell, runs in best.items()}
        compared |= {
            "equal_time": gains(lambda cell, runs: [_at(run, until[cell]) for run in runs]),
            "stopped": gains(lambda cell, runs: [_at(run, stops[cell]) for run in runs]),
        }
    less_tuned: dict[str, dict[str, Any]] = {}
    for name in [name for name in selected if name != "tuned"]:
        cells = {cell: curves[cell] for cell in selected[name].values()}
        for cell, gain in (dict.fromkeys(cells) | _gains(cells, at_the_end)).items():
            ends = _summary(at_the_end(cell, cells[cell]))
            less_tuned.setdefault(cell.method, {})[name] = {
                "rho": cell.rho,
                "factor": cell.factor,
                "at_the_end": cell.rho is not None and _at_the_end(cell, tried),
                "test": ends,
                "over_plain": gain,
            }

    def row(cell: Cell, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ends = _ends(cell, runs, TEST)
        entry = {
            "method": cell.method,
            "label": METHODS[cell.method].label,
            "gradients": METHODS[cell.method].gradients,
            "rho": cell.rho,
            "at_the_end": _at_the_end(cell, tried),
            "factor": cell.factor,
            "test": _summary(ends),
            "ends": _rounded(ends),
            "time": float(seconds[cell.method]["ratio"]),
            **{name: of_all.get(cell) for name, of_all in compared.items()},
            "less_tuned": less_tuned.get(cell.method, {}),
        }
        if after:
            entry["after"] = {
                name: _rounded(np.mean([run["after"][name][1] for run in runs], axis=0))
                for name in runs[0]["after"]
            }
            entry["gains_after"] = {
                name: gains(lambda cell, runs, name=name: _ends(cell, runs, TEST, name)).get(cell)
                for name in runs[0]["after"]
            }
        return entry

    return {
        "unit": TASKS[task].kind.unit,
        "after": after,
        "start": _summary([start["test"] for start in starts]),
        "starts": starts,
        "steps": int(curves[selected["tuned"]["plain"]][0]["steps"][-1]),
        "trials": min(collections.Counter(cell.method for cell in tried).values()),
        "tuned_on": tuned,
        "rows": [row(cell, runs) for cell, runs in best.items()],
        "lines": _lines(tried, best),
    }


def _gains(curves: Curves, values: Any) -> dict[Cell, dict[str, Any]]:
    """By cell the comparison of its values with those of plain training, judged together."""
    plain = next(cell for cell in curves if cell.method == "plain")
    baseline = values(plain, curves[plain])
    judged = statistics.judged(
        {
            cell: statistics.compare(values(cell, runs), baseline)
            for cell, runs in curves.items()
            if cell != plain
        }
    )
    return {cell: comparison._asdict() for cell, comparison in judged.items()}


def _ends(
    cell: Cell, runs: Sequence[Mapping[str, Any]], split: str, name: str | None = None
) -> list[float]:
    """Scores at the end: of what comes after training, where something does."""
    kind = TASKS[cell.task].kind
    if kind.after is None:
        return [float(run[split][-1]) for run in runs]
    at = SPLITS.index(split)
    return [float(run["after"][name or kind.decisive][at][-1]) for run in runs]


def _at(run: Mapping[str, Any], place: float) -> float:
    """The test score at a place of the curve, counted in evaluations."""
    return float(np.interp(place, np.arange(EVALUATIONS + 1), np.asarray(run[TEST], float)))


def _equal_time(ratio: float, cell: Cell) -> float:
    """Where a method is, in evaluations, when plain training with as many gradients has ended."""
    method = METHODS[cell.method]
    return min(1.0, method.gradients / method.share / ratio) * EVALUATIONS


def _stop(runs: Sequence[Mapping[str, Any]]) -> int:
    """The evaluation with the best mean score on validation samples."""
    curves = np.array([run[VALIDATION] for run in runs], float)
    return statistics.chosen(dict(enumerate(curves.T)))


def _at_the_end(cell: Cell, tried: Curves) -> bool:
    """Whether something beyond its line might be better still, as it was not tried."""
    others = [other for other in tried if other.method == cell.method]
    if cell.rho is None:
        factors = {other.factor for other in others}
        return len(factors) > 1 and cell.factor in (min(factors), max(factors))
    return cell.rho == max(other.rho for other in others if other.rho is not None)


def _lines(tried: Curves, best: Curves) -> dict[str, dict[str, Any]]:
    """Gains of every method by radius, at its learning rate, from the seeds of all radii."""
    plain = next(cell for cell in best if cell.method == "plain")
    baseline = np.array(_ends(plain, tried[plain], TEST))
    lines = {}
    for own in best:
        cells = [
            cell
            for cell in tried
            if (cell.method, cell.factor) == (own.method, own.factor) and cell.rho is not None
        ]
        if cells:
            gains = [np.array(_ends(cell, tried[cell], TEST)) - baseline for cell in cells]
            lines[own.method] = {
                "rho": [cell.rho for cell in cells],
                "gains": [_rounded(gain) for gain in gains],
            }
    return lines


def _summary(values: Sequence[float]) -> dict[str, float | None]:
    return report.summarise([{TEST: value} for value in values])[TEST]


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]
