"""`monge-sam figures`: the figures of the paper, and the numbers behind them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import jax
from rich import box
from rich.table import Table

from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.progress import steps
from monge_sam_jax.experiments.figures.analysis import figure_3, figure_4
from monge_sam_jax.experiments.figures.options import Figures
from monge_sam_jax.experiments.figures.trajectories import Result, Row, figure_1, figure_2, figure_5

FIGURES = {1: figure_1, 2: figure_2, 3: figure_3, 4: figure_4, 5: figure_5}


def run(options: Figures) -> None:
    """Draws the figures, writes figures.json and prints the numbers.

    Args:
      options: which figures, and where to.

    Raises:
      InputError: the output folder cannot be used.
    """
    configuration = {"numbers": options.numbers}
    report.prepare_output(
        options.output,
        configuration,
        options.overwrite,
        file="figures.json",
        name_of=lambda name: f"the {name} of the figures",
    )
    figures, tables = {}, []
    with steps("", len(options.numbers), unit="figure") as told:
        for number in options.numbers:
            told.begin(f"figure {number}")
            result = draw(number)
            result.figure.savefig(options.output / f"figure_{number}.png")
            figures[str(number)] = {"setting": result.setting, "rows": result.rows}
            tables.append(_table(f"Figure {number}: {result.setting}", result.rows))
            told.end(f"figure {number} is drawn")
    content = {"configuration": configuration, **report.environment(), "figures": figures}
    pictures = [f"figure_{number}.png" for number in options.numbers]
    report.publish(options.output, {"figures.json": content}, *tables, others=pictures)


def draw(number: int) -> Result:
    """Computes and draws a figure of the paper, in double precision.

    Args:
      number: of the figure, from 1 to 5.

    Returns:
      The figure with its numbers.
    """
    with _double_precision():
        return FIGURES[number]()


def _double_precision() -> AbstractContextManager:
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return jax.experimental.enable_x64(True)  # type: ignore[attr-defined]


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title)
    table.title_justify = "left"
    for name, value in rows[0].items():
        is_text = isinstance(value, str)
        table.add_column(name, justify="left" if is_text else "right", no_wrap=is_text)
    for row in rows:
        table.add_row(*(v if isinstance(v, str) else f"{v:.4g}" for v in row.values()))
    return table
