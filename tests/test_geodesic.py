"""Geodesics against closed forms, conserved quantities, and the equation solved by SciPy."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import example_batch, example_params, flat, network_loss, relative_error
from scipy.integrate import quad, solve_ivp

import monge_sam_jax as ms
from monge_sam_jax.experiments.common.models import MLP

# A quartic in three dimensions, without symmetry.
MATRIX = np.array([[1.0, 0.3, -0.2], [0.3, -0.8, 0.5], [-0.2, 0.5, 2.0]])
LINEAR = np.array([0.7, -1.1, 0.4])
START = np.array([0.5, -0.4, 0.9])


def quartic(t):
    return 0.5 * t @ jnp.asarray(MATRIX) @ t + jnp.asarray(LINEAR) @ t + jnp.sum(t**4) / 12


def quartic_gradient(t):
    return MATRIX @ t + LINEAR + t**3 / 3


def quartic_hessian(t):
    return MATRIX + np.diag(t**2)


def integrated(gradient, hessian, start, rho, alpha):
    """The displacement by the geodesic equation, with Christoffel symbols from the metric itself.

    Gamma^k_ij = G^kl (d_i G_lj + d_j G_li - d_l G_ij) / 2, and G = I + alpha^2 g g^T has the
    derivatives d_l G_ij = alpha^2 (H_il g_j + g_i H_jl).
    """
    n = start.size

    def right_hand_side(_, y):
        t, v = y[:n], y[n:]
        g, H = gradient(t), hessian(t)
        dG = alpha**2 * (np.einsum("il,j->lij", H, g) + np.einsum("i,jl->lij", g, H))
        lowered = np.einsum("ilj,i,j->l", dG, v, v) - 0.5 * np.einsum("lij,i,j->l", dG, v, v)
        return np.r_[v, -np.linalg.solve(np.eye(n) + alpha**2 * np.outer(g, g), lowered)]

    g = gradient(start)
    v = g / np.linalg.norm(g) / np.sqrt(1 + alpha**2 * g @ g)
    span = {"rtol": 1e-11, "atol": 1e-12}
    return solve_ivp(right_hand_side, (0, rho), np.r_[start, v], **span).y[:n, -1] - start


# --- against solutions ---


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_the_equation_is_that_of_the_metrics_geodesics(alpha, x64):
    expected = integrated(quartic_gradient, quartic_hessian, START, 0.8, alpha)
    errors = []
    for num_steps in (8, 16, 32):
        delta = ms.geodesic_perturbation(quartic, START, 0.8, num_steps=num_steps, alpha=alpha)
        errors.append(np.linalg.norm(delta - expected) / np.linalg.norm(expected))
    assert errors[-1] < 2e-3
    np.testing.assert_allclose(np.log2(errors[:-1]) - np.log2(errors[1:]), 2, atol=0.1)
    straight = ms.worst_case_perturbation(
        ms.monge(alpha=alpha), quartic_gradient(START), START, 0.8
    )
    assert np.linalg.norm(straight - expected) > 10 * errors[0] * np.linalg.norm(expected)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("start", [0.1, -0.7])
def test_the_arc_on_a_parabola_has_length_rho(alpha, start, x64):
    errors = []
    for num_steps in (16, 32):
        delta = ms.geodesic_perturbation(
            lambda t: t**2, jnp.asarray(start), 0.5, num_steps=num_steps, alpha=alpha
        )
        end = start + float(delta)
        length, _ = quad(lambda t: np.sqrt(1 + 4 * alpha**2 * t**2), *sorted((start, end)))
        errors.append(abs(length - 0.5))
        assert abs(end) > abs(start)
    assert errors[1] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("rho", [0.3, 1.5])
def test_a_great_circle_over_the_top_of_a_sphere(rho, x64):
    """On the hemisphere of radius 2, from 0.5 rad off the top, straight towards it and beyond."""
    loss = lambda t: jnp.sqrt(4 - t @ t)  # noqa: E731
    direction = np.array([0.6, -0.8])
    start = 2 * np.sin(0.5) * direction
    delta = ms.geodesic_perturbation(loss, jnp.asarray(start), rho, num_steps=64)
    expected = 2 * np.sin(0.5 - rho / 2) * direction
    np.testing.assert_allclose(start + delta, expected, atol=1e-4)


def test_on_a_plane_it_is_monge_sams_perturbation():
    params = {"w": jnp.array([[1.0, -2.0]]), "b": jnp.array(0.5), "none": None}
    slopes = {"w": jnp.array([[3.0, -1.0]]), "b": jnp.array(2.0), "none": None}
    loss = lambda p: optax.tree.vdot(p, slopes)  # noqa: E731
    for num_steps in (1, 2, 7):
        for alpha in (0.5, 1.0):
            expected = ms.worst_case_perturbation(ms.monge(alpha=alpha), slopes, params, 0.3)
            delta = ms.geodesic_perturbation(loss, params, 0.3, num_steps=num_steps, alpha=alpha)
            chex.assert_trees_all_close(delta, expected, rtol=1e-6)


def test_without_height_it_is_sams_perturbation():
    params, batch = example_params(), example_batch()
    grads = jax.grad(network_loss)(params, batch)
    expected = ms.worst_case_perturbation(ms.euclidean(), grads, params, 0.3)
    delta = ms.geodesic_perturbation(lambda p: network_loss(p, batch), params, 0.3, alpha=0)
    chex.assert_trees_all_close(delta, expected, rtol=1e-5, atol=1e-7)


def test_short_ones_are_monge_sams_up_to_a_shorter_length(x64):
    """To second order in rho: theta'(0) rho + theta''(0) rho^2 / 2."""
    g, H = quartic_gradient(START), quartic_hessian(START)
    n = np.linalg.norm(g)
    v = g / n / np.sqrt(1 + n**2)
    errors = []
    for rho in (0.02, 0.01):
        expected = rho * v - rho**2 / 2 * (v @ H @ v) / (1 + n**2) * g
        errors.append(np.linalg.norm(ms.geodesic_perturbation(quartic, START, rho) - expected))
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.1)


