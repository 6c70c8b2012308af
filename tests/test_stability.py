"""Stability against eqs. 10 and 11 written out in NumPy, finite differences and simulated flows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import monge_sam_jax as ms
from monge_sam_jax.stability import (
    critical_radius,
    is_attractor,
    stability_eigenvalues,
    stability_matrix,
)

fixed = settings(derandomize=True, deadline=None, max_examples=25)


@pytest.fixture(autouse=True, scope="module")
def double_precision():
    enable = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with enable(True):
        yield


def banana(p):
    return (1 - p[0] * p[1]) ** 2


def banana_gradient(p):
    x, y = p
    return -2 * (1 - x * y) * np.array([y, x])


def banana_hessian(p):
    x, y = p
    return np.array([[2 * y**2, 4 * x * y - 2], [4 * x * y - 2, 2 * x**2]])


def sinc(p):
    r = p[0] ** 2 + p[1] ** 2
    return 5 * jnp.sin(r) / r


def sinc_slopes(r):
    """First and second derivative of 5 sin(r) / r."""
    s, c = np.sin(r), np.cos(r)
    return 5 * (r * c - s) / r**2, 5 * (2 * s - 2 * r * c - r**2 * s) / r**3


def sinc_gradient(p):
    return 2 * sinc_slopes(p @ p)[0] * p


def sinc_hessian(p):
    first, second = sinc_slopes(p @ p)
    return 2 * first * np.eye(2) + 4 * second * np.outer(p, p)


LOSSES = {
    "banana": (banana, banana_gradient, banana_hessian),
    "sinc": (sinc, sinc_gradient, sinc_hessian),
}
METRICS = {
    "euclidean": ms.euclidean(),
    "monge": ms.monge(),
    "adaptive": ms.adaptive(eta=0.1),
    "diagonal_fisher": ms.diagonal_fisher(eta=2.0),
}
GRID = np.array([(x, y) for x in np.linspace(-2.9, 3, 8) for y in np.linspace(-3, 2.7, 8)])


def effective_radius(name, g, rho):
    n = np.linalg.norm(g)
    return {"euclidean": rho / n, "monge": rho / (n * np.sqrt(1 + n**2))}[name]


def perturbation(name, p, g, rho):
    """Eq. 5."""
    G = {
        "euclidean": np.eye(p.size),
        "monge": np.eye(p.size) + np.outer(g, g),
        "adaptive": np.diag(1 / (np.abs(p) + 0.1) ** 2),
        "diagonal_fisher": np.diag(1 + 2 * g**2),
    }[name]
    natural_gradient = np.linalg.solve(G, g)
    return rho * natural_gradient / np.sqrt(g @ natural_gradient)


@functools.cache
def matrices(loss, metric, exact=False):
    matrix = functools.partial(
        stability_matrix, LOSSES[loss][0], metric=METRICS[metric], exact=exact
    )
    return jax.jit(jax.vmap(lambda p, rho: matrix(p, rho=rho), in_axes=(0, None)))


@pytest.mark.parametrize("rho", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("metric", ["euclidean", "monge"])
@pytest.mark.parametrize("loss", LOSSES)
def test_matrix_is_that_of_equation_10(loss, metric, rho):
    _, gradient, hessian = LOSSES[loss]
    for p, A in zip(GRID, np.asarray(matrices(loss, metric)(GRID, rho)), strict=True):
        g = gradient(p)
        radius = effective_radius(metric, g, rho)
        if loss == "sinc" and np.linalg.norm(p + radius * g) < 0.2:
            continue  # the derivatives of sin(r) / r cancel digits there
        expected = (hessian(p + radius * g) @ (np.eye(2) + radius * hessian(p))).T
        np.testing.assert_allclose(A, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())


def test_matrix_outside_jit_and_transposed_as_in_equation_10():
    p = np.array([0.3, 1.2])
    A = stability_matrix(banana, jnp.asarray(p), metric=ms.monge(), rho=0.5)
    np.testing.assert_allclose(A, matrices("banana", "monge")(p[None], 0.5)[0], rtol=1e-12)
    assert abs(A[0, 1] - A[1, 0]) > 0.1


@pytest.mark.parametrize("rho", [0.0, 0.3])
@pytest.mark.parametrize(
    ("loss", "metric"), [*(("banana", metric) for metric in METRICS), ("sinc", "monge")]
)
def test_exact_matrix_is_the_difference_quotient_of_the_field(loss, metric, rho):
    _, gradient, _ = LOSSES[loss]

    def field(p):
        return gradient(p + perturbation(metric, p, gradient(p), rho))

    h = 1e-5
    for p, A in zip(GRID, np.asarray(matrices(loss, metric, exact=True)(GRID, rho)), strict=True):
        expected = [(field(p + h * e) - field(p - h * e)) / (2 * h) for e in np.eye(2)]
        np.testing.assert_allclose(A, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("metric", ["adaptive", "diagonal_fisher"])
def test_frozen_radius_needs_a_multiple_of_the_gradient(metric):
    p = jnp.array([0.7, -0.4])
    for function in (stability_matrix, stability_eigenvalues):
        with pytest.raises(ValueError, match="not a multiple of the gradient; use exact=True"):
            function(banana, p, metric=METRICS[metric], rho=0.5)
    assert jnp.isnan(matrices("banana", metric)(p[None], 0.5)).all()
    # Without a perturbation there is nothing to freeze.
    A = stability_matrix(banana, p, metric=METRICS[metric], rho=0.0)
    np.testing.assert_allclose(A, banana_hessian(np.asarray(p)), rtol=1e-12)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("metric", ["euclidean", "monge"])
def test_no_matrix_at_an_equilibrium(metric, exact):
    equilibria = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 0.5]])
    matrix = matrices("banana", metric, exact)
    assert jnp.isnan(matrix(equilibria, 0.5)).all()
    hessians = [banana_hessian(p) for p in equilibria]
    np.testing.assert_allclose(matrix(equilibria, 0.0), hessians, atol=1e-14)


@pytest.mark.parametrize("n", [2, 50])
def test_no_eigenvalues_at_an_equilibrium(n):
    loss_fn = lambda p: jnp.sum(p**2)  # noqa: E731
    options = {"metric": ms.euclidean(), "k": 2}
    found = stability_eigenvalues(loss_fn, jnp.zeros(n), rho=0.5, **options)
    assert found.shape == (2,)
    assert jnp.isnan(found).all()
    assert not is_attractor(found)
    descent = stability_eigenvalues(loss_fn, jnp.zeros(n), rho=0.0, **options)
    np.testing.assert_allclose(descent, 2, rtol=1e-12)


def test_no_matrix_where_the_gradient_is_not_finite():
    p = jnp.array([jnp.nan, 1.0])
    assert jnp.isnan(stability_matrix(banana, p, metric=ms.euclidean(), rho=0.5)).all()


def test_params_in_a_tree():
    rng = np.random.default_rng(0)
    tree = {"b": [jnp.asarray(rng.normal()), None], "a": jnp.asarray(rng.normal(size=(2, 1)))}
    x, unravel = ravel_pytree(tree)
    loss_fn = lambda x: jnp.sum(jnp.cos(jnp.outer(x, x)))  # noqa: E731

    @jax.jit
    def flat_and_tree(x):
        matrix = functools.partial(stability_matrix, metric=ms.monge(), rho=0.3)
        return matrix(loss_fn, x), matrix(lambda p: loss_fn(ravel_pytree(p)[0]), unravel(x))

    flat, tree = flat_and_tree(x)
    np.testing.assert_allclose(tree, flat, rtol=1e-12)


@pytest.mark.parametrize("rho", [0.2, 1.0])
@pytest.mark.parametrize("metric", ["euclidean", "monge"])
def test_eigenvalues_of_two_params(metric, rho):
    spectrum = lambda p: stability_eigenvalues(banana, p, metric=METRICS[metric], rho=rho)  # noqa: E731
    found = jax.jit(jax.vmap(spectrum))(GRID)
    expected = np.linalg.eigvals(np.asarray(matrices("banana", metric)(GRID, rho)))
    np.testing.assert_allclose(found, np.sort_complex(expected), rtol=1e-8, atol=1e-8)
    np.testing.assert_array_equal(is_attractor(found), (expected.real > 0).all(axis=-1))


def network():
    """Cross-entropy of a perceptron with 1 hidden layer."""
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(40, 6)), np.eye(5)[rng.integers(5, size=40)]
    params = {
        "in": jnp.asarray(rng.normal(size=(6, 9)) / 2),
        "out": jnp.asarray(rng.normal(size=(9, 5)) / 2),
    }

    def loss_fn(params):
        logits = jnp.tanh(x @ params["in"]) @ params["out"]
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * labels, axis=-1))

    return loss_fn, params


@pytest.mark.parametrize(
    ("metric", "exact", "rho"),
    [("monge", False, 1.0), ("adaptive", True, 0.3)],
)
def test_smallest_eigenvalues_of_a_network(metric, exact, rho):
    loss_fn, params = network()
    x, unravel = ravel_pytree(params)
    gradient = jax.grad(lambda x: loss_fn(unravel(x)))
    frozen = None if exact else effective_radius(metric, np.asarray(gradient(x)), rho)

    def field(x):
        T = jnp.abs(x) + 0.1
        g = gradient(x)
        delta = rho * T**2 * g / jnp.linalg.norm(T * g) if exact else frozen * g
        return gradient(x + delta)

    expected = np.sort_complex(np.linalg.eigvals(jax.jit(jax.jacrev(field))(x)))
    smallest = functools.partial(
        stability_eigenvalues, loss_fn, params, metric=METRICS[metric], rho=rho, exact=exact
    )
    np.testing.assert_allclose(smallest(k=3, tol=1e-9), expected[:3], rtol=1e-6)
    coarse = smallest(k=1)
    np.testing.assert_allclose(coarse, expected[:1], rtol=2e-2)
    assert coarse.dtype == jnp.complex128
    assert not is_attractor(coarse)


def test_a_product_with_the_matrix_is_two_hessian_products():
    loss_fn, params = network()
    passes = []

    def counted(params):
        jax.debug.callback(lambda: passes.append(1))
        return loss_fn(params)

    options = {"metric": ms.euclidean(), "k": 1}
    stability_eigenvalues(counted, params, rho=0.3, **options)
    jax.effects_barrier()
    setup = 1  # the gradient that gives the effective radius
    assert (len(passes) - setup) % 2 == 0
    assert len(passes) < 2 * 100


def test_few_params_are_solved_densely():
    p = jnp.array([0.7, -0.4])
    spectrum = functools.partial(stability_eigenvalues, banana, p, metric=ms.monge(), rho=0.5)
    np.testing.assert_array_equal(spectrum(k=1), spectrum()[:1])
    np.testing.assert_array_equal(spectrum(k=7), spectrum())


def test_eigenvalues_say_what_is_wrong():
    loss_fn = lambda p: jnp.sum(p**4)  # noqa: E731
    spectrum = functools.partial(stability_eigenvalues, loss_fn, metric=ms.euclidean(), rho=0.5)
    with pytest.raises(ValueError, match="k must be an integer, 1 or more, got 0"):
        spectrum(jnp.ones(30), k=0)
    with pytest.raises(TypeError, match="call this outside"):
        jax.jit(lambda p: spectrum(p, k=1))(jnp.ones(30))
    with pytest.raises(TypeError, match="params must be real floats"):
        spectrum(jnp.ones(3, complex))
    with pytest.raises(ValueError, match="rho must be finite and not negative"):
        stability_matrix(loss_fn, jnp.ones(3), metric=ms.euclidean(), rho=-1.0)


def test_on_a_line_equation_10_tells_from_where_sam_moves_to_a_maximum():
    curvature, rho = -3.0, 0.5

    @jax.jit
    def frozen_and_exact(p):
        loss_fn = lambda p: 0.5 * curvature * jnp.sum(p**2)  # noqa: E731
        matrix = functools.partial(stability_matrix, loss_fn, p, metric=ms.euclidean(), rho=rho)
        return matrix()[0, 0], matrix(exact=True)[0, 0]

    for start in (0.1, 0.4, 0.6, 2.0):
        frozen, exact = frozen_and_exact(jnp.array([start]))
        velocity = -curvature * (start + rho * np.sign(curvature * start))
        assert (frozen > 0) == (velocity < 0) == (start < rho)
        np.testing.assert_allclose(exact, curvature)


@pytest.mark.parametrize("curvatures", [(-3.0, 3.0), (-3.0, -3.0)])
def test_the_papers_example_of_equation_11(curvatures):
    # "if rho_tilde = 0.35 and we consider ... eigenvalues of {-3, 3} and {-3, -3}", section 3.2
    H = np.array(curvatures)
    assert critical_radius(H) == 1 / 3
    p = jnp.array([0.1, 0.2])
    for radius, attracts in ((0.35, True), (0.33, False)):
        rho = radius * np.linalg.norm(H * p)
        eigenvalues = stability_eigenvalues(
            lambda p: 0.5 * jnp.sum(H * p**2), p, metric=ms.euclidean(), rho=rho
        )
        np.testing.assert_allclose(eigenvalues, np.sort(H + radius * H**2), rtol=1e-9)
        assert is_attractor(eigenvalues) == attracts


def test_an_attractor_has_no_eigenvalue_on_the_axis():
    spectra = np.array([[1 + 2j, 1 - 2j], [0.0, 1.0], [2j, -2j], [np.nan, 1.0], [-1.0, 1.0]])
    np.testing.assert_array_equal(is_attractor(spectra), [True, False, False, False, False])


curvatures = st.lists(st.floats(-10, 10).filter(lambda x: abs(x) > 1e-2), min_size=1, max_size=6)


@fixed
@given(curvatures)
def test_an_equilibrium_attracts_above_the_critical_radius_alone(curvatures):
    H = np.array(curvatures)
    critical = float(critical_radius(H))
    attracts = lambda radius: bool(is_attractor(H + radius * H**2))  # noqa: E731
    assert attracts(critical + 1e-9 + 1e-9 * critical)
    if critical == 0:
        assert attracts(0.0)
        assert (H > 0).all()
    else:
        assert not attracts(critical * (1 - 1e-9))


@pytest.mark.parametrize(
    "curvatures", [(-3.0, 3.0), (-0.5, -4.0, 1.0), (-0.2, 0.0, 5.0), (0.0, 1.0, 2.0)]
)
def test_deviations_decay_above_the_critical_radius(curvatures):
    H = np.array(curvatures)
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(H.size, H.size)))[0]
    hessian = Q @ np.diag(H) @ Q.T
    critical = float(critical_radius(H))
    start = np.ones(H.size)
    neutral = Q[:, H == 0]
    remains = neutral @ neutral.T @ start  # never decays, whatever the radius

    def deviation_after(radius, time=150.0):
        A = hessian @ (np.eye(H.size) + radius * hessian)  # eq. 10 at an equilibrium
        return scipy.linalg.expm(-A * time) @ start

    np.testing.assert_allclose(deviation_after(critical * 1.5 + 0.5), remains, atol=1e-6)
    if critical > 0:
        assert np.linalg.norm(deviation_after(critical * 0.5)) > 1e3


def test_critical_radius_over_leading_axes():
    H = np.array([[[-3.0, 3.0], [-4.0, -0.5]], [[1.0, 2.0], [0.0, 1.0]]])
    expected = [[1 / 3, 2], [0, 0]]
    np.testing.assert_allclose(critical_radius(H), expected, rtol=1e-15)
    np.testing.assert_allclose(jax.jit(jax.vmap(critical_radius))(H), expected, rtol=1e-15)
    assert jnp.isnan(critical_radius(jnp.array([jnp.nan, 1.0])))
    np.testing.assert_allclose(jax.jacfwd(critical_radius)(H[0, 0]), [1 / 9, 0], rtol=1e-15)


@pytest.mark.parametrize("rho", [0.2, 0.5, 1.0])
def test_more_points_around_the_saddle_attract_sam_than_monge_sam(rho):
    # Figure 4. The Hessian is indefinite all over this square, so gradient descent has none.
    axis = np.linspace(-0.5, 0.5, 20)
    square = np.array([(x, y) for x in axis for y in axis])
    descent, monge, sam = (
        is_attractor(np.linalg.eigvals(matrices("banana", name)(square, radius))).sum()
        for name, radius in [("monge", 0.0), ("monge", rho), ("euclidean", rho)]
    )
    assert descent == 0 < monge < sam
