"""Edges of stability and orbits against recursions iterated in NumPy and steps of the package."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import monge_sam_jax as ms
from monge_sam_jax import stability
from monge_sam_jax.stability import (
    edge_of_stability,
    one_pass_edge_of_stability,
    one_pass_is_stable,
    one_pass_orbit,
    two_pass_is_stable,
)
from monge_sam_jax.toy import trajectory

fixed = settings(derandomize=True, deadline=None, max_examples=150)
METHODS = ("two passes", "gradient", "momentum")  # of one pass: its direction


@pytest.fixture(autouse=True, scope="module")
def double_precision():
    enable = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with enable(True):
        yield


def is_stable(method, eigenvalues, **arguments):
    if method == "two passes":
        return two_pass_is_stable(jnp.asarray(eigenvalues), **arguments)
    return one_pass_is_stable(jnp.asarray(eigenvalues), **arguments, direction=method)


def edge(method, rate, radius, momentum):
    if method == "two passes":
        return edge_of_stability(rate, radius, momentum=momentum)
    return one_pass_edge_of_stability(rate, radius, momentum=momentum, direction=method)


def growth(method, eigenvalue, rate, radius, momentum, steps=4000):
    """Logarithm of what steps at a frozen radius multiply deviations by, over their last half."""
    theta, m, delta = 1.0, 0.0, 0.0
    log_scale, log_sizes = 0.0, []
    for step in range(steps):
        if method == "two passes":
            delta = radius * eigenvalue * theta
        g = eigenvalue * (theta + delta)
        m = momentum * m + g
        theta = theta - rate * m
        if method != "two passes":
            delta = radius * (g if method == "gradient" else m)
        size = math.hypot(theta, delta, rate * m)
        if size == 0:
            return -math.inf
        theta, m, delta = theta / size, m / size, delta / size
        log_scale += math.log(size)
        if step + 1 in (steps // 2, steps):
            log_sizes.append(log_scale)
    return log_sizes[1] - log_sizes[0]


def polynomial(method, h, s, beta):
    """That of the recursion, by descending powers of z."""
    if method == "two passes":
        return np.polyadd(np.poly([1, beta]), [h * (1 + s), 0])
    if method == "gradient":
        return np.polyadd(np.poly([1, beta, s]), [h, 0, 0])
    return np.polyadd(np.poly([1, beta + s]), [h, 0])


def spectral_radius(method, eigenvalue, rate, radius, momentum):
    roots = np.roots(polynomial(method, rate * eigenvalue, radius * eigenvalue, momentum))
    return np.max(np.abs(roots))


# --- frozen radius ---

momenta = st.sampled_from([0.0, 0.5, 0.9]) | st.floats(0, 0.95)
rates = st.floats(-3, 1).map(lambda x: 10**x)
ratios = st.just(0.0) | st.floats(-2, 1.5).map(lambda x: 10**x)  # of the radius to the rate


@pytest.mark.parametrize("method", METHODS)
@fixed
@given(rates, ratios, momenta, st.floats(0.05, 3.0))
def test_minima_are_stable_up_to_the_edge_alone(method, rate, ratio, momentum, relative):
    assume(abs(relative - 1) > 0.03)
    radius = ratio * rate
    eigenvalue = relative * float(edge(method, rate, radius, momentum))
    settings = {"learning_rate": rate, "effective_radius": radius, "momentum": momentum}
    decays = growth(method, eigenvalue, rate, radius, momentum) < 0
    assert bool(is_stable(method, [eigenvalue], **settings)) == decays == (relative < 1)


@pytest.mark.parametrize("method", METHODS)
@fixed
@given(rates, ratios, momenta, st.floats(-2, 1))
def test_saddles_repel_one_pass_and_may_attract_two(method, rate, ratio, momentum, log_size):
    radius, eigenvalue = ratio * rate, -(10**log_size) / rate
    # A growth of 1e-3 a step would not show.
    assume(abs(1 + radius * eigenvalue) > 0.02)
    grows = growth(method, eigenvalue, rate, radius, momentum)
    assume(abs(grows) > 0.5)
    settings = {"learning_rate": rate, "effective_radius": radius, "momentum": momentum}
    stable = bool(is_stable(method, [eigenvalue], **settings))
    assert stable == (grows < 0)
    if method == "two passes":
        assert not stable or radius > stability.critical_radius(jnp.array([eigenvalue]))
    else:
        assert not stable


def test_two_passes_are_drawn_to_the_saddles_of_equation_11():
    saddle, settings = jnp.array([-3.0, 3.0]), {"learning_rate": 0.1}
    radii = jnp.array([0.0, 0.33, 0.34, 0.5, 1.2, 10.0])
    expected = [False, False, True, True, True, False]
    stable = two_pass_is_stable(saddle, effective_radius=radii, **settings)
    np.testing.assert_array_equal(stable, expected)
    for radius, attracts in zip(radii, expected, strict=True):
        grows = [growth("two passes", x, 0.1, float(radius), 0.0) for x in (-3.0, 3.0)]
        assert (max(grows) < 0) == attracts
    assert not one_pass_is_stable(saddle, effective_radius=radii, **settings).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("ratio", [0.0, 1e-3, 0.1, 0.26, 1.0, 30.0])
def test_at_the_edge_a_root_is_on_the_unit_circle(method, momentum, ratio):
    rate = 0.05
    at_edge = float(edge(method, rate, ratio * rate, momentum))
    for relative, expected in [(1 - 1e-3, -1), (1.0, 0), (1 + 1e-3, 1)]:
        excess = spectral_radius(method, relative * at_edge, rate, ratio * rate, momentum) - 1
        assert (np.sign(excess) if abs(excess) > 1e-8 else 0) == expected


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_the_edge_of_two_passes_solves_its_equation_for_radii_of_any_size(momentum, dtype, rtol):
    radii = np.array([0, 1e-30, 1e-12, 1e-7, 1e-3, 1, 1e6, 1e30], dtype)
    for rate in (1e-25, 1e-6, 0.1, 3.0):
        edges = edge_of_stability(dtype(rate), radii, momentum=momentum)
        assert edges.dtype == dtype
        x = np.asarray(edges, np.longdouble)
        step = np.longdouble(dtype(rate)) * x * (1 + radii.astype(np.longdouble) * x)
        np.testing.assert_allclose(step.astype(float), 2 * (1 + momentum), rtol=rtol)
    np.testing.assert_allclose(edge_of_stability(0.1), 20.0, rtol=1e-15)
    assert edge_of_stability(0.0, 1.0) == one_pass_edge_of_stability(0.0) == np.inf


def test_a_small_radius_raises_the_edge_of_one_pass_and_lowers_that_of_two():
    rate = 0.1
    radii = jnp.linspace(0.0, 3 * rate, 301)
    one, two = one_pass_edge_of_stability(rate, radii), edge_of_stability(rate, radii)
    assert (jnp.diff(two) < 0).all()
    np.testing.assert_allclose(radii[jnp.argmax(one)], rate / 4)
    np.testing.assert_allclose(one.max(), 4 / rate)
    sharper = one > 2 / rate * (1 + 1e-9)
    np.testing.assert_array_equal(sharper, (radii > 1e-9) & (radii < rate / 2 - 1e-9))


@pytest.mark.parametrize("method", METHODS)
def test_edges_fall_with_the_radius_where_momentum_is_high(method):
    radii = jnp.linspace(0.05, 1.0, 50)
    assert (jnp.diff(edge(method, 0.1, radii, 0.9)) < 0).all()


def frozen(method, eigenvalues, rate, radius, momentum, metric, steps=400):
    """Logarithms of deviations in steps of the package, at a radius that a slope keeps constant.

    The loss is a quadratic one plus a steep line in another coordinate, whose slope is all but the
    whole gradient.
    """
    slope = 2.0
    H = jnp.asarray(eigenvalues)
    grad_fn = jax.grad(lambda p: 0.5 * jnp.sum(H * p["x"] ** 2) + slope * p["line"])
    length = slope / (1 - momentum) if method == "momentum" else slope
    alpha = {"euclidean": 0.0, "monge": 1.0}[metric]
    rho = radius * length * np.sqrt(1 + alpha**2 * length**2)
    ball = {"metric": getattr(ms, metric)(), "rho": rho}
    tx = optax.sgd(rate, momentum=momentum or None)
    if method == "two passes":
        tx = optax.chain(ms.sharpness_aware(grad_fn, **ball), tx)
    else:
        tx = ms.one_pass_sam(tx, **ball, direction=method)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grad_fn(params), state, params)
        params = optax.apply_updates(params, updates)
        logged = ms.get_diagnostics(state).effective_radius
        return (params, state), (jnp.log(jnp.abs(params["x"])), logged)

    params = {"x": jnp.full(H.size, 1e-200), "line": jnp.zeros(())}
    _, (sizes, radii) = jax.lax.scan(step, (params, tx.init(params)), length=steps)
    np.testing.assert_allclose(radii[-1], radius, rtol=1e-5)
    return np.asarray(sizes)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("metric", "momentum"), [("euclidean", 0.0), ("monge", 0.8)])
@pytest.mark.parametrize("radius", [0.01, 0.2])
def test_steps_of_the_package_are_stable_up_to_the_edge(method, metric, momentum, radius):
    if method == "momentum" and momentum == 0:
        momentum = 0.5
    rate = 0.1
    relative = np.array([-0.05, 0.8, 1.2])
    eigenvalues = relative * float(edge(method, rate, radius, momentum))
    sizes = frozen(method, eigenvalues, rate, radius, momentum, metric)
    late = np.max(sizes[-50:], axis=0) - np.max(sizes[150:200], axis=0)
    settings = {"learning_rate": rate, "effective_radius": radius, "momentum": momentum}
    stable = is_stable(method, eigenvalues[:, None], **settings)
    np.testing.assert_array_equal(late < -1, stable)
    np.testing.assert_array_equal(late > 1, ~stable)
    np.testing.assert_array_equal(stable[1:], [True, False])


# --- what goes in and comes out ---


def test_stability_over_leading_axes():
    H = jnp.array(
        [[[-3.0, 3.0], [0.5, 3.0]], [[1.0, 2.0], [0.0, 1.0]], [[1.0, 9.0], [1.0, np.nan]]]
    )
    settings = {"learning_rate": 0.3, "effective_radius": 0.2}
    expected = [[False, True], [True, False], [False, False]]
    for stable in (one_pass_is_stable, two_pass_is_stable):
        function = functools.partial(stable, **settings)
        np.testing.assert_array_equal(function(H), expected)
        np.testing.assert_array_equal(jax.jit(jax.vmap(function))(H), expected)
        radii = jnp.array([0.2, 1e3])
        by_radius = stable(H, learning_rate=0.3, effective_radius=radii)
        np.testing.assert_array_equal(by_radius, np.array(expected) & [True, False])
        several = stable(H[1, 0], learning_rate=0.3, effective_radius=radii)
        np.testing.assert_array_equal(several, [True, False])


def test_a_radius_that_is_no_radius_has_no_edge():
    for function in (edge_of_stability, one_pass_edge_of_stability):
        edges = function(0.1, jnp.array([-0.01, np.nan, 0.1]))
        np.testing.assert_array_equal(jnp.isnan(edges), [True, True, False])
        assert jax.jit(function)(0.1, 0.2) == function(0.1, 0.2)


def test_half_precision_and_integers_are_computed_with_in_float32():
    with jax.numpy_dtype_promotion("strict"):
        for function in (edge_of_stability, one_pass_edge_of_stability):
            edges = function(0.5, jnp.array([0.125, 0.5], jnp.bfloat16))
            assert edges.dtype == jnp.float32
            expected = function(0.5, jnp.array([0.125, 0.5], jnp.float32))
            np.testing.assert_array_equal(edges, expected)
            assert function(1, 2) == function(jnp.float32(1), jnp.float32(2))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("method", METHODS)
def test_edges_have_finite_derivatives(method, momentum):
    for radius in (0.0, 0.01, 0.2):
        slope = jax.grad(lambda r: edge(method, 0.1, r, momentum))(radius)
        assert np.isfinite(slope)
        if radius:
            step = 1e-6 * radius
            right, left = (edge(method, 0.1, radius + d, momentum) for d in (step, -step))
            np.testing.assert_allclose(slope, (right - left) / (2 * step), rtol=1e-6)


def test_what_is_wrong_is_said():
    for function in (edge_of_stability, one_pass_edge_of_stability):
        with pytest.raises(ValueError, match=r"learning_rate must be finite.*got -0.1"):
            function(-0.1)
        with pytest.raises(TypeError, match="learning_rate must be a real number"):
            function("0.1")
        with pytest.raises(ValueError, match=r"momentum must be less than 1, got 1\.0"):
            function(0.1, momentum=1.0)
        with pytest.raises(ValueError, match="momentum must be finite"):
            function(0.1, momentum=-0.5)
    match = "direction must be 'gradient' or 'momentum', got 'ascent'"
    with pytest.raises(ValueError, match=match):
        one_pass_edge_of_stability(0.1, direction="ascent")
    orbit = functools.partial(one_pass_orbit, 1.0, learning_rate=0.1)
    with pytest.raises(ValueError, match=match):
        orbit(rho=0.1, direction="ascent")
    with pytest.raises(ValueError, match="rho must be finite"):
        orbit(rho=-0.1)
    with pytest.raises(ValueError, match="alpha must be finite"):
        orbit(rho=0.1, alpha=np.inf)


# --- orbits at a fixed rho ---


def one_pass(H, theta, delta, *, rate, rho, alpha, momentum=0.0, direction="gradient", steps=4000):
    """The method step by step on the loss theta^T diag(H) theta / 2: y and theta at every step."""
    m, ys, thetas = np.zeros_like(theta), [], []
    for _ in range(steps):
        y = theta + delta
        ys.append(y)
        thetas.append(theta)
        g = H * y
        m = momentum * m + g
        theta = theta - rate * m
        v = g if direction == "gradient" else m
        n = np.sqrt(v @ v)
        delta = rho * v / n / np.sqrt(1 + alpha**2 * n**2) if n > 0 else 0 * v
    return np.array(ys), np.array(thetas)


def lengths(x):
    return np.linalg.norm(x, axis=-1)


ORBITS = [
    (4.0, 0.01, 0.3, 0.0, 0.0, "gradient"),
    (4.0, 0.01, 0.3, 2.0, 0.0, "gradient"),
    (0.5, 0.5, 1.0, 1.0, 0.0, "gradient"),
    (2.0, 0.1, 0.5, 0.0, 0.9, "gradient"),
    (2.0, 0.1, 0.5, 1.0, 0.9, "gradient"),
    (2.0, 0.1, 0.5, 1.0, 0.6, "momentum"),
    (2.0, 0.1, 0.5, 0.0, 0.9, "momentum"),
]


@pytest.mark.parametrize(("sharpest", "rate", "rho", "alpha", "momentum", "direction"), ORBITS)
def test_one_pass_moves_on_the_circle(sharpest, rate, rho, alpha, momentum, direction):
    """In NumPy, where the largest eigenvalue is that of two or three directions."""
    rng = np.random.default_rng(0)
    settings = {"rho": rho, "alpha": alpha, "momentum": momentum, "direction": direction}
    orbit = one_pass_orbit(sharpest, learning_rate=rate, **settings)
    for H in ([sharpest] * 2, [sharpest] * 3 + [0.3 * sharpest, 0.01 * sharpest]):
        theta, delta = rng.normal(size=(2, len(H)))
        y, theta = one_pass(np.array(H), theta, delta, rate=rate, **settings, steps=6000)
        y, theta = y[-500:, : H.count(sharpest)], theta[-500:, : H.count(sharpest)]
        np.testing.assert_allclose(lengths(y), orbit.perturbed_radius, rtol=1e-5)
        np.testing.assert_allclose(lengths(theta), orbit.unperturbed_radius, rtol=1e-5)
        for x in (y, theta):
            cosine = np.sum(x[1:] * x[:-1], axis=-1) / lengths(x[1:]) / lengths(x[:-1])
            np.testing.assert_allclose(np.arccos(cosine), orbit.angle, rtol=1e-5)


@pytest.mark.parametrize(
    ("sharpest", "rate", "rho", "alpha", "momentum", "direction"), ORBITS[1:2] + ORBITS[4:6]
)
def test_one_pass_sam_moves_on_the_circle(sharpest, rate, rho, alpha, momentum, direction):
    """With the package's own steps, and a kick off the line through the minimum."""
    H = jnp.array([sharpest, sharpest, 0.2 * sharpest])
    tx = ms.one_pass_sam(
        optax.sgd(rate, momentum=momentum or None),
        metric=ms.monge(alpha=alpha),
        rho=rho,
        direction=direction,
    )

    def step(carry, count):
        y, state = carry
        updates, state = tx.update(H * y, state, y)
        y = optax.apply_updates(y, updates)
        y += jnp.where(count == 10, 0.1, 0.0) * jnp.array([1.0, 0.0, 0.0])
        return (y, state), (y, ms.unperturbed_params(state, y))

    start = jnp.array([0.3, 0.4, 0.5])
    _, (y, theta) = jax.lax.scan(step, (start, tx.init(start)), jnp.arange(4000))
    settings = {"rho": rho, "alpha": alpha, "momentum": momentum, "direction": direction}
    orbit = one_pass_orbit(sharpest, learning_rate=rate, **settings)
    np.testing.assert_allclose(lengths(y[-200:]), orbit.perturbed_radius, rtol=1e-5)
    np.testing.assert_allclose(lengths(theta[-200:]), orbit.unperturbed_radius, rtol=1e-5)


