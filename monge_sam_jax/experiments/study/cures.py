"""What `--methods one-pass` is run for: which form of one pass is robust to its radius."""

from collections.abc import Mapping, Sequence

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

# By radius, the differences to plain training from each seed.
Gains = Mapping[float, Sequence[float]]

# What is drawn; the tables have all.
DRAWN = {
    "{}": ("constant", COLOURS["sgd"], "-"),
    "annealed_{}": ("linear fall", COLOURS["monge_sam"], "-"),
    "cosine_{}": ("cosine fall", COLOURS["adamw"], "--"),
    "momentum_{}": ("along momentum", COLOURS["adaptive_sam"], "-."),
    "capped_{}": ("stability margin", COLOURS["sam"], ":"),
}
BALLS = {"one_pass_sam": "SAM", "one_pass_monge": "M-SAM"}


def robustness(gains: Mapping[str, Mapping[str, Gains]]) -> dict[str, dict[str, float]]:
    """How much of what can be gained each method gains, without knowing the task.

    Args:
      gains: by task and method; every method has the same radii in a task.

    Returns:
      By method the mean over tasks of the regret, which is the best mean gain of any method at any
      radius of the task, less its own: "own" at its best radius of each task, "common" at the best
      of the radii that all tasks have, "rho", for all of them.
    """
    methods = set.intersection(*(set(by_method) for by_method in gains.values()))
    means = {
        task: {m: {rho: float(np.mean(g)) for rho, g in of[m].items()} for m in methods}
        for task, of in gains.items()
    }
    best = {task: max(max(g.values()) for g in of.values()) for task, of in means.items()}
    shared = set.intersection(*(set(g) for of in means.values() for g in of.values()))
    found = {}
    for method in sorted(methods):
        own = np.mean([best[task] - max(of[method].values()) for task, of in means.items()])
        regrets = {
            rho: float(np.mean([best[task] - of[method][rho] for task, of in means.items()]))
            for rho in sorted(shared)
        }
        rho = min(regrets, key=lambda rho: regrets[rho])
        found[method] = {"own": float(own), "common": regrets[rho], "rho": rho}
    return found


def harmless(gains: Gains) -> float:
    """The largest radius up to which no mean gain is below zero; zero if there is none.

    >>> harmless({0.1: [0.5, -0.1], 0.2: [0.0], 0.5: [-3.0], 1.0: [2.0]})
    0.2
    """
    reached = 0.0
    for rho in sorted(gains):
        if np.mean(gains[rho]) < 0:
            break
        reached = rho
    return reached


def cures_figure(gains: Mapping[str, Mapping[str, Gains]]) -> Figure:
    """Gains over plain training against the radius, a row of panels for each task.

    Args:
      gains: by task and method.

    Returns:
      The figure: means of paired differences, in bands of one standard error.
    """
    figure = blank_figure(0.9 + 1.35 * len(gains))
    panels = figure.subplots(len(gains), 2, squeeze=False, sharey="row")
    several = False
    for row, (task, by_method) in zip(panels, gains.items(), strict=True):
        best = 0.0
        for axes, (ball, text) in zip(row, BALLS.items(), strict=True):
            for name, (label, colour, style) in DRAWN.items():
                if not (of := by_method.get(name.format(ball))):
                    continue
                rho = sorted(of)
                values = [np.asarray(of[r], float) for r in rho]
                mean = np.array([v.mean() for v in values])
                axes.plot(rho, mean, style, color=colour, label=label, linewidth=1.2)
                best = max(best, *mean)
                if len(values[0]) > 1:
                    several = True
                    error = np.array([v.std(ddof=1) / np.sqrt(len(v)) for v in values])
                    ends = mean - error, mean + error
                    axes.fill_between(rho, *ends, color=colour, alpha=0.15, linewidth=0)
            axes.axhline(0.0, color=COLOURS["sgd"], linewidth=0.6)
            axes.set_xscale("log")
            axes.set_title(f"{task}, {text}", fontsize=SMALL)
            axes.tick_params(labelsize=SMALL)
            axes.grid(alpha=0.2)
            axes.spines[["top", "right"]].set_visible(False)
        # What falls apart does not flatten the rest.
        row[0].set_ylim(-1.1 * best, 1.2 * best)
        row[0].set_ylabel("gain (points)", fontsize=SMALL)
    for axes in panels[-1]:
        axes.set_xlabel(r"radius $\rho$", fontsize=FONT_SIZE)
    handles, _ = panels[0, 0].get_legend_handles_labels()
    legend_below(figure, [*handles, *([band()] * several)])
    return figure
