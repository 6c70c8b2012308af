"""The command `monge-sam`."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from monge_sam_jax.experiments import InputError
from monge_sam_jax.experiments.digits import Train
from monge_sam_jax.experiments.figures import Figures

# Classes of options, each with a method `run`.
COMMANDS: dict[str, Callable[..., Any]] = {
    "train": Train,
    "figures": Figures,
}


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
      args: what comes after the program's name; None takes it from the process.

    Raises:
      SystemExit: with code 2 where options or data cannot be used, after one line on stderr.
    """
    try:
        import tyro

        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="monge-sam", description="Sharpness-aware training in JAX.", args=args
        )
        command.run()
    except InputError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "rich", "sklearn", "tyro"):
            raise
        _fail(f"{error.name} is missing; pip install 'monge_sam_jax[cli]'")


def _fail(message: str) -> None:
    print("monge-sam: error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
