"""How `monge-sam edges` trains, and what it measures on the way."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from monge_sam_jax.curvature import lanczos_eigenvalues
from monge_sam_jax.diagnostics import get_diagnostics
from monge_sam_jax.edges import edge_of_stability, one_pass_edge_of_stability
from monge_sam_jax.experiments.common.data import Batch, handwritten_digits, shuffled_rows
from monge_sam_jax.experiments.common.models import MLP
from monge_sam_jax.experiments.edges.options import Edges
from monge_sam_jax.metrics import Metric, euclidean, monge
from monge_sam_jax.one_pass import one_pass_sam, unperturbed_params
from monge_sam_jax.transforms import sharpness_aware

CLASSES = 10
EVALUATIONS = 10
PRODUCTS = 15  # with the Hessian, for its largest eigenvalue
WINDOW = 50  # steps before an evaluation, over which the median of the effective radius is taken


class Method(NamedTuple):
    """How a method takes its gradients.

    Attributes:
      label: its name.
      metric: what it perturbs along, or None.
      one_pass: whether along the gradient of the step before.
    """

    label: str
    metric: Metric | None = None
    one_pass: bool = False

    def optimizer(self, options: Edges, rho: float) -> optax.GradientTransformation:
        """The whole of it, whose `update` takes a grad_fn."""
        base = optax.sgd(options.learning_rate, momentum=options.momentum or None)
        if self.metric is None:
            return base
        if self.one_pass:
            direction = options.direction
            return one_pass_sam(base, metric=self.metric, rho=rho, direction=direction)
        return optax.chain(sharpness_aware(metric=self.metric, rho=rho), base)

    def edge(self, options: Edges, effective_radius: np.ndarray) -> np.ndarray:
        """The largest sharpness that is stable, by the theory."""
        edge = edge_of_stability
        if self.one_pass:
            edge = functools.partial(one_pass_edge_of_stability, direction=options.direction)
        radius = jnp.asarray(effective_radius)
        return np.asarray(edge(options.learning_rate, radius, momentum=options.momentum))


METHODS = {
    "sgd": Method("SGD"),
    "sam": Method("SAM", euclidean()),
    "monge_sam": Method("M-SAM", monge()),
    "one_pass_sam": Method("one-pass SAM", euclidean(), one_pass=True),
    "one_pass_monge_sam": Method("one-pass M-SAM", monge(), one_pass=True),
}


class Problem(NamedTuple):
    """What is learnt from one seed.

    Attributes:
      params: where training starts.
      train: the samples that it has.
      test: those that judge it.
      rows: of the training samples, those of every step (steps, batch size), the same for all
        methods; None: all at every step.
    """

    params: chex.ArrayTree
    train: Batch
    test: Batch
    rows: np.ndarray | None


def problem(seed: int, options: Edges) -> Problem:
    """Fresh params, and training images drawn at random from the training half of the digits."""
    digits, rng = handwritten_digits(), np.random.default_rng(seed)
    chosen = rng.permutation(len(digits.train.y))[: options.images]
    train = Batch(digits.train.x[chosen], digits.train.y[chosen])
    params = MLP(CLASSES, options.width).init(jax.random.key(seed), train.x)
    rows = None
    if options.batch_size is not None:
        epochs = -(-options.steps // (options.images // options.batch_size))
        rows = shuffled_rows(options.images, options.batch_size, rng, epochs)[: options.steps]
    return Problem(params, train, digits.test, rows)


def squared_error(params: chex.ArrayTree, batch: Batch) -> jax.Array:
    """Half the squared distance from the one-hot labels, in the mean over samples."""
    error = _outputs(params, batch.x) - jax.nn.one_hot(batch.y, CLASSES)
    return 0.5 * jnp.mean(jnp.sum(error**2, axis=-1))


@jax.jit
def measure(params: chex.ArrayTree, train: Batch, test: Batch) -> dict[str, jax.Array]:
    """Loss on the training samples, and which percentage of them and of the others is right."""

    def accuracy(batch: Batch) -> jax.Array:
        return 100 * jnp.mean(jnp.argmax(_outputs(params, batch.x), axis=-1) == batch.y)

    return {
        "loss": squared_error(params, train),
        "train_accuracy": accuracy(train),
        "test_accuracy": accuracy(test),
    }


def _outputs(params: chex.ArrayTree, x: jax.Array) -> jax.Array:
    width = params["params"]["Dense_0"]["bias"].size
    return MLP(CLASSES, width).apply(params, x)  # type: ignore[return-value]


@jax.jit
def largest_eigenvalue(params: chex.ArrayTree, train: Batch) -> jax.Array:
    """That of the Hessian, to a thousandth where it stands apart from the second."""
    loss_fn = functools.partial(squared_error, batch=train)
    values, _ = lanczos_eigenvalues(loss_fn, params, jax.random.key(0), num_steps=PRODUCTS)
    return values[0]


def learn(problem: Problem, name: str, rho: float, options: Edges) -> dict[str, np.ndarray]:
    """What is measured at the start and after each tenth of the steps.

    Args:
      problem: what is learnt.
      name: of a method.
      rho: its radius.
      options: those of the optimizer, and the number of steps.

    Returns:
      Curves of "loss", "train_accuracy", "test_accuracy" and "sharpness", the largest eigenvalue of
      the Hessian, all of all samples at the unperturbed params; "effective_radius", that of the
      steps' batches, the median over the last steps before; and "edge", the sharpness predicted
      from it. NaN from where the loss is no longer finite.
    """
    method = METHODS[name]
    params = problem.params
    carry = params, method.optimizer(options, rho).init(params)
    part = options.steps // EVALUATIONS
    names = ("loss", "train_accuracy", "test_accuracy", "sharpness", "effective_radius")
    curves = {key: np.full(EVALUATIONS + 1, np.nan) for key in names}
    radius = np.nan
    for i in range(EVALUATIONS + 1):
        measured: Mapping[str, Any] = measure(params, problem.train, problem.test)
        if not np.isfinite(measured["loss"]):
            break
        curves["sharpness"][i] = largest_eigenvalue(params, problem.train)
        curves["effective_radius"][i] = radius
        for key, value in measured.items():
            curves[key][i] = value
        if i < EVALUATIONS:
            rows = None if problem.rows is None else problem.rows[i * part : (i + 1) * part]
            carry, radii = _advance(carry, problem.train, rows, rho, name=name, options=options)
            params, opt_state = carry
            if method.one_pass:
                params = unperturbed_params(opt_state, params)
            radius = float(np.median(radii[-WINDOW:]))
    return curves | {"edge": method.edge(options, curves["effective_radius"])}


@functools.partial(jax.jit, static_argnames=("name", "options"))
def _advance(
    carry: tuple[chex.ArrayTree, optax.OptState],
    train: Batch,
    rows: jax.Array | None,
    rho: float,
    *,
    name: str,
    options: Edges,
) -> tuple[tuple[chex.ArrayTree, optax.OptState], jax.Array]:
    """Params and optimizer state after some steps, and the effective radius at each."""
    method = METHODS[name]
    optimizer = method.optimizer(options, rho)

    def step(
        carry: tuple[chex.ArrayTree, optax.OptState], row: jax.Array | None
    ) -> tuple[tuple[chex.ArrayTree, optax.OptState], jax.Array]:
        params, opt_state = carry
        batch = train if row is None else Batch(train.x[row], train.y[row])
        grad_fn = jax.grad(functools.partial(squared_error, batch=batch))
        given = {} if method.metric is None or method.one_pass else {"grad_fn": grad_fn}
        updates, opt_state = optimizer.update(grad_fn(params), opt_state, params, **given)
        radius = jnp.zeros(())
        if method.metric is not None:
            radius = get_diagnostics(opt_state).effective_radius
        return (optax.apply_updates(params, updates), opt_state), radius

    return jax.lax.scan(step, carry, rows, length=options.steps // EVALUATIONS)
