"""What a reader gives: pictures that have captions, and where they come from."""

import gzip
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from monge_sam_jax.experiments.common.errors import InputError

UNKNOWN = "not found"


class Candidate(NamedTuple):
    """A picture with its caption.

    Attributes:
      picture: its file.
      name: of the file, from the package's folder.
      caption: what is said of it.
      label: its class.
    """

    picture: Path
    name: str
    caption: str
    label: str


class Origin(NamedTuple):
    """A package as it is installed.

    Attributes:
      package: its name.
      version: as found, or `UNKNOWN`.
      licence: its name.
      text: file that has the licence, None if there is none.
    """

    package: str
    version: str
    licence: str
    text: Path | None


class Found(NamedTuple):
    """What a reader has found.

    Attributes:
      candidates: in the order of their names.
      origins: the packages.
      captions: how captions are made, in a sentence.
      left_out: names of files that are not taken, by the reason.
    """

    candidates: list[Candidate]
    origins: list[Origin]
    captions: str
    left_out: dict[str, list[str]]


def check_folders(folder: Path, needed: Iterable[str], installing: str) -> None:
    """Raises an InputError, which says how to install them, unless all files and folders exist."""
    missing = [name for name in needed if not (folder / name).exists()]
    if not missing:
        return
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    shown = ", ".join(there[:8]) or ("nothing" if folder.is_dir() else "no such folder")
    raise InputError(
        f"--folder {folder}: expected {', '.join(missing)}, found {shown}; {installing} installs "
        f"it, and --folder says where"
    )


def caption_of(parts: Iterable[str]) -> str:
    """Parts with commas between them, without empty ones, and without what is there already.

    >>> caption_of([" cat ", "Cat", "", "animal_farm", "animal  farm"])
    'cat, animal farm'
    """
    kept: dict[str, str] = {}
    for part in parts:
        clean = " ".join(part.replace("_", " ").split())
        kept.setdefault(clean.lower(), clean)
    kept.pop("", None)
    return ", ".join(kept.values())


def read_json(path: Path, kind: type) -> Any:
    """The content of a JSON file; an InputError if it is not of this kind."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected JSON: {error}") from error
    if not isinstance(content, kind):
        noun = "a list" if kind is list else "an object"
        raise InputError(f"{path}: expected {noun} in JSON, found {type(content).__name__}")
    return content


def debian_version(doc: Path) -> str:
    """The version in the first line of a Debian changelog."""
    try:
        with gzip.open(doc / "changelog.Debian.gz", "rt", encoding="utf-8") as file:
            found = re.match(r"\S+ \(([^)]+)\)", file.readline())
    except (OSError, EOFError, ValueError):
        return UNKNOWN
    return found[1] if found else UNKNOWN
