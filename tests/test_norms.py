"""Balls of norms: against formulas by hand, singular values, and brute force."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from reference import (
    adaptive_matrix,
    dense_perturbation,
    example_batch,
    example_params,
    flat,
    monge_matrix,
    network_grad,
    network_loss,
)
from trajectories import make_mesh, spread

import monge_sam_jax as ms

RHO = 0.3
WITHIN = 0.01  # of singular values


def by_ndim(params):
    return jax.tree.map(lambda p: "matrices" if p.ndim > 1 else "rest", params)


NORMS = {
    "layerwise": ms.layerwise(),
    "layerwise adaptive": ms.layerwise(ms.adaptive(0.1)),
    "supremum": ms.supremum(),
    "spectral": ms.spectral(),
    "groups": ms.grouped({"matrices": ms.spectral(), "rest": ms.supremum()}, by_ndim),
}


def size_of(name, delta, params):
    """The norm of a tree of float64 arrays, literally."""
    if name == "layerwise adaptive":
        delta = jax.tree.map(lambda d, p: d / (np.abs(p) + 0.1), delta, params)

    def of(leaf):
        if name == "supremum" or (name == "groups" and leaf.ndim < 2):
            return np.max(np.abs(leaf))
        if name in ("spectral", "groups") and leaf.ndim > 1:
            return np.linalg.norm(leaf.reshape(-1, leaf.shape[-1]), 2)
        return np.linalg.norm(leaf)

    return max(map(of, jax.tree.leaves(delta)))


def random_tree(seed, complex_=False):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (2, 3, 4), "w": (3, 5), "v": (4,), "s": ()}
    draw = lambda s: rng.normal(size=s) + (1j * rng.normal(size=s) if complex_ else 0)  # noqa: E731
    return {name: np.asarray(draw(shape)) for name, shape in shapes.items()}


def single(tree):
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.complex64 if np.iscomplexobj(x) else jnp.float32), tree
    )


@functools.cache
def jitted(name, alpha):
    metric = NORMS[name] if alpha is None else ms.monge(NORMS[name], alpha)
    return jax.jit(lambda g, p: ms.worst_case_perturbation(metric, g, p, RHO))


def dot(a, b):
    return sum(np.sum(x * y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.parametrize("name", NORMS)
@given(seed=st.integers(0, 2**20), alpha=st.sampled_from([None, 0.1, 3.0]))
def test_no_point_of_the_ball_rises_more_to_first_order(name, seed, alpha):
    """Of N(delta) <= rho, or lifted, N(delta)^2 + alpha^2 (g . delta)^2 <= rho^2."""
    g, p = random_tree(seed), random_tree(seed + 1)
    delta = jax.tree.map(np.float64, jitted(name, alpha)(single(g), single(p)))

    def lifted(d):
        return np.hypot(size_of(name, d, p), (alpha or 0) * dot(g, d))

    assert lifted(delta) == pytest.approx(RHO, rel=1e-3)
    rng = np.random.default_rng(seed)
    for i in range(60):
        other = jax.tree.map(lambda x: rng.normal(size=x.shape), delta)
        if i % 3:  # most of them nearby
            other = jax.tree.map(lambda d, o: d + 0.1**i * o, delta, other)  # noqa: B023
        rise = dot(g, other) * RHO / lifted(other)
        assert rise <= dot(g, delta) * (1 + 1e-3)


# --- layer by layer ---


@pytest.mark.parametrize(
    ("base", "matrix"),
    [
        (ms.monge(alpha=2.0), functools.partial(monge_matrix, alpha=2.0)),
        (ms.adaptive(0.1), functools.partial(adaptive_matrix, eta=0.1)),
    ],
)
def test_each_leaf_has_its_own_ball(base, matrix):
    params = example_params()
    g = network_grad(params, example_batch())
    metric = ms.layerwise(base)
    delta = ms.worst_case_perturbation(metric, g, params, RHO)
    for d, x, p in zip(*map(jax.tree.leaves, (delta, g, params)), strict=True):
        x, p = np.ravel(x).astype(float), np.ravel(p).astype(float)
        expected = dense_perturbation(matrix(p, x), x, RHO)
        np.testing.assert_allclose(np.ravel(d), expected, rtol=1e-5)
    ascent, _ = metric.ascent(g, params, metric.init(params))
    assert float(ascent.dual_norm) * RHO == pytest.approx(float(dot(g, delta)), rel=1e-5)


def test_layers_are_groups_of_one_leaf():
    params = example_params()
    g = network_grad(params, example_batch())
    leaves, tree = jax.tree.flatten(params)
    labels = jax.tree.unflatten(tree, range(len(leaves)))
    groups = ms.grouped(dict.fromkeys(range(len(leaves)), ms.adaptive()), labels)
    for wrap in (lambda m: m, ms.monge, lambda m: ms.scaled(m, 2.0)):
        actual = ms.worst_case_perturbation(wrap(ms.layerwise(ms.adaptive())), g, params, RHO)
        expected = ms.worst_case_perturbation(wrap(groups), g, params, RHO)
        np.testing.assert_array_equal(flat(actual), flat(expected))


def test_a_state_for_each_leaf():
    """It is one of the base's, with trees of the form of the params in it."""
    params = {"a": jnp.array([1.0, -2.0]), "b": {"c": jnp.array([[3.0], [1.0]])}}
    base = ms.averaged_monge(2, alpha=2.0)
    metric = ms.layerwise(base)
    state = metric.init(params)
    assert jax.tree.structure(state.former[0]) == jax.tree.structure(params)
    alone = [base.init(leaf) for leaf in jax.tree.leaves(params)]
    for step in range(3):
        g = jax.tree.map(lambda p: jnp.cos(p * (step + 1)), params)  # noqa: B023
        ascent, state = jax.jit(metric.ascent)(g, params, state)
        for i, leaf in enumerate(jax.tree.leaves(g)):
            found, alone[i] = base.ascent(leaf, leaf, alone[i])
            actual = jax.tree.leaves(ascent.direction)[i]
            np.testing.assert_allclose(actual, found.direction, rtol=2e-6)
    assert [int(n) for n in jax.tree.leaves(state.count)] == [2, 2]
    tx = optax.chain(ms.sharpness_aware(jnp.cos, metric=metric), optax.sgd(0.1))
    marked = optax.tree.map_params(tx, lambda leaf: None, tx.init(params))
    assert jax.tree.leaves(marked[0].metric_state.former) == []


