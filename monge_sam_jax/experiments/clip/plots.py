"""The pictures of `monge-sam clip`: figure 7 of the paper, and what the perturbation does."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import CSS4_COLORS
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from monge_sam_jax.experiments.common.plots import (
    COLOURS,
    FIGURE_WIDTH,
    FONT_SIZE,
    GREY,
    LABELS,
    SMALL,
    band,
    blank_figure,
    draw_mean,
    legend_below,
    legend_in_corner,
    log_ticks,
    three_panels,
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
    figure = blank_figure(1.1 + FIGURE_WIDTH / max(len(panels), 2))
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
            f"{panel.title}\n{panel.explained:.0%} of the variance\nremoved, correlation\n"
            f"{panel.correlation:.3f} with modality",
            fontsize=SMALL,
        )
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel("t-SNE, axis 1", fontsize=FONT_SIZE)
    first = figure.axes[0]
    first.set_ylabel("t-SNE, axis 2", fontsize=FONT_SIZE)
    for name, marker in MARKERS.items():
        colour = "black" if names else WITHOUT_CLASSES[name]
        first.scatter([], [], c=colour, marker=marker, s=12, label=name)
    for name in names[:MOST_NAMED]:
        first.scatter([], [], color=_colour(names, name), marker="s", s=12, label=name)
    if len(names) > MOST_NAMED:
        first.scatter([], [], c="none", s=12, label=f"and {len(names) - MOST_NAMED} classes more")
    legend_below(figure, first.get_legend_handles_labels()[0])
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
    names = (r"$\|g\|$ at $\theta$ (nats)", r"$\|\delta\|$", "training loss (nats)")
    figure, panels = three_panels("step", names)
    gradient, length, loss = panels
    for cell in results["cells"]:
        if (cell["learning_rate"], cell["rho"]) != (chosen["learning_rate"], chosen["rho"]):
            continue
        steps = np.array(cell["seeds"][0]["steps"])
        middle = (steps[1:] + steps[:-1]) / 2  # each is a mean over steps
        for axes, name, style in (
            (gradient, "grad_norm", "-"),
            (length, "perturbation_norm", "-"),
            (loss, "train_loss", "-"),
            (loss, "perturbed_loss", "--"),
        ):
            curves = [seed[name] for seed in cell["seeds"]]
            colour, label = COLOURS[cell["method"]], LABELS[cell["method"]]
            draw_mean(axes, middle, curves, colour, label, linestyle=style)
    loss.axhline(results["chance"]["loss"], color=GREY, linewidth=0.8, linestyle=":")
    for axes in (gradient, length):
        axes.set_yscale("log")
        log_ticks(axes)
    figure.suptitle(
        rf"learning rate {chosen['learning_rate']:g}, $\rho$ = {chosen['rho']:g}",
        fontsize=FONT_SIZE,
    )
    handles = [
        *gradient.get_legend_handles_labels()[0],
        *[band()] * bool(gradient.collections),
        Line2D([], [], color=GREY, label=r"at $\theta$"),
        Line2D([], [], color=GREY, linestyle="--", label=r"at $\theta + \delta$"),
        Line2D([], [], color=GREY, linewidth=0.8, linestyle=":", label="loss of chance"),
    ]
    legend_in_corner(figure, handles)
    return figure
