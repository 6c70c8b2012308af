"""What `--methods one-pass` is run for: which form of one pass is robust to its radius."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from monge_sam_jax.experiments.common.plots import (
    COLOURS,
    FONT_SIZE,
    SMALL,
    band,
    blank_figure,
    legend_below,
)
from monge_sam_jax.experiments.study import statistics
from monge_sam_jax.experiments.study.methods import METHODS

# What is drawn; the table has all.
DRAWN = {
    "{}": ("constant", COLOURS["sgd"], "-"),
    "annealed_{}": ("linear fall", COLOURS["monge_sam"], "-"),
    "cosine_{}": ("cosine fall", COLOURS["adamw"], "--"),
    "warm_annealed_{}": ("warm-up, linear fall", COLOURS["fisher_sam"], "--"),
    "momentum_{}": ("along momentum", COLOURS["adaptive_sam"], "-."),
    "ahead_{}": ("extrapolated", COLOURS["supremum"], "-."),
    "capped_{}": ("stability margin", COLOURS["sam"], ":"),
}
BALLS = {"one_pass_sam": "SAM", "one_pass_monge": "M-SAM"}


class Ends(NamedTuple):
    """What training ended with, by seed.

    Attributes:
      validation: scores on validation samples.
      gain: differences to plain training, on test samples.
    """

    validation: np.ndarray
    gain: np.ndarray


# By task, method and radius.
Line = Mapping[float, Ends]
AllEnds = Mapping[str, Mapping[str, Line]]


def all_ends(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> AllEnds:
    """From the "runs" of results.json; of all methods at the task's own learning rate."""
    found: dict[str, dict[str, dict[float, Ends]]] = {}
    for task, cells in runs.items():
        own = [cell for cell in cells if cell["factor"] == 1]
        plain = next(_ends(cell, "test") for cell in own if cell["method"] == "plain")
        of = found.setdefault(task, {})
        for cell in own:
            if cell["rho"] is not None:
                test = _ends(cell, "test")
                ends = Ends(_ends(cell, "validation"), test - plain[: len(test)])
                of.setdefault(cell["method"], {})[cell["rho"]] = ends
    return found


def _ends(cell: Mapping[str, Any], quantity: str) -> np.ndarray:
    return np.array([run[quantity][-1] for run in cell["runs"]], float)


def best_radius(line: Line) -> float:
    """The radius that validation samples choose."""
    return statistics.chosen({rho: ends.validation for rho, ends in line.items()})


def harmless(line: Line) -> float:
    """The largest radius up to which no mean gain is below zero; zero if there is none."""
    reached = 0.0
    for rho in sorted(line):
        if not np.mean(line[rho].gain) >= 0:
            break
        reached = rho
    return reached


class Regret(NamedTuple):
    """The mean over tasks of what a method gains less than the best one at its best radius.

    Attributes:
      own: at the best radius for each task.
      common: at one radius for all tasks, the best one of those that all of them have.
      rho: that radius.
    """

    own: float
    common: float
    rho: float


def regrets(ends: AllEnds) -> dict[str, Regret]:
    """Of every method that all tasks have. Radii are chosen by validation samples."""
    methods = sorted(set.intersection(*(set(of) for of in ends.values())))
    own = {
        task: {m: float(np.mean(of[m][best_radius(of[m])].gain)) for m in methods}
        for task, of in ends.items()
    }
    best = {task: max(of.values()) for task, of in own.items()}
    shared = set.intersection(*(set(of[m]) for of in ends.values() for m in methods))

    def validated(method: str, rho: float) -> float:
        score = np.mean([np.mean(of[method][rho].validation) for of in ends.values()])
        return float(np.nan_to_num(score, nan=-np.inf))

    def regret(method: str) -> Regret:
        rho = max(sorted(shared), key=lambda rho: validated(method, rho))
        common = [best[task] - np.mean(of[method][rho].gain) for task, of in ends.items()]
        mean_own = np.mean([best[task] - own[task][method] for task in ends])
        return Regret(float(mean_own), float(np.mean(common)), rho)

    return {method: regret(method) for method in methods}


def table(ends: AllEnds) -> str:
    """A row for each method: gains at the best radius, where they end, and regrets."""
    of_all = regrets(ends)
    lines = [
        "Gains over plain training of as many gradients, at the radius that validation samples "
        "choose, with intervals of 95 %, that radius, and the largest up to which no mean gain is "
        "negative. Regret: mean over tasks of what is missing to the best method at its best "
        "radius; at the own best radius of each task, and at one radius for all.",
        "",
        f"| method | {' | '.join(ends)} | regret | at one radius |",
        "|---" * (len(ends) + 3) + "|",
    ]
    for method in (name for name in METHODS if name in of_all):
        cells = []
        for of in ends.values():
            rho = best_radius(of[method])
            gain = of[method][rho].gain
            found = statistics.compare(gain.tolist(), [0.0] * len(gain))
            interval = f" ({found.low:+.1f} to {found.high:+.1f})" if len(gain) > 1 else ""
            cells.append(
                f"{found.difference:+.1f}{interval}, {rho:g}, up to {harmless(of[method]):g}"
            )
        regret = of_all[method]
        cells += [f"{regret.own:.1f}", f"{regret.common:.1f} ({regret.rho:g})"]
        lines.append(f"| {METHODS[method].label} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def cures_figure(ends: AllEnds) -> Figure:
    """Gains over plain training against the radius, two panels for each task.

    Args:
      ends: of one-pass methods and others.

    Returns:
      The figure: means of paired differences, in bands of one standard error.
    """
    figure = blank_figure(0.9 + 1.35 * len(ends))
    panels = figure.subplots(len(ends), 2, squeeze=False, sharey="row")
    several = False
    handles: dict[str, Any] = {}
    for row, (task, of) in zip(panels, ends.items(), strict=True):
        best = 1.0
        for axes, (ball, text) in zip(row, BALLS.items(), strict=True):
            for name, (label, colour, style) in DRAWN.items():
                if not (line := of.get(name.format(ball))):
                    continue
                gains = [line[rho].gain for rho in sorted(line)]
                mean = np.array([np.mean(gain) for gain in gains])
                best = max([best, *mean])
                look = {"color": colour, "label": label, "linewidth": 1.2}
                (handles[label],) = axes.plot(sorted(line), mean, style, **look)
                if len(gains[0]) > 1:
                    several = True
                    error = np.array([np.std(g, ddof=1) / np.sqrt(len(g)) for g in gains])
                    limits = mean - error, mean + error
                    axes.fill_between(sorted(line), *limits, color=colour, alpha=0.15, linewidth=0)
            axes.axhline(0.0, color=COLOURS["sgd"], linewidth=0.6)
            axes.set_xscale("log")
            radii = sorted({rho for line in of.values() for rho in line})
            axes.set_xticks(radii, [f"{rho:g}" for rho in radii])
            axes.minorticks_off()
            axes.set_title(f"{task}, {text}", fontsize=SMALL)
            axes.tick_params(labelsize=SMALL)
            axes.grid(alpha=0.2)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylim(-1.2 * best, 1.2 * best)  # what falls apart does not flatten the rest
        row[0].set_ylabel("gain (points)", fontsize=SMALL)
    for axes in panels[-1]:
        axes.set_xlabel(r"radius $\rho$", fontsize=FONT_SIZE)
    legend_below(figure, [*handles.values(), *([band()] * several)])
    return figure
