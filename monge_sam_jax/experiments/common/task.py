"""A model on a data set: what is minimised, and what is measured."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from monge_sam_jax import euclidean, worst_case_perturbation
from monge_sam_jax.experiments.common.data import Batch, Dataset
from monge_sam_jax.experiments.common.placement import Placement, make_placement
from monge_sam_jax.linen import SharpnessAwareTrainState

LARGEST_CHUNK = 2048  # samples that an evaluation holds at once on a device

Variables: TypeAlias = Mapping[str, chex.ArrayTree]


def variables_of(state: SharpnessAwareTrainState) -> Variables:
    """The params of a state, and the running statistics if it has any."""
    stats = state.batch_stats
    return {"params": state.params} | ({} if stats is None else {"batch_stats": stats})


class Task:
    """A model on a data set.

    Attributes:
      dataset: the training and the test set.
      model: a Flax module from x to logits, with no mutable variables but `batch_stats`, which it
        updates where that is mutable.
      placement: of params and samples.
      params_sharding: the shardings of the params.
    """

    def __init__(
        self, dataset: Dataset, model: nn.Module, placement: Placement | None = None
    ) -> None:
        self.dataset = dataset
        self.model = model
        self.placement = placement or make_placement()
        self._train, self._test = (
            list(self.placement.place_all(samples, LARGEST_CHUNK))
            for samples in (dataset.train, dataset.test)
        )
        everywhere = self.placement.everywhere
        shapes = jax.eval_shape(self._fresh_variables, 0)
        self.params_sharding = self.placement.of_params(shapes["params"])
        self._init = jax.jit(
            self._fresh_variables,
            out_shardings=dict.fromkeys(shapes, everywhere) | {"params": self.params_sharding},
        )
        self._measure = jax.jit(_weighted(self.loss_and_accuracy), out_shardings=everywhere)
        self._value_and_grad = jax.jit(
            _weighted(jax.value_and_grad(self._loss_of_params)),
            out_shardings=(everywhere, self.params_sharding),
        )

    def _fresh_variables(self, seed: chex.Numeric) -> Variables:
        x = self.dataset.train.x
        return self.model.init(jax.random.key(seed), jnp.zeros((1, *x.shape[1:]), x.dtype))

    def init(self, seed: int) -> Variables:
        """Fresh variables: the params, and the running statistics if the model has any."""
        return self._init(seed)

    def train_loss(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, tuple[Variables, dict[str, jax.Array]]]:
        """Mean cross-entropy in nats, and new running statistics; for `make_train_step`."""
        del rngs
        logits, updated = self.model.apply(variables, batch.x, mutable=["batch_stats"])
        return _mean_cross_entropy(logits, batch.y), (updated, {})

    def loss_and_accuracy(self, variables: Variables, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Mean cross-entropy in nats, and the fraction of samples whose largest logit is right.

        With the running statistics, and in float32 from the logits on.
        """
        logits: Any = self.model.apply(variables, batch.x)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch.y)
        return _mean_cross_entropy(logits, batch.y), accuracy

    def _loss_of_params(
        self, params: chex.ArrayTree, constants: Variables, batch: Batch
    ) -> jax.Array:
        return self.loss_and_accuracy({**constants, "params": params}, batch)[0]

    def measure(self, variables: Variables) -> dict[str, float]:
        """Loss on both whole sets, and accuracy on the test set in percent."""
        train_loss, _ = _mean_over(self._train, self._measure, variables)
        test_loss, test_accuracy = _mean_over(self._test, self._measure, variables)
        return {
            "train_loss": float(train_loss),
            "test_loss": float(test_loss),
            "test_accuracy": 100 * float(test_accuracy),
        }

    def sharpness(self, variables: Variables, rho: float) -> float:
        r"""How much the training loss rises at distance rho along its gradient.

        .. math:: \ell(\theta + \rho \, g / \|g\|_2) - \ell(\theta), \quad g = \nabla \ell(\theta)

        The same measure for all optimizers: the loss is that of the whole training set with the
        running statistics, the metric Euclidean. Params in lower precision are taken as float32,
        which does not lose the step.
        """
        constants = {name: tree for name, tree in variables.items() if name != "params"}
        params = optax.tree.cast(variables["params"], jnp.float32)
        here, grads = _mean_over(self._train, self._value_and_grad, params, constants)
        perturbed = {**constants, "params": _perturb(params, grads, rho)}
        there, _ = _mean_over(self._train, self._measure, perturbed)
        return float(there) - float(here)


def _mean_cross_entropy(logits: Any, y: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


@jax.jit
def _perturb(params: chex.ArrayTree, grads: chex.ArrayTree, rho: float) -> chex.ArrayTree:
    return optax.apply_updates(params, worst_case_perturbation(euclidean(), grads, params, rho))


def _weighted(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda weight, *args: jax.tree.map(lambda x: weight * x, fn(*args))


def _mean_over(chunks: Sequence[Batch], mean_fn: Callable[..., Any], *args: Any) -> Any:
    """The mean over all samples of what `mean_fn(weight, *args, chunk)` gives for those of one."""
    count = sum(len(chunk.y) for chunk in chunks)
    means = [mean_fn(len(chunk.y) / count, *args, chunk) for chunk in chunks]
    return jax.tree.map(lambda *leaves: sum(leaves[1:], start=leaves[0]), *means)
