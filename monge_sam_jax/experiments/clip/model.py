"""A small CLIP: two towers without convolutions, whose gradients XLA's CPU loops take quickly."""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from monge_sam_jax.alignment import clip_loss
from monge_sam_jax.experiments.clip.data import Pairs
from monge_sam_jax.experiments.clip.options import PATCH

LARGEST_LOGIT_SCALE = 100.0
FIRST_LOGIT_SCALE = 1 / 0.07


class Latents(NamedTuple):
    """Embeddings (n, d) of both modalities, and the logit scale, a scalar."""

    image: jax.Array
    text: jax.Array
    logit_scale: jax.Array


class Tower(nn.Module):
    """An embedding of tokens (n, tokens, width): they are mixed, then their features, then pooled.

    Attributes:
      embedding: length of the embedding.
    """

    embedding: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The embeddings of n things, (n, embedding)."""
        tokens, width = x.shape[-2:]
        mixed = nn.Dense(tokens)(jnp.swapaxes(nn.LayerNorm()(x), -1, -2))
        x = x + jnp.swapaxes(nn.Dense(tokens)(nn.relu(mixed)), -1, -2)
        x = x + nn.Dense(width)(nn.relu(nn.Dense(width)(nn.LayerNorm()(x))))
        return nn.Dense(self.embedding)(jnp.mean(nn.LayerNorm()(x), axis=-2))


class TwoTowers(nn.Module):
    """Images and captions in one space, as CLIP has them.

    Attributes:
      vocabulary: number of word numbers.
      width: features of a token.
      embedding: length of the embeddings.
    """

    vocabulary: int
    width: int = 32
    embedding: int = 32

    @nn.compact
    def __call__(self, pairs: Pairs) -> Latents:
        """The embeddings of n pairs."""
        n, side = pairs.images.shape[:2]
        cells = pairs.images.reshape(n, side // PATCH, PATCH, side // PATCH, PATCH, 3)
        patches = jnp.swapaxes(cells, 2, 3).reshape(n, -1, PATCH * PATCH * 3)
        words = nn.Embed(self.vocabulary, self.width)(pairs.words)
        log_scale = self.param(
            "log_logit_scale", nn.initializers.constant(math.log(FIRST_LOGIT_SCALE)), ()
        )
        return Latents(
            Tower(self.embedding, name="image_tower")(nn.Dense(self.width)(patches)),
            Tower(self.embedding, name="text_tower")(words),
            jnp.exp(jnp.minimum(log_scale, math.log(LARGEST_LOGIT_SCALE))),
        )


def embed(params: chex.ArrayTree, pairs: Pairs) -> Latents:
    """The embeddings of pairs."""
    vocabulary = params["params"]["Embed_0"]["embedding"].shape[0]
    return TwoTowers(vocabulary).apply(params, pairs)  # type: ignore[return-value]


def batch_loss(params: chex.ArrayTree, batch: Pairs) -> jax.Array:
    """The CLIP loss of a batch, in nats."""
    return clip_loss(*embed(params, batch))