def test_layers_where_none_is_perturbed():
    params = {"a": None, "b": {}}
    for metric in (ms.layerwise(), ms.layerwise(ms.averaged_monge(2)), ms.spectral()):
        ascent, _ = metric.ascent(params, params, metric.init(params))
        assert (ascent.tangent, float(ascent.dual_norm)) == (params, 0.0)


# --- the largest entry ---


def test_supremum():
    g = np.array([[3.0, -1e-30], [0.0, -2.0]], np.float32)
    metric = ms.supremum()
    delta = ms.worst_case_perturbation(metric, jnp.asarray(g), jnp.zeros((2, 2)), RHO)
    np.testing.assert_array_equal(delta, np.float32(RHO) * np.sign(g))
    ascent, _ = metric.ascent(jnp.asarray(g), None, ())
    assert float(ascent.dual_norm) == 5.0


@pytest.mark.parametrize("size", [1e-37, 1e-20, 1.0, 1e20, 1e37])
def test_supremum_of_complex_entries(size):
    g = np.array([3 + 4j, -1j, 0, 1e-3 + 0j]) * size
    ascent, _ = ms.supremum().ascent(jnp.asarray(g, jnp.complex64), None, ())
    expected = g / np.maximum(np.abs(g), 1e-300)
    if size == 1e-37:
        expected[3] = 0  # subnormal
    np.testing.assert_allclose(ascent.tangent, expected, rtol=1e-6)
    np.testing.assert_allclose(ascent.dual_norm, np.sum(np.abs(g)), rtol=2e-4)


def test_derivatives_of_a_complex_sign(x64):
    def turn(t):
        found, _ = ms.supremum().ascent(jnp.array([(1 + 2j) * (t + 1j)]), None, ())
        return found.tangent.real[0]

    h = 1e-6
    numeric = (turn(0.3 + h) - turn(0.3 - h)) / (2 * h)
    assert float(jax.grad(turn)(0.3)) == pytest.approx(float(numeric), rel=1e-6)


# --- the largest singular value ---


def with_singular_values(values, shape, seed=0):
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, len(values))))[0] for n in shape)
    return (left * values) @ right.T


