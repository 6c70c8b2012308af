"""Pictures on a square, and which of them are doubles."""

import collections
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.neighbors import radius_neighbors_graph

from monge_sam_jax.experiments.common.pictures import NO_PICTURE, on_white
from monge_sam_jax.experiments.pairs.options import SMALLEST_SIDE
from monge_sam_jax.experiments.pairs.package import Candidate

# Root of the mean square difference of two pictures, at `SMALLEST_SIDE` and in parts of white to
# black, below which they count as one.
SAME = 0.02


class Chosen(NamedTuple):
    """The pairs that are kept.

    Attributes:
      candidates: n of them.
      images: their pictures (n, side, side, 3) in uint8.
      left_out: names of the others, by the reason.
    """

    candidates: list[Candidate]
    images: np.ndarray
    left_out: dict[str, list[str]]


def choose(
    candidates: Sequence[Candidate], side: int, told: Callable[[], object] = lambda: None
) -> Chosen:
    """Reads the pictures, and leaves out those that are broken and doubles.

    Of equal captions, whatever their case, and of pictures that look the same, only the first is
    kept: no two that are left share either.

    Args:
      candidates: in the order that decides which is the first.
      side: of the pictures.
      told: is called after every picture.
    """
    left_out: dict[str, list[str]] = collections.defaultdict(list)
    read, images, captions = [], [], set()
    for candidate in candidates:
        image = square(candidate.picture, side)
        if image is None:
            left_out["picture that is broken, or too large to be decoded"].append(candidate.name)
        elif candidate.caption.lower() in captions:
            left_out["caption that another has"].append(candidate.name)
        else:
            captions.add(candidate.caption.lower())
            read.append(candidate)
            images.append(image)
        told()
    is_kept = firsts(np.array(images).reshape(-1, side, side, 3))
    for candidate, kept in zip(read, is_kept, strict=True):
        if not kept:
            left_out["picture that looks like another"].append(candidate.name)
    chosen = [candidate for candidate, kept in zip(read, is_kept, strict=True) if kept]
    return Chosen(chosen, np.array(images).reshape(-1, side, side, 3)[is_kept], left_out)


def square(path: Path, side: int) -> np.ndarray | None:
    """The picture (side, side, 3) in uint8, in the middle of white; None if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                picture.load()
                scale = side / max(picture.size)
                width, height = (max(1, round(scale * length)) for length in picture.size)
                scaled = on_white(picture).resize(
                    (width, height), Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST
                )
    except NO_PICTURE:
        return None
    ground = Image.new("RGB", (side, side), "white")
    ground.paste(scaled, ((side - width) // 2, (side - height) // 2))
    return np.asarray(ground)


def firsts(images: np.ndarray) -> np.ndarray:
    """Which (n,) of the pictures (n, side, side, 3) no kept one before them looks like."""
    is_kept = np.ones(len(images), bool)
    if len(images) > 1:
        alike = radius_neighbors_graph(reduced(images), SAME)
        for i in range(len(images)):
            near = alike.indices[alike.indptr[i] : alike.indptr[i + 1]]
            is_kept[i] = not is_kept[near[near < i]].any()
    return is_kept


def reduced(images: np.ndarray) -> np.ndarray:
    """Pictures (n, d), such that their distance is the root of the mean square difference."""
    small = [
        np.asarray(Image.fromarray(x).resize((SMALLEST_SIDE,) * 2, Image.Resampling.BOX))
        for x in images
    ]
    flat = np.array(small, np.float32).reshape(len(images), -1) / 255
    return flat / np.sqrt(flat.shape[1], dtype=np.float32)
