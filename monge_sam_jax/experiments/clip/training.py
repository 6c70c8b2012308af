"""Pre-training and fine-tuning of the two towers, and the cells of the grid."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from monge_sam_jax.alignment import mutual_knn_alignment
from monge_sam_jax.diagnostics import get_diagnostics
from monge_sam_jax.experiments.clip.data import Corpus, Pairs
from monge_sam_jax.experiments.clip.model import Latents, TwoTowers, batch_loss, embed
from monge_sam_jax.experiments.clip.options import Clip
from monge_sam_jax.experiments.common.data import shuffled_rows
from monge_sam_jax.transforms import monge_sam, sam

PRETRAINING_RATE = 2e-3
SHARPNESS_AWARE = {"sam": sam, "monge_sam": monge_sam}
LABELS = {"sgd": "SGD", "adam": "Adam", "sam": "SAM", "monge_sam": "M-SAM"}
# Means over the steps since the last evaluation.
LOGGED = ("train_loss", "perturbed_loss", "grad_norm", "perturbation_norm", "effective_radius")
EVALUATED = ("val_loss", "val_alignment", "test_loss", "test_alignment")


class Cell(NamedTuple):
    """A cell of the grid: what fine-tunes.

    Attributes:
      method: sgd, adam, sam or monge_sam.
      learning_rate: of the optimizer.
      rho: radius, or None for SGD and Adam.
    """

    method: str
    learning_rate: float
    rho: float | None = None

    def __str__(self) -> str:
        radius = "" if self.rho is None else f", rho {self.rho:g}"
        return f"{LABELS[self.method]}, rate {self.learning_rate:g}{radius}"

    def optimizer(self, base: str) -> optax.GradientTransformationExtraArgs:
        """SGD or Adam, for SAM and M-SAM behind their transformation."""
        name = base if self.method in SHARPNESS_AWARE else self.method
        optimizer = {"sgd": optax.sgd, "adam": optax.adam}[name](self.learning_rate)
        if self.method in SHARPNESS_AWARE:
            sharpness_aware = SHARPNESS_AWARE[self.method](jax.grad(batch_loss), rho=self.rho)
            return optax.chain(sharpness_aware, optimizer)
        return optax.with_extra_args_support(optimizer)


def grid(options: Clip) -> list[Cell]:
    """All cells; SAM and M-SAM have the learning rates of their base, and the same radii."""
    size = options.size
    rates = {"sgd": size.sgd_rates, "adam": size.adam_rates}
    plain = [Cell(method, rate) for method in rates for rate in rates[method]]
    return plain + [
        Cell(method, rate, rho)
        for method in SHARPNESS_AWARE
        for rate in rates[options.base]
        for rho in size.rho
    ]


def batch_rows(pairs: int, batch_size: int, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Indices (steps, batch_size): whole batches of epochs, each in an order of its own."""
    epochs = -(-steps // (pairs // batch_size))
    return shuffled_rows(pairs, batch_size, rng, epochs)[:steps]


def pretrain(corpus: Corpus, options: Clip, seed: int) -> chex.ArrayTree:
    """Params after Adam with a cosine schedule on the pre-training pairs."""
    size = options.size
    rng = np.random.default_rng((seed, 10))
    one = jax.tree.map(lambda x: x[:1], corpus.pretrain)
    params = jax.jit(TwoTowers(corpus.vocabulary).init)(jax.random.key(seed), one)
    pairs = len(corpus.pretrain.words)
    rows = batch_rows(pairs, size.batch_size, size.pretraining_steps, rng)
    return _pretrain(params, corpus.pretrain, rows)


@jax.jit
def _pretrain(params: chex.ArrayTree, pairs: Pairs, rows: jax.Array) -> chex.ArrayTree:
    schedule = optax.cosine_decay_schedule(PRETRAINING_RATE, len(rows))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def step(
        carry: tuple[chex.ArrayTree, optax.OptState], row: jax.Array
    ) -> tuple[tuple[chex.ArrayTree, optax.OptState], None]:
        params, opt_state = carry
        grads = jax.grad(batch_loss)(params, _take(pairs, row))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), rows)[0][0]


class Moment(NamedTuple):
    """Where a run of fine-tuning is.

    Attributes:
      step: number of steps so far.
      params: after them.
      logged: `LOGGED` quantities, none at step 0.
    """

    step: int
    params: chex.ArrayTree
    logged: dict[str, float]


def moments(
    cell: Cell, params: chex.ArrayTree, corpus: Corpus, options: Clip, seed: int
) -> Iterator[Moment]:
    """Fine-tunes, and stops at every evaluation; the batches are the same in all cells."""
    size = options.size
    rng = np.random.default_rng((seed, 11))
    rows = batch_rows(len(corpus.train.words), size.batch_size, size.steps, rng)
    carry = params, cell.optimizer(options.base).init(params)
    yield Moment(0, params, {})
    for first, last in itertools.pairwise(evaluation_steps(options)):
        carry, logged = _advance(
            carry,
            corpus.train,
            rows[first:last],
            cell.learning_rate,
            cell.rho,
            method=cell.method,
            base=options.base,
        )
        yield Moment(last, carry[0], dict(zip(LOGGED, map(float, logged), strict=True)))


