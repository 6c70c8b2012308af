"""The command `monge-sam`."""

import functools
import importlib
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from monge_sam_jax._core import interruption
from monge_sam_jax.experiments.bad_minimum.options import BadMinimum
from monge_sam_jax.experiments.bench.options import Bench
from monge_sam_jax.experiments.clip.options import Clip
from monge_sam_jax.experiments.common.errors import InputError, LostProcessError
from monge_sam_jax.experiments.figures.options import Figures
from monge_sam_jax.experiments.quality.options import Quality
from monge_sam_jax.experiments.train.options import Train


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
    "quality": Command(Quality, "monge_sam_jax.experiments.quality.run:run"),
    "bad-minimum": Command(
        BadMinimum,
        "monge_sam_jax.experiments.bad_minimum.run:run",
        ("kept/*.npz",),
        "finished minima and runs are kept in {output}/kept; the same command goes on from there",
    ),
    "clip": Command(
        Clip,
        "monge_sam_jax.experiments.clip.run:run",
        ("finished/*/*.npz",),
        "finished runs are kept in {output}/finished; the same command goes on from there",
    ),
}


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
      args: what comes after the program's name; None takes it from the process.

    Raises:
      SystemExit: after one line on stderr, with code 2 where options or data cannot be used, and 3
        where a process of a distributed run is gone, and 130 where Ctrl-C interrupts.
    """
    kept: Callable[[], str] = lambda: interruption.BEFORE_THE_WORK  # noqa: E731
    try:
        import tyro

        options = tyro.extras.subcommand_cli_from_dict(
            {name: command.options for name, command in COMMANDS.items()},
            prog="monge-sam",
            description="Sharpness-aware training in JAX.",
            args=args,
        )
        kept = functools.partial(command_of(options).kept, options.output)
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
        _fail(f"{error.name} is missing; pip install 'monge_sam_jax[cli]'")


def command_of(options: Any) -> Command:
    """The command whose options they are."""
    return next(command for command in COMMANDS.values() if command.options is type(options))


def run(options: Any) -> None:
    """Runs the command whose options they are."""
    module, _, function = command_of(options).runner.partition(":")
    getattr(importlib.import_module(module), function)(options)


def _fail(message: str, code: int = 2) -> None:
    print("monge-sam: error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
