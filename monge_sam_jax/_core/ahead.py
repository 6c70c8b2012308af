"""The perturbation of one pass, for the gradient that is taken next."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from monge_sam_jax._core.numerics import (
    ScaledNorm,
    bounded_product,
    bounded_quotient,
    euclidean_norm,
    scaled_norm,
    tree_scale,
)
from monge_sam_jax.diagnostics import Diagnostics, diagnose
from monge_sam_jax.metrics import Grads, Params
from monge_sam_jax.perturbation import (
    MetricOrFunction,
    SlotStates,
    ascent_multiple,
    metric_at,
    transform,
)


class Perturbation(NamedTuple):
    """delta = multiple * scaled.unit if it is along g, and what goes with it."""

    delta: Params
    multiple: jax.Array
    scaled: ScaledNorm
    states: SlotStates
    diagnostics: Diagnostics


def perturb(
    metric: MetricOrFunction,
    ascent: optax.GradientTransformation | None,
    g: Grads,
    theta: Params,
    states: SlotStates,
    rho: chex.Numeric,
    shorten: Callable[[jax.Array], jax.Array] | None,
) -> Perturbation:
    """The worst step along g around theta, times what `shorten` makes of its effective radius."""
    metric = metric_at(rho, metric)
    up, ascent_state = transform(ascent, g, states.ascent, theta)
    steepest, metric_state = metric.ascent(up, theta, states.metric)
    k, tangent, scaled = ascent_multiple(steepest, rho), steepest.tangent, scaled_norm(g)
    if shorten is not None:
        length, norm = bounded_product(scaled_norm(tangent).norm, k), scaled.norm
        factor = shorten(bounded_quotient(length, jnp.where(norm != 0, norm, 1.0)))
        k, rho = k * factor, rho * factor
    multiple = k * euclidean_norm(tangent, k.dtype) / scaled.unit_norm
    is_along_g = ascent is None and metric.isotropic
    delta = tree_scale(multiple, scaled.unit) if is_along_g else tree_scale(k, tangent)
    diagnostics = diagnose(
        scaled, steepest, k, rho, isotropic=metric.isotropic, transformed=ascent is not None
    )
    states = SlotStates(metric_state, ascent_state)
    return Perturbation(delta, multiple, scaled, states, diagnostics)
