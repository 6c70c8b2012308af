r"""How well two embeddings of the same things agree: the CLIP loss, and mutual nearest neighbours.

Both look at directions alone: rows are divided by their lengths first. A zero row stays zero, so
that its cosine with every other row is zero.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from monge_sam_jax._core.checks import check_at_least
from monge_sam_jax._core.numerics import scaled_norm, widen, working_dtype

__all__ = ["Alignment", "clip_loss", "mutual_knn_alignment"]
__dir__ = __all__.copy

# Entries of the similarity matrix that are held at a time: 32 MiB in float32.
_BLOCK_ENTRIES = 2**23
# Cosines of points at distances r_i, r_j from the centre are off by at most 2 (r_i + r_j), in units
# of the dtype's eps (seen from 2 to 20,000 dimensions), and so their differences by twice that.
_EPS_OF_COSINES = 4.0
# Of unrelated points all nearer to the centre than this, in the same units, rounding makes enough
# cosines equal that their score is well above chance.
_EPS_OF_CONSTANT = 1000.0


class Alignment(NamedTuple):
    """A mutual nearest neighbour score beside what unrelated embeddings would get.

    Attributes:
      score: the share of nearest neighbours in common, from 0 to 1; scalar, float32 or wider.
      chance: its expectation for unrelated embeddings, k / (n - 1). A score means little without
        it, and scores over different n or k do not compare.
    """

    score: jax.Array
    chance: jax.Array


def mutual_knn_alignment(x: chex.Array, y: chex.Array, k: int = 8) -> Alignment:
    r"""The share of nearest neighbours that two embeddings of the same things have in common.

    .. math::
        \mathcal{S}_{kNN} = \frac{1}{n k} \sum_{i=1}^{n}
            \big| \mathcal{N}^x_k(i) \cap \mathcal{N}^y_k(i) \big|

    :math:`\mathcal{N}^x_k(i)` are the k things j other than i of largest cosine
    :math:`x_i^\top x_j / (\|x_i\| \|x_j\|)`. Cosines that differ by no more than rounding count as
    equal, and of equal ones the smaller index j wins, in x and y alike. Embeddings with many ties
    (equal rows, zero rows) therefore score too high: to the constant ones, which would get 1, no
    score is given, but others are not found out.

    The similarities are computed in blocks of rows: memory is that of a few copies of x and y and
    of a few blocks of 32 MiB. It is compiled once per shape, dtype and k.

    Args:
      x: embeddings, of shape (n, d_x), real; row i is thing i. Computed in float32 or wider.
      y: other embeddings of the same things, of shape (n, d_y).
      k: number of neighbours, 1 to n - 1. The Monge SAM paper takes 8 (section 4.2).

    Returns:
      The score and its chance level, as an `Alignment`. The score is NaN if an entry of x or y is
      not finite, or if all rows of one of them have the same direction up to rounding (1e-4 in
      float32, 1e-3 in float16, 8e-3 in bfloat16); a RuntimeWarning says which. Under `jax.jit`
      (with k static) and other transformations the score is the same, but there is no warning.

    Raises:
      TypeError: x or y is complex.
      ValueError: x or y is no matrix, they differ in n, or k is no integer from 1 to n - 1.

    References:
      Huh et al., The Platonic Representation Hypothesis, 2024.

    >>> import jax.numpy as jnp
    >>> angle_x, angle_y = jnp.array([0.0, 0.1, 0.9, 1.0]), jnp.array([0.0, 0.1, 0.3, 1.0])
    >>> x = jnp.stack([jnp.cos(angle_x), jnp.sin(angle_x)], axis=1)
    >>> y = jnp.stack([jnp.cos(angle_y), jnp.sin(angle_y)], axis=1)
    >>> mutual_knn_alignment(x, y, k=1)  # thing 2 is nearest to 3 in x, to 1 in y
    Alignment(score=Array(0.75, dtype=float32), chance=Array(0.33333334, dtype=float32))
    """
    x, y = _as_embeddings("x", x), _as_embeddings("y", y)
    n = len(x)
    if len(y) != n:
        raise ValueError(
            "x and y must be embeddings of the same things, row by row, got shapes "
            f"{x.shape} and {y.shape}"
        )
    check_at_least("k", k, 1)
    if k >= n:
        raise ValueError(
            "a thing among n has n - 1 others, so k must be below n: take a smaller k or embed "
            f"more things; got k = {k} and n = {n}"
        )
    score, causes = _mutual_knn(x, y, k=int(k), block=max(1, _BLOCK_ENTRIES // n))
    if not isinstance(score, jax.core.Tracer):
        for cause, applies in causes.items():
            if applies:
                warnings.warn(f"the alignment score is NaN: {cause}", RuntimeWarning, stacklevel=2)
    return Alignment(score, jnp.asarray(k / (n - 1), score.dtype))


@partial(jax.jit, static_argnames=("k", "block"))
def _mutual_knn(
    x: jax.Array, y: jax.Array, *, k: int, block: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The score, and what made it NaN if that applies."""
    points_x, points_y = _as_points(x), _as_points(y)

    def overlap(i: jax.Array) -> jax.Array:
        return jnp.sum(_neighbours(points_x, i, k) & _neighbours(points_y, i, k), dtype=jnp.int32)

    shared = jax.lax.map(overlap, jnp.arange(len(x), dtype=jnp.int32), batch_size=block)
    score = jnp.mean(shared.astype(working_dtype((x, y)))) / k
    causes = {}
    for name, rows, points in (("x", x, points_x), ("y", y, points_y)):
        causes[f"{name} has entries that are not finite"] = ~jnp.all(jnp.isfinite(rows))
        causes[f"all rows of {name} have the same direction, up to rounding"] = points.is_constant
    undefined = jnp.any(jnp.stack(list(causes.values())))
    return jnp.where(undefined, jnp.nan, score), causes


