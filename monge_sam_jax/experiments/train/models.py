"""What `monge-sam train` trains: small Flax models, without dropout."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype

from monge_sam_jax.experiments.common.models import MLP


class CNN(nn.Module):
    """Two blocks of 3 x 3 convolution, BatchNorm, ReLU and 2 x 2 pooling, and a linear layer.

    The running statistics are updated wherever the collection `batch_stats` is mutable, and used
    wherever it is not. It computes in what the dtypes of params and input promote to, as the MLP.

    Attributes:
      classes: number of logits.
      channels: of the first convolution; the second has twice as many.
      dtype: of the params; the running statistics are in float32.
    """

    classes: int
    channels: int = 16
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (n, classes) of the images (n, height, width) or (n, height, width, channels)."""
        training = self.is_mutable_collection("batch_stats")
        if x.ndim == 3:
            x = x[..., None]
        for channels in (self.channels, 2 * self.channels):
            x = nn.Conv(channels, (3, 3), use_bias=False, param_dtype=self.dtype)(x)
            x = nn.BatchNorm(not training, momentum=0.9, param_dtype=self.dtype)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2), padding="SAME")
        return nn.Dense(self.classes, param_dtype=self.dtype)(x.reshape(x.shape[0], -1))


MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "cnn": CNN}
