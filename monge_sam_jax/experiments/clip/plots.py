"""The pictures of `monge-sam clip`: figure 7 of the paper, and what the perturbation does."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import CSS4_COLORS
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from monge_sam_jax.experiments.common.plots import (
    COLOURS,
    FONT_SIZE,
    GREY,
    LABELS,
    SMALL,
    WIDTH,
    band,
    blank_figure,
    log_ticks,
)

MOST_NAMED = 12  # classes in the legend
MARKERS = {"image": "o", "text": "^"}
WITHOUT_CLASSES = {"image": "black", "text": "#56B4E9"}


class Panel(NamedTuple):
    """A panel of figure 7.

    Attributes:
      title: what the embeddings are of.
      points: (2 n, 2), of n images and then of their n texts.
      labels: n names of classes, or None.
      correlation: of the first principal component, which was taken out, with the modality.
      explained: its share of the variance.
    """

    title: str
    points: np.ndarray
    labels: np.ndarray | None
    correlation: float
    explained: float


def figure_7(panels: Sequence[Panel]) -> Figure:
    """Embeddings of images and texts in the plane, coloured by class.

    Args:
      panels: from left to right; the classes are those of the first.

    Returns:
      The figure: circles are images, triangles texts. A class that is named like a colour has it.
    """
    figure = blank_figure(0.9 + WIDTH / max(len(panels), 2))
    names = [] if panels[0].labels is None else list(np.unique(panels[0].labels))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for half, (modality, marker) in zip(
            np.split(panel.points, 2), MARKERS.items(), strict=True
        ):
            colours: Any = WITHOUT_CLASSES[modality]
            if panel.labels is not None:
                colours = [_colour(names, label) for label in panel.labels]
            axes.scatter(*half.T, c=colours, marker=marker, s=5, alpha=0.7, linewidths=0)
        axes.set_title(
            f"{panel.title}\nremoved: {panel.explained:.0%} of the variance,\n"
            f"correlation {panel.correlation:.3f} with modality",
            fontsize=SMALL,
        )
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel("t-SNE, first axis", fontsize=FONT_SIZE)
    first = figure.axes[0]
    first.set_ylabel("t-SNE, second axis", fontsize=FONT_SIZE)
    for name, marker in MARKERS.items():
        colour = "black" if names else WITHOUT_CLASSES[name]
        first.scatter([], [], c=colour, marker=marker, s=12, label=name)
    for name in names[:MOST_NAMED]:
        first.scatter([], [], color=_colour(names, name), marker="s", s=12, label=name)
    if len(names) > MOST_NAMED:
        first.scatter([], [], c="none", s=12, label=f"and {len(names) - MOST_NAMED} classes more")
    _legend_below(figure, first)
    return figure


def _colour(names: list[str], label: str) -> Any:
    return label if label in CSS4_COLORS else colormaps["tab20"](names.index(label) % 20)


def mechanism_figure(results: Mapping[str, Any]) -> Figure:
    """SAM against M-SAM at one learning rate and radius, over the steps of fine-tuning.

    Args:
      results: content of the results.json of `monge-sam clip`; its `mechanism` says which cells.

    Returns:
      Panels of the gradient's norm, the perturbation's norm and the losses (at the perturbed
      params dashed): means over seeds, in bands of one standard error if there are several.
    """
    chosen = results["mechanism"]
    figure = blank_figure(2.8)
    panels = figure.subplots(1, 3)
    for cell in results["cells"]:
        if (cell["learning_rate"], cell["rho"]) != (chosen["learning_rate"], chosen["rho"]):
            continue
        for axes, name in zip(
            panels, ("grad_norm", "perturbation_norm", "train_loss"), strict=True
        ):
            _draw(axes, cell, name, "-")
        _draw(panels[2], cell, "perturbed_loss", "--")
    panels[2].axhline(results["chance"]["loss"], color=GREY, linewidth=0.8, linestyle=":")
    labels = (r"$\|g\|$ at $\theta$ (nats)", r"$\|\delta\|$", "training loss (nats)")
    for axes, label in zip(panels, labels, strict=True):
        axes.set_ylabel(label, fontsize=FONT_SIZE)
        axes.set_xlabel("step", fontsize=FONT_SIZE)
        axes.tick_params(which="both", labelsize=SMALL)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[:2]:
        axes.set_yscale("log")
        log_ticks(axes)
    figure.suptitle(
        rf"learning rate {chosen['learning_rate']:g}, $\rho$ = {chosen['rho']:g}",
        fontsize=FONT_SIZE,
    )
    _legend_below(
        figure,
        panels[0],
        *[band()] * bool(panels[0].collections),
        Line2D([], [], color=GREY, label=r"at $\theta$"),
        Line2D([], [], color=GREY, linestyle="--", label=r"at $\theta + \delta$"),
        Line2D([], [], color=GREY, linewidth=0.8, linestyle=":", label="loss of chance"),
    )
    return figure


def _draw(axes: Axes, cell: Mapping[str, Any], name: str, style: str) -> None:
    curves = np.array([seed[name] for seed in cell["seeds"]], float)  # null becomes NaN
    steps = np.array(cell["seeds"][0]["steps"])
    middle = (steps[1:] + steps[:-1]) / 2  # each is a mean over steps
    mean, colour = curves.mean(axis=0), COLOURS[cell["method"]]
    axes.plot(middle, mean, style, color=colour, label=LABELS[cell["method"]], linewidth=1.2)
    if len(curves) > 1:
        error = curves.std(axis=0, ddof=1) / np.sqrt(len(curves))
        axes.fill_between(middle, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)


def _legend_below(figure: Figure, axes: Axes, *more: Artist) -> None:
    handles = [*axes.get_legend_handles_labels()[0], *more]
    longest = max(len(str(handle.get_label())) for handle in handles)
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=max(1, min(8, int(WIDTH / (0.5 + 0.055 * longest)))),  # in inches, roughly
        fontsize=SMALL,
        frameon=False,
    )
