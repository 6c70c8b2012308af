"""The command `monge-sam`."""

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
      SystemExit: after one line on stderr, with code 2 where options or data cannot be used, and 3
        where a process of a distributed run is gone.
    """
    try:
        import tyro

        options = tyro.extras.subcommand_cli_from_dict(
            {name: command.options for name, command in COMMANDS.items()},
            prog="monge-sam",
            description="Sharpness-aware training in JAX.",
            args=args,
        )
        run(options)
    except InputError as error:
        _fail(str(error))
    except LostProcessError as error:
        _fail(str(error), code=3)
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "orbax", "rich", "sklearn", "tyro"):
            raise
        _fail(f"{error.name} is missing; pip install 'monge_sam_jax[cli]'")


def run(options: Any) -> None:
    """Runs the command whose options they are."""
    runners = {command.options: command.runner for command in COMMANDS.values()}
    module, _, function = runners[type(options)].partition(":")
    getattr(importlib.import_module(module), function)(options)


def _fail(message: str, code: int = 2) -> None:
    print("monge-sam: error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
