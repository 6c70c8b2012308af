"""The methods that `monge-sam study` compares, a line each."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from monge_sam_jax.ascent import friendly
from monge_sam_jax.averaged import averaged_monge
from monge_sam_jax.composite import layerwise
from monge_sam_jax.experiments.common.data import Batch
from monge_sam_jax.experiments.study.images import MOMENTUM
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
WARM_UP = 0.1  # the part of training in which the radius rises
MIX, MIX_DECAY = 0.5, 0.9  # weight and decay of the average that is mixed into the ascent
MARGIN = 0.5  # of stability, for secants between mini-batches
EXTRA_EVERY = 4  # steps from one second gradient to the next


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

    @property
    def cosine(self) -> optax.Schedule:
        """From the radius to zero along half a wave."""
        return lambda count: self.rho * (1 + jnp.cos(jnp.pi * count / self.steps)) / 2

    def warmed(self, rho: chex.Numeric | optax.Schedule) -> optax.Schedule:
        """That radius, after rising to it from zero."""

        def warm(count: chex.Numeric) -> chex.Numeric:
            now = rho(count) if callable(rho) else rho
            return now * jnp.minimum(1.0, count / (WARM_UP * self.steps))

        return warm

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
      has_radius: whether there is one to choose.
      share: of the gradients that others take.
    """

    label: str
    gradients: float
    build: Callable[[Setting], Trainer]
    has_radius: bool = True
    share: float = 1.0


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


def _mixed(weight: float, decay: float) -> optax.GradientTransformation:
    """Ascent along a mean of the gradient and its moving average."""
    average = optax.ema(decay)

    def update(g: Grads, state: Any, params: Params | None = None) -> tuple[Grads, Any]:
        del params
        m, state = average.update(g, state)
        return optax.incremental_update(m, g, weight), state

    return optax.GradientTransformation(average.init, update)


def _extrapolated() -> optax.GradientTransformation:
    """Ascent along what the next gradient would be if gradients moved on a line, 2 g - g_before."""

    def update(g: Grads, last: Grads, params: Params | None = None) -> tuple[Grads, Grads]:
        del params
        return jax.tree.map(lambda g, last: 2 * g - last, g, last), g

    return optax.GradientTransformation(optax.tree.zeros_like, update)


def _extra_gradient(metric: Metric) -> Callable[[Setting], Trainer]:
    """One pass whose direction is taken anew at every `EXTRA_EVERY`-th step, by a second gradient.

    That step follows the gradient at the worst step along the one that others follow.
    """

    def build(setting: Setting) -> Trainer:
        one_pass = one_pass_sam(setting.base, metric=metric, rho=setting.rho)

        def update(
            grads: Grads, state: Any, params: Params | None = None, *, batch: Batch, **extra: Any
        ) -> tuple[Params, Any]:
            assert params is not None  # for the type checker

            def corrected() -> Grads:
                theta = unperturbed_params(state, params)
                delta = worst_case_perturbation(metric, grads, theta, setting.rho)
                return setting.gradient(jax.tree.map(jnp.add, theta, delta), batch)

            g = jax.lax.cond(state.count % EXTRA_EVERY == 0, corrected, lambda: grads)
            return one_pass.update(g, state, params, **extra)

        optimizer = optax.GradientTransformationExtraArgs(one_pass.init, update)
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
    "plain_half": Method("plain, half the steps", 1, _plain, has_radius=False, share=0.5),
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


def _ball(alpha: float) -> Metric:
    return monge(alpha=alpha) if alpha else euclidean()


# What may keep one pass from falling apart at large radii: text, and options by alpha.
_CURES: dict[str, tuple[str, Callable[[float, Setting], dict[str, Any]]]] = {
    "cosine": ("cosine", lambda alpha, s: {"metric": _ball(alpha), "rho": s.cosine}),
    "warm": ("warm-up", lambda alpha, s: {"metric": _ball(alpha), "rho": s.warmed(s.rho)}),
    "warm_annealed": (
        "warm-up, annealed",
        lambda alpha, s: {"metric": _ball(alpha), "rho": s.warmed(s.annealed)},
    ),
    "momentum": (
        "momentum",
        # A trace is 1 / (1 - MOMENTUM) times as long as gradients are.
        lambda alpha, s: {"metric": _ball((1 - MOMENTUM) * alpha), "direction": "momentum"},
    ),
    "mixed": (
        "mixed ascent",
        lambda alpha, s: {"metric": _ball(alpha), "ascent": _mixed(MIX, MIX_DECAY)},
    ),
    "capped": ("capped", lambda alpha, s: {"metric": _ball(alpha), "stability_margin": MARGIN}),
    "ahead": ("extrapolated", lambda alpha, s: {"metric": _ball(alpha), "ascent": _extrapolated()}),
}
for _ball_name, _text, _alpha in (("sam", "SAM", 0.0), ("monge", "M-SAM", 1.0)):
    for _name, (_cure, _options) in _CURES.items():
        METHODS[f"{_name}_one_pass_{_ball_name}"] = Method(
            f"one-pass {_text}, {_cure}",
            1,
            _one_pass(functools.partial(_options, _alpha)),
        )
    METHODS[f"extra_one_pass_{_ball_name}"] = Method(
        f"one-pass {_text}, extra gradients", 1 + 1 / EXTRA_EVERY, _extra_gradient(_ball(_alpha))
    )
METHODS["against_momentum"] = Method(
    "Momentum-SAM",
    1,
    _one_pass(
        lambda s: {"metric": _ball(0.0), "direction": "momentum", "ascent": optax.scale(-1.0)}
    ),
)
