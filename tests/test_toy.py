"""The toy losses against their formulas, and trajectories against a loop written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    adaptive_matrix,
    banana_gradient,
    dense_perturbation,
    euclidean_matrix,
    fisher_matrix,
    monge_matrix,
)

import monge_sam_jax as ms
from monge_sam_jax import toy

METRICS = {
    "sgd": (None, None),
    "sam": (ms.euclidean(), euclidean_matrix),
    "monge_sam": (ms.monge(), monge_matrix),
    "fisher_sam": (ms.diagonal_fisher(), fisher_matrix),
    "adaptive_sam": (ms.adaptive(), adaptive_matrix),
}
POINTS = np.random.default_rng(0).uniform(-2, 2, (40, 2))
SETTINGS = {"rho": 1.0, "learning_rate": 0.01, "steps": 200}


def sinc_gradient(t):
    r = t @ t
    return 10 * (r * np.cos(r) - np.sin(r)) / r**2 * t


GRADIENTS = {
    "banana": banana_gradient,
    "sinc": sinc_gradient,
    "paraboloid": lambda t: 2 * t,
}


# --- losses ---


def test_values_are_those_of_the_formulas(x64):
    x, y = POINTS.T
    r = x**2 + y**2
    np.testing.assert_allclose(toy.banana(jnp.asarray(POINTS)), (1 - x * y) ** 2, rtol=1e-13)
    np.testing.assert_allclose(toy.sinc(jnp.asarray(POINTS)), 5 * np.sin(r) / r, rtol=1e-12)
    np.testing.assert_allclose(toy.paraboloid(jnp.asarray(POINTS)), r, rtol=1e-14)


def test_losses_keep_leading_axes():
    points = jnp.ones((3, 4, 2))
    for loss_fn in (toy.banana, toy.sinc, toy.paraboloid):
        assert loss_fn(points).shape == (3, 4)
        assert loss_fn(points[0, 0]).shape == ()


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_by_hand_and_by_finite_differences(name, x64):
    loss_fn = getattr(toy, name)
    gradients = jax.vmap(jax.grad(loss_fn))(jnp.asarray(POINTS))
    expected = [GRADIENTS[name](t) for t in POINTS]
    np.testing.assert_allclose(gradients, expected, rtol=1e-11, atol=1e-12)
    shifted = POINTS[:, None] + 1e-5 * np.eye(2), POINTS[:, None] - 1e-5 * np.eye(2)
    right, left = (loss_fn(jnp.asarray(points)) for points in shifted)
    np.testing.assert_allclose(gradients, (right - left) / 2e-5, rtol=1e-6, atol=1e-7)


def sinc_derivatives(t):
    """Value, gradient and Hessian of `sinc` from its series, summed in float64."""
    r = t @ t
    a = [5 * (-1) ** k / np.prod(np.arange(1.0, 2 * k + 2)) for k in range(12)]
    value = sum(c * r ** (2 * k) for k, c in enumerate(a))
    first = sum(2 * k * c * r ** (2 * k - 1) for k, c in enumerate(a) if k)
    second = sum(2 * k * (2 * k - 1) * c * r ** (2 * k - 2) for k, c in enumerate(a) if k)
    return value, 2 * first * t, 2 * first * np.eye(2) + 4 * second * np.outer(t, t)


def check_sinc_near_its_maximum(dtype, rtol):
    functions = [jax.jit(f) for f in (toy.sinc, jax.grad(toy.sinc), jax.hessian(toy.sinc))]
    radii = [0.0, 1e-12, 1e-6, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.999, 1.001, 1.2]
    for radius in radii:
        t = np.asarray([0.8 * radius, -0.6 * radius], dtype)
        expected = sinc_derivatives(t.astype(np.float64))
        # Below the square root of the smallest normal number, powers of r are zero in its place.
        tiny = float(np.finfo(dtype).tiny) ** 0.5
        for fn, value in zip(functions, expected, strict=True):
            actual = fn(jnp.asarray(t))
            assert actual.dtype == dtype
            scale = np.max(np.abs(value))
            np.testing.assert_allclose(actual, value, rtol=0, atol=rtol * scale + tiny)


def test_sinc_near_its_maximum_in_float32():
    check_sinc_near_its_maximum(np.float32, 2e-6)


def test_sinc_near_its_maximum_in_float64(x64):
    check_sinc_near_its_maximum(np.float64, 1e-14)


def test_sinc_at_its_maximum_exactly():
    zero = jnp.zeros(2)
    assert toy.sinc(zero) == 5
    np.testing.assert_array_equal(jax.grad(toy.sinc)(zero), np.zeros(2))
    np.testing.assert_array_equal(jax.hessian(toy.sinc)(zero), np.zeros((2, 2)))


@pytest.mark.parametrize("scale", [1e3, 1e8, 1e18])
def test_sinc_far_away_has_finite_derivatives(scale):
    t = jnp.array([scale, -scale])
    assert np.all(np.isfinite(jax.grad(toy.sinc)(t)))


def test_sinc_has_its_minima_on_a_circle(x64):
    r = 4.493409457909064  # the first positive root of tan(r) = r
    angles = np.linspace(0, 6, 7)
    points = np.sqrt(r) * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    gradients = jax.vmap(jax.grad(toy.sinc))(jnp.asarray(points))
    np.testing.assert_allclose(gradients, np.zeros((7, 2)), atol=1e-14)
    np.testing.assert_allclose(toy.sinc(jnp.asarray(points)), 5 * np.cos(r), rtol=1e-12)


# --- trajectories ---


def loop(gradient, theta, matrix, rho, learning_rate, steps):
    """The method step by step, with the dense metric of eq. 5."""
    path = [theta]
    for _ in range(steps):
        g = gradient(theta)
        if matrix is not None:
            g = gradient(theta + dense_perturbation(matrix(theta, g), g, rho))
        theta = theta - learning_rate * g
        path.append(theta)
    return np.array(path)


@pytest.mark.parametrize("method", METRICS)
@pytest.mark.parametrize("loss", ["banana", "sinc"])
def test_trajectory_is_that_of_a_loop(loss, method, x64):
    metric, matrix = METRICS[method]
    start = np.array([-1.5, 0.5])
    settings = {"rho": 0.5, "learning_rate": 0.02, "steps": 30}
    path = toy.trajectory(getattr(toy, loss), jnp.asarray(start), metric=metric, **settings)
    assert path.shape == (31, 2)
    expected = loop(GRADIENTS[loss], start, matrix, *settings.values())
    np.testing.assert_allclose(path, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", METRICS)
def test_a_batch_is_its_points_one_by_one(method, x64):
    metric, _ = METRICS[method]
    starts = jnp.asarray(POINTS[:6].reshape(3, 2, 2))
    settings = {"metric": metric, "rho": 0.5, "learning_rate": 0.01, "steps": 20}
    paths = toy.trajectory(toy.banana, starts, **settings)
    assert paths.shape == (21, 3, 2, 2)
    for i in range(3):
        for j in range(2):
            path = toy.trajectory(toy.banana, starts[i, j], **settings)
            np.testing.assert_allclose(paths[:, i, j], path, rtol=1e-10, atol=1e-12)


def test_new_values_do_not_recompile():
    def loss_fn(t):
        return toy.banana(t)

    metric, before = ms.monge(), toy._trajectory._cache_size()
    starts = jnp.array([[0.3, 0.4], [1.0, 2.0]])
    ends = [
        toy.trajectory(loss_fn, t, metric=metric, rho=rho, learning_rate=rate, steps=3)[-1, 0, 0]
        for rho, rate, t in [(0.1, 0.1, starts), (0.9, 0.1, starts), (0.9, 0.2, 2 * starts)]
    ]
    assert len({float(end) for end in ends}) == 3
    assert toy._trajectory._cache_size() == before + 1


def test_without_a_metric_it_is_gradient_descent_whatever_rho(x64):
    start = jnp.array([-1.5, 0.5])
    paths = [
        toy.trajectory(toy.banana, start, metric=None, rho=rho, learning_rate=0.05, steps=40)
        for rho in (0.0, 3.0)
    ]
    np.testing.assert_array_equal(*paths)
    radius_zero = toy.trajectory(
        toy.banana, start, metric=ms.monge(), rho=0.0, learning_rate=0.05, steps=40
    )
    np.testing.assert_allclose(radius_zero, paths[0], rtol=1e-12)


def test_the_start_comes_first_and_no_steps_are_allowed():
    starts = jnp.asarray(POINTS, jnp.float32)
    settings = {"metric": ms.euclidean(), "rho": 1.0, "learning_rate": 0.1}
    path = toy.trajectory(toy.banana, starts, steps=0, **settings)
    np.testing.assert_array_equal(path, starts[None])
    assert path.dtype == jnp.float32
    assert toy.trajectory(toy.banana, np.zeros((0, 2)), steps=2, **settings).shape == (3, 0, 2)


def test_a_start_on_a_stationary_point_stays_there():
    for metric, _ in METRICS.values():
        path = toy.trajectory(toy.banana, jnp.zeros(2), metric=metric, **SETTINGS)
        np.testing.assert_array_equal(path, np.zeros((201, 2)))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"metric": "sam"}, TypeError, "metric must be a Metric"),
        ({"rho": -1.0}, ValueError, "rho"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate"),
        ({"steps": -1}, ValueError, "steps must not be negative, got -1"),
        ({"theta0": 1.0}, ValueError, "axis of coordinates"),
    ],
)
def test_bad_arguments_are_refused(change, error, match):
    arguments = {"theta0": jnp.ones(2), "metric": ms.monge(), **SETTINGS, **change}
    with pytest.raises(error, match=match):
        toy.trajectory(toy.banana, arguments.pop("theta0"), **arguments)


@pytest.mark.parametrize("method", list(METRICS)[1:])
def test_perturbed_points_are_those_of_the_dense_formula(method, x64):
    metric, matrix = METRICS[method]
    points = POINTS[:8].reshape(2, 4, 2)
    perturbed = toy.perturbed_points(toy.banana, jnp.asarray(points), metric=metric, rho=0.7)
    assert perturbed.shape == (2, 4, 2)
    for t, actual in zip(POINTS[:8], perturbed.reshape(-1, 2), strict=True):
        g = banana_gradient(t)
        expected = t + dense_perturbation(matrix(t, g), g, 0.7)
        np.testing.assert_allclose(actual, expected, rtol=1e-10)


# --- figure 1 ---


@pytest.mark.parametrize(
    ("method", "end"),
    [("sgd", (-1.5459, -0.6469)), ("sam", (-0.0037, -0.0028)), ("monge_sam", (-0.9454, -0.9413))],
)
def test_where_figure_1_ends(method, end, x64):
    metric, matrix = METRICS[method]
    start = np.array([-1.5, 0.5])
    path = toy.trajectory(toy.banana, jnp.asarray(start), metric=metric, **SETTINGS)
    np.testing.assert_allclose(path[-1], end, atol=1e-4)
    expected = loop(banana_gradient, start, matrix, *SETTINGS.values())
    np.testing.assert_allclose(path, expected, atol=1e-8)