class _Points(NamedTuple):
    """Unit rows u_j, seen from their mean c.

    Attributes:
      a: u_j - c.
      half_square: half the square of the length of u_j - c; more by 1/2 for a zero row.
      radius: length of u_j - c.
      is_constant: whether all rows are equal up to the rounding of the given dtype.
    """

    a: jax.Array
    half_square: jax.Array
    radius: jax.Array
    is_constant: jax.Array


def _as_points(x: jax.Array) -> _Points:
    units = _unit_rows(x)
    a = units - jnp.mean(units, axis=0, keepdims=True)
    square = jnp.sum(a * a, axis=1)
    radius = jnp.sqrt(square)
    is_zero = jnp.all(units == 0, axis=1).astype(square.dtype)
    given_eps = jnp.finfo(x.dtype).eps if jnp.issubdtype(x.dtype, jnp.floating) else 0.0
    smallest = max(float(given_eps), _EPS_OF_CONSTANT * float(jnp.finfo(units.dtype).eps))
    return _Points(a, (square + is_zero) / 2, radius, jnp.max(radius) <= smallest)


def _neighbours(points: _Points, i: jax.Array, k: int) -> jax.Array:
    r"""Which things are among the k nearest to thing i, as a mask over the things.

    They are those of largest cosine :math:`u_i^\top u_j`. With :math:`a_j = u_j - c` that is, up to
    a constant for each i and for unit vectors,

    .. math:: a_i^\top a_j - \|a_j\|^2 / 2

    whose rounding errors shrink with the distances from c. Of rows with cosines of 1 - 1e-6, all
    around one direction, the cosines themselves would be rounding errors and little else.
    """
    index = jnp.arange(len(points.a), dtype=jnp.int32)
    product = jnp.matmul(points.a[i], points.a.T, precision=jax.lax.Precision.HIGHEST)
    nearness = jnp.where(index == i, -jnp.inf, product - points.half_square)

    # Only at the edge of the neighbourhood does it matter what is equal. Slices of top_k's results
    # such as [-1] make XLA sort whole rows on CPU, which takes 30 times as long.
    kth = jnp.min(jax.lax.top_k(nearness, k)[0])
    rounding = _EPS_OF_COSINES * jnp.finfo(nearness.dtype).eps * (points.radius[i] + points.radius)
    beyond = nearness > kth + rounding
    equal = ~beyond & (nearness >= kth - rounding)
    rank = jnp.where(beyond, 2.0, jnp.where(equal, 1.0, 0.0)).astype(jnp.float32)
    ranks, chosen = jax.lax.top_k(rank, k)  # of equal ranks, those of smaller index
    last_equal = jnp.max(jnp.where(ranks == 1, chosen, -1))
    return beyond | (equal & (index <= last_equal))