def test_the_circle_is_balanced():
    """Where r lambda is one, and for Monge SAM smaller."""
    H, rho = jnp.array([0.3, 1.0, 7.0]), 0.4
    radii = {}
    for alpha in (0.0, 1.0, 5.0):
        orbit = one_pass_orbit(H, learning_rate=0.01, rho=rho, alpha=alpha)
        g = H * orbit.perturbed_radius
        np.testing.assert_allclose(g * np.sqrt(1 + (alpha * g) ** 2), rho * H, rtol=1e-13)
        np.testing.assert_allclose(
            orbit.unperturbed_radius, np.sqrt(0.01 * H) * orbit.perturbed_radius, rtol=1e-13
        )
        np.testing.assert_allclose(np.cos(orbit.angle), 1 - 0.01 * H / 2, rtol=1e-13)
        radii[alpha] = orbit.perturbed_radius
    np.testing.assert_allclose(radii[0.0], rho, rtol=1e-13)
    assert (radii[5.0] < radii[1.0]).all()
    assert (radii[1.0] < radii[0.0]).all()


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_circle_is_where_one_pass_is_neutral(direction, momentum):
    sharpest, rate, rho = 3.0, 0.05, 0.2
    orbit = one_pass_orbit(
        sharpest, learning_rate=rate, rho=rho, alpha=0.0, momentum=momentum, direction=direction
    )
    g = sharpest * orbit.perturbed_radius
    z = np.exp(1j * orbit.angle)
    ascended = g if direction == "gradient" else g / np.abs(z - momentum)  # |m| = |g z / (z - b)|
    s = rho / ascended * sharpest
    np.testing.assert_allclose(
        np.polyval(polynomial(direction, rate * sharpest, s, momentum), z), 0, atol=1e-14
    )
    edge = one_pass_edge_of_stability(rate, rho / ascended, momentum=momentum, direction=direction)
    np.testing.assert_allclose(edge, sharpest, rtol=1e-13)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 3.0])
