"""`monge-sam pairs`: a folder of pairs for `monge-sam clip --data`."""

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import pairwise_distances_argmin_min

from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.common.progress import steps
from monge_sam_jax.experiments.pairs import emoji, openclipart, pictures
from monge_sam_jax.experiments.pairs.options import Pairs, Source
from monge_sam_jax.experiments.pairs.package import Candidate, Found
from monge_sam_jax.experiments.pairs.report import contact_sheet, sources

READERS: dict[Source, Callable[[Path], Found]] = {
    "openclipart": openclipart.read,
    "emoji": emoji.read,
}
RESULTS = "pairs.json"
# In parts of all pairs, in the order in which they are dealt.
SHARES = {"test": 0.15, "val": 0.15, "train": 0.3, "pretrain": 0.4}
FEWEST = 10  # pairs that can be dealt so


def run(options: Pairs) -> None:
    """Reads the packages, writes the pairs and what they are, and prints the latter.

    Args:
      options: unchecked ones.

    Raises:
      InputError: an option, the packages or the output folder cannot be used.
    """
    options.check()
    names = ("source", "folder", "side", "seed")
    configuration = {name: getattr(options, name) for name in names}
    output = options.output
    report.prepare_output(output, configuration, options.overwrite, file=RESULTS)
    found = READERS[options.source](options.folder)
    with steps("", len(found.candidates), unit="picture") as told:
        told.begin(f"pictures of {options.source}")
        chosen = pictures.choose(found.candidates, options.side, told.end)
    left_out = {**found.left_out, **chosen.left_out}
    count = len(chosen.candidates)
    if count < FEWEST:
        reasons = ", ".join(f"{len(names)} {reason}" for reason, names in left_out.items())
        raise InputError(
            f"--folder {options.folder}: expected at least {FEWEST} pairs, found {count}"
            + (f"; left out are {reasons}" if reasons else "")
        )
    rows = deal(count, options.seed)
    for name, row in rows.items():
        part = [chosen.candidates[i] for i in row]
        write(output / f"{name}.npz", chosen.images[row], part)
    licences = _copy_licences(found, output)
    results = {
        "configuration": configuration,
        "pairs": {name: len(row) for name, row in rows.items()},
        "packages": [
            origin._asdict() | {"text": licences.get(origin.package)} for origin in found.origins
        ],
        "captions": found.captions,
        "words": _words([candidate.caption for candidate in chosen.candidates]),
        "nearest": _nearest(chosen.images, rows),
        "left_out": left_out,
    }
    files = {
        RESULTS: results,
        "SOURCES.md": sources(results),
        "contact_sheet.png": contact_sheet(chosen.images, chosen.candidates),
    }
    others = [*(f"{name}.npz" for name in rows), *licences.values()]
    report.publish(output, files, others=others)


def deal(count: int, seed: int) -> dict[str, np.ndarray]:
    """The rows of every part, each in increasing order; all of them are dealt."""
    order = np.random.default_rng(seed).permutation(count)
    ends = np.round(count * np.cumsum(list(SHARES.values()))[:-1]).astype(int)
    parts = zip(SHARES, np.split(order, ends), strict=True)
    return {name: np.sort(rows) for name, rows in reversed(list(parts))}


def write(path: Path, images: np.ndarray, candidates: Sequence[Candidate]) -> None:
    """Writes pairs as `clip --data` reads them, with the name of every picture beside."""
    np.savez_compressed(
        path,
        image=images,
        caption=np.array([candidate.caption for candidate in candidates]),
        label=np.array([candidate.label for candidate in candidates]),
        source=np.array([candidate.name for candidate in candidates]),
    )


def _copy_licences(found: Found, output: Path) -> dict[str, str]:
    """Copies the texts of the licences; their names in the output folder, by package."""
    copied = {}
    for origin in found.origins:
        if origin.text is not None:
            copied[origin.package] = f"LICENSE-{origin.package}.txt"
            shutil.copyfile(origin.text, output / copied[origin.package])
    return copied


def _words(captions: Sequence[str]) -> dict[str, float]:
    counts = [len(re.findall(r"\w+", caption)) for caption in captions]
    return {"median": float(np.median(counts)), "most": max(counts)}


def _nearest(images: np.ndarray, rows: dict[str, np.ndarray]) -> dict[str, Any]:
    """How far test pictures are from the nearest of all the others."""
    points = pictures.reduced(images)
    others = np.concatenate([part for name, part in rows.items() if name != "test"])
    _, distances = pairwise_distances_argmin_min(points[rows["test"]], points[others])
    return {
        "least": float(distances.min()),
        "median": float(np.median(distances)),
        "same": pictures.SAME,
    }
