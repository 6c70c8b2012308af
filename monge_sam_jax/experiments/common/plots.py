"""How figures look, which are drawn without pyplot and so without global state."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WIDTH = 7.0  # of the text on a page, in inches
FONT_SIZE = 9
DOTS_PER_INCH = 200

LABELS = {
    "sam": "SAM",
    "monge_sam": "M-SAM",
    "fisher_sam": "Fisher SAM",
    "adaptive_sam": "ASAM",
}
# The palette of Okabe and Ito, whose colours remain distinct to the colour-blind.
COLOURS = {
    "sgd": "#000000",
    "sam": "#0072B2",
    "monge_sam": "#D55E00",
    "adaptive_sam": "#009E73",
    "fisher_sam": "#CC79A7",
}


def blank_figure(height: float) -> Figure:
    """A figure as wide as the text of a page, to draw on."""
    figure = Figure(figsize=(WIDTH, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
