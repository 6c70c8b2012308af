"""The command `monge-sam`."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from monge_sam_jax.experiments import InputError, LostProcessError
from monge_sam_jax.experiments.bad_minimum import BadMinimum
from monge_sam_jax.experiments.benchmark import Bench
from monge_sam_jax.experiments.clip_alignment import Clip
from monge_sam_jax.experiments.digits import Train
from monge_sam_jax.experiments.figures import Figures
from monge_sam_jax.experiments.quality import Quality

# Classes of options, each with a method `run`.
COMMANDS: dict[str, Callable[..., Any]] = {
    "train": Train,
    "figures": Figures,
    "bench": Bench,
    "quality": Quality,
    "bad-minimum": BadMinimum,
    "clip": Clip,
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

        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="monge-sam", description="Sharpness-aware training in JAX.", args=args
        )
        command.run()
    except InputError as error:
        _fail(str(error))
    except LostProcessError as error:
        _fail(str(error), code=3)
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "orbax", "rich", "sklearn", "tyro"):
            raise
        _fail(f"{error.name} is missing; pip install 'monge_sam_jax[cli]'")


def _fail(message: str, code: int = 2) -> None:
    print("monge-sam: error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
