"""What the options of several commands have in common."""

import math
from collections.abc import Mapping
from pathlib import Path

from monge_sam_jax.experiments.common.errors import InputError

LARGEST_SEED = 2**31 - 1
PRESET = "PRESET"  # stands for the preset's name in the folder that is the default of --output


def flag(name: str) -> str:
    """The option as it is typed."""
    return "--" + name.replace("_", "-")


def check_seed(seed: int) -> None:
    """Raises an InputError unless random numbers can be had from the seed."""
    if not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"--seed must be from 0 to {LARGEST_SEED}, got {seed}")


def check_numbers(
    values: Mapping[str, float | tuple[float, ...] | None], *, positive: bool = False
) -> None:
    """Raises an InputError where a number cannot be a radius, a height or the like.

    Args:
      values: by option: a number, several, or None for the default.
      positive: whether zero is refused too, as for learning rates, with which nothing is learnt.
    """
    for name, value in values.items():
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if all(math.isfinite(x) and (x > 0 if positive else x >= 0) for x in numbers):
            continue
        if isinstance(value, tuple):
            kind = "finite positive numbers" if positive else "finite numbers, none negative"
            raise InputError(f"{flag(name)} needs {kind}, got {value}")
        kind = "positive" if positive else "not negative"
        raise InputError(f"{flag(name)} must be finite and {kind}, got {value}")


def of_preset(output: Path, preset: str) -> Path:
    """The output folder, where it is the default one that of the preset.

    >>> of_preset(Path("runs") / "clip" / PRESET, "smoke").name
    'smoke'
    """
    return Path(*(preset if part == PRESET else part for part in output.parts))
