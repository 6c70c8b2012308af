"""The options of `monge-sam figures`; light to import, so that the command line's help is quick."""

from pathlib import Path
from typing import Literal


class Figures:
    """Draw the figures 1 to 5 of the Monge SAM paper, on its toy losses.

    Figures 1, 4 and 5 are on the loss (1 - t1 t2)^2, figure 2 on 5 sin(r) / r with r = t1^2 + t2^2,
    figure 3 on t^2.
    """

    # No dataclass: positional-only, the numbers are given without a flag.
    def __init__(
        self,
        numbers: tuple[Literal[1, 2, 3, 4, 5], ...] = (1, 2, 3, 4, 5),
        /,
        *,
        output: Path = Path("runs/figures"),
        overwrite: bool = False,
    ) -> None:
        """Takes the options.

        Args:
          numbers: Which figures; all of them if none is given.
          output: Folder for figure_1.png to figure_5.png and figures.json, the numbers behind them.
            Those of an earlier run of the same figures are overwritten.
          overwrite: Write over those of other figures, if the output folder has some.
        """
        self.numbers = tuple(sorted(set(numbers))) or (1, 2, 3, 4, 5)
        self.output = output
        self.overwrite = overwrite
