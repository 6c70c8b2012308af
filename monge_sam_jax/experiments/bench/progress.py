"""How far `monge-sam bench` is: a bar on a terminal, lines in a log."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TaskID

from monge_sam_jax.experiments.common import report


class Steps:
    """Tells of steps, of which there is a known number."""

    def __init__(self, label: str, bars: Progress, bar: TaskID, as_lines: bool) -> None:
        self._label, self._bars, self._bar, self._as_lines = label, bars, bar, as_lines

    def begin(self, what: str) -> None:
        """What is being done, for the bar."""
        self._bars.update(self._bar, description=f"{self._label}: {what}")

    def end(self, what: str | None = None) -> None:
        """A step is done; what it came to and what is left, for a line."""
        self._bars.advance(self._bar)
        if self._as_lines and what:
            print(f"{self._label}: {what}", file=sys.stderr, flush=True)


@contextmanager
def steps(label: str, total: int) -> Iterator[Steps]:
    """A bar with so many steps that vanishes in the end, or lines where there is no terminal."""
    as_lines = not Console(stderr=True).is_terminal
    with report.progress_bar(disable=as_lines) as bars:
        yield Steps(label, bars, bars.add_task(label, total=total), as_lines)
