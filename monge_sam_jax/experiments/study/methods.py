"""The methods that `monge-sam study` compares, a line each."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from monge_sam_jax.ascent import friendly
from monge_sam_jax.averaged import averaged_monge
from monge_sam_jax.composite import layerwise
from monge_sam_jax.experiments.common.data import Batch
from monge_sam_jax.experiments.study.kinds import Kind
from monge_sam_jax.functional import functional_sam_value_and_grad
from monge_sam_jax.geodesic import geodesic_perturbation
from monge_sam_jax.metrics import Grads, Metric, Params, adaptive, euclidean, monge
from monge_sam_jax.norms import spectral, supremum
from monge_sam_jax.one_pass import one_pass_sam, unperturbed_params
from monge_sam_jax.perturbation import worst_case_perturbation
from monge_sam_jax.slots import sharpness_aware

AVERAGE_DECAY = 0.99
LATE = 0.9  # the part of training that is over when late SAM begins
LOSS_BUDGET = 1.0  # nats
GEODESIC_STEPS = 2


class Setting(NamedTuple):
    """What a method is built for.

    Attributes:
      kind: of the problem.
      base: the optimizer.
      rho: the radius of the line, a Euclidean length.
      steps: of the whole training, a number that may be traced.
      params: their shapes.
    """

    kind: Kind
    base: optax.GradientTransformation
    rho: Any
    steps: Any
    params: Params

    def gradient(self, params: Params, batch: Batch) -> Grads:
        """Of the loss."""
        return jax.grad(self.kind.loss)(params, batch)

    @property
    def annealed(self) -> optax.Schedule:
        """From the radius to zero along a line."""
        return lambda count: self.rho * jnp.maximum(0.0, 1 - count / self.steps)

    def length(self, metric: Metric) -> jax.Array:
        """Euclidean length of a step in the unit ball, for a gradient without zeros."""
        rng = np.random.default_rng(0)
        g = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), self.params)
        return optax.tree.norm(worst_case_perturbation(metric, g, g, 1.0))


class Trainer(NamedTuple):
    """How a method trains.

    Attributes:
      optimizer: takes gradients, and batch and so on by name.
      gradient: (params, batch) -> the gradient that it is given.
      evaluated: (state of the optimizer, params) -> params to evaluate.
    """

    optimizer: optax.GradientTransformationExtraArgs
    gradient: Callable[[Params, Batch], Grads]
    evaluated: Callable[[Any, Params], Params] = lambda state, params: params


class Method(NamedTuple):
    """A row of the tables.

    Attributes:
      label: its name there.
      gradients: of a step.
      build: how it trains.
      has_radius: whether there is anything to choose.
    """

    label: str
    gradients: int
    build: Callable[[Setting], Trainer]
    has_radius: bool = True


def _plain(setting: Setting) -> Trainer:
    return Trainer(optax.with_extra_args_support(setting.base), setting.gradient)


def _averaged(setting: Setting) -> Trainer:
    """The weights are averaged on the way, and the average is evaluated."""
    chain = optax.chain(setting.base, _average_of_params(AVERAGE_DECAY))
    return Trainer(chain, setting.gradient, lambda state, params: state[-1])


def _average_of_params(decay: float) -> optax.GradientTransformation:
    def update(
        updates: Params, average: Params, params: Params | None = None
    ) -> tuple[Params, Params]:
        moved = optax.apply_updates(params, updates)
        return updates, optax.incremental_update(moved, average, 1 - decay)

    return optax.GradientTransformation(lambda params: params, update)


def _two_passes(options: Callable[[Setting], dict[str, Any]]) -> Callable[[Setting], Trainer]:
    def build(setting: Setting) -> Trainer:
        chosen = {"metric": euclidean(), "rho": setting.rho} | options(setting)
        robust = sharpness_aware(setting.gradient, **chosen)
        return Trainer(optax.chain(robust, setting.base), setting.gradient)

    return build


def _one_pass(options: Callable[[Setting], dict[str, Any]]) -> Callable[[Setting], Trainer]:
    def build(setting: Setting) -> Trainer:
        optimizer = one_pass_sam(setting.base, **({"rho": setting.rho} | options(setting)))
        return Trainer(optimizer, setting.gradient, unperturbed_params)

    return build


def _functional(setting: Setting) -> Trainer:
    kind = setting.kind
    functional = functional_sam_value_and_grad(
        lambda params, batch: kind.model(params, batch.x),
        lambda outputs, batch: kind.output_loss(outputs, batch.y),
        metric=monge(),
        rho=setting.rho,
    )
    return _plain(setting)._replace(gradient=lambda params, batch: functional(params, batch)[1])


def _geodesic(setting: Setting) -> Trainer:
    def gradient(params: Params, batch: Batch) -> Grads:
        loss = functools.partial(setting.kind.loss, batch=batch)
        delta = geodesic_perturbation(loss, params, setting.rho, num_steps=GEODESIC_STEPS)
        return setting.gradient(jax.tree.map(jnp.add, params, delta), batch)

    return _plain(setting)._replace(gradient=gradient)


METHODS = {
    "plain": Method("plain", 1, _plain, has_radius=False),
    "average": Method("averaged weights", 1, _averaged, has_radius=False),
    "sam": Method("SAM", 2, _two_passes(lambda s: {})),
    "late_sam": Method(
        "late SAM", 1, _two_passes(lambda s: {"when": lambda count: count >= LATE * s.steps})
    ),
    "adaptive_sam": Method(
        "ASAM", 2, _two_passes(lambda s: {"metric": adaptive(), "rho": 10 * s.rho})
    ),
    "monge_sam": Method("M-SAM", 2, _two_passes(lambda s: {"metric": monge()})),
    "annealed_sam": Method("SAM, annealed", 2, _two_passes(lambda s: {"rho": s.annealed})),
    "budget": Method(
        "loss budget 1",
        2,
        _two_passes(lambda s: {"metric": lambda rho: monge(alpha=rho / LOSS_BUDGET)}),
    ),
    "friendly": Method("Friendly SAM", 2, _two_passes(lambda s: {"ascent": friendly()})),
    "one_pass_sam": Method("one-pass SAM", 1, _one_pass(lambda s: {"metric": euclidean()})),
    "one_pass_monge": Method("one-pass M-SAM", 1, _one_pass(lambda s: {"metric": monge()})),
    "annealed_one_pass_sam": Method(
        "one-pass SAM, annealed",
        1,
        _one_pass(lambda s: {"metric": euclidean(), "rho": s.annealed}),
    ),
    "annealed_one_pass_monge": Method(
        "one-pass M-SAM, annealed", 1, _one_pass(lambda s: {"metric": monge(), "rho": s.annealed})
    ),
    "averaged_monge": Method(
        "averaged M-SAM", 2, _two_passes(lambda s: {"metric": averaged_monge(history=4)})
    ),
    "geodesic": Method("geodesic M-SAM", 4, _geodesic),
    "functional": Method("functional M-SAM", 2, _functional),
    "layerwise": Method(
        "layerwise SAM",
        2,
        _two_passes(lambda s: {"metric": layerwise(), "rho": s.rho / s.length(layerwise())}),
    ),
    "supremum": Method(
        "SAM, largest entry",
        2,
        _two_passes(lambda s: {"metric": supremum(), "rho": s.rho / s.length(supremum())}),
    ),
    "spectral": Method(
        "SAM, singular values",
        2,
        _two_passes(lambda s: {"metric": spectral(), "rho": s.rho / s.length(spectral())}),
    ),
}
