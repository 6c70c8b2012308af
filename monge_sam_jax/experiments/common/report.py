"""What a command comes to: summaries over seeds, valid JSON, and the folder that it goes to."""

import json
import math
import os
import platform
import re
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import flax
import jax
import numpy as np
import optax
from rich.console import Console, RenderableType
from rich.markdown import Markdown

import monge_sam_jax
from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.common.options import flag

RESULTS = "results.json"
# Options that decide nothing but where results are computed, and where they go.
PLACES = ("output", "overwrite", "devices")

FEWEST_SEEDS = 3  # that a verdict may rest on
CERTAIN = 2.0  # standard errors beyond which a mean difference is not put down to chance


def prepare_output(
    folder: Path,
    configuration: Mapping[str, Any],
    overwrite: bool,
    *,
    file: str = RESULTS,
    indifferent: Collection[str] = (),
    may_grow: bool = False,
    name_of: Callable[[str], str] = flag,
) -> None:
    """Makes the folder before the work, which an error after it would waste.

    Args:
      folder: of the results.
      configuration: what will be written into them under that name.
      overwrite: whether results of another configuration may be overwritten.
      file: that holds the results.
      indifferent: entries of the configuration that may differ, beside `PLACES`.
      may_grow: whether results of some of the seeds may be overwritten by those of all.
      name_of: what the user calls an entry.

    Raises:
      InputError: the folder cannot be made or written to, or has results of another configuration.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output {folder}: no permission to write")
    if (folder / file).exists() and not overwrite:
        refuse_others(folder, configuration, file, indifferent, may_grow, name_of)


def refuse_others(
    folder: Path,
    configuration: Mapping[str, Any],
    file: str,
    indifferent: Collection[str] = (),
    may_grow: bool = False,
    name_of: Callable[[str], str] = flag,
) -> None:
    """Raises an InputError if a file of the folder is not of this configuration."""
    advice = "--overwrite writes over it, another --output keeps it"
    try:
        earlier = json.loads((folder / file).read_text(encoding="utf-8"))["configuration"]
        names = sorted({*earlier, *configuration} - {*PLACES, *indifferent})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--output {folder}: its {file} does not say of what options it is; {advice}"
        ) from error
    present = jsonable(configuration)
    if may_grow and _seeds(earlier) <= _seeds(present):
        names = [name for name in names if name not in ("seed", "seeds")]
    differ = [
        f"{name_of(name)} (was {_typed(earlier.get(name))}, is {_typed(present.get(name))})"
        for name in names
        if earlier.get(name) != present.get(name)
    ]
    if differ:
        raise InputError(
            f"--output {folder}: its {file} is of other options, which differ in "
            f"{', '.join(differ)}; {advice}"
        )


def _seeds(configuration: Mapping[str, Any]) -> set[int]:
    first, count = (configuration.get(name) or 0 for name in ("seed", "seeds"))
    return set(range(first, first + count))


def _typed(value: Any) -> str:
    if value in (None, []):
        return "the default"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def summarise(seeds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard error over seeds of every quantity.

    The mean is NaN if it is not finite for every seed; then, and for a single seed, there is no
    standard error.
    """
    summary: dict[str, dict[str, float | None]] = {}
    for quantity in seeds[0]:
        values = [seed[quantity] for seed in seeds]
        mean, error = math.nan, None
        if all(map(math.isfinite, values)):
            mean = statistics.fmean(values)
            if len(values) > 1:
                error = statistics.stdev(values) / math.sqrt(len(values))
        summary[quantity] = {"mean": mean, "standard_error": error}
    return summary


