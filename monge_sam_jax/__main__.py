"""The command `monge-sam`."""

import difflib
import importlib
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import monge_sam_jax
from monge_sam_jax.experiments.bad_minimum.options import BadMinimum
from monge_sam_jax.experiments.bench.options import Bench
from monge_sam_jax.experiments.clip.options import Clip
from monge_sam_jax.experiments.common.errors import (
    InputError,
    LostProcessError,
    installing,
)
from monge_sam_jax.experiments.figures.options import Figures
from monge_sam_jax.experiments.quality.options import Quality
from monge_sam_jax.experiments.train.options import Train


class Command(NamedTuple):
    """A command.

    Attributes:
      options: what the command line is parsed into.
      runner: module:function that takes them; loaded when it is called, so that help is quick.
    """

    options: Callable[..., Any]
    runner: str


COMMANDS = {
    "train": Command(Train, "monge_sam_jax.experiments.train.run:run"),
    "figures": Command(Figures, "monge_sam_jax.experiments.figures.run:run"),
    "bench": Command(Bench, "monge_sam_jax.experiments.bench.run:run"),
    "quality": Command(Quality, "monge_sam_jax.experiments.quality.run:run"),
    "bad-minimum": Command(BadMinimum, "monge_sam_jax.experiments.bad_minimum.run:run"),
    "clip": Command(Clip, "monge_sam_jax.experiments.clip.run:run"),
}


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
      args: what comes after the program's name; None takes it from the process.

    Raises:
      SystemExit: after help or the version, with code 0; after one line on stderr, with code 2
        where options or data cannot be used, and 3 where a process of a distributed run is gone.
    """
    first, *rest = (sys.argv[1:] if args is None else args) or ("",)
    if first in ("-h", "--help"):
        print(_overview())
        sys.exit(0)
    if first == "--version":
        print("monge-sam", monge_sam_jax.__version__)
        sys.exit(0)
    if first not in COMMANDS:
        _fail(_not_a_command(first))
    try:
        import tyro

        run(tyro.cli(COMMANDS[first].options, prog=f"monge-sam {first}", args=rest))
    except InputError as error:
        _fail(str(error))
    except LostProcessError as error:
        _fail(str(error), code=3)
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "orbax", "rich", "sklearn", "tyro"):
            raise
        _fail(f"{error.name} is missing; {installing('cli')}")


def run(options: Any) -> None:
    """Runs the command whose options they are."""
    runners = {command.options: command.runner for command in COMMANDS.values()}
    module, _, function = runners[type(options)].partition(":")
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
