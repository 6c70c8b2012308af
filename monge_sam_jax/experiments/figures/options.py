"""The options of `monge-sam figures`; light to import, so that the command line's help is quick."""

from pathlib import Path
from typing import Literal, get_args

Name = Literal[1, 2, 3, 4, 5, "one-pass", "comparison"]
OF_THE_PAPER: tuple[Name, ...] = (1, 2, 3, 4, 5)


class Figures:
    """Draw the figures 1 to 5 of the Monge SAM paper, on its toy losses, and two more.

    Figures 1, 4 and 5 are on the loss (1 - t1 t2)^2, figure 2 on 5 sin(r) / r with r = t1^2 + t2^2,
    figure 3 on t^2. Two more, drawn on request, have the loss and the starts of figure 5: one-pass
    sets one pass beside two, comparison the supremum, averaged Monge and geodesic perturbations
    beside those of SAM and M-SAM.
    """

    # No dataclass: positional-only, the numbers are given without a flag.
    def __init__(
        self,
        numbers: tuple[Name, ...] = OF_THE_PAPER,
        /,
        *,
        output: Path = Path("runs/figures"),
        overwrite: bool = False,
    ) -> None:
        """Takes the options.

        Args:
          numbers: Which figures; the paper's five if none is given.
          output: Folder for figure_1.png to figure_comparison.png and, for the
            numbers, figures.json. Those of an earlier run of the same figures are overwritten.
          overwrite: Write over those of other figures, if the output folder has some.
        """
        self.numbers = tuple(n for n in get_args(Name) if n in numbers) or OF_THE_PAPER
        self.output = output
        self.overwrite = overwrite
