"""The paper's claims on fine-tuning from a bad minimum, judged by the runs."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from monge_sam_jax.experiments.common.plots import LABELS
from monge_sam_jax.experiments.common.report import Difference

ALIKE = 1.0  # points of accuracy that two methods may differ by to be called alike
VALLEY = 99.0  # a run whose training accuracy falls below this has left the valley


class Runs:
    """The runs of results.json by method and radius."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self._runs = {(run["method"], run["rho"]): run["seeds"] for run in results["runs"]}
        self.radii: list[float] = list(results["configuration"]["rho"])

    def finals(self, method: str, rho: float | None, name: str) -> np.ndarray:
        """What the runs of all seeds come to."""
        return np.array([seed["final"][name] for seed in self._runs[method, rho]], float)

    def curves(self, method: str, rho: float | None, name: str) -> np.ndarray:
        """(seeds, evaluations)."""
        return np.array([seed["curves"][name] for seed in self._runs[method, rho]], float)

    def difference(
        self, a: tuple[str, float | None], b: tuple[str, float | None], name: str = "test_accuracy"
    ) -> Difference:
        """Of a from b; the runs of a seed are paired, for they start together."""
        return Difference.of(self.finals(*a, name), self.finals(*b, name))

    def leaves(self, method: str, rho: float) -> bool:
        """Whether most runs leave the valley. One that diverges has left it."""
        stays = self.finals(method, rho, "lowest_train_accuracy") >= VALLEY
        return bool(np.mean(stays) < 0.5)


