"""The chart of `monge-sam bench`."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from monge_sam_jax.experiments.common.plots import COLOURS, FONT_SIZE, blank_figure

REFERENCE = "0.6"
BY_HAND = (
    "sam_by_hand",
    "monge_by_hand",
    "adaptive_by_hand",
    "fisher_by_hand",
    "one_pass_by_hand",
)
# By the beginning of a method's name, the first that fits.
GROUPS = {
    ("plain", "two_gradients"): ("references", COLOURS["sgd"]),
    BY_HAND: ("by hand", COLOURS["fisher_sam"]),
    ("optax_",): ("optax.contrib.sam", COLOURS["sam"]),
    ("",): ("monge_sam_jax", COLOURS["monge_sam"]),
}


def benchmark_figure(results: Mapping[str, Any]) -> Figure:
    """Time of a descent step with each method as a ratio to the plain one.

    Args:
      results: content of the results.json of `monge-sam bench`.

    Returns:
      A panel for each model, or a column of them where there are several batch sizes: medians over
      rounds, in bars from quartile to quartile. Lines mark the plain step and two gradients.
    """
    columns: dict[str, list[Mapping[str, Any]]] = {}
    for entry in results["measurements"]:
        columns.setdefault(entry["model"], []).append(entry)
    rows = max(map(len, columns.values()))
    names = list(results["measurements"][0]["methods"])
    figure = blank_figure(0.5 + rows * (0.4 + 0.19 * len(names)))
    panels = figure.subplots(rows, len(columns), sharex="col", sharey=True, squeeze=False)
    for column, (model, entries) in enumerate(columns.items()):
        for axes, entry in zip(panels[:, column], entries, strict=True):
            _draw(axes, entry["methods"])
            title = f"{model}, batch {entry['batch_size']}" if rows > 1 else model
            axes.set_title(title, fontsize=FONT_SIZE)
            axes.tick_params(labelsize=FONT_SIZE)
            axes.spines[["top", "right"]].set_visible(False)
        panels[-1, column].set_xlabel("time / plain", fontsize=FONT_SIZE)
        panels[-1, column].set_xlim(left=0)  # of all: it ends the scaling to what is drawn
    panels[0, 0].set_yticks(range(len(names)), names)
    panels[0, 0].invert_yaxis()
    handles, labels = panels[0, 0].get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))
    order = [label for label, _ in GROUPS.values() if label in first]
    figure.legend(
        [first[label] for label in order],
        order,
        loc="outside lower center",
        ncols=len(GROUPS),
        fontsize=FONT_SIZE,
        frameon=False,
    )
    return figure


def _draw(axes: Axes, methods: Mapping[str, Any]) -> None:
    for reference in ("plain", "two_gradients"):
        ratio = methods[reference]["ratio_to_plain"]["median"]
        axes.axvline(ratio, color=REFERENCE, linewidth=0.8, zorder=0)
    for place, (name, entry) in enumerate(methods.items()):
        ratio = entry["ratio_to_plain"]
        label, colour = next(
            group for prefixes, group in GROUPS.items() if name.startswith(prefixes)
        )
        below, above = ratio["median"] - ratio["lower"], ratio["upper"] - ratio["median"]
        axes.errorbar(
            ratio["median"],
            place,
            xerr=[[below], [above]],
            color=colour,
            marker="o",
            markersize=3.5,
            linewidth=1.3,
            label=label,
        )
