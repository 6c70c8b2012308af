"""Intervals over seeds, for the verdicts of several commands."""

from collections.abc import Sequence

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

LEVEL = 0.95  # of intervals, and of all verdicts of a task together
RESAMPLES = 9999


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """That of the mean (BCa bootstrap of Efron 1987); the values themselves, if they are all equal.

    >>> interval([1.0, 1.0, 1.0])
    (1.0, 1.0)
    """
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = stats.bootstrap(
        (np.asarray(values),),
        np.mean,
        confidence_level=LEVEL,
        n_resamples=RESAMPLES,
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
