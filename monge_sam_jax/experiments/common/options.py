"""What the options of several commands have in common."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from monge_sam_jax.experiments.common.errors import InputError

LARGEST_SEED = 2**31 - 1
PRESET = "PRESET"  # stands for the preset's name in the folder that is the default of --output

Options = TypeVar("Options", bound=type)


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


def presets_in_help(
    presets: Mapping[Any, Any], noun: str = "Preset "
) -> Callable[[Options], Options]:
    """A decorator of options, whose help gets a paragraph for the values of each preset.

    Args:
      noun: what comes before a name.
      presets: by name, what a preset decides: dataclasses, named tuples or mappings, nested too.
    """

    def decorate(options: Options) -> Options:
        documented = inspect.cleandoc(options.__doc__ or "")  # Python 3.13 has done so already
        description, attributes, rest = documented.partition("\n\nAttributes:")
        paragraphs = [f"\n\n{noun}{name}: {in_words(v)}." for name, v in presets.items()]
        options.__doc__ = "".join([description, *paragraphs, attributes, rest])
        return options

    return decorate


def in_words(value: Any) -> str:
    """Values by name, as the help has them.

    >>> in_words({"batch_size": 32, "rho": (0.1, 1.0), "mlp": {"width": 4}})
    'batch size 32, rho 0.1 1, mlp (width 4)'
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        parts = ((name.replace("_", " "), in_words(part), part) for name, part in value.items())
        return ", ".join(f"{n} ({w})" if _has_names(p) else f"{n} {w}" for n, w, p in parts)
    if isinstance(value, tuple):
        return " ".join(map(in_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _has_names(value: Any) -> bool:
    return isinstance(value, Mapping) or hasattr(value, "_asdict")
