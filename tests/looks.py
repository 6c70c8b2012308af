"""What holds for every figure, of the commands and of the notebooks."""

import itertools
import re

from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.quiver import Quiver

from monge_sam_jax.experiments.bad_minimum.report import LABELS as OF_STOCHASTIC
from monge_sam_jax.experiments.common.plots import COLOURS
from monge_sam_jax.experiments.figures.plots import LABELS as OF_TOYS

NAMES = {label: name for name, label in (OF_STOCHASTIC | OF_TOYS).items()} | {
    "SGD": "sgd",
    "Adam": "adam",
    "one-pass SAM": "sam",
    "one-pass M-SAM": "monge_sam",
}
del NAMES["SGD from scratch"]


def check(figure):
    """Axes have names, methods their colours, all is legible and within the figure.

    Args:
      figure: a Matplotlib figure.

    Returns:
      The labels of the methods that were found in it.
    """
    figure.canvas.draw()
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert panels
    assert all(axes.get_ylabel() for axes in panels if axes.get_subplotspec().is_first_col())
    assert all(axes.get_xlabel() for axes in panels if axes.get_subplotspec().is_last_row())
    entries = [
        entry
        for legend in figure.legends + [axes.get_legend() for axes in panels]
        if legend is not None
        for entry in zip(legend.legend_handles, legend.get_texts(), strict=True)
    ]
    drawn = [(line, line.get_label()) for axes in panels for line in axes.lines]
    drawn += [(handle, text.get_text()) for handle, text in entries]
    found = {label for _, label in drawn if label in NAMES}
    for artist, label in drawn:
        if label in NAMES and hasattr(artist, "get_color"):
            assert to_hex(artist.get_color()) == COLOURS[NAMES[label]].lower(), label
    for axes in panels:
        if (name := NAMES.get(axes.get_title())) is not None:
            used = {to_hex(line.get_color()).upper() for line in axes.lines}
            assert used & set(COLOURS.values()) <= {COLOURS[name], COLOURS["sgd"]}  # black: marks
    words = [text.get_text() for _, text in entries]
    assert len(words) == len(set(words))
    filled = [c for axes in panels for c in axes.collections if isinstance(c, PolyCollection)]
    if any(not isinstance(c, Quiver) for c in filled):
        assert "± one standard error" in words
    _check_texts(figure, panels)
    return found


def check_column(figure):
    """`check`; and in a column of 3.3 inches all can be read, and no name covers another.

    Args:
      figure: of a command.

    Returns:
      What `check` does.
    """
    found = check(figure)
    names = [text for text in _names(figure.axes) if text.get_text()]
    ticks = [
        text for axes in figure.axes for text in axes.get_xticklabels() + axes.get_yticklabels()
    ]
    entries = [text for legend in figure.legends for text in legend.get_texts()]
    for text in (*names, *ticks, *entries):
        assert text.get_fontsize() * 3.3 / figure.get_figwidth() > 5.99, text
    for a, b in itertools.combinations(names, 2):
        assert not a.get_window_extent().overlaps(b.get_window_extent()), (a, b)
    return found


def _names(panels):
    texts = [axes.title for axes in panels]
    return texts + [axis.label for axes in panels for axis in (axes.xaxis, axes.yaxis)]


def _check_texts(figure, panels):
    texts = _names(panels)
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    width, height = figure.canvas.get_width_height()
    for text in texts:
        if not text.get_text():
            continue
        assert text.get_fontsize() >= 8
        plain = "".join(text.get_text().split("$")[::2])
        assert not re.search(r"\b(rho|theta|delta|eta|alpha)\b|\|", plain), plain
        box = text.get_window_extent()
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= width + 1
        assert box.y1 <= height + 1
