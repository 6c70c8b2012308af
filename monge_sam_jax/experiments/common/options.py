"""What the options of several commands have in common."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from monge_sam_jax.experiments.common.errors import InputError

LARGEST_SEED = 2**31 - 1
PRESET = "PRESET"  # stands for the preset's name in the folder that is the default of --output
FINISHED = "finished"  # the folder in that of --output for what need not be computed again

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


def check_counts(values: Mapping[str, int | None]) -> None:
    """Raises an InputError where a number of things, if it is not None, is below one."""
    for name, count in values.items():
        if count is not None and count < 1:
            raise InputError(f"{flag(name)} must be at least 1, got {count}")


def check_list(
    name: str, values: Sequence[Any] | None, noun: str = "name", *, may_be_empty: bool = False
) -> None:
    """Raises an InputError where a list, if it is not None, is empty or has something twice."""
    if values is not None and not values and not may_be_empty:
        raise InputError(f"{flag(name)} needs at least one {noun}")
    if values and len(set(values)) < len(values):
        raise InputError(f"{flag(name)} has a {noun} twice: {' '.join(map(str, values))}")


class InFolderOfPreset:
    """Options whose default folder is that of their preset.

    >>> from monge_sam_jax.experiments.clip.options import Clip
    >>> Clip(preset="smoke").output.name
    'smoke'
    """

    output: Path
    preset: Any

    def __post_init__(self) -> None:
        """Resolves the default folder."""
        parts = (self.resolved_preset if x == PRESET else x for x in self.output.parts)
        object.__setattr__(self, "output", Path(*parts))

    @property
    def resolved_preset(self) -> Any:
        """The preset by which the folder is named."""
        return self.preset


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
