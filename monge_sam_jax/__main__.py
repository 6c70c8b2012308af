"""The command `monge-sam`."""

import difflib
import functools
import importlib
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import monge_sam_jax
from monge_sam_jax._core import interruption
from monge_sam_jax.experiments.bad_minimum.options import BadMinimum
from monge_sam_jax.experiments.bench.options import Bench
from monge_sam_jax.experiments.clip.options import Clip
from monge_sam_jax.experiments.common.errors import (
    InputError,
    LostProcessError,
    installing,
)
from monge_sam_jax.experiments.common.options import FINISHED
from monge_sam_jax.experiments.edges.options import Edges
from monge_sam_jax.experiments.figures.options import Figures
from monge_sam_jax.experiments.pairs.options import Pairs
from monge_sam_jax.experiments.study.options import Study
from monge_sam_jax.experiments.train.options import Train

CLOSED_PIPE = 141  # of a program whose output nobody reads any more, by convention


class Command(NamedTuple):
    """A command.

    Attributes:
      options: what the command line is parsed into.
      runner: module:function that takes them; loaded when it is called, so that help is quick.
      keeps: what an interrupted run may leave in the output folder, as patterns of its files.
      advice: what to say of it then.
    """

    options: Callable[..., Any]
    runner: str
    keeps: tuple[str, ...] = ()
    advice: str = ""

    def kept(self, output: Path) -> str:
        """What an interrupted run has left, and how to go on."""
        found = [path for pattern in self.keeps for path in output.glob(pattern)]
        if any("tmp" not in path.name for path in found):  # so Orbax calls what is not complete
            return self.advice.format(output=output)
        return "nothing is kept; the same command begins anew"


_STORE = (
    (f"{FINISHED}/*.npz",),
    f"what is finished is kept in {{output}}/{FINISHED}; the same command goes on from there",
)
COMMANDS = {
    "train": Command(
        Train,
        "monge_sam_jax.experiments.train.run:run",
        ("checkpoints/epoch_*",),
        "the last checkpoint is kept in {output}/checkpoints; the same command with --resume goes "
        "on from it",
    ),
    "figures": Command(
        Figures,
        "monge_sam_jax.experiments.figures.run:run",
        ("figure_*.png",),
        "the figures in {output} are kept; the same command draws all of its own anew",
    ),
    "bench": Command(
        Bench,
        "monge_sam_jax.experiments.bench.run:run",
        ("results.json", "counts.json"),
        "the models in the .json file in {output} are kept; the same command begins anew",
    ),
    "study": Command(Study, "monge_sam_jax.experiments.study.run:run", *_STORE),
    "edges": Command(Edges, "monge_sam_jax.experiments.edges.run:run"),
    "bad-minimum": Command(BadMinimum, "monge_sam_jax.experiments.bad_minimum.run:run", *_STORE),
    "clip": Command(Clip, "monge_sam_jax.experiments.clip.run:run", *_STORE),
    "pairs": Command(Pairs, "monge_sam_jax.experiments.pairs.run:run"),
}


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
      args: what comes after the program's name; None takes it from the process.

    Raises:
      SystemExit: after help or the version, with code 0; after one line on stderr, with code 2
        where options or data cannot be used, 3 where a process of a distributed run is gone, 130
        where Ctrl-C interrupts, and 141 where what reads the output has ended.
    """
    try:
        try:
            _main(args)
        except SystemExit as exit_:
            # So Rich tells of a closed pipe.
            if isinstance(exit_.__context__, BrokenPipeError):
                raise exit_.__context__ from None
            raise
        finally:
            sys.stdout.flush()  # while it can still be answered
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):  # which Python flushes at its end
            try:
                stream.flush()
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(CLOSED_PIPE)


def _main(args: Sequence[str] | None) -> None:
    first, *rest = (sys.argv[1:] if args is None else args) or ("",)
    if first in ("-h", "--help"):
        print(_overview())
        sys.exit(0)
    if first == "--version":
        print("monge-sam", monge_sam_jax.__version__)
        sys.exit(0)
    if first not in COMMANDS:
        _fail(_not_a_command(first))
    kept: Callable[[], str] = lambda: interruption.BEFORE_THE_WORK  # noqa: E731
    try:
        import tyro

        command = COMMANDS[first]
        options = tyro.cli(command.options, prog=f"monge-sam {first}", args=rest)
        kept = functools.partial(command.kept, options.output)
        interruption.unwind_from_now_on(kept)
        run(options)
    except KeyboardInterrupt:
        if args is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end is not interrupted again
        print(interruption.on_a_clean_line(interruption.line(kept())), file=sys.stderr)
        if args is None:
            interruption.leave_quietly()
        sys.exit(interruption.CODE)
    except InputError as error:
        _fail(str(error))
    except LostProcessError as error:
        _fail(str(error), code=3)
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "orbax", "rich", "sklearn", "tyro"):
            raise
        _fail(f"{error.name} is missing; {installing('cli')}")


def command_of(options: Any) -> Command:
    """The command whose options they are."""
    return next(command for command in COMMANDS.values() if command.options is type(options))


def run(options: Any) -> None:
    """Runs the command whose options they are."""
    module, _, function = command_of(options).runner.partition(":")
    getattr(importlib.import_module(module), function)(options)


def _overview() -> str:
    """The help: a sentence for every command, the first of what its own help says."""
    width = max(map(len, COMMANDS))
    lines = ["usage: monge-sam COMMAND [OPTIONS]", "", "Sharpness-aware training in JAX.", ""]
    for name, command in COMMANDS.items():
        sentence = (command.options.__doc__ or "").partition("\n")[0]
        indent = " " * (width + 4)
        lines.append(
            textwrap.fill(
                sentence, 79, initial_indent=f"  {name:{width}}  ", subsequent_indent=indent
            )
        )
    options = ("monge-sam COMMAND --help: its options.", "monge-sam --version: the version.")
    return "\n".join([*lines, "", *options])


def _not_a_command(word: str) -> str:
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    if near:
        return f"no command {word}; did you mean {near[0]}?"
    start = f"no command {word}" if word else "a command is needed"
    return f"{start}; it comes first and is one of {', '.join(COMMANDS)} (monge-sam --help)"


def _fail(message: str, code: int = 2) -> NoReturn:
    print("monge-sam: error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
