"""Generated pairs of images and captions: two objects, and how they lie to each other."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

# A name, and the other words for it.
SHAPES = {
    "circle": ("disc", "ball"),
    "square": ("box", "block"),
    "triangle": ("wedge", "pyramid"),
    "cross": ("plus", "crucifix"),
}
COLOURS = {
    "red": ("crimson", "scarlet"),
    "green": ("emerald", "lime"),
    "blue": ("navy", "cobalt"),
    "orange": ("amber", "tangerine"),
    "purple": ("violet", "mauve"),
    "cyan": ("turquoise", "teal"),
}
SIZES = {"small": ("tiny", "little"), "large": ("big", "huge")}
# A relation and its inverse are neighbours in this order.
RELATIONS = {
    "left of": ("to the left of", "west of"),
    "right of": ("to the right of", "east of"),
    "above": ("over", "on top of"),
    "below": ("under", "beneath"),
}
RADII = (0.13, 0.22)  # of small and large objects, in sides of the image
_RGB = np.array(
    [
        (0.9, 0.1, 0.1),
        (0.1, 0.7, 0.2),
        (0.15, 0.25, 0.95),
        (1.0, 0.65, 0.0),
        (0.6, 0.1, 0.7),
        (0.0, 0.8, 0.9),
    ]
)


class Split(NamedTuple):
    """Pairs, one after the other.

    Attributes:
      images: (n, side, side, 3), from 0 to 1.
      captions: n texts.
      labels: n names of classes, or None.
    """

    images: np.ndarray
    captions: Sequence[str]
    labels: np.ndarray | None


_PLAIN = ("{a} {relation} {b}", "there is {a} {relation} {b}")
_OTHER = (
    "{b} is {inverse} {a}",
    "{relation} {b} there is {a}",
    "in this picture {a} sits {relation} {b}",
)
_NEW = ("we see {b} and {inverse} it {a}",)


class Distribution(NamedTuple):
    """How scenes are shown and told.

    Attributes:
      templates: of captions, in terms of the objects a and b, the relation of a to b and its
        inverse.
      noise: standard deviation of what is added to each pixel.
      wrong: share of pairs with the caption of another.
      synonyms: probability that another word takes the place of a name.
      background: brightest background.
      nouns: templates of objects, in terms of size, colour and shape.
    """

    templates: tuple[str, ...]
    noise: float
    wrong: float = 0.0
    synonyms: float = 0.5
    background: float = 0.5
    nouns: tuple[str, ...] = ("a {size} {colour} {shape}", "some {shape} {colour} {size}")


PRETRAINING = Distribution(_PLAIN + _OTHER, noise=0.1)
FINE_TUNING = Distribution(_OTHER + _NEW, noise=0.15, wrong=0.1, synonyms=0.7)
EVALUATION = Distribution(_PLAIN + _NEW, noise=0.12)


def generate(distribution: Distribution, count: int, side: int, rng: np.random.Generator) -> Split:
    """Draws scenes, paints them and writes their captions.

    Args:
      distribution: how.
      count: number of pairs.
      side: of the images, in pixels.
      rng: source of randomness; the same state gives the same pairs.

    Returns:
      The pairs, labelled by the colour of object a.
    """
    sizes, colours, shapes = (
        rng.integers(len(names), size=(count, 2)) for names in (SIZES, COLOURS, SHAPES)
    )
    relations = rng.integers(len(RELATIONS), size=count)
    images = _paint(relations, sizes, colours, shapes, side, distribution.background, rng)
    images += distribution.noise * rng.standard_normal(images.shape)
    captions = [
        _caption(distribution, relation, size, colour, shape, rng)
        for relation, size, colour, shape in zip(relations, sizes, colours, shapes, strict=True)
    ]
    wrong = np.flatnonzero(rng.random(count) < distribution.wrong)
    told = np.arange(count)
    told[wrong] = np.roll(wrong, 1)
    return Split(
        np.clip(images, 0, 1).astype(np.float32),
        [captions[i] for i in told],
        np.array(list(COLOURS))[colours[:, 0]],
    )


def _paint(
    relations: np.ndarray,
    sizes: np.ndarray,
    colours: np.ndarray,
    shapes: np.ndarray,
    side: int,
    background: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Images in which object a lies to b as the relations say."""
    count = len(relations)
    ahead = np.where(relations % 2 == 0, -1, 1)  # of a, along the axis; left and above come first
    along = 0.5 + 0.25 * np.stack([ahead, -ahead], axis=1)
    along = along + rng.uniform(-0.05, 0.05, (count, 2))
    across = rng.uniform(0.3, 0.7, (count, 2))
    horizontal = (relations < 2)[:, None]
    x, y = np.where(horizontal, along, across), np.where(horizontal, across, along)
    images = np.tile(rng.uniform(0, background, (count, 1, 1, 1)), (1, side, side, 3))
    grid = (np.arange(side) + 0.5) / side
    for i in (0, 1):
        dx = grid[None, None, :] - x[:, i, None, None]
        dy = grid[None, :, None] - y[:, i, None, None]
        inside = _inside(dx, dy, np.array(RADII)[sizes[:, i], None, None])
        mask = inside[shapes[:, i], np.arange(count)]
        images = np.where(mask[..., None], _RGB[colours[:, i], None, None], images)
    return images


def _inside(dx: np.ndarray, dy: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Which pixels belong to an object, for each of `SHAPES`."""
    far, near = np.maximum(abs(dx), abs(dy)), np.minimum(abs(dx), abs(dy))
    return np.stack(
        [
            np.hypot(dx, dy) <= r,
            far <= 0.9 * r,
            (dy <= 0.8 * r) & (2 * abs(dx) <= dy + 1.2 * r),
            (far <= r) & (near <= 0.35 * r),
        ]
    )


def _caption(
    distribution: Distribution,
    relation: int,
    sizes: np.ndarray,
    colours: np.ndarray,
    shapes: np.ndarray,
    rng: np.random.Generator,
) -> str:
    def word(names: Mapping[str, tuple[str, ...]], i: int) -> str:
        name = list(names)[i]
        if rng.random() >= distribution.synonyms:
            return name
        return names[name][rng.integers(len(names[name]))]

    a, b = (
        distribution.nouns[rng.integers(len(distribution.nouns))].format(
            size=word(SIZES, sizes[i]),
            colour=word(COLOURS, colours[i]),
            shape=word(SHAPES, shapes[i]),
        )
        for i in (0, 1)
    )
    template = distribution.templates[rng.integers(len(distribution.templates))]
    inverse = relation + 1 - 2 * (relation % 2)
    return template.format(
        a=a, b=b, relation=word(RELATIONS, relation), inverse=word(RELATIONS, inverse)
    )
