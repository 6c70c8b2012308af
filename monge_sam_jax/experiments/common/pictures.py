"""Pictures from files."""

import zlib

import numpy as np
from PIL import Image

# What Pillow raises for files that are no pictures, are broken, or are larger than it allows.
NO_PICTURE = (
    OSError,
    ValueError,
    EOFError,
    SyntaxError,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # where warnings are errors
)


def on_white(picture: Image.Image) -> Image.Image:
    """The picture in RGB, on a white ground where it is transparent.

    Pillow's own conversion keeps the colour that lies below transparency, which is often black, and
    cuts 16 bits off at 255.

    >>> half = Image.fromarray(np.array([[[255, 0, 0, 255], [0, 0, 0, 0]]], np.uint8))
    >>> np.asarray(on_white(half)).tolist()
    [[[255, 0, 0], [255, 255, 255]]]
    """
    if picture.mode.startswith("I"):  # grey of 16 bits
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    coloured = picture.convert("RGBA")
    ground = Image.new("RGBA", coloured.size, "white")
    return Image.alpha_composite(ground, coloured).convert("RGB")
