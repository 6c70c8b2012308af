"""Figure 7: embeddings of two modalities without what tells them apart; also from a file."""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from monge_sam_jax.alignment import clip_loss, mutual_knn_alignment
from monge_sam_jax.experiments.clip.data import check_labels
from monge_sam_jax.experiments.clip.options import Clip
from monge_sam_jax.experiments.clip.plots import Panel, figure_7
from monge_sam_jax.experiments.common import report
from monge_sam_jax.experiments.common.data import load_arrays
from monge_sam_jax.experiments.common.errors import InputError

PERPLEXITY = 30.0
BATCH_SIZE = 128
LOGIT_SCALE = 100.0
MOST_DRAWN = 2000
EXPECTED = (
    "an .npz file with image (n, d) and text (n, d), if wanted label (n,) and logit_scale, a number"
)


class Joint(NamedTuple):
    """Embeddings of n images and then of their n texts, without their first principal component.

    Attributes:
      points: (2 n, d).
      correlation: of that component with the modality, without its sign.
      explained: its share of the variance.
    """

    points: np.ndarray
    correlation: float
    explained: float


def without_first_component(image: np.ndarray, text: np.ndarray) -> Joint:
    """Stacks both modalities and takes the main variation out (figure 7).

    Args:
      image: embeddings (n, d); rows are divided by their lengths, as in the loss.
      text: embeddings (n, d) of the captions.

    Returns:
      What a PCA reconstructs once the first component's scores are zero.

    >>> joint = without_first_component(
    ...     np.array([[3.0, 4.0], [3.0, 4.0]]), np.array([[4.0, -3.0], [4.0, -3.0]])
    ... )
    >>> joint.correlation, joint.explained  # nothing but the modality
    (1.0, 1.0)
    """
    stacked = np.concatenate([image, text]).astype(np.float64)
    lengths = np.linalg.norm(stacked, axis=1, keepdims=True)
    stacked = stacked / np.where(lengths > 0, lengths, 1)
    if not np.ptp(stacked, axis=0).any():
        return Joint(stacked, math.nan, math.nan)
    pca = PCA(svd_solver="full").fit(stacked)
    scores = pca.transform(stacked)
    modality = np.repeat([0.0, 1.0], len(image))
    correlation = abs(np.corrcoef(scores[:, 0], modality)[0, 1])
    scores[:, 0] = 0
    return Joint(
        pca.inverse_transform(scores), float(correlation), float(pca.explained_variance_ratio_[0])
    )


def panel(title: str, image: np.ndarray, text: np.ndarray, labels: np.ndarray | None) -> Panel:
    """t-SNE of the reconstruction, of at most `MOST_DRAWN` pairs, and what its PCA said."""
    joint = without_first_component(image, text)
    drawn = min(len(image), MOST_DRAWN)
    points = np.concatenate([joint.points[:drawn], joint.points[len(image) :][:drawn]])
    tsne = TSNE(perplexity=min(PERPLEXITY, (len(points) - 1) / 3), random_state=0)
    with threadpool_limits(1):  # on busy cores its threads wait for each other, many times as long
        plane = tsne.fit_transform(points)
    return Panel(
        title,
        plane,
        None if labels is None else np.asarray(labels)[:drawn],
        joint.correlation,
        joint.explained,
    )


def evaluate_file(path: Path, options: Clip) -> None:
    """`monge-sam clip --embeddings`: writes results.json and figure7.png, and prints the numbers.

    Raises:
      InputError: the file or the output folder cannot be used.
    """
    k, output = options.k, options.output
    try:
        image, text, labels, logit_scale = _read(path, k)
    except InputError as error:
        raise InputError(f"--embeddings {path}: {error}") from error
    configuration = dataclasses.asdict(options)
    report.prepare_output(output, configuration, options.overwrite)
    drawn = panel(path.stem, image, text, labels)
    results = report.jsonable(
        {
            "embeddings": path,
            "configuration": configuration,
            **report.environment(),
            **measure(image, text, k, logit_scale),
            "figure7": {"correlation": drawn.correlation, "explained": drawn.explained},
        }
    )
    names = ("pairs", "alignment", "alignment_chance", "loss", "loss_chance")
    report.publish(
        output,
        {report.RESULTS: results, "figure7.png": figure_7([drawn])},
        *(f"{name.replace('_', ', ')}: {results[name]:.4g}" for name in names),
        f"first principal component: correlation {drawn.correlation:.3f} with the modality, "
        f"{drawn.explained:.0%} of the variance",
    )


def measure(image: np.ndarray, text: np.ndarray, k: int, logit_scale: float) -> dict[str, Any]:
    """Alignment of all pairs and mean loss of whole batches, beside their chance levels."""
    size = min(BATCH_SIZE, len(image))
    starts = range(0, len(image) // size * size, size)
    losses = [clip_loss(image[i : i + size], text[i : i + size], logit_scale) for i in starts]
    alignment = mutual_knn_alignment(image, text, k)
    return {
        "pairs": len(image),
        "alignment": float(alignment.score),
        "alignment_chance": float(alignment.chance),
        "loss": float(np.mean(losses)),
        "loss_chance": math.log(size),
    }


def _read(path: Path, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, float]:
    arrays = load_arrays(path, EXPECTED, ("image", "text"), ("label", "logit_scale"))
    image, text, labels = arrays["image"], arrays["text"], arrays.get("label")
    scale = arrays.get("logit_scale", np.array(LOGIT_SCALE))
    for name, array in (("image", image), ("text", text)):
        if array.ndim != 2 or array.dtype.kind not in "iuf":
            raise InputError(
                f"expected {name} (n, d) of numbers, found {array.shape} of {array.dtype}"
            )
        if not np.all(np.isfinite(array)):
            raise InputError(f"{name} {array.shape} holds NaN or infinity")
    if image.shape != text.shape:
        raise InputError(
            f"expected image and text of one shape, found {image.shape} and {text.shape}"
        )
    if len(image) <= max(k, 2) or image.shape[1] < 2:
        raise InputError(
            f"expected more than {max(k, 2)} pairs in at least two dimensions, "
            f"found shape {image.shape}"
        )
    if scale.shape != () or scale.dtype.kind not in "iuf" or not np.isfinite(scale):
        raise InputError(
            f"expected logit_scale to be a finite number (), found {scale.shape}: {scale}"
        )
    image, text = (array.astype(np.float32) for array in (image, text))
    return image, text, None if labels is None else check_labels(labels, len(image)), float(scale)