def test_up_to_what_learning_rate_the_circle_attracts(alpha):
    sharpest, rho = 1.0, 1.0
    y = one_pass_orbit(sharpest, learning_rate=0.1, rho=rho, alpha=alpha).perturbed_radius
    limit = 4 / (3 + 2 * alpha**2 * float(y) ** 2)
    for relative, attracts in [(0.97, True), (1.03, False)]:
        rate = relative * limit
        orbit = one_pass_orbit(sharpest, learning_rate=rate, rho=rho, alpha=alpha)
        back = np.exp(-1j * float(orbit.angle))  # y one step before, as a complex number
        delta = rho / np.sqrt(1 + alpha**2 * y**2) * np.array([back.real, back.imag])
        theta = np.array([y, 0.0]) - delta + 1e-5
        path, _ = one_pass(
            np.full(2, sharpest), theta, delta, rate=rate, rho=rho, alpha=alpha, steps=2000
        )
        deviation = np.abs(lengths(path) - y)
        assert (deviation[-20:].max() < 1e-3 * deviation[:20].max()) == attracts
        assert (deviation[-20:].max() > 1e3 * deviation[:20].max()) == (not attracts)


def test_where_there_is_no_circle():
    orbit = functools.partial(one_pass_orbit, learning_rate=0.1, rho=0.5)
    for sharpest in (-1.0, 0.0, 40.1, np.nan):
        assert all(np.isnan(x) for x in orbit(sharpest))
    assert all(np.isfinite(x) for x in orbit(39.9))
    assert orbit(1.0).perturbed_radius.shape == ()
    assert orbit(jnp.ones((2, 3))).angle.shape == (2, 3)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize(
    ("second", "low", "high"), [(0.9, 0.95, 0.97), (0.5, 0.82, 0.95), (0.1, 0.73, 0.80)]
)
def test_how_far_off_the_circle_is_if_the_second_eigenvalue_is_smaller(alpha, second, low, high):
    H, settings = np.array([1.0, second]), {"rho": 1.0, "alpha": alpha}
    for rate in (0.01, 0.1, 0.5):
        theta, delta = np.random.default_rng(0).normal(size=(2, 2))
        y, theta = one_pass(H, theta, delta, rate=rate, **settings, steps=20_000)
        y, theta = y[5_000:], theta[5_000:]
        orbit = one_pass_orbit(1.0, learning_rate=rate, **settings)
        rms = np.sqrt(np.mean(lengths(H * y) ** 2))
        assert low - 0.005 < rms / orbit.perturbed_radius < high + 0.005
        loss = np.mean(np.sum(H * theta**2, axis=-1))
        if second == 0.5:
            assert 0.8 < loss / orbit.unperturbed_radius**2 < 18.5
        assert lengths(theta).max() < 1