def environment() -> dict[str, Any]:
    """Versions of the packages, and the device."""
    device = jax.devices()[0]
    return {
        "versions": {
            "monge_sam_jax": monge_sam_jax.__version__,
            "jax": jax.__version__,
            "optax": optax.__version__,
            "flax": flax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
    }


def publish(
    folder: Path,
    files: Mapping[str, Any],
    *shown: RenderableType,
    others: Sequence[str] = (),
) -> None:
    """Writes what a command has come to, and then prints it.

    Args:
      folder: of the files.
      files: by name their content: Markdown, which is printed, a Matplotlib figure, or what becomes
        JSON.
      *shown: what else is printed.
      others: files that have been written already.
    """
    for name, content in files.items():
        if isinstance(content, str):
            (folder / name).write_text(content, encoding="utf-8")
        elif isinstance(content, Mapping):
            write_json(folder / name, content)
        else:
            content.savefig(folder / name)
    console = Console()
    texts = (content for content in files.values() if isinstance(content, str))
    # So that a narrow cell breaks before an error, not within.
    for part in (*(Markdown(re.sub(r"± (?=\d)", "±", text)) for text in texts), *shown):
        console.print(part)
    *most, last = (*files, *others)
    written = f"{', '.join(most)} and {last}" if most else last
    console.print(f"Wrote {written} to {folder}", soft_wrap=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file of strict JSON."""
    text = json.dumps(jsonable(content), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def jsonable(tree: Any) -> Any:
    """`tree` as strict JSON has it: null for NaN and infinity, text for paths."""
    if isinstance(tree, Mapping):
        return {name: jsonable(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [jsonable(value) for value in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return None
    return str(tree) if isinstance(tree, Path) else tree


def estimate(summary: Mapping[str, float | None], digits: int = 1, sign: str = "") -> str:
    """A mean with its standard error, if there is one.

    There are so many decimals, and up to three more where the error would be zero without them.

    >>> estimate({"mean": 97.64, "standard_error": 0.125})
    '97.6 ± 0.1'
    >>> estimate({"mean": 97.64, "standard_error": 0.004})
    '97.640 ± 0.004'
    >>> estimate({"mean": 100.0, "standard_error": 0.0})
    '100.0 ± 0'
    >>> estimate({"mean": float("nan"), "standard_error": None})
    'diverged'
    """
    mean, error = summary["mean"], summary["standard_error"]
    if mean is None or not math.isfinite(mean):
        return "diverged"
    if error and not round(error, digits):
        digits = min(decimals(error, 1), digits + 3)
    return f"{mean:{sign}.{digits}f}" + ("" if error is None else f" ± {error_text(error, digits)}")


def error_text(error: float, digits: int) -> str:
    """An error with so many decimals, unless they would make a zero of it."""
    return f"{error:.{digits}f}" if round(error, digits) else f"{error:.0e}" if error else "0"


class Difference(NamedTuple):
    """Of two runs, a mean over seeds with its standard error, NaN if there is none."""

    mean: float
    error: float

    @classmethod
    def of(cls, high: Sequence[float] | np.ndarray, low: Sequence[float] | np.ndarray) -> Self:
        """Of two lists of values; those of a seed are paired."""
        values = [{"d": float(h) - float(l)} for h, l in zip(high, low, strict=True)]  # noqa: E741
        found = summarise(values)["d"]
        mean, error = found["mean"], found["standard_error"]
        assert mean is not None
        return cls(mean, math.nan if error is None else error)

    @property
    def is_nothing(self) -> bool:
        """Whether it is of runs that are the same."""
        return self.mean == 0 and not self.error > 0

    def text(self, digits: int = 1) -> str:
        """It with its error, if there is one.

        >>> Difference(0.01234, 0.0004).text(), Difference(0.0, 0.0).text()
        ('+0.0123 ± 0.0004', 'none')
        """
        if self.is_nothing:
            return "none"
        error = self.error if self.error > 0 else None
        return estimate({"mean": self.mean, "standard_error": error}, digits, "+")

    def verdict(self, yes: str = "yes", no: str = "no") -> str:
        """Whether it is above zero, which needs seeds that differ to tell."""
        if abs(self.mean) <= CERTAIN * self.error:
            return "not resolved"
        if not 0 < self.error < math.inf:
            return "cannot be told"
        return yes if self.mean > 0 else no


def count(number: int, noun: str) -> str:
    """A number with its noun.

    >>> count(1, "seed"), count(1797, "image")
    ('1 seed', '1797 images')
    """
    return f"{number} {noun}" + ("" if number == 1 else "s")


def too_little(configuration: Mapping[str, Any]) -> str:
    """Why a run of this configuration is too small for verdicts; empty if it is not."""
    if configuration.get("preset") == "smoke":
        return "No verdicts: preset smoke shows that the command works, and no more."
    if configuration["seeds"] < FEWEST_SEEDS:
        seeds = count(configuration["seeds"], "seed")
        return f"No verdicts from {seeds}: they need at least {FEWEST_SEEDS}."
    return ""


def without_verdicts(
    claims: Sequence[Mapping[str, str]], configuration: Mapping[str, Any]
) -> list[dict[str, str | None]]:
    """The claims, with None for verdicts if the run is too small for them."""
    unjudged = {"verdict": None} if too_little(configuration) else {}
    return [{**claim, **unjudged} for claim in claims]


def claims_table(results: Mapping[str, Any], headers: Mapping[str, str]) -> list[str]:
    """The claims of results.json as lines of Markdown.

    Args:
      results: content of results.json.
      headers: of the columns, by the key of a claim. That of verdicts is left out, and the reason
        said above the table, if the run is too small for them.
    """
    reason = too_little(results["configuration"])
    keys = [key for key in headers if not (reason and key == "verdict")]
    return [
        *([reason, ""] if reason else []),
        f"| {' | '.join(headers[key] for key in keys)} |",
        "|---" * len(keys) + "|",
        *(f"| {' | '.join(claim[key] for key in keys)} |" for claim in results["claims"]),
    ]


def decimals(value: float, digits: int) -> int:
    """After the point, so that the value has so many significant digits, of those before it too.

    >>> decimals(0.0957, 2), decimals(97.64, 3), decimals(1234.0, 3), decimals(0.0, 3)
    (3, 1, 0, 2)
    """
    exponent = math.floor(math.log10(abs(value))) if value else 0
    return max(0, digits - 1 - exponent)