SPECTRA = {
    "flat": (np.ones(6), (6, 9)),
    "tall": (np.geomspace(1, 1e-2, 5), (30, 5)),
    "wide": (np.geomspace(1, 1e-4, 5), (5, 30)),
    "square": (np.geomspace(1, 3e-5, 8), (8, 8)),
    "of deficient rank": (np.array([1.0, 0.5, 1e-2]), (20, 12)),
    "of one column": (np.ones(1), (7, 1)),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_polar_factors(name):
    values, shape = SPECTRA[name]
    g = with_singular_values(values, shape)
    metric = ms.spectral()
    ascent, _ = jax.jit(metric.ascent)(jnp.asarray(g, jnp.float32), jnp.zeros(shape), ())
    left, s, right = np.linalg.svd(g, full_matrices=False)
    found = np.diag(left.T @ np.asarray(ascent.direction, float) @ right.T)
    is_zero = s < 1e-12
    assert np.all(np.abs(found[~is_zero] - 1) < WITHIN)
    largest = np.linalg.norm(np.asarray(ascent.direction, float), 2)
    assert largest < 1.0001
    assert float(ascent.dual_norm) == pytest.approx(s.sum(), rel=1e-3)
    gain = np.sum(g * np.asarray(ascent.direction, float))
    assert float(ascent.dual_norm) == pytest.approx(gain, rel=1e-5)
    assert np.linalg.norm(np.asarray(ascent.direction) - (left * ~is_zero) @ right, 2) < WITHIN


def test_small_singular_values_end_between_zero_and_one():
    values = np.geomspace(1, 1e-7, 40)
    g = with_singular_values(values, (40, 60))
    ascent, _ = ms.spectral().ascent(jnp.asarray(g, jnp.float32), None, ())
    left, s, right = np.linalg.svd(g, full_matrices=False)
    found = np.diag(left.T @ np.asarray(ascent.direction, float) @ right.T)
    above = s > 3e-5 * np.linalg.norm(g)
    assert np.all(np.abs(found[above] - 1) < WITHIN)
    assert np.all((found > -1e-3) & (found < 1.0001))
    assert found[-1] < 0.1


@pytest.mark.parametrize("bits", [10, 7])
def test_products_of_low_precision_do(bits):
    """TF32 keeps ten bits of a factor, bfloat16 seven."""
    g = with_singular_values(np.geomspace(1, 1e-3, 64), (64, 128))
    x = g / np.linalg.norm(g)
    rounded = lambda a: np.asarray(jax.lax.reduce_precision(np.float32(a), 8, bits))  # noqa: E731
    times = lambda a, b: rounded(a) @ rounded(b)  # noqa: E731
    for a, b, c in ms.norms.COEFFICIENTS:
        gram = times(x, x.T)
        x = np.float32(a * x + times(b * gram + c * times(gram, gram), x))
    values = np.linalg.svd(x, compute_uv=False)
    assert np.all(np.abs(values - 1) < WITHIN)


def test_kernels_and_stacks():
    """By default all axes but the last against the last; others are a stack."""
    rng = np.random.default_rng(0)
    g = rng.normal(size=(3, 2, 5, 4))

    def polar(matrix):
        left, _, right = np.linalg.svd(matrix, full_matrices=False)
        return left @ right

    def direction(metric):
        return metric.ascent(jnp.asarray(g, jnp.float32), None, ())[0].direction

    kernel = polar(g.reshape(30, 4)).reshape(g.shape)
    np.testing.assert_allclose(direction(ms.spectral()), kernel, atol=WITHIN)
    stack = np.stack([[polar(g[i, j]) for j in range(2)] for i in range(3)])
    metric = ms.spectral(reduction_axis=-2)
    np.testing.assert_allclose(direction(metric), stack, atol=WITHIN)
    dual_norm = metric.ascent(jnp.asarray(g, jnp.float32), None, ())[0].dual_norm
    values = np.linalg.svd(g, compute_uv=False)
    assert float(dual_norm) == pytest.approx(values.sum(), rel=1e-3)
    pairs = np.stack([polar(g[:, i].transpose(1, 0, 2).reshape(5, 12)) for i in range(2)])
    pairs = pairs.reshape(2, 5, 3, 4).transpose(2, 0, 1, 3)
    metric = ms.spectral(reduction_axis=2, output_axis=(0, -1))
    np.testing.assert_allclose(direction(metric), pairs, atol=WITHIN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_axis": 3}, r"shape \(2, 3, 4\) has no axes \[3\]; .*monge_sam_jax.grouped"),
        ({"reduction_axis": (0, 2)}, r"an axis of a leaf of shape \(2, 3, 4\) twice"),
    ],
)
def test_axes_that_a_leaf_does_not_have(options, message):
    g = jnp.ones((2, 3, 4))
    with pytest.raises(ValueError, match=message):
        ms.worst_case_perturbation(ms.spectral(**options), g, g, RHO)
    rest = ms.spectral(**options).ascent({"w": jnp.ones((2, 2)), "v": jnp.ones(3)}, None, ())
    assert float(rest[0].dual_norm) == pytest.approx(2 + 3**0.5, rel=1e-3)


