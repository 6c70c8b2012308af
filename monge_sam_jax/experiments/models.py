"""Small Flax models, without dropout and batch normalisation."""

import jax
from flax import linen as nn


class MLP(nn.Module):
    """Two hidden layers of ReLU units over the flattened input.

    Attributes:
      classes: number of logits.
      width: units of a hidden layer.
    """

    classes: int
    width: int = 128

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (n, classes) of the samples (n, ...)."""
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(self.classes)(x)


class CNN(nn.Module):
    """Two 3 x 3 convolutions with ReLU, each followed by 2 x 2 pooling, and a linear layer.

    Attributes:
      classes: number of logits.
      channels: of the first convolution; the second has twice as many.
    """

    classes: int
    channels: int = 16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (n, classes) of the images (n, height, width) or (n, height, width, channels)."""
        if x.ndim == 3:
            x = x[..., None]
        for channels in (self.channels, 2 * self.channels):
            x = nn.relu(nn.Conv(channels, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
        return nn.Dense(self.classes)(x.reshape(x.shape[0], -1))
