"""Curvature against dense linear algebra, matrices of known spectrum, and counted products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from matrices import (
    FIRST,
    SPECTRA,
    flatten,
    network,
    quartic,
    small_network,
    symmetric,
    tree_of_nine,
)

import monge_sam_jax as ms
from monge_sam_jax.curvature import hessian, hessian_trace, hvp, sharpness, top_eigenvalues

fixed = settings(derandomize=True, deadline=None, max_examples=25)


def x64(enabled):
    enable = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    return enable(enabled)


@pytest.fixture(autouse=True, scope="module")
def double_precision():
    with x64(True):
        yield


@jax.jit
def product_and_matrix(S, params, vector):
    return hvp(quartic(S), params, vector), hessian(quartic(S), params)


@fixed
@given(seed=st.integers(0, 1000))
def test_products_and_matrix_are_the_hessian(seed):
    params, vector = tree_of_nine(seed), tree_of_nine(seed + 1)
    S = symmetric(np.random.default_rng(seed).normal(size=9), seed)
    Hv, H = product_and_matrix(S, params, vector)
    expected = S + np.diag(np.asarray(flatten(params)) ** 2)
    assert jax.tree.structure(Hv) == jax.tree.structure(params)
    np.testing.assert_allclose(flatten(Hv), expected @ flatten(vector), atol=1e-12)
    np.testing.assert_allclose(H, expected, atol=1e-12)


@pytest.mark.parametrize("which", FIRST)
@pytest.mark.parametrize("name", SPECTRA)
def test_eigenvalues_of_known_spectrum(name, which):
    spectrum = SPECTRA[name]
    S = jnp.asarray(symmetric(spectrum))
    expected = FIRST[which](spectrum)
    loss_fn = lambda x: 0.5 * x @ S @ x  # noqa: E731
    found = top_eigenvalues(loss_fn, jnp.zeros(60), 3, which, tol=1e-10)
    np.testing.assert_allclose(found, np.sort(expected[:3])[::-1], rtol=1e-9, atol=1e-10)
    assert found.dtype == jnp.float64


@pytest.mark.parametrize("name", ["spread", "outliers_over_a_bulk", "clustered_at_both_ends"])
def test_eigenvalues_to_the_default_tolerance(name):
    S = jnp.asarray(symmetric(SPECTRA[name]))
    found = top_eigenvalues(lambda x: 0.5 * x @ S @ x, jnp.zeros(60))
    np.testing.assert_allclose(found, [max(SPECTRA[name])], rtol=1e-2)


@pytest.mark.parametrize(("which", "k"), [("LA", 4), ("SA", 1), ("LM", 4)])
def test_eigenvalues_of_a_network(which, k):
    loss_fn, params, H = small_network()
    expected = np.sort(FIRST[which](np.linalg.eigvalsh(H))[:k])[::-1]
    found, vectors = top_eigenvalues(loss_fn, params, k, which, tol=1e-9, return_eigenvectors=True)
    np.testing.assert_allclose(found, expected, rtol=1e-8)
    assert jax.tree.structure(vectors) == jax.tree.structure(params)
    V = np.asarray(jax.vmap(flatten)(vectors))
    np.testing.assert_allclose(V @ V.T, np.eye(k), atol=1e-12)
    np.testing.assert_allclose(V @ H, found[:, None] * V, atol=1e-8)


@pytest.mark.parametrize(("which", "k"), [("SA", 1), ("LM", 4), ("LA", 20)])
def test_small_problems_are_solved_densely(which, k):
    spectrum = np.array([-7.0, -1, 0, 0.5, 2, 2, 3, 4, 6])
    S = jnp.asarray(symmetric(spectrum))
    loss_fn = lambda p: 0.5 * flatten(p) @ S @ flatten(p)  # noqa: E731
    found, vectors = top_eigenvalues(loss_fn, tree_of_nine(0), k, which, return_eigenvectors=True)
    expected = np.sort(FIRST[which](spectrum)[:k])[::-1]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    V = jax.vmap(flatten)(vectors)
    np.testing.assert_allclose(V @ S, found[:, None] * V, atol=1e-12)


def largest_of_lanczos(product, n, steps):
    """Largest Ritz value of the Krylov space of a random vector, reorthogonalised in full."""
    Q = np.zeros((steps, n))
    HQ = np.zeros((steps, n))
    v = np.random.default_rng(7).normal(size=n)
    for i in range(steps):
        for _ in range(2):
            v = v - (Q[:i] @ v) @ Q[:i]
        Q[i] = v / np.linalg.norm(v)
        HQ[i] = v = np.asarray(product(Q[i]), float)
    return np.linalg.eigvalsh(Q @ HQ.T)[-1:]


@pytest.mark.parametrize(("activation", "train_steps"), [(jax.nn.relu, 50), (jnp.tanh, 0)])
def test_top_eigenvalue_of_a_large_network_takes_few_products(activation, train_steps):
    with x64(False):
        loss_fn, params = network([64, 256, 256, 64, 10], 64, activation)
        x, unravel = ravel_pytree(params)
        assert 95_000 < x.size < 105_000
        descend = jax.jit(lambda x: x - 0.1 * flatten(jax.grad(loss_fn)(unravel(x))))
        for _ in range(train_steps):
            x = descend(x)

        products = []

        def counted(params):
            jax.debug.callback(lambda: products.append(1))
            return loss_fn(params)

        found = top_eigenvalues(counted, unravel(x), tol=1e-2)
        jax.effects_barrier()
        assert len(products) < 50  # of two gradients each
        product = jax.jit(lambda x, v: flatten(hvp(loss_fn, unravel(x), unravel(v))))
        expected = largest_of_lanczos(lambda v: product(x, v.astype(np.float32)), x.size, steps=30)
        np.testing.assert_allclose(found, expected, rtol=1e-2)


def test_eigenvalues_repeat_with_the_seed():
    loss_fn, params, _ = small_network()
    first, again, other = (top_eigenvalues(loss_fn, params, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first != other
    np.testing.assert_allclose(first, other, rtol=1e-2)


@pytest.mark.parametrize("n", [5, 50])
def test_eigenvalues_of_a_linear_loss_are_zero(n):
    found, vectors = top_eigenvalues(jnp.sum, jnp.ones(n), k=2, return_eigenvectors=True)
    np.testing.assert_array_equal(found, 0)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(2), atol=1e-12)


@pytest.mark.parametrize("n", [5, 50])
def test_eigenvalues_say_what_is_wrong(n):
    params, loss_fn = jnp.ones(n), lambda p: jnp.sum(p**3)
    with pytest.raises(ValueError, match="which must be one of LA, SA, LM, got 'SM'"):
        top_eigenvalues(loss_fn, params, which="SM")
    with pytest.raises(ValueError, match="k must be an integer, 1 or more, got 0"):
        top_eigenvalues(loss_fn, params, k=0)
    with pytest.raises(ValueError, match="must not contain infs or NaNs"):
        top_eigenvalues(lambda p: jnp.sum(jnp.abs(p) ** 1.5), 0 * params)
    with pytest.raises(TypeError, match="call this outside"):
        jax.jit(lambda p: top_eigenvalues(loss_fn, p))(params)


@pytest.mark.parametrize("params", [{"a": jnp.ones(2), "b": 1j}, np.arange(3)])
def test_params_must_be_real(params):
    loss_fn = lambda p: jnp.sum(jnp.abs(flatten(p)) ** 2)  # noqa: E731
    for function in (
        lambda: hvp(loss_fn, params, params),
        lambda: hessian(loss_fn, params),
        lambda: top_eigenvalues(loss_fn, params),
        lambda: hessian_trace(loss_fn, params, jax.random.key(0)),
        lambda: sharpness(loss_fn, params, metric=ms.euclidean(), rho=0.1),
    ):
        with pytest.raises(TypeError, match=r"params must be real floats, got dtype (complex|int)"):
            function()


def test_trace_is_within_its_standard_error():
    params, S = tree_of_nine(0), symmetric(np.linspace(-2.0, 5.0, 9))
    H = S + np.diag(np.asarray(flatten(params)) ** 2)
    N = 4000
    estimate, error = hessian_trace(quartic(S), params, jax.random.key(1), N)
    off_diagonal = np.sum(H**2) - np.sum(np.diag(H) ** 2)
    np.testing.assert_allclose(error, np.sqrt(2 * off_diagonal / N), rtol=0.05)
    assert abs(estimate - np.trace(H)) < 4 * error


def test_trace_of_a_diagonal_hessian_is_exact():
    params = tree_of_nine(3)
    estimate, error = hessian_trace(quartic(np.diag(np.arange(9.0))), params, jax.random.key(0), 10)
    np.testing.assert_allclose(estimate, 36 + np.sum(np.asarray(flatten(params)) ** 2), rtol=1e-14)
    assert error < 1e-14


@jax.jit
def trace_in_blocks(S, params, key):
    trace = functools.partial(hessian_trace, quartic(S), params, key, 10)
    return trace(), trace(batch_size=3)


def test_trace_does_not_depend_on_the_batch_size():
    S = symmetric(np.arange(9.0))
    whole, thirds = trace_in_blocks(S, tree_of_nine(0), jax.random.key(0))
    np.testing.assert_allclose(thirds, whole, rtol=1e-12)


@pytest.mark.parametrize("num_samples", [1, 0, 2.5])
def test_trace_needs_two_samples(num_samples):
    with pytest.raises(ValueError, match=f"2 or more, got {num_samples}"):
        hessian_trace(jnp.sum, jnp.ones(3), jax.random.key(0), num_samples)


# G(theta, g) of each metric, densely.
METRICS = {
    "euclidean": (ms.euclidean(), lambda p, g: np.eye(p.size)),
    "monge": (ms.monge(alpha=2.0), lambda p, g: np.eye(p.size) + 4 * np.outer(g, g)),
    "adaptive": (ms.adaptive(eta=0.1), lambda p, g: np.diag(1 / (np.abs(p) + 0.1) ** 2)),
    "diagonal_fisher": (ms.diagonal_fisher(eta=2.0), lambda p, g: np.diag(1 + 2 * g**2)),
}


@functools.cache
def rises_of_one_to_three_steps(name):
    def rises(S, params, rho):
        rise = functools.partial(sharpness, quartic(S), params, metric=METRICS[name][0], rho=rho)
        return [rise(), rise(steps=2), rise(steps=3)]

    return jax.jit(rises)


@pytest.mark.parametrize("name", METRICS)
@fixed
@given(seed=st.integers(0, 1000), rho=st.sampled_from([0.01, 0.3, 2.0]))
def test_sharpness_is_the_dense_one(name, seed, rho):
    matrix = METRICS[name][1]
    S = symmetric(np.random.default_rng(seed).normal(size=9), seed)
    params = tree_of_nine(seed)
    x = np.asarray(flatten(params))
    loss = lambda x: 0.5 * x @ S @ x + np.sum(x**4) / 12  # noqa: E731
    found = rises_of_one_to_three_steps(name)(S, params, rho)

    delta, rises = np.zeros(9), []
    for steps in range(3):
        y = x + delta
        g = S @ y + y**3 / 3
        natural_gradient = np.linalg.solve(matrix(x, g), g)
        delta = rho * natural_gradient / np.sqrt(g @ natural_gradient)  # eq. 5
        rises.append(loss(x + delta) - loss(x))
        np.testing.assert_allclose(found[steps], max(rises), rtol=1e-9, atol=1e-12)


def worst_rise(S, g, rho):
    """max g^T d + d^T S d / 2 over |d| <= rho, for positive S, from the secular equation."""
    eigenvalues, Q = np.linalg.eigh(S)
    h = Q.T @ g
    low, high = eigenvalues[-1], eigenvalues[-1] + np.linalg.norm(g) / rho
    for _ in range(200):
        middle = (low + high) / 2
        too_long = np.linalg.norm(h / (middle - eigenvalues)) > rho
        low, high = (middle, high) if too_long else (low, middle)
    d = h / (high - eigenvalues)
    return h @ d + 0.5 * eigenvalues @ d**2


@jax.jit
def climb_a_quadratic(S, x, rho):
    rise = functools.partial(
        sharpness, lambda p: 0.5 * p @ S @ p, x, metric=ms.euclidean(), rho=rho
    )
    return rise(), rise(steps=2), rise(steps=5), rise(steps=60)


@fixed
@given(seed=st.integers(0, 1000), rho=st.sampled_from([0.1, 1.0, 10.0]))
def test_more_steps_climb_to_the_worst_case_of_a_convex_loss(seed, rho):
    rng = np.random.default_rng(seed)
    S, x = symmetric(rng.uniform(0.1, 5, size=4), seed), rng.normal(size=4)
    climb = climb_a_quadratic(S, x, rho)
    worst = worst_rise(S, S @ x, rho)
    assert climb[0] <= climb[1] <= climb[2] <= climb[3] <= worst * (1 + 1e-9)
    assert climb[0] >= rho * np.linalg.norm(S @ x)  # its linear part: the rest is convex


def test_many_steps_reach_the_worst_case():
    S, x = symmetric(np.array([0.5, 1.0, 2.0, 4.0])), np.array([1.0, -2.0, 0.5, 0.0])
    np.testing.assert_allclose(
        climb_a_quadratic(S, x, 1.0)[3], worst_rise(S, S @ x, 1.0), rtol=1e-9
    )


def test_sharpness_under_jit_vmap_and_grad():
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
    S = symmetric(np.linspace(-1.0, 3.0, 4))
    rise = lambda p, rho: sharpness(quartic(S), p, metric=ms.monge(), rho=rho, steps=2)  # noqa: E731
    jitted = jax.jit(jax.vmap(jax.value_and_grad(rise, argnums=1), (0, None)))
    value, slope = jitted(xs, 0.3)
    np.testing.assert_allclose(value[0], rise(xs[0], 0.3), rtol=1e-12)
    difference = (jitted(xs, 0.3 + 1e-6)[0] - jitted(xs, 0.3 - 1e-6)[0]) / 2e-6
    np.testing.assert_allclose(slope, difference, rtol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_sharpness_of_narrow_params(dtype):
    with x64(False):
        rise = sharpness(
            lambda p: jnp.sum(p["w"] ** 2),
            {"w": jnp.array([3.0, 4.0], dtype)},
            metric=ms.euclidean(),
            rho=1e-3,
        )
        np.testing.assert_allclose(rise, 5.001**2 - 25, rtol=1e-3)


def test_sharpness_at_the_ends():
    loss_fn = lambda p: jnp.sum(p**2)  # noqa: E731
    assert sharpness(loss_fn, jnp.zeros(3), metric=ms.euclidean(), rho=1.0, steps=3) == 0
    assert sharpness(loss_fn, jnp.ones(3), metric=ms.euclidean(), rho=0.0) == 0
    assert jnp.isnan(
        sharpness(loss_fn, jnp.full(3, jnp.nan), metric=ms.euclidean(), rho=1.0, steps=2)
    )
    with pytest.raises(ValueError, match="steps must be an integer, 1 or more, got 0"):
        sharpness(loss_fn, jnp.ones(3), metric=ms.euclidean(), rho=1.0, steps=0)
    with pytest.raises(ValueError, match="rho must be finite and not negative"):
        sharpness(loss_fn, jnp.ones(3), metric=ms.euclidean(), rho=-1.0)
