"""The emoji of the npm packages emoji-datasource-google and emojibase-data."""

import collections
import re
from pathlib import Path
from typing import Any

from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.pairs.options import INSTALLING
from monge_sam_jax.experiments.pairs.package import (
    UNKNOWN,
    Candidate,
    Found,
    Origin,
    caption_of,
    check_folders,
    read_json,
)

PICTURES, NAMES = "emoji-datasource-google", "emojibase-data"
IMAGES = f"{PICTURES}/img/google/64"
LIST, TAGS = f"{PICTURES}/emoji.json", f"{NAMES}/en/data.json"
CAPTIONS = "The name of the emoji and then its tags, in the English of CLDR."
VARIATION = "-FE0F"  # selector that some lists write and others do not


def read(folder: Path) -> Found:
    """The emoji that have a picture and a name; skin tones are left out, being nearly the same.

    Args:
      folder: `node_modules`, which has both packages.

    Raises:
      InputError: a package is missing or is not what it should be, or no emoji has both.
    """
    needed = (LIST, IMAGES, TAGS, f"{PICTURES}/package.json", f"{NAMES}/package.json")
    check_folders(folder, needed, INSTALLING["emoji"])
    entries = _entries(folder / LIST, ("unified", "image", "category"))
    named = {
        entry["hexcode"].upper().replace(VARIATION, ""): entry
        for entry in _entries(folder / TAGS, ("hexcode", "label"))
    }
    left_out: dict[str, list[str]] = collections.defaultdict(list)
    candidates = []
    for entry in sorted(entries, key=lambda entry: entry["image"]):
        name = f"{IMAGES}/{entry['image']}"
        known = named.get(entry["unified"].upper().replace(VARIATION, ""))
        tones = entry.get("skin_variations") or {}
        if tones:
            left_out["in a skin tone"] += [f"{name}: {tone}" for tone in tones]
        if known is None:
            left_out["without a name in CLDR"].append(name)
        elif not (folder / name).is_file():
            left_out["without a picture"].append(name)
        else:
            caption = caption_of([known["label"], *known.get("tags", ())])
            candidates.append(Candidate(folder / name, name, caption, entry["category"]))
    if not candidates:
        raise InputError(
            f"--folder {folder}: expected emoji of {LIST} with names in {TAGS} and pictures in "
            f"{IMAGES}, found none of {len(entries)}"
        )
    origins = [_origin(folder / package) for package in (PICTURES, NAMES)]
    return Found(candidates, origins, CAPTIONS, left_out)


def _entries(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """The list of a JSON file, whose entries have texts by these keys."""
    entries = read_json(path, list)
    for number, entry in enumerate(entries):
        is_object = isinstance(entry, dict)
        if not (is_object and all(isinstance(entry.get(key), str) for key in keys)):
            raise InputError(
                f"{path}: expected texts {', '.join(keys)} in entry {number}, found "
                f"{str(entry)[:80]}"
            )
        tags = entry.get("tags", [])
        if not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
            raise InputError(f"{path}: expected a list of texts tags in entry {number}")
    return entries


def _origin(package: Path) -> Origin:
    description = read_json(package / "package.json", dict)
    licence = str(description.get("license", UNKNOWN))
    readme = package / "README.md"
    if package.name == PICTURES and readme.is_file():
        # The package's own licence is that of its lists; of the pictures its README speaks.
        text = readme.read_text(encoding="utf-8", errors="replace")
        stated = re.search(r"^[* ]*(.*\bNoto\b.*licen[cs]e.*)$", text, re.MULTILINE | re.I)
        licence += f"; its README of the pictures: {stated[1] if stated else UNKNOWN}"
    text_file = package / "LICENSE"
    return Origin(
        package.name,
        str(description.get("version", UNKNOWN)),
        licence,
        text_file if text_file.is_file() else None,
    )
