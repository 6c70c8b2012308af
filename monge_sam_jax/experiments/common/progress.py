"""How far a command is: bars on a terminal, lines in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import chex
from rich.console import Console
from rich.progress import (
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from monge_sam_jax.experiments.common import report


class Steps:
    """Tells of steps, of which there is a known number."""

    def __init__(
        self, label: str, total: int, *, completed: int, unit: str, bars: Progress, as_lines: bool
    ) -> None:
        self._label, self._total, self._first, self._done = label, total, completed, completed
        self._unit, self._bars, self._as_lines = unit, bars, as_lines
        self._bar = self._add_bar(label, total, completed, unit)
        self._part: TaskID | None = None
        self._start = time.monotonic()

    def _add_bar(self, label: str, total: int, completed: int, unit: str) -> TaskID:
        units = f"{unit}s" if unit else ""
        return self._bars.add_task(label, total=total, completed=completed, unit=units, loss="")

    def begin(self, what: str) -> None:
        """What is being done, for the bar."""
        self._bars.update(self._bar, description=self._told(what))

    def begin_part(self, what: str, total: int, unit: str) -> None:
        """A step has parts of its own, for a second bar."""
        if self._part is None:
            self._part = self._add_bar(what, total, 0, unit)
        self._bars.reset(self._part, total=total, description=what, unit=f"{unit}s", loss="")

    def end_part(self, loss: chex.Numeric | None = None) -> None:
        """One of the parts is done; the loss, for the bar, is read if there is one."""
        if self._part is None or self._bars.disable:
            return
        self._bars.advance(self._part)
        if loss is not None:
            self._bars.update(self._part, loss=f"loss {float(loss):.4g}")

    def end(self, what: str | None = None, loss: float | None = None) -> None:
        """A step is done; what it came to, for a line, and the loss, for the bar."""
        self._done += 1
        self._bars.advance(self._bar)
        if loss is not None:
            self._bars.update(self._bar, loss=f"loss {loss:.4g}")
        if self._as_lines and what:
            left = f", {self._left()}" if self._unit else ""
            print(f"{self._told(what)}{left}", file=sys.stderr, flush=True)

    def _told(self, what: str) -> str:
        return f"{self._label}: {what}" if self._label else what

    def _left(self) -> str:
        """How much, and for how long if all steps take the same."""
        seconds = (time.monotonic() - self._start) / (self._done - self._first)
        left = f"{self._total - self._done} of {report.count(self._total, self._unit)} left"
        return f"{left}, about {duration(seconds * (self._total - self._done))}"


def duration(seconds: float) -> str:
    """A time in words.

    >>> duration(42.4), duration(300), duration(5400)
    ('42 s', '5 min', '1.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


@contextmanager
def steps(
    label: str, total: int, *, completed: int = 0, unit: str = "", silent: bool = False
) -> Iterator[Steps]:
    """Bars that vanish in the end, or lines where standard error is no terminal.

    Args:
      label: what all of it is, at the beginning of every line.
      total: number of steps.
      completed: how many of them lie behind.
      unit: what one of them is; without that, lines do not say how many are left.
      silent: neither bars nor lines.

    Yields:
      What is told of the steps.
    """
    console = Console(stderr=True)
    as_lines = not console.is_terminal
    columns = (
        *Progress.get_default_columns()[:2],  # of which the bar is short where there is no room
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[unit]}"),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
    )
    disable = as_lines or silent
    with Progress(*columns, console=console, transient=True, disable=disable) as bars:
        yield Steps(
            label,
            total,
            completed=completed,
            unit=unit,
            bars=bars,
            as_lines=as_lines and not silent,
        )
