"""Flax models that several commands train, without dropout."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

HEAD = "head"  # the layer of the logits


class MLP(nn.Module):
    """Two hidden layers of ReLU units over the flattened input.

    It computes in what the dtypes of params and input promote to, not in `dtype` at all events:
    params in float32 give a gradient in float32 whatever the dtype of the model.

    Attributes:
      classes: number of logits.
      width: units of a hidden layer.
      dtype: of the params.
    """

    classes: int
    width: int = 128
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (n, classes) of the samples (n, ...)."""
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width, param_dtype=self.dtype)(x))
        return nn.Dense(self.classes, param_dtype=self.dtype)(x)


class ResNet(nn.Module):
    """A residual network with BatchNorm, for images of 32 x 32 pixels or fewer (He et al. 2015).

    The first convolution is 3 x 3 and there is no max-pooling, as is usual for CIFAR-10. With its
    defaults it is ResNet-18. The running statistics are updated wherever the collection
    `batch_stats` is mutable, and used wherever it is not.

    Attributes:
      classes: number of logits.
      channels: of the first stage; every further one has twice as many, and half the resolution.
      blocks: number of blocks of two 3 x 3 convolutions, for every stage.
      dtype: of the computation.
      norm: makes what takes the place of BatchNorm.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from monge_sam_jax.experiments.common.models import ResNet
    >>> model = ResNet(classes=10)
    >>> shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    11173962
    """

    classes: int
    channels: int = 64
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    dtype: Any = jnp.float32
    norm: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (n, classes) of the images (n, height, width) or (n, height, width, channels)."""
        training = self.is_mutable_collection("batch_stats")
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        batch_norm = functools.partial(nn.BatchNorm, not training, momentum=0.9)
        norm = functools.partial(self.norm or batch_norm, dtype=self.dtype)
        if x.ndim == 3:
            x = x[..., None]
        x = nn.relu(norm()(conv(self.channels, (3, 3))(x)))
        for stage, blocks in enumerate(self.blocks):
            channels = self.channels * 2**stage
            for block in range(blocks):
                strides = 2 if stage > 0 and block == 0 else 1
                y = nn.relu(norm()(conv(channels, (3, 3), strides)(x)))
                y = norm()(conv(channels, (3, 3))(y))
                if x.shape != y.shape:
                    x = norm()(conv(channels, (1, 1), strides)(x))
                x = nn.relu(x + y)
        return nn.Dense(self.classes, dtype=self.dtype, name=HEAD)(x.mean(axis=(1, 2)))


class Transformer(nn.Module):
    """A causal language model, normalised before every layer, as GPT-2 is."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (n, length, vocabulary) of the next token at every place of tokens (n, length)."""
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        n, length = tokens.shape
        x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)(tokens)
        x += nn.Embed(length, self.width, dtype=self.dtype)(jnp.arange(length))[None]
        for _ in range(self.layers):
            qkv = dense(3 * self.width, use_bias=False)(norm()(x))
            q, k, v = jnp.moveaxis(qkv.reshape(n, length, 3, self.heads, -1), 2, 0)
            attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x += dense(self.width)(attended.reshape(n, length, self.width))
            x += dense(self.width)(nn.gelu(dense(4 * self.width)(norm()(x))))
        return dense(self.vocabulary, name=HEAD, use_bias=False)(norm()(x))
