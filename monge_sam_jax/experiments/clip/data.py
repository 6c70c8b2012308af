"""Pairs of images and captions for the two towers: generated, or from a folder."""

import collections
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from monge_sam_jax.experiments.clip.options import Preset
from monge_sam_jax.experiments.clip.scenes import (
    EVALUATION,
    FINE_TUNING,
    PRETRAINING,
    Split,
    generate,
)
from monge_sam_jax.experiments.common.data import UNREADABLE, load_arrays
from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.common.pictures import NO_PICTURE, on_white

WORDS = 16  # of a caption that are read
MOST_WORDS = 5000  # of the vocabulary
VOCABULARY_STEP = 64  # its size is a multiple
PADDING, UNKNOWN = 0, 1
SPLITS = ("train", "val", "test")
EXPECTED = "an .npz file with image (n, height, width[, 3]) and caption (n,), if wanted label (n,)"


class Pairs(NamedTuple):
    """What the towers see: images (n, side, side, 3) and word numbers (n, `WORDS`)."""

    images: jax.Array
    words: jax.Array


class Corpus(NamedTuple):
    """Pairs for every purpose.

    Attributes:
      pretrain: the pre-training's.
      train: the fine-tuning's.
      val: those that choose.
      test: those that are reported.
      vocabulary: number of word numbers.
      labels: classes of the test pairs, or None.
      cut: number of captions that have more words than are read.
    """

    pretrain: Pairs
    train: Pairs
    val: Pairs
    test: Pairs
    vocabulary: int
    labels: np.ndarray | None
    cut: int


def generated(size: Preset, side: int, seed: int) -> Corpus:
    """Generated pairs; each purpose has its own randomness."""
    parts = {
        "pretrain": (PRETRAINING, size.pretraining_pairs),
        "train": (FINE_TUNING, size.pairs),
        "val": (EVALUATION, size.evaluation_pairs),
        "test": (EVALUATION, size.evaluation_pairs),
    }
    return _corpus(
        {
            name: generate(distribution, count, side, np.random.default_rng((seed, number)))
            for number, (name, (distribution, count)) in enumerate(parts.items())
        }
    )


def from_folder(folder: Path, side: int, fewest: int) -> Corpus:
    """The user's pairs.

    Args:
      folder: has train, val and test, if wanted pretrain, each .jsonl or .npz.
      side: to which images are scaled.
      fewest: pairs that each must have.

    Returns:
      The pairs; the words are those of the captions to train with.

    Raises:
      InputError: a file is missing, malformed or too short.
    """
    splits = {name: _split(folder, name, side) for name in SPLITS}
    has_own = any(folder.joinpath(f"pretrain.{ending}").exists() for ending in _READERS)
    splits["pretrain"] = _split(folder, "pretrain", side) if has_own else splits["train"]
    for name, split in splits.items():
        if len(split.captions) < fewest:
            raise InputError(
                f"--data {folder}: {name} needs at least {fewest} pairs, found "
                f"{len(split.captions)}"
            )
    return _corpus(splits)