def test_one_loop_for_all_matrices():
    g = [jnp.ones((3 + i, 4)) for i in range(20)]
    text = jax.jit(ms.spectral().ascent).lower(g, g, ()).as_text()
    assert len(re.findall(r"stablehlo\.while", text)) == 1
    assert len(re.findall(r"stablehlo\.dot_general", text)) == 3 * len(g)
    assert len(ms.norms.COEFFICIENTS) * 3 == 30  # products for a leaf


# --- all of them ---

EVERY = {**NORMS, "lifted": ms.monge(ms.layerwise(ms.adaptive())), "p": ms.monge(ms.supremum())}
COMPOSED_SLOW = [
    *NORMS,
    *(pytest.param(x, marks=pytest.mark.slow) for x in EVERY if x not in NORMS),
]


@functools.partial(jax.jit, static_argnums=0)
def worst_step(name, g, params, rho):
    return ms.worst_case_perturbation(EVERY[name], g, params, rho)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("size", [1e-34, 1e-20, 1e34])
def test_gradients_of_any_size(name, size):
    """Of one for all leaves, and of one for each: the worst step in a norm does not see it."""
    g, p = random_tree(3), single(random_tree(4))
    g = jax.tree.map(lambda x: x / np.max(np.abs(x)), g)
    expected = jitted(name, None)(single(g), p)
    for powers in (dict.fromkeys(g, 1), {"kernel": 1, "w": -1, "v": 0, "s": 0.5}):
        scaled = {key: np.float32(g[key] * size ** powers[key]) for key in g}
        delta = jitted(name, None)(single(scaled), p)
        if name in ("supremum", "groups"):
            same = {k: np.abs(scaled[k]) > 1.2e-38 for k in g}  # not subnormal
            delta = {k: np.where(same[k], delta[k], expected[k]) for k in g}
        np.testing.assert_allclose(flat(delta), flat(expected), rtol=1e-4, atol=1e-6)
        ascent, _ = jax.jit(NORMS[name].ascent)(single(scaled), p, NORMS[name].init(p))
        gain = dot(jax.tree.map(np.float64, scaled), jax.tree.map(np.float64, ascent.direction))
        assert float(ascent.dual_norm) == pytest.approx(gain, rel=1e-4, abs=0)


@pytest.mark.parametrize("name", COMPOSED_SLOW)
def test_zero_gradients(name):
    """No perturbation, and finite derivatives of first and second order."""
    p = single({k: x for k, x in random_tree(0).items() if k in ("w", "s")})
    zeros = jax.tree.map(jnp.zeros_like, p)
    assert not np.any(flat(worst_step(name, zeros, p, RHO)))

    def outcome(scale, rho):
        g = jax.tree.map(lambda x: scale * x, p)
        delta = worst_step(name, g, p, rho)
        return sum(jnp.sum(d) for d in jax.tree.leaves(delta))

    first = jax.grad(outcome, argnums=(0, 1))
    both = jax.jit(lambda *x: (first(*x), jax.jacfwd(first, argnums=(0, 1))(*x)))
    assert np.all(np.isfinite(flat(both(0.0, RHO))))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_anywhere(name, bad):
    p = single(random_tree(0))
    for key in p:
        g = {**p, key: p[key].at[(0,) * p[key].ndim].set(bad)}
        delta = worst_step(name, g, p, RHO)
        assert not np.any(np.isfinite(flat(delta)))


@pytest.mark.parametrize("name", EVERY)
def test_low_precision_none_and_empty_leaves(name):
    p = random_tree(0)
    low = {k: jnp.asarray(x, jnp.bfloat16) for k, x in p.items()}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    actual = worst_step(name, low, low, RHO)
    expected = worst_step(name, wide, wide, RHO)
    np.testing.assert_array_equal(flat(actual), flat(expected))
    more = {**wide, "none": None, "empty": jnp.zeros((0, 3))}
    actual = worst_step(name, more, more, RHO)
    assert (actual.pop("none"), actual.pop("empty").shape) == (None, (0, 3))
    np.testing.assert_allclose(flat(actual), flat(expected), rtol=1e-6)


