"""The two predictions of the theory of edges, judged by the runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.statistics import interval

LATE = 4  # of the evaluations, the last ones, whose mean a run comes to
COLLAPSED = 55.0  # half way from all training images right to chance, in %: below it is collapse
AT_EDGE = 0.1  # that sharpness may be away from the edge, relative to it, to have settled there
NEAR_ONE = 0.9  # from where on r lambda counts as one
SAME_RADIUS = 1.5  # factor that the rho of collapse may be away from that of r lambda = 1

Runs = Sequence[Mapping[str, Any]]


def late(run: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What each seed of a run comes to: means over the last evaluations, NaN if it diverged.

    Args:
      run: curves by name, each of (seeds, evaluations).

    Returns:
      The means of all curves, of "sharpness / edge", and of "r lambda", the effective radius times
      the sharpness.
    """
    names = [key for key, value in run.items() if isinstance(value, list)]
    ends = {key: np.array(run[key], float)[:, -LATE:] for key in names}
    ends["sharpness / edge"] = ends["sharpness"] / ends["edge"]
    ends["r lambda"] = ends["effective_radius"] * ends["sharpness"]
    return {key: np.mean(values, axis=1) for key, values in ends.items()}


def claims(configuration: Mapping[str, Any], runs: Runs) -> list[dict[str, str | None]]:
    """Both predictions for every method: what was measured, and whether it holds.

    Args:
      configuration: of the command.
      runs: those of results.json, by radius in ascending order.

    Returns:
      The claims, with None for verdicts where there are too few seeds.
    """
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: run["rho"] or 0.0):
        by_method.setdefault(run["label"], []).append(run)
    rows = [_settles(label, of_method) for label, of_method in by_method.items()]
    rows += [
        _collapses(label, of_method)
        for label, of_method in by_method.items()
        if of_method[0]["rho"] is not None
    ]
    names = ("claim", "measured", "verdict")
    return report.without_verdicts(
        [dict(zip(names, row, strict=True)) for row in rows], configuration
    )


def _settles(label: str, runs: Runs) -> tuple[str, str, str]:
    """By the relative distance from the edge, in the mean over the radii without collapse."""
    quantities = [late(run) for run in runs]
    ratios = np.stack([q["sharpness / edge"] for q in quantities])  # (radii, seeds)
    ratios[_collapsed(quantities)] = np.nan
    counted = ~np.all(np.isnan(ratios), axis=0)  # seeds
    claim = f"{label} settles at the edge"
    if not np.all(counted):
        return claim, "some seeds collapse at every radius", "cannot be told"
    away = 100 * np.nanmean(np.abs(ratios - 1), axis=0)
    low, high = interval(away)
    by_radius = np.array([np.nanmean(r) for r in ratios if not np.all(np.isnan(r))])
    measured = (
        f"{np.mean(away):.0f} % away from it ({low:.0f} to {high:.0f}); sharpness / edge "
        f"{_between(by_radius)}"
    )
    return claim, measured, _verdict(low, high, -np.inf, 100 * AT_EDGE)


def _collapses(label: str, runs: Runs) -> tuple[str, str, str]:
    """By the factor between the smallest rho of collapse and that at which r lambda is one."""
    rho = np.array([run["rho"] for run in runs])
    quantities = [late(run) for run in runs]
    collapsed = _collapsed(quantities)
    near_one = np.stack([q["r lambda"] >= NEAR_ONE for q in quantities])
    claim = f"{label} collapses from r lambda = 1 on"
    if not np.all(np.any(collapsed, axis=0)):
        seeds = np.sum(~np.any(collapsed, axis=0))
        measured = f"{report.count(int(seeds), 'seed')} did not collapse up to rho = {rho[-1]:g}"
        return claim, measured, "cannot be told"
    onset = np.argmax(collapsed, axis=0)
    # One that collapses where it has been smaller throughout counts as at the radius of collapse.
    reached = np.argmax(near_one | collapsed, axis=0)
    factors = np.log(rho[onset] / rho[reached])
    low, high = np.exp(interval(factors))
    products = np.stack([q["r lambda"] for q in quantities])
    seeds = np.arange(products.shape[1])
    before = products[np.maximum(onset - 1, 0), seeds][onset > 0]
    measured = (
        f"collapse from rho = {_between(rho[onset])} on, with r lambda "
        f"{_between(products[onset, seeds])} there"
        + (f" and {_between(before)} at the rho before" if before.size else "")
        + f"; r lambda is {NEAR_ONE:g} or more from rho = {_between(rho[reached])} on, "
        f"{np.exp(np.mean(factors)):.1f} times ({low:.1f} to {high:.1f}) less"
    )
    return claim, measured, _verdict(low, high, 1 / SAME_RADIUS, SAME_RADIUS)


def _collapsed(quantities: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """(radii, seeds): whether training has collapsed, or diverged."""
    return np.stack([~(q["train_accuracy"] >= COLLAPSED) for q in quantities])


def _between(values: np.ndarray) -> str:
    """The range, with two or three digits."""
    low, high = (f"{x:.3g}" if x < 1 else f"{x:.2g}" for x in (np.min(values), np.max(values)))
    return low if low == high else f"{low} to {high}"


def _verdict(low: float, high: float, lowest: float, highest: float) -> str:
    """Whether an interval lies within the limits, or outside them."""
    if lowest <= low and high <= highest:
        return "yes"
    return "no" if high < lowest or low > highest else "open"
