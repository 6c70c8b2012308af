"""The options of `monge-sam pairs`; light to import, so that the command line's help is quick."""

from pathlib import Path
from typing import Literal, TypeAlias, get_args

from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.common.options import check_seed

Source: TypeAlias = Literal["openclipart", "emoji"]
# Where the packages are when they are installed, and what installs them.
FOLDERS: dict[Source, Path] = {
    "openclipart": Path("/usr/share/openclipart"),
    "emoji": Path("node_modules"),
}
INSTALLING: dict[Source, str] = {
    "openclipart": "apt-get install openclipart-png openclipart-svg",
    "emoji": "npm install emoji-datasource-google emojibase-data",
}
SMALLEST_SIDE = 16  # at which pictures are compared


class Pairs:
    """Make pairs of pictures and captions for clip --data from packages installed by name.

    openclipart: some thousand drawings in the public domain, after `apt-get install openclipart-png
    openclipart-svg`. A caption is the title and the keywords in the SVG's metadata.

    emoji: some 1900 emoji, after `npm install emoji-datasource-google emojibase-data`. A caption is
    the name and the tags that CLDR has.

    Nothing is downloaded. Pictures are put on white and in the middle of a square. Of pictures that
    look the same at 16 pixels, and of equal captions, the first by name is kept. The pairs that are
    left are divided at random: 40 % for pre-training, 30 % for fine-tuning, 15 % for validation and
    15 % to test. What is left out, and why, is counted in SOURCES.md and named in pairs.json.
    """

    # No dataclass: positional-only, the source is given without a flag.
    def __init__(
        self,
        source: Source,
        /,
        *,
        folder: Path | None = None,
        side: int = 64,
        seed: int = 0,
        output: Path | None = None,
        overwrite: bool = False,
    ) -> None:
        """Takes the options.

        Args:
          source: What to read.
          folder: Where the packages are installed. By default /usr/share/openclipart, or
            node_modules in the current folder.
          side: Height and width of the pictures that are written; clip --image-size scales them.
          seed: Of the division.
          output: Folder for pretrain.npz, train.npz, val.npz and test.npz, and beside them
            SOURCES.md, contact_sheet.png, pairs.json and the licences of the packages. By default
            that of the source below runs/pairs.
          overwrite: Write over pairs of other options, if the output folder has some.
        """
        self.source = source
        self.folder = FOLDERS[source] if folder is None else folder
        self.side = side
        self.seed = seed
        self.output = Path("runs/pairs", source) if output is None else output
        self.overwrite = overwrite

    def check(self) -> None:
        """Raises an InputError where an option cannot be used."""
        if self.source not in get_args(Source):
            raise InputError(f"no source {self.source}; there are {', '.join(get_args(Source))}")
        if self.side < SMALLEST_SIDE:
            raise InputError(f"--side must be at least {SMALLEST_SIDE}, got {self.side}")
        check_seed(self.seed)