def _corpus(splits: dict[str, Split]) -> Corpus:
    counts = collections.Counter(
        word
        for name in ("pretrain", "train")
        for caption in splits[name].captions
        for word in _words(caption)
    )
    ordered = sorted(counts, key=lambda word: (-counts[word], word))[:MOST_WORDS]
    numbers = {word: UNKNOWN + 1 + i for i, word in enumerate(ordered)}
    pairs = {
        name: Pairs(jnp.asarray(split.images), jnp.asarray(_encode(split.captions, numbers)))
        for name, split in splits.items()
    }
    # Rounded up, so that what is compiled for one seed serves the others.
    vocabulary = -(-(UNKNOWN + 1 + len(numbers)) // VOCABULARY_STEP) * VOCABULARY_STEP
    cut = sum(
        len(_words(caption)) > WORDS for split in splits.values() for caption in split.captions
    )
    return Corpus(**pairs, vocabulary=vocabulary, labels=splits["test"].labels, cut=cut)


def unknown_words(pairs: Pairs) -> float:
    """The share of the captions' words, of those that are read, that are not the vocabulary's."""
    words = np.asarray(pairs.words)
    return float(np.sum(words == UNKNOWN) / max(np.sum(words != PADDING), 1))


def _words(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.lower())


def _encode(captions: Sequence[str], numbers: dict[str, int]) -> np.ndarray:
    encoded = np.full((len(captions), WORDS), PADDING, np.int32)
    for row, caption in zip(encoded, captions, strict=True):
        found = [numbers.get(word, UNKNOWN) for word in _words(caption)[:WORDS]]
        row[: len(found)] = found
    return encoded


def _split(folder: Path, name: str, side: int) -> Split:
    """The pairs of a file, whichever its format."""
    for ending, read in _READERS.items():
        path = folder / f"{name}.{ending}"
        if path.exists():
            try:
                images, captions, labels = zip(*read(path, side), strict=True)
            except InputError as error:
                raise InputError(f"{path}: {error}") from error
            except UNREADABLE as error:
                raise InputError(f"{path}: no pairs can be read: {error}") from error
            has_labels = all(label is not None for label in labels)
            return Split(
                np.stack(images), captions, np.array(labels).astype(str) if has_labels else None
            )
    found = ", ".join(sorted(p.name for p in folder.glob("*"))) or "nothing"
    raise InputError(
        f"--data {folder}: expected {name}.jsonl or {name}.npz, found "
        f"{found if folder.is_dir() else 'no such folder'}"
    )


def _from_jsonl(path: Path, side: int) -> Iterator[tuple[np.ndarray, str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            pair = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"line {number} is no JSON: {error}") from error
        image, caption = (
            pair.get(key) if isinstance(pair, dict) else None for key in ("image", "caption")
        )
        if not (isinstance(image, str) and isinstance(caption, str)):
            raise InputError(
                f"line {number}: expected an object with texts image and caption, found {line[:80]}"
            )
        try:
            with Image.open(path.parent / image) as picture:
                yield _fit(picture, side), caption, pair.get("label")
        except NO_PICTURE as error:
            raise InputError(f"line {number}: no image can be read: {error}") from error


def _from_npz(path: Path, side: int) -> Iterator[tuple[np.ndarray, str, Any]]:
    arrays = load_arrays(path, EXPECTED, ("image", "caption"), ("label",))
    image, caption = arrays["image"], arrays["caption"]
    if image.dtype.kind == "f" and image.size and image.min() >= 0 and image.max() <= 1:
        image = np.round(255 * image).astype(np.uint8)
    if image.dtype != np.uint8:
        raise InputError(
            f"expected image in uint8, or in floats from 0 to 1, found {image.shape} in "
            f"{image.dtype}{f' from {image.min()} to {image.max()}' if image.size else ''}"
        )
    if image.ndim != 3 and not (image.ndim == 4 and image.shape[3] == 3):
        raise InputError(
            f"expected image (n, height, width) or (n, height, width, 3), found {image.shape}"
        )
    if caption.dtype.kind != "U" or caption.shape != image.shape[:1]:
        raise InputError(
            f"expected caption ({len(image)},) of texts, found {caption.shape} of {caption.dtype}"
        )
    labels = check_labels(arrays["label"], len(image)) if "label" in arrays else [None] * len(image)
    for pixels, text, label in zip(image, caption, labels, strict=True):
        yield _fit(Image.fromarray(pixels), side), str(text), label


_READERS = {"jsonl": _from_jsonl, "npz": _from_npz}


def check_labels(labels: np.ndarray, count: int) -> np.ndarray:
    """The labels as texts; an InputError if there is not one for each of `count` pairs."""
    if labels.shape != (count,) or labels.dtype.kind not in "iuU":
        raise InputError(
            f"expected label ({count},) of integers or texts, found {labels.shape} of "
            f"{labels.dtype}"
        )
    return labels.astype(str)


def _fit(image: Image.Image, side: int) -> np.ndarray:
    """Three channels from 0 to 1, on white where it is transparent, scaled to a square."""
    scaled = on_white(image).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(scaled, np.float32) / 255
