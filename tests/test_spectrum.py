"""Spectra under jit and on shards, against dense linear algebra and matrices of known spectrum."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matrices import FIRST, SPECTRA, flatten, quartic, small_network, symmetric, tree_of_nine
from trajectories import make_mesh, spread

from monge_sam_jax._core.lanczos import tridiagonalize
from monge_sam_jax.curvature import (
    SymmetricOperator,
    hessian_trace,
    lanczos_eigenvalues,
    lanczos_quadrature,
    layerwise_eigenvalues,
    layerwise_traces,
    spectral_density,
)

KEY = jax.random.key(0)


def operator(S):
    S = jnp.asarray(S)
    return SymmetricOperator(lambda v: jnp.matmul(S, v, precision="highest"))


def goe(n, seed=0):
    A = np.random.default_rng(seed).normal(size=(n, n))
    return (A + A.T) / np.sqrt(8 * n)  # a semicircle of radius one


DENSE = {name: symmetric(spectrum) for name, spectrum in SPECTRA.items()} | {
    "diagonal": np.diag(np.random.default_rng(1).normal(size=100)),
    "goe": goe(300),
    "low_rank_over_a_bulk": goe(300) + 3 * symmetric(np.r_[[5.0, 4, 4, -3], np.zeros(296)]),
    "five_values": symmetric(np.repeat([-2.0, 0, 0, 0, 0, 1, 3], 30)),
}
QUICK_DENSE = ("diagonal", "goe", "low_rank_over_a_bulk", "five_values", "spread")
EACH_DENSE = [
    name if name in QUICK_DENSE else pytest.param(name, marks=pytest.mark.slow) for name in DENSE
]


@functools.cache
def eigenvalues_of(name):
    return np.linalg.eigvalsh(DENSE[name])


def bells(eigenvalues, grid, width):
    z = (np.asarray(grid, np.float64)[:, None] - eigenvalues) / width
    return np.exp(-0.5 * z**2) / width / np.sqrt(2 * np.pi)


def assert_density(grid, density, eigenvalues, width, samples):
    """Up to five standard deviations of an estimate of as many samples, and its resolution."""
    f = bells(eigenvalues, grid, width)
    deviation = np.sqrt(2 * np.sum(f**2, axis=1) / samples) / eigenvalues.size
    exact = np.mean(f, axis=1)
    assert np.all(np.abs(density - exact) < 5 * deviation + 0.01 * np.max(exact))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_quadrature_is_exact_for_polynomials(num_steps):
    """Of a diagonal matrix: there random signs have no variance."""
    spectrum = np.linspace(-2.0, 3.0, 50)
    product = SymmetricOperator(lambda v: jnp.asarray(spectrum) * v)
    nodes, weights = lanczos_quadrature(
        product, jnp.zeros(50), KEY, num_samples=3, num_steps=num_steps
    )
    assert nodes.shape == weights.shape == (3, num_steps)
    moments = [np.mean(spectrum**d) for d in range(2 * num_steps + 1)]
    found = [np.sum(weights * nodes**d) for d in range(2 * num_steps + 1)]
    np.testing.assert_allclose(found[:-1], moments[:-1], rtol=1e-12)
    assert abs(found[-1] - moments[-1]) > 1e-4 * moments[-1]  # of degree 2 m it is not


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("reorthogonalize", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", EACH_DENSE)
def test_quadrature_has_the_moments_and_the_distribution(name, reorthogonalize):
    eigenvalues = eigenvalues_of(name)
    n, samples = eigenvalues.size, 30
    nodes, weights = lanczos_quadrature(
        operator(DENSE[name]),
        jnp.zeros(n),
        KEY,
        num_samples=samples,
        num_steps=60,
        reorthogonalize=reorthogonalize,
    )
    nodes, weights = np.asarray(nodes), np.asarray(weights)
    np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-12)
    assert np.all(weights >= 0)
    for power in (1, 2):
        # Four standard deviations of the estimate, which are zero for a diagonal matrix.
        F = np.linalg.matrix_power(DENSE[name], power)
        deviation = np.sqrt(2 * (np.sum(F**2) - np.sum(np.diag(F) ** 2)) / samples) / n
        moment = np.mean(eigenvalues**power)
        assert abs(np.sum(weights * nodes**power) - moment) < 4 * deviation + 1e-12

    between = (eigenvalues[1:] + eigenvalues[:-1])[np.diff(eigenvalues) > 1e-6] / 2
    below = np.sum(weights * (nodes < between[:, None, None]), axis=(1, 2))
    exact = np.mean(eigenvalues < between[:, None], axis=1)
    deviation = np.sqrt(2 * exact * (1 - exact) / (samples * n))
    assert np.all(np.abs(below - exact) < 4 * deviation + 0.01)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("width", [0.1, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", EACH_DENSE)
def test_density_is_that_of_the_eigenvalues(name, width):
    eigenvalues = eigenvalues_of(name)
    n = eigenvalues.size
    grid, density = spectral_density(
        operator(DENSE[name]), jnp.zeros(n), KEY, num_samples=20, num_steps=60, width=width
    )
    assert_density(grid, density, eigenvalues, width, samples=20)
    integrate = lambda f: np.trapezoid(f * density, grid)  # noqa: E731
    np.testing.assert_allclose(integrate(1), 1, rtol=1e-8)
    deviation = np.sqrt(2 * np.mean(eigenvalues**2) / n / 20)
    np.testing.assert_allclose(integrate(grid), np.mean(eigenvalues), atol=4 * deviation)
    second = np.mean(eigenvalues**2) + width**2
    deviation = np.sqrt(2 * np.mean(eigenvalues**4) / n / 20)
    np.testing.assert_allclose(integrate(grid**2), second, atol=4 * deviation)
    assert grid[0] < eigenvalues[0] - 5 * width
    assert grid[-1] > eigenvalues[-1] + 5 * width


@pytest.mark.usefixtures("x64")
def test_density_of_a_network():
    loss_fn, params, H = small_network()
    eigenvalues = np.linalg.eigvalsh(H)
    grid, density = spectral_density(loss_fn, params, KEY, num_samples=30, num_steps=80)
    width = 0.01 * np.max(np.abs(eigenvalues))
    assert_density(grid, density, eigenvalues, width, samples=30)
    np.testing.assert_allclose(np.trapezoid(density, grid), 1, rtol=1e-8)


@pytest.mark.parametrize("spectrum", [np.ones(10), np.zeros(10), np.r_[-1e-3, np.full(9, 1e3)]])
@pytest.mark.parametrize("width", [None, 1e-9, 0.5])
def test_density_integrates_to_one_whatever_the_width(spectrum, width):
    product = SymmetricOperator(lambda v: jnp.float32(spectrum) * v)
    grid, density = spectral_density(product, jnp.zeros(10), KEY, width=width, num_points=200)
    assert grid.shape == density.shape == (200,)
    assert grid.dtype == density.dtype == jnp.float32
    np.testing.assert_allclose(np.trapezoid(density, grid), 1, rtol=1e-4)


def test_density_on_a_grid_of_ones_own():
    own = jnp.linspace(-3.0, 3.0, 50)
    product = SymmetricOperator(lambda v: jnp.linspace(-1.0, 1.0, 10) * v)
    grid, density = spectral_density(product, jnp.zeros(10), KEY, width=0.5, grid=own)
    np.testing.assert_array_equal(grid, own)
    np.testing.assert_allclose(
        density, np.mean(bells(np.linspace(-1.0, 1.0, 10), own, 0.5), axis=1), rtol=1e-4, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_all_of_it_under_jit():
    loss_fn, params, _ = small_network()

    def all_of_it(params, key, width):
        return (
            spectral_density(loss_fn, params, key, num_samples=2, num_steps=10, width=width),
            lanczos_eigenvalues(loss_fn, params, key, 2, num_steps=10, return_eigenvectors=True),
            layerwise_traces(loss_fn, params, key, 3, labels="all"),
        )

    compiled = jax.jit(all_of_it)
    compiled(params, KEY, 0.2)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-9),
        compiled(params, jax.random.key(1), 0.1),
        all_of_it(params, jax.random.key(1), 0.1),
    )
    assert compiled._cache_size() == 1


def test_products_are_counted():
    count = []

    def product(v):
        count.append(1)
        return jnp.arange(50.0) * v

    lanczos_quadrature(SymmetricOperator(product), jnp.zeros(50), KEY, num_samples=3, num_steps=7)
    assert len(count) == 21
    lanczos_eigenvalues(SymmetricOperator(product), jnp.zeros(50), KEY, num_steps=9)
    assert len(count) == 30
    spectral_density(SymmetricOperator(product), jnp.zeros(50), KEY)
    assert len(count) == 30 + 4 * 40


@pytest.mark.parametrize("spectrum", [np.geomspace(1e-4, 1e4, 300), np.linspace(-1.0, 1.0, 300)])
@pytest.mark.parametrize("num_steps", [pytest.param(100, marks=pytest.mark.slow), 300])
def test_the_basis_stays_orthonormal(spectrum, num_steps):
    """In float32, long after the largest eigenvalues are found, and over leaves of all shapes."""
    S = jnp.float32(symmetric(spectrum))
    params = {"a": jnp.zeros((10, 20)), "b": [jnp.zeros(()), jnp.zeros(99)], "none": None}
    leaves, structure = jax.tree.flatten(params)

    def product(v):
        image = jnp.matmul(S, flatten(v), precision="highest")
        parts = jnp.split(image, np.cumsum([x.size for x in leaves])[:-1])
        return jax.tree.unflatten(
            structure, [x.reshape(p.shape) for x, p in zip(parts, leaves, strict=True)]
        )

    state = tridiagonalize(product, params, KEY, num_steps, num_steps)
    Q = np.asarray(jax.vmap(flatten)(state.basis), np.float64)
    np.testing.assert_allclose(Q @ Q.T, np.eye(num_steps), atol=3e-6)
    T = Q @ symmetric(spectrum) @ Q.T
    tolerance = 1e-5 * np.max(np.abs(spectrum))
    np.testing.assert_allclose(np.diag(T), state.diagonal, atol=tolerance)
    np.testing.assert_allclose(np.diag(T, 1), state.off_diagonal[:-1], atol=tolerance)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("which", FIRST)
@pytest.mark.parametrize("name", SPECTRA)
def test_eigenvalues_of_known_spectrum(name, which):
    """By as many steps as there are dimensions, with all copies of those that are repeated."""
    expected = np.sort(FIRST[which](SPECTRA[name])[:3])[::-1]
    values, residuals = lanczos_eigenvalues(
        operator(DENSE[name]), jnp.zeros(60), KEY, 3, which, num_steps=60
    )
    np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-10)
    assert np.max(residuals) < 1e-9
    assert values.dtype == residuals.dtype == jnp.float64


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("num_steps", [8, pytest.param(15, marks=pytest.mark.slow), 40])
@pytest.mark.parametrize("which", FIRST)
def test_residuals_are_those_of_the_pairs_and_bound_the_error(which, num_steps):
    loss_fn, params, H = small_network()
    values, residuals, vectors = lanczos_eigenvalues(
        loss_fn, params, KEY, 4, which, num_steps=num_steps, return_eigenvectors=True
    )
    assert np.all(np.diff(values) <= 0)
    assert jax.tree.structure(vectors) == jax.tree.structure(params)
    V = np.asarray(jax.vmap(flatten)(vectors))
    np.testing.assert_allclose(V @ V.T, np.eye(4), atol=1e-12)
    of_pairs = np.linalg.norm(V @ H - np.asarray(values)[:, None] * V, axis=1)
    np.testing.assert_allclose(residuals, of_pairs, rtol=1e-6, atol=1e-12)
    distances = np.min(np.abs(np.asarray(values)[:, None] - np.linalg.eigvalsh(H)), axis=1)
    assert np.all(distances <= of_pairs + 1e-12)
    if num_steps == 40 and which == "LA":
        np.testing.assert_allclose(values, np.linalg.eigvalsh(H)[:-5:-1], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_float32_at_any_scale(scale):
    spectrum = np.linspace(-3.0, 9.0, 60) ** 3
    values, residuals = lanczos_eigenvalues(
        operator(jnp.float32(scale * symmetric(spectrum))), jnp.zeros(60), KEY, 2, num_steps=60
    )
    assert values.dtype == residuals.dtype == jnp.float32
    np.testing.assert_allclose(values / scale, spectrum[:-3:-1], rtol=1e-5)
    assert np.max(residuals / scale) < 1e-2


@pytest.mark.parametrize("n", [1, 2, 5])
def test_more_steps_than_dimensions(n):
    spectrum = np.arange(1.0, n + 1)
    product = SymmetricOperator(lambda v: jnp.asarray(spectrum, v.dtype) * v)
    values, residuals = lanczos_eigenvalues(product, jnp.zeros(n), KEY, 20, num_steps=30)
    np.testing.assert_allclose(values, spectrum[::-1], rtol=1e-5)
    assert np.max(residuals) < 1e-5
    quadrature = lanczos_quadrature(product, jnp.zeros(n), KEY, num_steps=30)
    assert quadrature.nodes.shape == (4, n)


@pytest.mark.parametrize("jit", [False, True])
def test_a_product_that_returns_what_it_was_given(jit):
    eigenvalues = functools.partial(
        lanczos_eigenvalues, SymmetricOperator(lambda v: v), k=3, num_steps=5
    )
    values, _ = (jax.jit(eigenvalues) if jit else eigenvalues)(jnp.zeros(10), key=KEY)
    np.testing.assert_allclose(values, 1, rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_a_hessian_that_is_not_finite_gives_nan(jit):
    def both(params):
        loss_fn = lambda p: jnp.sum(jnp.abs(p) ** 1.5)  # noqa: E731
        return (
            lanczos_eigenvalues(loss_fn, params, KEY, num_steps=5),
            spectral_density(loss_fn, params, KEY, num_steps=5)[1],
        )

    found = (jax.jit(both) if jit else both)(jnp.zeros(10))
    assert all(np.all(np.isnan(x)) for x in jax.tree.leaves(found))


def test_arguments_that_are_wrong():
    params, loss_fn = jnp.ones(5), lambda p: jnp.sum(p**3)
    with pytest.raises(ValueError, match="which must be one of LA, SA, LM, got 'SM'"):
        lanczos_eigenvalues(loss_fn, params, KEY, which="SM")
    with pytest.raises(ValueError, match="k must be an integer, 1 or more, got 0"):
        lanczos_eigenvalues(loss_fn, params, KEY, 0)
    with pytest.raises(ValueError, match="num_steps must be an integer, 3 or more, got 2"):
        lanczos_eigenvalues(loss_fn, params, KEY, 3, num_steps=2)
    with pytest.raises(ValueError, match="num_samples must be an integer, 1 or more, got 0"):
        lanczos_quadrature(loss_fn, params, KEY, num_samples=0)
    with pytest.raises(ValueError, match="num_points must be an integer, 64 or more, got 2"):
        spectral_density(loss_fn, params, KEY, num_points=2)
    with pytest.raises(ValueError, match=r"there are no params to take a spectrum over, got \{\}"):
        lanczos_quadrature(lambda p: jnp.zeros(()), {}, KEY)
    with pytest.raises(ValueError, match="labels must be a tree of labels that is a prefix"):
        layerwise_traces(lambda p: loss_fn(p["a"]), {"a": params}, KEY, labels={"b": 0})


@pytest.mark.parametrize("params", [{"a": jnp.ones(2), "b": 1j}, np.arange(3)])
@pytest.mark.parametrize(
    "function",
    [
        lanczos_quadrature,
        spectral_density,
        lanczos_eigenvalues,
        layerwise_eigenvalues,
        layerwise_traces,
        hessian_trace,
    ],
)
def test_params_must_be_real(function, params):
    with pytest.raises(TypeError, match=r"params must be real floats, got dtype (complex|int)"):
        function(lambda p: jnp.sum(jnp.abs(flatten(p)) ** 2), params, KEY)


LABELS = {
    "leaves": (None, {"a": ["a"], "b/0": ["b0"], "b/1": ["b1"], "empty": []}),
    "prefix": ({"a": "x", "b": "y", "empty": "y", "none": None}, {"x": ["a"], "y": ["b0", "b1"]}),
    "function": (
        lambda params: {**params, "a": 1, "b": [2, 1], "empty": 1},
        {1: ["a", "b1"], 2: ["b0"]},
    ),
}
PLACES = {"a": [0, 1], "b0": [2], "b1": [3, 4, 5, 6, 7, 8]}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "as_operator"),
    [
        pytest.param("prefix", False, marks=pytest.mark.slow),
        ("prefix", True),
        ("function", False),
        pytest.param("function", True, marks=pytest.mark.slow),
    ],
)
def test_blocks_are_those_of_the_dense_hessian(name, as_operator):
    labels, blocks = LABELS[name]
    params, S = tree_of_nine(0), symmetric(np.linspace(-2.0, 5.0, 9))
    H = S + np.diag(np.asarray(flatten(params)) ** 2)
    loss_fn = quartic(S)
    if as_operator:
        loss_fn = SymmetricOperator(
            lambda v, loss=loss_fn: jax.jvp(jax.grad(loss), (params,), (v,))[1]
        )
    found = layerwise_eigenvalues(loss_fn, params, KEY, 2, labels=labels)
    traces = layerwise_traces(loss_fn, params, KEY, 400, labels=labels)
    assert list(found) == list(traces)
    assert set(found) == set(blocks)
    for label, parts in blocks.items():
        places = np.concatenate([PLACES[part] for part in parts])
        block = H[np.ix_(places, places)]
        np.testing.assert_allclose(found[label][0], np.linalg.eigvalsh(block)[::-1][:2], rtol=1e-8)
        estimate, error = traces[label]
        assert abs(estimate - np.trace(block)) < 4 * error + 1e-12
        off_diagonal = np.sum(block**2) - np.sum(np.diag(block) ** 2)
        np.testing.assert_allclose(error, np.sqrt(2 * off_diagonal / 400), rtol=0.2, atol=1e-12)


def test_blocks_are_named_by_their_paths():
    params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "scale": [jnp.ones(())]}
    loss_fn = lambda p: jnp.sum(flatten(p) ** 2)  # noqa: E731
    found = layerwise_traces(loss_fn, params, KEY, 2)
    traces = {label: float(trace) for label, (trace, _) in found.items()}
    assert traces == {"dense/bias": 6.0, "dense/kernel": 12.0, "scale/0": 2.0}
    with pytest.raises(ValueError, match=r"two leaves are at the path 'a/b'.*give labels"):
        layerwise_traces(loss_fn, {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, KEY, 2)


@jax.custom_jvp
def not_to_be_differentiated(x):
    return x


@not_to_be_differentiated.defjvp
def _(primals, tangents):
    raise AssertionError("differentiated with respect to another block")


def test_blocks_are_differentiated_alone():
    loss_fn = lambda p: jnp.sum(p["a"] ** 2) * jnp.sum(not_to_be_differentiated(p["b"]))  # noqa: E731
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    with pytest.raises(AssertionError, match="another block"):
        lanczos_eigenvalues(loss_fn, params, KEY)
    labels = {"a": "a", "b": "b"}
    with pytest.raises(AssertionError, match="another block"):  # the block of b itself
        layerwise_eigenvalues(loss_fn, params, KEY, labels=labels)
    a_alone = lambda p: loss_fn({"a": p["a"], "b": params["b"]})  # noqa: E731
    found = layerwise_eigenvalues(a_alone, {"a": params["a"]}, KEY)
    np.testing.assert_allclose(found["a"][0], 4, rtol=1e-6)


# A shape tells which leaf it is of.
SPECS = {"w": P("data", "model"), "v": P("model", "data"), "b": P("model"), "t": P()}


def sharded_loss(params):
    """One that has sharded leaves meet elementwise, and in sums."""
    coupling = jnp.mean(params["w"]) + jnp.mean(params["v"] ** 3) + params["t"]
    return (
        jnp.mean(jnp.cos(params["w"]) * params["w"] ** 2)
        + jnp.sum(params["b"] ** 2) * coupling
        + coupling**4
    )


def sharded_params():
    rng = np.random.default_rng(0)
    shapes = {"w": (16, 32), "v": (32, 8), "b": (24,), "t": ()}
    return {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}


LAYERS = {"w": "matrices", "v": "matrices", "b": "rest", "t": "rest"}


def spectra(params, key):
    return (
        spectral_density(sharded_loss, params, key, num_samples=2, num_steps=12, width=0.1),
        lanczos_eigenvalues(sharded_loss, params, key, 3, num_steps=12, return_eigenvectors=True),
        layerwise_eigenvalues(sharded_loss, params, key, num_steps=5, labels=LAYERS),
        hessian_trace(sharded_loss, params, key, 2),
    )


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("axis_type", "jit"),
    [(AxisType.Auto, True), (AxisType.Auto, False), (AxisType.Explicit, True)],
)
@pytest.mark.slow
def test_shards_change_nothing(axis_type, jit):
    whole, mesh = sharded_params(), make_mesh(axis_type, data=4, model=2)
    parts = spread(mesh, whole, SPECS)
    expected = jax.jit(spectra)(whole, KEY)
    found = (jax.jit(spectra) if jit else spectra)(parts, KEY)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), found, expected
    )
    for name, leaf in found[1][2].items():
        spec = NamedSharding(mesh, P(None, *SPECS[name]))
        assert leaf.sharding.is_equivalent_to(spec, leaf.ndim)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
def test_only_scalars_and_coefficients_move_between_devices(axis_type):
    """All of the iteration: this loss itself needs no more than sums."""
    parts = spread(make_mesh(axis_type, data=4, model=2), sharded_params(), SPECS)
    eigenvalues = functools.partial(lanczos_eigenvalues, sharded_loss, num_steps=12)
    compiled = jax.jit(eigenvalues).lower(parts, key=KEY).compile()
    found, expected = compiled(parts, key=KEY), jax.jit(eigenvalues)(sharded_params(), key=KEY)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), found, expected
    )
    program = compiled.as_text()
    moved = re.findall(
        r"= (\S.*?) (all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\(", program
    )
    assert moved
    for shapes, kind in moved:
        assert kind == "all-reduce"
        sizes = [
            np.prod([int(d) for d in s.split(",") if d]) for s in re.findall(r"\[(.*?)\]", shapes)
        ]
        assert max(sizes) <= 12, shapes
    assert "f32[12,16,32]" not in program  # nor is the basis whole on any device
    assert "f32[12,4,16]" in program