# --- what is conserved ---


def end_and_velocity(loss, start, rho, **options):
    """The end of the geodesic and its velocity there, the derivative by its length."""
    return jax.jvp(
        lambda r: start + ms.geodesic_perturbation(loss, start, r, **options),
        (jnp.asarray(rho),),
        (jnp.asarray(1.0),),
    )


@pytest.mark.parametrize("alpha", [pytest.param(0.5, marks=pytest.mark.slow), 2.0])
def test_the_speed_stays_one(alpha, x64):
    deviations = []
    for num_steps in (8, 16, 32):
        t, v = end_and_velocity(quartic, jnp.asarray(START), 0.8, num_steps=num_steps, alpha=alpha)
        g = quartic_gradient(np.asarray(t))
        deviations.append(abs(float(v @ v + alpha**2 * (g @ v) ** 2) - 1))
    assert deviations[-1] < 1e-2
    np.testing.assert_allclose(np.log2(deviations[:-1]) - np.log2(deviations[1:]), 2, atol=0.2)


def test_clairauts_relation_on_a_surface_of_revolution(x64):
    """(x, y, z) with y^2 + z^2 = R(x)^2: a geodesic keeps its angular momentum y z' - z y'."""
    radius = lambda x: 2 + 0.5 * jnp.sin(x)  # noqa: E731
    loss = lambda t: jnp.sqrt(radius(t[0]) ** 2 - t[1] ** 2)  # noqa: E731
    start = jnp.array([0.4, 0.8])

    def momentum(t, v):
        return float(t[1] * (jax.grad(loss)(t) @ v) - loss(t) * v[1])

    g = jax.grad(loss)(start)
    first = momentum(start, g / jnp.linalg.norm(g) / jnp.sqrt(1 + g @ g))
    assert abs(first) > 0.3  # neither a meridian nor a parallel
    deviations = []
    for num_steps in (8, 16, 32):
        t, v = end_and_velocity(loss, start, 1.2, num_steps=num_steps)
        deviations.append(abs(momentum(t, v) - first))
    assert deviations[-1] < 1e-3
    np.testing.assert_allclose(np.log2(deviations[:-1]) - np.log2(deviations[1:]), 2, atol=0.3)
    straight = start + ms.worst_case_perturbation(ms.monge(), g, start, 1.2)
    assert float(jnp.linalg.norm(straight - t)) > 0.02