spectra = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(spectra, st.sampled_from([0.0, 1.0]), st.floats(0.05, 1.8), st.integers(0, 2**32 - 1))
def test_gradients_of_one_pass_stay_within_their_bound(spectrum, alpha, step, seed):
    H, rho = np.array(spectrum), 0.7
    theta, delta = rho * np.random.default_rng(seed).normal(size=(2, H.size))
    rate = step / H.max()
    y, theta = one_pass(H, theta, delta, rate=rate, rho=rho, alpha=alpha, steps=3000)
    g = lengths(H * y)
    bound = rho * H.max() / (1 - rate * H.max() / 2)
    assert np.sqrt(np.mean(g[1000:] ** 2)) < 1.03 * bound


@pytest.mark.parametrize(
    ("metric", "step"), [("euclidean", 0.05), ("euclidean", 0.9), ("monge", 0.05)]
)
def test_on_a_line_theta_comes_to_rest_at_rho_from_the_minimum(metric, step):
    sharpest, rho = 4.0, 0.5
    tx = ms.one_pass_sam(optax.sgd(step / sharpest), metric=getattr(ms, metric)(), rho=rho)
    y = jnp.array([1.3])
    state = tx.init(y)
    update = jax.jit(lambda y, state: tx.update(sharpest * y, state, y))
    for _ in range(math.ceil(25 / step)):  # many more, and the gradient underflows
        updates, state = update(y, state)
        y = optax.apply_updates(y, updates)
    np.testing.assert_allclose(y, 0, atol=1e-8)
    np.testing.assert_allclose(ms.unperturbed_params(state, y), -rho, rtol=1e-7)


