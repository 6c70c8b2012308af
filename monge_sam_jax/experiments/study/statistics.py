"""What `monge-sam study` may conclude: choices by validation, paired differences, profiles."""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from monge_sam_jax.experiments.common.statistics import LEVEL, RESAMPLES, interval

Choice = TypeVar("Choice", bound=Hashable)


class Comparison(NamedTuple):
    """Of a method with plain training, over paired seeds.

    Attributes:
      difference: mean of the differences of the score; positive where the method is better.
      low: end of the bootstrap interval.
      high: the other end.
      p: of the two-sided sign-flip test; None for fewer than six seeds, of which none can be small.
      verdict: "better", "worse" or "open", after Holm's correction for all methods of the task.
    """

    difference: float
    low: float
    high: float
    p: float | None
    verdict: str = "open"


def chosen(validation: Mapping[Choice, Sequence[float] | np.ndarray]) -> Choice:
    """What has the best mean score on the validation samples; one that diverged has none.

    >>> chosen({0.1: [90.0, 92.0], 0.5: [95.0, 91.0], 1.0: [99.0, float("nan")]})
    0.5
    """
    return max(
        validation, key=lambda choice: np.nan_to_num(np.mean(validation[choice]), nan=-np.inf)
    )


def compare(scores: Sequence[float], baseline: Sequence[float]) -> Comparison:
    """The difference of paired scores: its interval (BCa bootstrap), and a sign-flip test."""
    differences = np.asarray(scores, float) - np.asarray(baseline, float)
    mean = float(np.mean(differences))
    if len(differences) < 2 or not np.isfinite(mean) or np.ptp(differences) == 0:
        return Comparison(mean, mean, mean, None)
    low, high = interval(differences)
    if 2 / 2 ** len(differences) > 1 - LEVEL:
        return Comparison(mean, low, high, None)
    test = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        random_state=np.random.default_rng(0),
    )
    return Comparison(mean, low, high, float(test.pvalue))


def judged(comparisons: Mapping[Choice, Comparison]) -> dict[Choice, Comparison]:
    """The comparisons with verdicts, right together with probability `LEVEL` (Holm 1979)."""
    tested = {name: c.p for name, c in comparisons.items() if c.p is not None}
    verdicts = dict(comparisons)
    for rank, name in enumerate(sorted(tested, key=lambda name: tested[name])):
        if tested[name] * (len(tested) - rank) > 1 - LEVEL:
            break
        better = comparisons[name].difference > 0
        verdicts[name] = comparisons[name]._replace(verdict="better" if better else "worse")
    return verdicts


def profiles(errors: Mapping[str, np.ndarray], ratios: np.ndarray) -> dict[str, np.ndarray]:
    """Performance profiles (Dolan and Moré 2002).

    Args:
      errors: of every method, on the same problems; the smaller, the better.
      ratios: to the best method's error on the problem.

    Returns:
      For every method the part of the problems on which its error is within each ratio of the best.
    """
    best = np.nanmin(np.stack(list(errors.values())), axis=0)
    return {
        name: np.mean(error[:, None] <= ratios * best[:, None], axis=0)
        for name, error in errors.items()
    }
