"""The chart of `monge-sam bench`."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from monge_sam_jax.experiments.bench.options import BY_HAND
from monge_sam_jax.experiments.common.plots import (
    COLOURS,
    FONT_SIZE,
    GREY,
    LABELS,
    SMALL,
    blank_figure,
    finish,
    legend_below,
)

# Who wrote it, by the beginning of a method's name, the first that fits: the mark.
GROUPS = {
    ("plain", "two_gradients"): ("references", "|"),
    tuple(BY_HAND.values()): ("by hand", "s"),
    ("optax_",): ("optax.contrib.sam", "D"),
    ("",): ("monge_sam_jax", "o"),
}
# And what it does: the colour. `one_pass_sam` perturbs by M-SAM's metric here.
KINDS = {
    ("plain", "two_gradients"): "sgd",
    ("sam", "optax_"): "sam",
    ("adaptive",): "adaptive_sam",
    ("fisher",): "fisher_sam",
    ("",): "monge_sam",
}


def benchmark_figure(results: Mapping[str, Any]) -> Figure:
    """Time of a descent step with each method as a ratio to the plain one.

    Args:
      results: content of the results.json of `monge-sam bench`.

    Returns:
      A panel for each model, or a column of them where there are several batch sizes: medians over
      rounds, in bars from quartile to quartile, in the colours of the methods. Lines mark the plain
      step and two gradients.
    """
    columns: dict[str, list[Mapping[str, Any]]] = {}
    for entry in results["measurements"]:
        columns.setdefault(entry["model"], []).append(entry)
    rows = max(map(len, columns.values()))
    names = list(results["measurements"][0]["methods"])
    figure = blank_figure(1.3 + rows * (0.4 + 0.19 * len(names)))
    panels = figure.subplots(rows, len(columns), sharex="col", sharey=True, squeeze=False)
    for column, (model, entries) in enumerate(columns.items()):
        for axes, entry in zip(panels[:, column], entries, strict=True):
            _draw(axes, entry["methods"])
            title = f"{model}, batch {entry['batch_size']}" if rows > 1 else model
            axes.set_title(title, fontsize=SMALL)
            finish(axes, "/ plain" if entry is entries[-1] else "")
            axes.xaxis.set_major_locator(MaxNLocator(2))
        panels[-1, column].set_xlim(left=0)  # of all: it ends the scaling to what is drawn
    panels[0, 0].set_yticks(range(len(names)), names)
    panels[0, 0].invert_yaxis()
    for axes in panels[:, 0]:
        axes.set_ylabel("kind of step", fontsize=FONT_SIZE)
    figure.suptitle("time of a step", fontsize=FONT_SIZE)
    legend_below(figure, _entries(names))
    return figure


def _entries(names: Sequence[str]) -> list[Line2D]:
    """Of the legend: the marks, the colours and the lines that there are."""
    groups = [_first(GROUPS, name) for name in names]
    kinds = [_first(KINDS, name) for name in names]
    entries = [
        Line2D([], [], color=GREY, marker=marker, markersize=4, linestyle="none", label=label)
        for label, marker in GROUPS.values()
        if (label, marker) in groups
    ]
    entries += [
        Line2D([], [], color=COLOURS[kind], linewidth=3, label=LABELS[kind])
        for kind in LABELS
        if kind in kinds
    ]
    return [
        *entries,
        Line2D([], [], color=GREY, linewidth=1.3, label="from quartile to quartile"),
        Line2D([], [], color=GREY, linewidth=0.8, linestyle=":", label="medians of the references"),
    ]


def _first(table: Mapping[tuple[str, ...], Any], name: str) -> Any:
    return next(value for prefixes, value in table.items() if name.startswith(prefixes))


def _draw(axes: Axes, methods: Mapping[str, Any]) -> None:
    for reference in ("plain", "two_gradients"):
        ratio = methods[reference]["ratio_to_plain"]["median"]
        axes.axvline(ratio, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    for place, (name, entry) in enumerate(methods.items()):
        ratio = entry["ratio_to_plain"]
        label, marker = _first(GROUPS, name)
        below, above = ratio["median"] - ratio["lower"], ratio["upper"] - ratio["median"]
        axes.errorbar(
            ratio["median"],
            place,
            xerr=[[below], [above]],
            color=COLOURS[_first(KINDS, name)],
            marker=marker,
            markersize=8 if marker == "|" else 3.5,
            linewidth=1.3,
            label=label,
        )