@pytest.mark.parametrize("step", [0.1, 1.0, 1.7])
def test_two_passes_jump_to_and_fro(step):
    sharpest, rho = 4.0, 0.5
    loss_fn = lambda p: 0.5 * sharpest * jnp.sum(p**2)  # noqa: E731
    start = jnp.array([0.3, 0.4])
    path = trajectory(
        loss_fn, start, metric=ms.euclidean(), rho=rho, learning_rate=step / sharpest, steps=500
    )
    np.testing.assert_allclose(lengths(path[-9:]), rho * step / (2 - step), rtol=1e-8)
    np.testing.assert_allclose(path[-1], -path[-2], rtol=1e-8)


# --- saddles and maxima at a fixed rho ---


def distances(tx, H, theta_of, steps):
    """Absolute coordinates of theta on the loss theta^T diag(H) theta / 2, at every step."""
    start = 0.02 / H.size * jnp.ones(H.size)

    def step(carry, _):
        p, state = carry
        updates, state = tx.update(H * p, state, p)
        p = optax.apply_updates(p, updates)
        return (p, state), theta_of(state, p)

    return np.abs(jax.lax.scan(step, (start, tx.init(start)), length=steps)[1])


@pytest.mark.parametrize("spectrum", [(-3.0, 3.0), (-3.0, -1.0), (-0.5, 2.0, 1.9), (-1.0,)])
@pytest.mark.parametrize("metric", ["euclidean", "monge"])
@pytest.mark.parametrize("rho", [0.3, 1.0, 3.0])
def test_saddles_and_maxima_repel_one_pass_and_draw_two(spectrum, metric, rho):
    H, rate = jnp.array(spectrum), 0.05
    ball = {"metric": getattr(ms, metric)(), "rho": rho}
    two_passes = optax.chain(ms.sharpness_aware(lambda p: H * p, **ball), optax.sgd(rate))
    assert lengths(distances(two_passes, H, lambda _, p: p, 1500)).max() < rho
    one_pass = ms.one_pass_sam(optax.sgd(rate), **ball)
    assert lengths(distances(one_pass, H, ms.unperturbed_params, 1500))[-1] > 100 * rho


@pytest.mark.parametrize(
    ("spectrum", "rate", "metric", "rho"),
    [((4.0, 2.0, -1.0), 0.01, "monge", 10.0), ((4.0, 0.1, -0.1), 0.2, "euclidean", 1.0)],
)
def test_a_radius_that_varies_may_draw_one_pass_to_a_saddle(spectrum, rate, metric, rho):
    H = jnp.array(spectrum)
    tx = ms.one_pass_sam(optax.sgd(rate), metric=getattr(ms, metric)(), rho=rho)
    theta = distances(tx, H, ms.unperturbed_params, 6000)
    assert theta[-1, -1] < 1e-9
    assert theta[-1000:, :-1].max() > 1e-2
