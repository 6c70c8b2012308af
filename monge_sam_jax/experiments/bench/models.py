"""What `monge-sam bench` trains: models of usual kinds, on generated samples."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from monge_sam_jax.experiments.bench.options import SIZES
from monge_sam_jax.experiments.common.data import Batch
from monge_sam_jax.experiments.common.models import HEAD, ResNet, Transformer

# Batch statistics and the like: all collections of a Flax model except its params.
Stats: TypeAlias = chex.ArrayTree


class MLP(nn.Module):
    """Hidden layers of ReLU units over vectors."""

    width: int
    layers: int
    classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (n, classes) of the samples (n, features)."""
        keep_size = nn.initializers.he_normal()  # of activations, through however many layers
        for _ in range(self.layers):
            x = nn.relu(nn.Dense(self.width, dtype=self.dtype, kernel_init=keep_size)(x))
        return nn.Dense(self.classes, dtype=self.dtype, name=HEAD)(x)


class Problem(NamedTuple):
    """A loss to minimise, with all that its training steps share.

    Attributes:
      description: of model, batch and base optimizer, for people.
      init: key -> (params, stats, batch).
      loss_fn: (params, stats, batch) -> (loss, stats).
      base_optimizer: what descends.
      has_convolutions: whether XLA's CPU compiler needs the gradient outside of loops and
        conditionals, in which that of a convolution is many times slower.
    """

    description: str
    init: Callable[[jax.Array], tuple[chex.ArrayTree, Stats, Batch]]
    loss_fn: Callable[[chex.ArrayTree, Stats, Batch], tuple[jax.Array, Stats]]
    base_optimizer: optax.GradientTransformation
    has_convolutions: bool = False


def mlp(
    preset: str,
    batch_size: int | None = None,
    *,
    sizes: str = "mlp",
    learning_rate: float = 0.05,
) -> Problem:
    """Vectors in classes, by a multilayer perceptron and SGD with momentum."""
    features, width, layers, usual = SIZES[preset][sizes]
    dtype = SIZES[preset]["dtype"]
    batch_size = batch_size or usual
    model = MLP(width, layers, classes=10, dtype=dtype)

    def batch(key: jax.Array) -> Batch:
        x = jax.random.normal(key, (batch_size, features))
        return Batch(x, jnp.argmax(x[:, :10], axis=-1))

    description = f"MLP of {layers} x {width}, batch {batch_size} x {features}"
    return _problem(description, model, batch, optax.sgd(learning_rate, momentum=0.9))


def resnet(preset: str, batch_size: int | None = None) -> Problem:
    """Images in classes, by a residual network with BatchNorm and SGD with momentum."""
    size, channels, stages, blocks, usual = SIZES[preset]["resnet"]
    dtype = SIZES[preset]["dtype"]
    batch_size = batch_size or usual
    model = ResNet(10, channels, (blocks,) * stages, dtype)

    def batch(key: jax.Array) -> Batch:
        x = jax.random.normal(key, (batch_size, size, size, 3))
        return Batch(x, jnp.argmax(x[:, 0, :10, 0], axis=-1))

    description = (
        f"ResNet-{2 * stages * blocks + 2}, {channels} channels, "
        f"batch {batch_size} x {size} x {size} x 3"
    )
    tx = optax.sgd(0.05, momentum=0.9)
    return _problem(description, model, batch, tx, has_convolutions=True)


def transformer(preset: str, batch_size: int | None = None) -> Problem:
    """The next token, by a transformer and AdamW."""
    width, layers, heads, vocabulary, length, usual = SIZES[preset]["transformer"]
    dtype = SIZES[preset]["dtype"]
    batch_size = batch_size or usual
    model = Transformer(width, layers, heads, vocabulary, dtype=dtype)

    def batch(key: jax.Array) -> Batch:
        text = jax.random.randint(key, (batch_size, length + 1), 0, vocabulary)
        return Batch(text[:, :-1], text[:, 1:])

    description = f"Transformer of {layers} x {width}, {heads} heads, batch {batch_size} x {length}"
    return _problem(description, model, batch, optax.adamw(1e-3))


def _problem(
    description: str,
    model: nn.Module,
    make_batch: Callable[[jax.Array], Batch],
    base_optimizer: optax.GradientTransformation,
    has_convolutions: bool = False,
) -> Problem:
    def init(key: jax.Array) -> tuple[chex.ArrayTree, Stats, Batch]:
        key_batch, key_model = jax.random.split(key)
        batch = make_batch(key_batch)
        stats = model.init(key_model, batch.x)
        params = stats.pop("params")
        return params, stats, batch

    def loss_fn(params: chex.ArrayTree, stats: Stats, batch: Batch) -> tuple[jax.Array, Stats]:
        """Mean cross-entropy in nats, in float32."""
        variables = {"params": params, **stats}
        logits, stats = model.apply(variables, batch.x, mutable=list(stats))
        logits = logits.astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.y)
        return jnp.mean(losses), stats

    return Problem(description, init, loss_fn, base_optimizer, has_convolutions)


MODELS: dict[str, Callable[[str, int | None], Problem]] = {
    "mlp": mlp,
    # So many small layers that what is done leaf by leaf shows.
    "deep_mlp": functools.partial(mlp, sizes="deep_mlp", learning_rate=1e-3),
    "resnet": resnet,
    "transformer": transformer,
}