# --- numbers ---

sizes = st.floats(-36, 36)


@given(sizes, st.floats(-8, 8), st.floats(-6, 2), st.integers(1, 3), st.integers(0, 10**6))
def test_any_finite_gradient_gives_a_step_no_longer_than_rho(size, alpha, rho, num_steps, seed):
    rng = np.random.default_rng(seed)
    coefficients = jnp.asarray(10**size * rng.normal(size=(2, 4)), jnp.float32)
    start = jnp.asarray(rng.normal(size=4), jnp.float32)
    rho, alpha = np.float32(10**rho), np.float32(10**alpha)
    loss = lambda t: coefficients[0] @ t + coefficients[1] @ jnp.sin(t)  # noqa: E731
    delta = ms.geodesic_perturbation(loss, start, rho, num_steps=num_steps, alpha=alpha)
    assert np.all(np.isfinite(delta))
    assert np.linalg.norm(np.asarray(delta, float)) <= rho * (1 + 1e-5)


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-10, 1e10, 1e30, 1e37])
@pytest.mark.parametrize("alpha", [1e-4, 1.0, 1e4])
def test_lengths_from_the_smallest_gradients_to_the_largest(size, alpha):
    slopes = np.array([0.6, -0.3, 0.2]) * size
    loss = lambda t: jnp.asarray(slopes, jnp.float32) @ t  # noqa: E731
    delta = ms.geodesic_perturbation(loss, jnp.ones(3), 100.0, alpha=alpha)
    n = np.linalg.norm(slopes)
    expected = 100 * slopes / n / np.hypot(1, alpha * n)
    assert relative_error(delta, expected) < 1e-5 or np.max(np.abs(expected)) < 1e-37


def test_beyond_the_largest_heights_it_is_zero_and_not_nan():
    loss = lambda t: 1e30 * jnp.sum(t)  # noqa: E731
    delta = ms.geodesic_perturbation(loss, jnp.ones(2), 0.1, alpha=1e25)
    np.testing.assert_array_equal(delta, [0, 0])


def test_a_narrow_valley_does_not_throw_it_out():
    """Curvature far beyond what the steps resolve: Runge and Kutta's method would go to 1e19."""
    loss = lambda t: 1e8 * (t[0] - t[1]) ** 2 + t[0]  # noqa: E731
    delta = ms.geodesic_perturbation(loss, jnp.array([0.5, 0.5]), 0.3)
    assert np.linalg.norm(delta) <= 0.3


def test_nothing_where_the_gradient_is_zero():
    loss = lambda p: jnp.sum(p["a"] ** 4) + 0.0 * jnp.sum(p["b"])  # noqa: E731
    params = {"a": jnp.zeros(2), "b": jnp.ones(3)}
    for num_steps in (1, 3):
        delta = ms.geodesic_perturbation(loss, params, 0.1, num_steps=num_steps)
        chex.assert_trees_all_equal(delta, jax.tree.map(jnp.zeros_like, params))
    derivative = jax.jacobian(lambda p: ms.geodesic_perturbation(loss, p, 0.1))(params)
    chex.assert_tree_all_finite(derivative)


def test_no_finite_gradient_at_the_params_or_on_the_way():
    delta = ms.geodesic_perturbation(
        lambda p: jnp.sum(jnp.log(p["a"])) + jnp.sum(p["b"]),
        {"a": jnp.zeros(2), "b": jnp.ones(2)},
        0.1,
    )
    assert np.all(np.isnan(flat(delta)))
    delta = ms.geodesic_perturbation(lambda p: -jnp.sum(jnp.sqrt(p)), jnp.array([0.01, 0.01]), 1.0)
    assert np.all(np.isnan(delta))


