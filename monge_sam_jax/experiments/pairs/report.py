"""What is written beside the pairs: where they come from, and some of them to look at."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.plots import blank_figure
from monge_sam_jax.experiments.pairs.package import Candidate

ROWS, COLUMNS = 4, 5  # of the contact sheet
CAPTION_WIDTH = 24  # letters on a line there
CAPTION_SIZE = 4.5
MOST_NAMED = 5  # of the files left out for a reason; pairs.json names all


def sources(results: Mapping[str, Any]) -> str:
    """Packages, licences, how captions are made, how many pairs there are, and what is left out.

    Args:
      results: content of pairs.json.

    Returns:
      Markdown.
    """
    side = results["configuration"]["side"]
    splits, nearest = results["pairs"], results["nearest"]
    lines = [
        "# Sources",
        "",
        f"{report.count(sum(splits.values()), 'pair')} of pictures of {side} x {side} pixels and "
        f"captions: {', '.join(f'{name} {count}' for name, count in splits.items())}.",
        "",
        "| package | version | licence | its text |",
        "|---|---|---|---|",
        *(
            f"| {origin['package']} | {origin['version']} | {origin['licence']} | "
            f"{origin['text'] or 'none found'} |"
            for origin in results["packages"]
        ),
        "",
        f"Captions: {results['captions']} They have {results['words']['median']:g} words in the "
        f"median, {results['words']['most']} at most.",
        "",
        f"No two pairs have one caption. Between a test picture and the nearest to train with, the "
        f"root of the mean square difference at 16 x 16 pixels is at least "
        f"{nearest['least']:.3f}, in the median {nearest['median']:.3f} (white to black: 1); "
        f"pictures nearer than {nearest['same']:g} count as one.",
        "",
        "Left out:",
        "",
        *(
            f"- {len(names)}, {reason}: {_some(names)}"
            for reason, names in results["left_out"].items()
        ),
        "",
    ]
    return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    more = [f"{len(names) - MOST_NAMED} more in pairs.json"] if len(names) > MOST_NAMED else []
    return ", ".join([*names[:MOST_NAMED], *more])


def contact_sheet(images: np.ndarray, candidates: Sequence[Candidate]) -> Figure:
    """Twenty of the pairs, or all if there are fewer, at even distances."""
    figure = blank_figure(4.6)
    rows = np.unique(np.linspace(0, len(images) - 1, ROWS * COLUMNS).astype(int))
    panels = figure.subplots(ROWS, COLUMNS)
    for axes in panels.flat:
        axes.axis("off")
    for axes, row in zip(panels.flat, rows, strict=False):
        axes.imshow(images[row])
        text = textwrap.shorten(candidates[row].caption, 4 * CAPTION_WIDTH)
        axes.set_title(textwrap.fill(text, CAPTION_WIDTH), fontsize=CAPTION_SIZE, parse_math=False)
    return figure
