"""Forgetting, for `monge-sam study`: a language model of code that goes on to prose.

The old text is the source of Python's standard library, the new one its reference in English, which
comes with `pydoc`: both are wherever Python is, though not the same in all its versions.
"""

import functools
import importlib
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from monge_sam_jax.experiments.common.data import Batch
from monge_sam_jax.experiments.common.models import Transformer
from monge_sam_jax.experiments.study.kinds import Kind, Problem, Size, cross_entropy

BYTES = 256
LENGTH = 64  # of a window
BATCH = 8  # windows
WIDTH_OF_HEAD = 16
UNSEEN = 32  # windows of each text for validation, and as many for tests
HELD_OUT = 10  # one file, or topic, of so many

LEARNING_RATE = 1e-2
FINE_TUNING_RATE = 1e-3
EVALUATIONS = 10
BITS = (8, 4)
NOISE, DRAWS = 0.1, 4  # standard deviation, over the root mean square of a weight


class Later(NamedTuple):
    """What comes after the first training.

    Attributes:
      train: windows of the new text, each used once.
      validation: other windows of it.
      test: others.
      seed: of the noise.
    """

    train: Batch
    validation: Batch
    test: Batch
    seed: int


@functools.cache
def texts() -> dict[str, tuple[bytes, bytes]]:
    """The old and the new text, each to be learnt and held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    topics = importlib.import_module("pydoc_data.topics").topics
    documents = {
        "old": [file.read_bytes() for file in files],
        "new": [topics[name].encode() for name in sorted(topics)],
    }
    return {
        name: (
            b"\n".join(x for i, x in enumerate(all_of_it) if i % HELD_OUT),
            b"\n".join(all_of_it[::HELD_OUT]),
        )
        for name, all_of_it in documents.items()
    }


def _windows(text: bytes, number: int, rng: np.random.Generator) -> Batch:
    """From places drawn at random: bytes, and those that follow them."""
    array = np.frombuffer(text, np.uint8)
    at = rng.integers(len(array) - LENGTH, size=(number, 1)) + np.arange(LENGTH)
    return Batch(jnp.asarray(array[at], jnp.int32), jnp.asarray(array[at + 1], jnp.int32))


def forgetting(seed: int, size: Size) -> Problem:
    """A fresh language model, code to learn, and prose to learn after that."""
    rng = np.random.default_rng((seed, 6))
    (old, old_unseen), (new, new_unseen) = texts()["old"], texts()["new"]
    train = _windows(old, size.text_steps * BATCH, rng)
    validation, test = (_windows(old_unseen, UNSEEN, rng) for _ in range(2))
    tuning = max(EVALUATIONS, size.text_steps // 2) // EVALUATIONS * EVALUATIONS
    learnt = _windows(new, tuning * BATCH, rng)
    new_validation, new_test = (_windows(new_unseen, UNSEEN, rng) for _ in range(2))
    later = Later(learnt, new_validation, new_test, seed)
    params = _fresh(size.text_width, size.text_layers)(jax.random.key(seed), train.x[:1])
    return Problem(params, train, validation, test, {}, later)


def _model(width: int, layers: int) -> Transformer:
    return Transformer(width, layers, max(1, width // WIDTH_OF_HEAD), BYTES)


@functools.cache
def _fresh(width: int, layers: int) -> Callable[..., chex.ArrayTree]:
    return jax.jit(_model(width, layers).init)


def _logits(params: chex.ArrayTree, x: jax.Array) -> jax.Array:
    embedding = params["params"]["Embed_0"]["embedding"]
    layers = (len(params["params"]) - 4) // 6  # of a layer two norms and four matrices
    return _model(embedding.shape[1], layers).apply(params, x)  # type: ignore[return-value]


def after(params: chex.ArrayTree, problem: Problem) -> dict[str, np.ndarray]:
    """Losses, with the other sign, on validation and test windows while prose is learnt.

    Args:
      params: of the network that has learnt code.
      problem: which code, and which prose.

    Returns:
      Curves (2, points) of "both" (the mean of the next two), of the "old" text and of the "new"
      one, from the start of fine-tuning with AdamW to its end; of one point for the old text
      "before" it, and after it with every weight rounded to "8 bits" or "4 bits", of which the
      largest magnitude of its array is the largest number, and with Gaussian "noise" of a tenth of
      the root mean square of its array.
    """
    later: Later = problem.later
    old, new = (
        jax.tree.map(lambda *pair: jnp.stack(pair), parts.validation, parts.test)
        for parts in (problem, later)
    )
    opt_state = optax.adamw(FINE_TUNING_RATE).init(params)
    curves = [[_scores(params, old), _scores(params, new)]]
    x, y = (a.reshape(EVALUATIONS, -1, BATCH, LENGTH) for a in later.train)
    for batches in zip(x, y, strict=True):
        params, opt_state = _tune(params, opt_state, Batch(*batches))
        curves.append([_scores(params, old), _scores(params, new)])
    on_old, on_new = np.moveaxis(np.asarray(curves, float), 0, -1)
    keys = jax.random.split(jax.random.key(later.seed), DRAWS)
    noisy = [np.asarray(_scores(_with_noise(params, key), old)) for key in keys]
    changed = {f"{bits} bits": _scores(_rounded(params, bits), old) for bits in BITS}
    return {
        "both": (on_old + on_new) / 2,
        "old": on_old,
        "new": on_new,
        "before": on_old[:, :1],
        **{name: np.asarray(x, float)[:, None] for name, x in changed.items()},
        "noise": np.mean(noisy, axis=0)[:, None],
    }


@jax.jit
def _scores(params: chex.ArrayTree, pair: Batch) -> jax.Array:
    return jax.vmap(lambda samples: TEXT.measure(params, samples))(pair)


@jax.jit
def _tune(
    params: chex.ArrayTree, opt_state: optax.OptState, batches: Batch
) -> tuple[chex.ArrayTree, optax.OptState]:
    tx = optax.adamw(FINE_TUNING_RATE)

    def step(carry: tuple, batch: Batch) -> tuple[tuple, None]:
        params, opt_state = carry
        updates, opt_state = tx.update(jax.grad(TEXT.loss)(params, batch), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (params, opt_state), batches)[0]


@functools.partial(jax.jit, static_argnames="bits")
def _rounded(params: chex.ArrayTree, bits: int) -> chex.ArrayTree:
    def rounded(w: jax.Array) -> jax.Array:
        unit = jnp.max(jnp.abs(w)) / (2 ** (bits - 1) - 1)
        return jnp.where(unit > 0, jnp.round(w / jnp.where(unit > 0, unit, 1.0)) * unit, w)

    return jax.tree.map(rounded, params)


@jax.jit
def _with_noise(params: chex.ArrayTree, key: jax.Array) -> chex.ArrayTree:
    noise = optax.tree.random_like(key, params)
    size = lambda w: NOISE * jnp.sqrt(jnp.mean(w**2))  # noqa: E731
    return jax.tree.map(lambda w, n: w + size(w) * n, params, noise)


TEXT = Kind(
    _logits,
    cross_entropy,
    lambda logits, y: -cross_entropy(logits, y),
    "-nats per byte",
    lambda score: -score,
    optax.adamw,
    BATCH,
    after=after,
    decisive="both",
)
