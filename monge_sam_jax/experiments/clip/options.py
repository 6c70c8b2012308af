"""The options of `monge-sam clip`; light to import, so that the command line's help is quick."""

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

from monge_sam_jax.experiments.common.errors import InputError
from monge_sam_jax.experiments.common.options import (
    PRESET,
    InFolderOfPreset,
    check_counts,
    check_list,
    check_numbers,
    check_seed,
    presets_in_help,
)

PATCH = 4  # pixels along the side of a patch


class Preset(NamedTuple):
    """The size of a study.

    Attributes:
      seeds: number of seeds.
      batch_size: pairs in a batch, of training and of evaluation.
      pretraining_pairs: generated for pre-training.
      pairs: generated for fine-tuning.
      evaluation_pairs: generated for the validation set, and for the test set.
      pretraining_steps: steps of pre-training.
      steps: steps of fine-tuning.
      evaluations: how often a fine-tuning run is evaluated after step 0.
      sgd_rates: learning rates of SGD.
      adam_rates: learning rates of Adam.
      rho: radii of SAM and M-SAM.
    """

    seeds: int
    batch_size: int
    pretraining_pairs: int
    pairs: int
    evaluation_pairs: int
    pretraining_steps: int
    steps: int
    evaluations: int
    sgd_rates: tuple[float, ...]
    adam_rates: tuple[float, ...]
    rho: tuple[float, ...]


_GRID = ((0.001, 0.003, 0.01), (1e-4, 3e-4, 1e-3), (0.03, 0.1, 0.3, 1.0))
PRESETS = {
    "smoke": Preset(2, 32, 4096, 512, 96, 600, 40, 2, (0.003, 0.01), (1e-3,), (0.1, 1.0)),
    "default": Preset(5, 128, 8192, 2048, 512, 2000, 240, 12, *_GRID),
    "long": Preset(5, 128, 32768, 8192, 1024, 8000, 1000, 20, *_GRID),
}


@presets_in_help(PRESETS)
@dataclasses.dataclass(frozen=True)
class Clip(InFolderOfPreset):
    """Fine-tune a small CLIP with SGD, Adam, SAM and M-SAM: tables 1 to 3 and figure 7.

    Two towers are pre-trained on generated pairs of images and captions, fine-tuned on noisier ones
    (other words, some wrong captions), and evaluated on a third kind. Steps and cells of the grid
    are chosen on the validation set, and what is reported is the test set's. Runs that are finished
    are kept in the output folder: an interrupted command goes on where it was, with the same
    results, if it has as many processor cores: sums are divided among them, and training makes
    much of their last bits.

    Attributes:
      preset: smoke takes half a minute, default about ten minutes on two cores, long forty,
        for four times the data and steps.
      base: Base optimizer of SAM and M-SAM. The paper does not name its own.
      seeds: Number of seeds: of the generated pairs, the initial params and the order of the
        batches. By default the preset's. More of them in the same folder are added to those that
        are there.
      seed: The first of them; the others follow it.
      steps: Steps of fine-tuning. By default the preset's.
      pretraining_steps: Steps of pre-training. By default the preset's, which are meant for as many
        pairs as are generated: fewer pairs are learnt by heart, and few steps are better.
      sgd_rates: Learning rates of SGD, and of SAM and M-SAM if that is their base. By default the
        preset's, like the next two.
      adam_rates: The same for Adam.
      rho: Radii, the same for SAM and M-SAM.
      k: Neighbours in the alignment score.
      data: A folder with pairs of your own instead of generated ones: train, val and test, each as
        name.jsonl, with image (path of a picture, from that folder) and caption in every line, or
        as name.npz, with arrays image (n, height, width[, 3]) and caption (n,). A label may go with
        each pair. If there is pretrain too, the pre-training is on that, otherwise on train.
      image_size: To which height and width images are scaled, or generated.
      embeddings: Train nothing, but evaluate embeddings computed elsewhere: an .npz file with
        arrays image (n, d) and text (n, d), if wanted label (n,) and logit_scale, 100 by default.
      output: Folder for results.json, tables.md, figure7.png and mechanism.png, which are
        overwritten if they are of the same options, and for finished runs.
      overwrite: Write over the results of other options, if the output folder has some.
    """

    preset: Literal["smoke", "default", "long"] = "default"
    base: Literal["sgd", "adam"] = "sgd"
    seeds: int | None = None
    seed: int = 0
    steps: int | None = None
    pretraining_steps: int | None = None
    sgd_rates: tuple[float, ...] = ()
    adam_rates: tuple[float, ...] = ()
    rho: tuple[float, ...] = ()
    k: int = 8
    data: Path | None = None
    image_size: int = 16
    embeddings: Path | None = None
    output: Path = Path("runs/clip", PRESET)
    overwrite: bool = False

    @property
    def size(self) -> Preset:
        """The preset with what was given instead."""
        given = {name: getattr(self, name) for name in ("sgd_rates", "adam_rates", "rho")}
        given |= {name: getattr(self, name) for name in ("seeds", "steps", "pretraining_steps")}
        return PRESETS[self.preset]._replace(**{name: v for name, v in given.items() if v})

    def check(self) -> None:
        """Raises an InputError where an option cannot be used."""
        check_counts(
            {name: getattr(self, name) for name in ("seeds", "steps", "pretraining_steps", "k")}
        )
        check_seed(self.seed)
        for name in ("sgd_rates", "adam_rates", "rho"):
            values = getattr(self, name)
            check_numbers({name: values}, positive=name != "rho")
            check_list(name, values, "number", may_be_empty=True)
        if self.image_size < PATCH or self.image_size % PATCH:
            raise InputError(f"--image-size must be a multiple of {PATCH}, got {self.image_size}")
        if self.data is not None and self.embeddings is not None:
            raise InputError("--data trains and --embeddings does not; give one of them")
        if self.embeddings is None and self.k >= self.size.batch_size:
            raise InputError(
                f"--k must be below the batch size of {self.size.batch_size}, got {self.k}"
            )
