"""Metrics out of Optax preconditioners, against the preconditioner written as a matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import (
    dense_perturbation,
    example_batch,
    example_params,
    flat,
    network_grad,
)

import monge_sam_jax as ms

RHO, DECAY, EPS = 0.3, 0.9, 1e-3
BATCH = example_batch()


def gradients(count):
    rng = np.random.default_rng(0)
    draw = lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype)  # noqa: E731
    return [jax.tree.map(draw, example_params()) for _ in range(count)]


def rms(squares):
    return 1 / np.sqrt(squares + EPS)


def adam(squares, step):
    return 1 / (np.sqrt(squares / (1 - DECAY**step)) + EPS)


@pytest.mark.parametrize(
    ("tx", "diagonal"),
    [
        (optax.scale_by_rms(DECAY, EPS), lambda squares, step: rms(squares)),
        (optax.scale_by_adam(b1=0.0, b2=DECAY, eps=EPS), adam),
        (optax.scale(3.0), lambda squares, step: np.full_like(squares, 3.0)),
    ],
    ids=["rms", "adam", "scale"],
)
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_preconditioners_with_a_state(tx, diagonal, alpha):
    """G is the inverse of P, step after step; lifted, with alpha^2 g g^T added."""
    params = example_params()
    metric = ms.preconditioned(tx)
    metric = metric if alpha is None else ms.monge(metric, alpha)
    state, squares = metric.init(params), 0
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    for step, grads in enumerate(gradients(3), start=1):
        ascent, state = jax.jit(metric.ascent)(grads, params, state)
        g = flat(grads).astype(float)
        squares = DECAY * squares + (1 - DECAY) * g**2
        G = np.diag(1 / diagonal(squares, step)) + (alpha or 0) ** 2 * np.outer(g, g)
        expected = dense_perturbation(G, g, 1.0)
        np.testing.assert_allclose(flat(ascent.direction), expected, rtol=2e-5, atol=1e-7)
        assert float(ascent.dual_norm) == pytest.approx(g @ expected, rel=1e-5)


def test_a_preconditioner_that_reads_the_params():
    def update(updates, state, params):
        return jax.tree.map(lambda g, p: g * p**2, updates, params), state

    tx = optax.GradientTransformation(lambda params: (), update)
    params = jax.tree.map(lambda p: p + 3, example_params())
    g = network_grad(params, BATCH)
    actual = ms.worst_case_perturbation(ms.preconditioned(tx), g, params, RHO)
    expected = ms.worst_case_perturbation(ms.adaptive(0.0), g, params, RHO)
    np.testing.assert_allclose(flat(actual), flat(expected), rtol=1e-5)


def test_training_in_the_ball_of_adam():
    """With a mask, by hand: the optimizer's own state is another one."""
    params = example_params()
    mask = {"hidden": {"w": True, "b": False}, "out": True, "temperature": True}
    metric = ms.preconditioned(optax.scale_by_adam(b1=0.0, b2=DECAY, eps=EPS))
    tx = optax.chain(
        ms.sharpness_aware(network_grad, metric=metric, rho=0.1, mask=mask), optax.sgd(0.05)
    )
    state, theta, squares = tx.init(params), params, 0
    update = jax.jit(lambda p, s: tx.update(network_grad(p, BATCH), s, p, batch=BATCH))
    chosen = flat(jax.tree.map(lambda p, keep: jnp.full_like(p, keep), params, mask))
    unravel = jax.flatten_util.ravel_pytree(params)[1]
    for step in range(1, 6):
        updates, state = update(params, state)
        params = optax.apply_updates(params, updates)
        g = flat(network_grad(theta, BATCH)).astype(float) * chosen
        squares = DECAY * squares + (1 - DECAY) * g**2
        delta = dense_perturbation(np.diag(1 / adam(squares, step)), g, 0.1)
        perturbed = jax.tree.map(jnp.add, theta, unravel(jnp.asarray(delta, jnp.float32)))
        theta = jax.tree.map(lambda p, x: p - 0.05 * x, theta, network_grad(perturbed, BATCH))
    np.testing.assert_allclose(flat(params), flat(theta), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1e-36, 1e-20, 1.0, 1e20, 1e36])