def claims(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """The claims of section 4.1, whether they hold, and by what count.

    Args:
      results: content of results.json, without the claims.

    Returns:
      For every claim its words, the verdict, and what was measured. A difference of means is taken
      over the runs of equal seeds, and counts if it exceeds `report.CERTAIN` standard errors.
      A claim on the difference of runs that are the same is left out.
    """
    runs = Runs(results)
    rows = (
        _is_bad(runs),
        _alike(runs),
        _improves(runs, "sam"),
        _improves(runs, "monge_sam"),
        _rises(runs),
        _leaves(runs),
        _stays(runs),
        _pays(runs),
        _fits(runs),
        _widens(runs),
    )
    return [dict(zip(("claim", "verdict", "measured"), row, strict=True)) for row in rows if row]


Row: TypeAlias = tuple[str, str, str]


def _is_bad(runs: Runs) -> Row:
    start = runs.curves("sgd", None, "test_accuracy")[:, 0]
    difference = Difference.of(runs.finals("scratch", None, "test_accuracy"), start)
    return (
        "a network that fits all training images can generalise badly",
        difference.verdict(),
        f"test accuracy {start.mean():.1f} at the start, {difference.text()} from scratch",
    )


def _alike(runs: Runs) -> Row:
    differences = {rho: runs.difference(("monge_sam", rho), ("sam", rho)) for rho in runs.radii}
    alike = list(itertools.takewhile(lambda rho: abs(differences[rho].mean) <= ALIKE, runs.radii))
    verdict = "no" if not alike else "yes" if alike == runs.radii else f"up to rho = {alike[-1]:g}"
    return (
        "SAM and M-SAM end alike where rho is small",
        verdict,
        f"test accuracy, M-SAM less SAM, alike within {ALIKE:g} point: {_texts(differences)}",
    )


def _improves(runs: Runs, method: str) -> Row | None:
    validation = [runs.finals(method, rho, "validation_accuracy").mean() for rho in runs.radii]
    rho = runs.radii[int(np.argmax(validation))]
    difference = runs.difference((method, rho), ("sgd", None))
    if difference.is_nothing:
        return None
    return (
        f"{LABELS[method]} finds a better minimum than SGD",
        difference.verdict(),
        f"{difference.text()} points of test accuracy at rho = {rho:g}, chosen on validation data",
    )


def _rises(runs: Runs) -> Row | None:
    means = [runs.finals("monge_sam", rho, "test_accuracy").mean() for rho in runs.radii]
    if len(means) == 1:
        return None
    top = 1 + int(np.argmax(means[1:]))
    gain = runs.difference(("monge_sam", runs.radii[top]), ("monge_sam", runs.radii[0]))
    if gain.is_nothing:
        return None
    rising = all(a <= b for a, b in itertools.pairwise(means[: top + 1]))
    verdict = gain.verdict() if rising else "no"
    if verdict == "yes" and top < len(means) - 1:
        verdict = f"up to rho = {runs.radii[top]:g}"
    return (
        "M-SAM generalises better with a larger rho",
        verdict,
        f"{gain.text()} points from rho = {runs.radii[0]:g} to {runs.radii[top]:g}; test accuracy "
        + _by_radius(dict(zip(runs.radii, (f"{mean:.1f}" for mean in means), strict=True))),
    )


def _leaves(runs: Runs) -> Row:
    left = [rho for rho in runs.radii if runs.leaves("sam", rho)]
    return (
        "SAM leaves the valley where rho is large",
        _where(left, runs.radii[-1]),
        f"lowest training accuracy on the way, left below {VALLEY:g} %: {_lowest(runs, 'sam')}",
    )


def _stays(runs: Runs) -> Row:
    left = [rho for rho in runs.radii if runs.leaves("sam", rho)]
    stayed = [rho for rho in left if not runs.leaves("monge_sam", rho)]
    less = {
        rho: runs.difference(("monge_sam", rho), ("sam", rho), "lowest_train_accuracy").verdict()
        for rho in left
        if rho not in stayed
    }
    nearer = [rho for rho, verdict in less.items() if verdict == "yes"]
    if not left:
        verdict = "cannot be told: SAM stays too"
    elif stayed == left:
        verdict = "yes"
    else:
        verdict = _where(stayed, None)
        verdict += f"; goes less far at rho = {_list(nearer)}" if nearer else ""
    return ("M-SAM stays where SAM leaves", verdict, f"the same: {_lowest(runs, 'monge_sam')}")


def _pays(runs: Runs) -> Row:
    left = [rho for rho in runs.radii if runs.leaves("sam", rho)]
    differences = {rho: runs.difference(("sam", rho), ("monge_sam", rho)) for rho in left}
    verdicts = {rho: difference.verdict() for rho, difference in differences.items()}
    if not left:
        verdict = "cannot be told: SAM stays"
    elif len(set(verdicts.values())) == 1:
        verdict = verdicts[left[0]]
    else:
        verdict = _by_radius(verdicts)
    return (
        "where SAM leaves, it generalises better than M-SAM",
        verdict,
        f"test accuracy, SAM less M-SAM: {_texts(differences)}",
    )


def _fits(runs: Runs) -> Row:
    cells = [(method, rho) for rho in runs.radii for method in ("sam", "monge_sam")]
    ends = {cell: runs.finals(*cell, "train_accuracy") for cell in [("sgd", None), *cells]}
    share = np.mean([end == 100 for end in ends.values()])
    except_for = [
        f"{LABELS[method]} at {rho:g}" for (method, rho), end in ends.items() if end.min() < 100
    ]
    return (
        "most models end with all training images right",
        "yes" if share > 0.5 else "no",
        f"{100 * share:.0f} % of the runs"
        + (f"; not all of {_list(except_for)}" * bool(except_for)),
    )


def _widens(runs: Runs) -> Row:
    rho = runs.radii[-1]
    gradients = runs.curves("monge_sam", rho, "grad_norm")
    lengths = runs.curves("monge_sam", rho, "perturbation_norm") / rho
    steepest = np.argmax(gradients, axis=1)
    at_steepest = lengths[np.arange(len(lengths)), steepest]
    return (
        "M-SAM's perturbation is short where the gradient is large, and widens",
        Difference.of(lengths[:, -1], at_steepest).verdict(),
        f"at rho = {rho:g}: {at_steepest.mean():.2f} rho at the largest gradient norm "
        f"({gradients.max(axis=1).mean():.2f}), {lengths[:, -1].mean():.2f} rho at the end "
        f"({gradients[:, -1].mean():.2f})",
    )


def _where(radii: Sequence[float], largest: float | None) -> str:
    """Yes at some radii; without more words if it is the largest alone."""
    if not radii:
        return "no"
    return "yes" if list(radii) == [largest] else f"at rho = {_list(radii)}"


def _lowest(runs: Runs, method: str) -> str:
    lowest = {rho: runs.finals(method, rho, "lowest_train_accuracy").mean() for rho in runs.radii}
    return _by_radius({rho: f"{value:.1f}" for rho, value in lowest.items()})


def _texts(differences: Mapping[float, Difference]) -> str:
    return _by_radius({rho: difference.text() for rho, difference in differences.items()})


def _by_radius(values: Mapping[float, Any]) -> str:
    return "; ".join(f"{value} at {rho:g}" for rho, value in values.items()) or "-"


def _list(items: Sequence[Any]) -> str:
    return ", ".join(f"{item:g}" if isinstance(item, float) else item for item in items)