def test_params_of_lower_precision_are_computed_with_in_float32():
    batch = example_batch()
    seen = []

    def loss(params):
        seen.extend(leaf.dtype for leaf in jax.tree.leaves(params))
        return network_loss(params, batch)

    params = example_params(jnp.bfloat16)
    delta = ms.geodesic_perturbation(loss, params, 0.1)
    assert set(seen) == {jnp.dtype("float32")}
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    chex.assert_trees_all_equal(delta, ms.geodesic_perturbation(loss, wide, 0.1))
    chex.assert_tree_all_finite(delta)
    assert {leaf.dtype for leaf in jax.tree.leaves(delta)} == {jnp.dtype("float32")}


# --- with JAX ---


def test_jit_vmap_and_traced_rho_and_alpha():
    batch = example_batch()
    loss = lambda p: network_loss(p, batch)  # noqa: E731
    params = [example_params(), jax.tree.map(lambda p: 0.5 * p - 0.1, example_params())]
    own = [ms.geodesic_perturbation(loss, p, 0.4, alpha=2.0) for p in params]
    function = lambda p, rho, alpha: ms.geodesic_perturbation(loss, p, rho, alpha=alpha)  # noqa: E731
    chex.assert_trees_all_close(
        jax.jit(function)(params[0], 0.4, 2.0), own[0], rtol=1e-4, atol=1e-6
    )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    together = jax.vmap(function, in_axes=(0, None, None))(stacked, 0.4, 2.0)
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
    chex.assert_trees_all_close(together, expected, rtol=1e-4, atol=1e-6)


def test_derivatives_are_those_of_finite_differences(x64):
    def outcome(t, rho, alpha):
        delta = ms.geodesic_perturbation(quartic, t, rho, alpha=alpha)
        return jnp.sum(jnp.array([1.0, -2.0, 0.5]) * delta)

    arguments = (jnp.asarray(START), jnp.asarray(0.7), jnp.asarray(1.3))
    check = partial(jax.test_util.check_grads, order=1, rtol=1e-6)
    check(outcome, arguments, modes=["rev"])
    check(lambda t, rho: outcome(t, rho, 1.3), arguments[:2], modes=["fwd"])


def test_the_gradients_that_it_takes():
    """num_steps + 1: counted as matrix products of a compiled network."""
    batch = {"x": jnp.ones((8, 6)), "y": jnp.ones((8, 2))}
    params = MLP(classes=2, width=16).init(jax.random.key(0), batch["x"])

    def loss(params):
        return jnp.mean((MLP(classes=2, width=16).apply(params, batch["x"]) - batch["y"]) ** 2)

    def products(function):
        return jax.jit(function).lower(params).compile().as_text().count(" dot(")

    one = products(jax.grad(loss))
    assert one > 5
    for num_steps in (1, 2, 4):
        perturb = lambda p: ms.geodesic_perturbation(loss, p, 0.1, num_steps=num_steps)  # noqa: B023, E731
        assert products(perturb) == (num_steps + 1) * one


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": -0.1}, ValueError, "rho must be finite and not negative"),
        ({"rho": "0.1"}, TypeError, "rho must be a real number"),
        ({"alpha": np.nan}, ValueError, "alpha must be finite"),
        ({"num_steps": 0}, ValueError, "num_steps must be an integer, 1 or more, got 0"),
        ({"num_steps": 2.0}, ValueError, "num_steps must be an integer"),
        ({"params": jnp.ones(2) * 1j}, TypeError, "real floats, got dtype complex64"),
        ({"params": jnp.ones(2, int)}, TypeError, "real floats, got dtype int32"),
    ],
)
def test_bad_arguments(options, error, message):
    arguments = {"params": jnp.ones(2), "rho": 0.1} | options
    with pytest.raises(error, match=message):
        ms.geodesic_perturbation(lambda p: jnp.sum(abs(p) ** 2), **arguments)