@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
def test_gradients_of_any_size(size, factor):
    """P may be far from one, as long as P g is in range."""
    if not 1e-36 <= size * factor <= 1e36:
        return
    g = np.array([3.0, -4.0, 0.5]) * np.float32(size)
    metric = ms.preconditioned(optax.scale(factor))
    ascent, _ = metric.ascent(jnp.asarray(g, jnp.float32), jnp.zeros(3), metric.init(jnp.zeros(3)))
    n = np.linalg.norm(g)
    expected = g / n * np.sqrt(factor)
    np.testing.assert_allclose(ascent.direction, expected, rtol=1e-5)
    np.testing.assert_allclose(ascent.dual_norm, n * np.sqrt(factor), rtol=1e-5)


def test_what_points_down_is_not_a_number():
    """A learning rate is negative; momentum remembers another direction."""
    g = jnp.array([1.0, 2.0])
    metric = ms.preconditioned(optax.scale(-0.1))
    assert np.all(np.isnan(ms.worst_case_perturbation(metric, g, g, RHO)))
    metric = ms.preconditioned(optax.trace(decay=0.9))
    ascent, state = metric.ascent(g, g, metric.init(g))
    np.testing.assert_allclose(ascent.direction, g / np.sqrt(5), rtol=1e-6)
    ascent, _ = metric.ascent(-0.5 * g, g, state)
    assert np.all(np.isnan(ascent.direction))
    assert np.isnan(ascent.dual_norm)


@pytest.mark.parametrize("tx", [optax.scale_by_rms(), optax.trace(decay=0.9), optax.scale(0.0)])
def test_zero_gradients(tx):
    """No perturbation, also where momentum would move; finite derivatives."""
    params = jnp.array([1.0, 2.0])
    metric = ms.preconditioned(tx)
    _, state = metric.ascent(params, params, metric.init(params))

    def outcome(scale):
        ascent, _ = metric.ascent(scale * params, params, state)
        return jnp.sum(ascent.direction) + ascent.dual_norm

    assert float(outcome(0.0)) == 0
    assert np.isfinite(jax.grad(outcome)(0.0))
    nothing = ms.preconditioned(optax.set_to_zero())  # nor where P g is zero
    assert not np.any(ms.worst_case_perturbation(nothing, params, params, RHO))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_leaves_the_state(bad):
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    metric = ms.preconditioned(optax.scale_by_adam(b1=0.0))
    _, state = metric.ascent(params, params, metric.init(params))
    g = {"a": jnp.ones(3), "b": jnp.array([1.0, bad])}
    ascent, after = metric.ascent(g, params, state)
    assert not np.any(np.isfinite(flat(ascent.direction)))
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_the_state_keeps_its_dtypes():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2), "none": None}
    metric = ms.preconditioned(optax.scale_by_rms())
    state = metric.init(params)
    g = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    _, after = metric.ascent(g, params, state)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


def test_derivatives_are_those_of_finite_differences(x64):
    params = jnp.array([1.0, 2.0, -0.5])
    metric = ms.preconditioned(optax.scale_by_rms(DECAY, EPS))
    _, state = metric.ascent(params, params, metric.init(params))

    def outcome(t):
        ascent, _ = metric.ascent(params + t * jnp.array([1.0, -1.0, 3.0]), params, state)
        return jnp.sum(jnp.sin(ascent.direction)) + ascent.dual_norm

    numeric = (outcome(1e-6) - outcome(-1e-6)) / 2e-6
    assert float(jax.grad(outcome)(0.0)) == pytest.approx(float(numeric), rel=1e-7)


def test_what_is_no_transformation():
    with pytest.raises(TypeError, match="tx must be an Optax transformation such as scale_by_rms"):
        ms.preconditioned(optax.adam)
