"""A model on a data set: what is minimised, and what is measured."""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from monge_sam_jax import euclidean, worst_case_perturbation
from monge_sam_jax.experiments.data import Batch, Dataset

LARGEST_CHUNK = 2048  # samples that an evaluation holds at once


class Task:
    """A model on a data set.

    Attributes:
      dataset: the training and the test set.
      model: a Flax module from x to logits, without mutable variables.
    """

    def __init__(self, dataset: Dataset, model: nn.Module) -> None:
        self.dataset = dataset
        self.model = model
        self._train, self._test = _chunks(dataset.train), _chunks(dataset.test)
        self._init = jax.jit(model.init)
        self._loss_and_accuracy = jax.jit(self.loss_and_accuracy)
        self._value_and_grad = jax.jit(jax.value_and_grad(self.loss))

    def init(self, seed: int) -> chex.ArrayTree:
        """Fresh params."""
        return self._init(jax.random.key(seed), self.dataset.train.x[:1])

    def loss_and_accuracy(
        self, params: chex.ArrayTree, batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        """Mean cross-entropy in nats, and the fraction of samples whose largest logit is right."""
        logits: Any = self.model.apply(params, batch.x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.y)
        return jnp.mean(losses), jnp.mean(jnp.argmax(logits, axis=-1) == batch.y)

    def loss(self, params: chex.ArrayTree, batch: Batch) -> jax.Array:
        """Mean cross-entropy in nats."""
        return self.loss_and_accuracy(params, batch)[0]

    def measure(self, params: chex.ArrayTree) -> dict[str, float]:
        """Loss on both whole sets, and accuracy on the test set in percent."""
        train_loss, _ = _mean_over(self._train, self._loss_and_accuracy, params)
        test_loss, test_accuracy = _mean_over(self._test, self._loss_and_accuracy, params)
        return {
            "train_loss": float(train_loss),
            "test_loss": float(test_loss),
            "test_accuracy": 100 * float(test_accuracy),
        }

    def sharpness(self, params: chex.ArrayTree, rho: float) -> float:
        r"""How much the training loss rises at distance rho along its gradient.

        .. math:: \ell(\theta + \rho \, g / \|g\|_2) - \ell(\theta), \quad g = \nabla \ell(\theta)

        The same measure for all optimizers: the loss is that of the whole training set, the metric
        Euclidean.
        """
        here, grads = _mean_over(self._train, self._value_and_grad, params)
        perturbed = _perturb(params, grads, rho)
        there, _ = _mean_over(self._train, self._loss_and_accuracy, perturbed)
        return float(there) - float(here)


@jax.jit
def _perturb(params: chex.ArrayTree, grads: chex.ArrayTree, rho: float) -> chex.ArrayTree:
    return optax.apply_updates(params, worst_case_perturbation(euclidean(), grads, params, rho))


def _chunks(samples: Batch) -> list[Batch]:
    pieces = -(-len(samples.y) // LARGEST_CHUNK)
    xs, ys = jnp.array_split(samples.x, pieces), jnp.array_split(samples.y, pieces)
    return [Batch(x, y) for x, y in zip(xs, ys, strict=True)]


def _mean_over(chunks: Sequence[Batch], mean_fn: Callable[..., Any], params: chex.ArrayTree) -> Any:
    """The mean over all samples of what `mean_fn(params, chunk)` gives for the samples of one."""
    sizes = [len(chunk.y) for chunk in chunks]
    means = jax.device_get([mean_fn(params, chunk) for chunk in chunks])
    return jax.tree.map(lambda *leaves: np.average(leaves, axis=0, weights=sizes), *means)