def evaluation_steps(options: Clip) -> list[int]:
    """Numbers of steps after which is evaluated: none, and then at even distances, to the end."""
    steps, count = options.size.steps, options.size.evaluations
    return sorted({round(part * steps / count) for part in range(count + 1)})


@functools.partial(jax.jit, static_argnames=("method", "base"))
def _advance(
    carry: tuple[chex.ArrayTree, optax.OptState],
    pairs: Pairs,
    rows: jax.Array,
    learning_rate: float,
    rho: float | None,
    *,
    method: str,
    base: str,
) -> tuple[tuple[chex.ArrayTree, optax.OptState], jax.Array]:
    """A step on each row of indices; params and optimizer state, and means of `LOGGED`."""
    optimizer = Cell(method, learning_rate, rho).optimizer(base)

    def step(
        carry: tuple[chex.ArrayTree, optax.OptState], row: jax.Array
    ) -> tuple[tuple[chex.ArrayTree, optax.OptState], jax.Array]:
        params, opt_state = carry
        batch = _take(pairs, row)
        loss, grads = jax.value_and_grad(batch_loss)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params, batch=batch)
        if method in SHARPNESS_AWARE:
            # The perturbation is the effective radius times the gradient, without momentum.
            found = get_diagnostics(opt_state)
            perturbed = optax.tree.add_scale(params, found.effective_radius, grads)
            log = (
                loss,
                batch_loss(perturbed, batch),
                found.grad_norm,
                found.perturbation_norm,
                found.effective_radius,
            )
        else:
            zero = jnp.zeros(())
            log = (loss, loss, optax.tree.norm(grads), zero, zero)
        return (optax.apply_updates(params, updates), opt_state), jnp.stack(log)

    carry, logs = jax.lax.scan(step, carry, rows)
    return carry, jnp.mean(logs, axis=0)


def _take(pairs: Pairs, row: jax.Array) -> Pairs:
    return jax.tree.map(lambda x: x[row], pairs)


class Evaluation(NamedTuple):
    """What is measured on a set of pairs.

    Attributes:
      loss: mean over its whole batches, in nats.
      alignment: mutual k nearest neighbours of all pairs in whole batches.
      latents: their embeddings.
    """

    loss: jax.Array
    alignment: jax.Array
    latents: Latents


@functools.partial(jax.jit, static_argnames=("batch_size", "k"))
def evaluate(params: chex.ArrayTree, pairs: Pairs, *, batch_size: int, k: int) -> Evaluation:
    """Loss and alignment; the loss in batches, as its chance level depends on their size."""
    whole = whole_batches(len(pairs.words), batch_size)
    batches = jax.tree.map(lambda x: x[:whole].reshape(-1, batch_size, *x.shape[1:]), pairs)

    def of_batch(batch: Pairs) -> tuple[jax.Array, jax.Array, jax.Array]:
        return batch_loss(params, batch), *embed(params, batch)[:2]

    losses, image, text = jax.lax.map(of_batch, batches)
    image, text = image.reshape(whole, -1), text.reshape(whole, -1)
    alignment = mutual_knn_alignment(image, text, k).score
    scale = embed(params, jax.tree.map(lambda x: x[0, :1], batches)).logit_scale
    return Evaluation(jnp.mean(losses), alignment, Latents(image, text, scale))


def whole_batches(pairs: int, batch_size: int) -> int:
    """How many of the pairs fill batches."""
    return pairs // batch_size * batch_size


def record(
    cell: Cell,
    params: chex.ArrayTree,
    corpus: Corpus,
    options: Clip,
    seed: int,
    on_evaluation: Callable[[float], None],
) -> dict[str, np.ndarray]:
    """What a run of fine-tuning came to: curves over its evaluations, from step 0 on.

    `on_evaluation` is called with the training loss after every evaluation but the first.
    """
    curves: dict[str, list[float]] = {name: [] for name in ("steps", *EVALUATED, *LOGGED)}
    for moment in moments(cell, params, corpus, options, seed):
        curves["steps"].append(moment.step)
        for name in ("val", "test"):
            found = evaluate(
                moment.params,
                getattr(corpus, name),
                batch_size=options.size.batch_size,
                k=options.k,
            )
            curves[f"{name}_loss"].append(float(found.loss))
            curves[f"{name}_alignment"].append(float(found.alignment))
        for name, value in moment.logged.items():
            curves[name].append(value)
        if moment.logged:
            on_evaluation(moment.logged["train_loss"])
    return {name: np.array(curve) for name, curve in curves.items()}