def clip_loss(
    image_embeddings: chex.Array, text_embeddings: chex.Array, logit_scale: chex.Numeric
) -> jax.Array:
    r"""The loss of CLIP: which text belongs to which image, and the other way round.

    .. math::
        \ell = \frac{1}{2n} \sum_{i=1}^{n} \Big(
            \log \sum_{j=1}^{n} e^{L_{ij} - L_{ii}} + \log \sum_{j=1}^{n} e^{L_{ji} - L_{ii}}
        \Big), \qquad L_{ij} = s \, \frac{I_i^\top T_j}{\|I_i\| \|T_j\|}

    In nats. A loss near log(n) means chance: all pairs look alike, as they do once a diverged
    optimizer has made the embeddings constant (4.852 = log(128) in table 2 of the Monge SAM paper).

    Args:
      image_embeddings: I, of shape (n, d), real; not normalised. Computed in float32 or wider.
      text_embeddings: T, of shape (n, d); row i belongs to row i of the image embeddings.
      logit_scale: s, the multiplier itself, a scalar; of a model that keeps its logarithm, as CLIP
        does, hand in its exponential. It is not checked for its sign or for being finite.

    Returns:
      The mean over the batch and over both directions, a scalar, float32 or wider. The derivative
      with respect to a zero row is zero.

    Raises:
      TypeError: an embedding is complex.
      ValueError: the embeddings are no matrices of one shape, or logit_scale is no scalar.

    References:
      Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.

    >>> import jax.numpy as jnp
    >>> clip_loss(jnp.eye(3), jnp.eye(3), logit_scale=100.0)
    Array(0., dtype=float32)
    >>> clip_loss(jnp.ones((128, 4)), jnp.ones((128, 4)), logit_scale=100.0)
    Array(4.852, dtype=float32)
    """
    image = _as_embeddings("image_embeddings", image_embeddings)
    text = _as_embeddings("text_embeddings", text_embeddings)
    if image.shape != text.shape or len(image) == 0:
        raise ValueError(
            "image_embeddings and text_embeddings must have one shape (n, d), n at least 1, got "
            f"{image.shape} and {text.shape}"
        )
    if jnp.shape(logit_scale) != ():
        raise ValueError(
            f"logit_scale must be a scalar, got an array of shape {jnp.shape(logit_scale)}"
        )
    dtype = working_dtype((image, text))
    cosines = jnp.matmul(
        _unit_rows(widen(image, dtype)),
        _unit_rows(widen(text, dtype)).T,
        precision=jax.lax.Precision.HIGHEST,
    )
    logits = jnp.asarray(logit_scale, dtype) * cosines
    right = jnp.diagonal(logits)
    to_text = jax.nn.logsumexp(logits - right[:, None], axis=1)
    to_image = jax.nn.logsumexp(logits - right[None, :], axis=0)
    return jnp.mean(to_text + to_image) / 2


def _as_embeddings(name: str, x: chex.Array) -> jax.Array:
    x = jnp.asarray(x)
    if x.ndim != 2:
        raise ValueError(f"{name} must be a matrix with a row for each thing, got shape {x.shape}")
    if jnp.iscomplexobj(x):
        raise TypeError(f"{name} must be real, got dtype {x.dtype}")
    return x


@jax.jit
def _unit_rows(x: jax.Array) -> jax.Array:
    """Rows divided by their lengths, in float32 or wider; zero rows stay zero."""
    norms = jax.vmap(scaled_norm)(x)
    return norms.unit / norms.unit_norm[:, None]
