"""Ctrl-C ends the command `monge-sam` with one line; imported first, for the time of the imports.

Other programs that import the package keep their own handling of it.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

CODE = 130  # of a program that Ctrl-C has ended, by convention
BEFORE_THE_WORK = "nothing has begun"
SHOW_CURSOR = "\r\x1b[2K\x1b[?25h"  # in a line without what is left of a bar


def is_command() -> bool:
    """Whether this process is the command and not another program that imports the package."""
    if sys.argv[:1] == ["-m"]:  # Python puts the path there after the imports
        module = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
        return module[:1] == ["monge_sam_jax"]
    return bool(sys.argv) and Path(sys.argv[0]).stem == "monge-sam"


def line(kept: str = BEFORE_THE_WORK) -> str:
    """What the command says when it is interrupted."""
    return " ".join(f"monge-sam: interrupted: {kept}".split())


def end_at_once(*_: Any) -> None:
    """Ends the process with the line, for when there is nothing to clean up."""
    _end(line())


def unwind_from_now_on(kept: Callable[[], str]) -> None:
    """Ctrl-C raises KeyboardInterrupt, and a second one ends what takes its time with that.

    To be called when the work begins, which has things to clean up.

    Args:
      kept: says what is kept.
    """
    if signal.getsignal(signal.SIGINT) is not end_at_once:
        return
    tell = sys.unraisablehook

    def end(*_: Any) -> None:
        _end(line(kept()))

    def unwind(*_: Any) -> None:
        signal.signal(signal.SIGINT, end)
        raise KeyboardInterrupt

    def unraisable(lost: Any) -> None:
        # Raised in a callback of the garbage collector, say, the interrupt would be lost.
        if isinstance(lost.exc_value, KeyboardInterrupt):
            end()
        tell(lost)

    sys.unraisablehook = unraisable
    signal.signal(signal.SIGINT, unwind)


def leave_quietly() -> NoReturn:
    """Ends the process as it is: where threads of JAX still compute, Python's own end can crash."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(CODE)


def on_a_clean_line(text: str) -> str:
    """The text, on a terminal with the cursor back that a bar or that of a child has hidden."""
    return (SHOW_CURSOR if sys.stderr.isatty() else "") + text


def _end(text: str) -> None:
    os.write(2, f"{on_a_clean_line(text)}\n".encode())  # it may have come in the middle of a print
    os._exit(CODE)


# Where the command was started with SIGINT ignored, as in the background of a shell's script, it
# stays so.
if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)