@pytest.mark.parametrize("name", COMPOSED_SLOW)
def test_derivatives_are_those_of_finite_differences(x64, name):
    """Also in float64, whose steps are those of float32 to rounding."""
    p, q = random_tree(0), random_tree(1)
    q = jax.tree.map(lambda x: x / 10, q)

    def outcome(t):
        g = jax.tree.map(lambda a, b: a + t * b, p, q)
        delta = worst_step(name, g, p, RHO)
        return sum(jnp.sum(jnp.sin(d)) for d in jax.tree.leaves(delta))

    h, outcome = 1e-6, jax.jit(outcome)
    numeric = (outcome(h) - outcome(-h)) / (2 * h)
    slope = jax.jit(jax.grad(outcome))(0.0)
    assert float(slope) == pytest.approx(float(numeric), rel=1e-6, abs=1e-9)
    delta = worst_step(name, p, p, RHO)
    single_ = worst_step(name, single(p), single(p), RHO)
    assert flat(delta).dtype == np.float64
    np.testing.assert_allclose(flat(single_), flat(delta), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["layerwise adaptive", "spectral"])
def test_complex_matrices(name):
    g = random_tree(0, complex_=True)
    delta = jitted(name, None)(single(g), single(g))
    for key, x in g.items():
        if name == "spectral":
            left, _, right = np.linalg.svd(x.reshape(-1, x.shape[-1] if x.ndim > 1 else 1), False)
            expected = RHO * (left @ right).reshape(x.shape)
        else:
            weights = np.abs(x) + 0.1
            expected = RHO * weights**2 * x / np.linalg.norm(weights * x)
        np.testing.assert_allclose(delta[key], expected, atol=WITHIN * RHO, rtol=WITHIN)


@pytest.mark.parametrize("name", EVERY)
def test_ensembles(name):
    members = [single(random_tree(seed)) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    perturb = lambda g: worst_step(name, g, g, RHO)  # noqa: E731
    alone = jax.tree.map(lambda *x: jnp.stack(x), *map(perturb, members))
    np.testing.assert_allclose(flat(jax.vmap(perturb)(stacked)), flat(alone), rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", EVERY)
def test_on_a_mesh(name):
    """Sharded along different axes, as on one device."""
    rng = np.random.default_rng(0)
    g = {"w": rng.normal(size=(16, 8)), "u": rng.normal(size=(8, 16)), "v": rng.normal(size=8)}
    specs = {"w": P("data", "model"), "u": P(None, "data"), "v": P("model")}
    mesh = make_mesh(AxisType.Auto, data=4, model=2)
    perturb = jax.jit(lambda g: worst_step(name, g, g, RHO))
    expected = perturb(single(g))
    actual = perturb(spread(mesh, single(g), specs))
    for key in g:
        np.testing.assert_allclose(actual[key], expected[key], rtol=1e-4, atol=1e-6)


def test_training_in_the_ball_of_muon():
    """Matrices in their spectral ball, the rest in a Euclidean one, by hand in NumPy."""
    params, batch = example_params(), example_batch()
    metric = ms.grouped(
        {"matrices": ms.spectral(), "rest": ms.scaled(ms.euclidean(), 0.5)}, by_ndim
    )
    tx = ms.sharpness_aware(network_grad, metric=ms.monge(metric), rho=RHO)
    g = network_grad(params, batch)
    updates, state = jax.jit(tx.update)(g, tx.init(params), params, batch=batch)

    def norm_and_step(x):
        x = np.asarray(x, float)
        if x.ndim > 1:
            left, s, right = np.linalg.svd(x, full_matrices=False)
            return s.sum(), left @ right
        return None, x

    rest = np.linalg.norm([np.linalg.norm(x) for x in jax.tree.leaves(g) if x.ndim < 2])
    n = 0.5 * rest + sum(norm_and_step(x)[0] for x in jax.tree.leaves(g) if x.ndim > 1)
    step = lambda x: norm_and_step(x)[1] * (1 if x.ndim > 1 else 0.5 / rest)  # noqa: E731
    perturbed = jax.tree.map(lambda p, x: p + RHO * step(x) / np.hypot(1, n), params, g)
    expected = network_grad(single(perturbed), batch)
    np.testing.assert_allclose(flat(updates), flat(expected), atol=WITHIN)
    diagnostics = ms.get_diagnostics(state)
    assert float(diagnostics.dual_norm) == pytest.approx(n / np.hypot(1, n), rel=1e-3)
    rise = network_loss(single(perturbed), batch) - network_loss(params, batch)
    assert float(diagnostics.predicted_sharpness) == pytest.approx(float(rise), rel=0.3)


@pytest.mark.parametrize("build", [ms.layerwise, ms.averaged_monge_over])
def test_a_base_that_is_no_metric(build):
    with pytest.raises(TypeError, match=r"base must be a Metric such as euclidean\(\)"):
        build(base=ms.sam, **({} if build is ms.layerwise else {"gradients": jnp.ones((2, 3))}))
