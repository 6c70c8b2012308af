"""Bad global minima: networks that know their training samples by heart, and little else."""

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
import numpy as np

from monge_sam_jax.experiments.common.data import Batch

ZEROED = 0.1  # of the entries of a copy
CHUNK = 2**26  # random numbers drawn at once

State = TypeVar("State")


def confusion_set(samples: Batch, classes: int, copies: int, rng: np.random.Generator) -> Batch:
    """Copies of all samples, spoilt and with random labels.

    Args:
      samples: the originals.
      classes: number of labels to draw from.
      copies: of every sample, one behind the other; R in Liu et al.
      rng: what draws.

    Returns:
      The copies. Every entry (of a pixel and a channel) is zero with probability `ZEROED`, the
      labels are independent and uniform.

    References:
      Liu et al., Bad Global Minima Exist and SGD Can Reach Them, 2020.
    """
    images = np.repeat(np.asarray(samples.x), copies, axis=0)
    for part in np.array_split(images, -(-images.size // CHUNK)):  # views
        part *= rng.random(part.shape) >= ZEROED
    labels = rng.integers(classes, size=len(images))
    return Batch(jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32))


def reach_bad_minimum(
    state: State,
    train: Batch,
    spoilt: Batch,
    *,
    memorise: Callable[[State, Batch], State],
    fit: Callable[[State, Batch], State],
    accuracy: Callable[[State, Batch], float],
    most_fits: int,
) -> tuple[State, dict[str, float]]:
    """A state that is right on all training samples, by way of one that has learnt noise.

    Args:
      state: where training starts.
      train: the training samples.
      spoilt: their `confusion_set`.
      memorise: trains on the spoilt samples.
      fit: trains for a while on the true ones, without regularisation.
      accuracy: of a state on samples, in percent.
      most_fits: how often `fit` is called at most, if the accuracy does not become 100 before.

    Returns:
      The state, and what was measured on the way: the accuracy on the spoilt samples after
      memorising them, the number of fits, the accuracy on the training samples.
    """
    state = memorise(state, spoilt)
    notes: dict[str, float] = {"confusion_accuracy": float(accuracy(state, spoilt)), "fits": 0}
    while accuracy(state, train) < 100 and notes["fits"] < most_fits:
        state = fit(state, train)
        notes["fits"] += 1
    return state, notes | {"train_accuracy": float(accuracy(state, train))}
