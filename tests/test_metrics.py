"""The metrics against dense linear algebra, as laws, and at the ends of the number range."""

import itertools
from decimal import Decimal, getcontext

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import CASES, dense_perturbation, flat, relative_error

import monge_sam_jax as ms

getcontext().prec = 40
SHAPES = [(), (1,), (3,), (2, 2), (0,)]


@st.composite
def trees(draw):
    """Random (params, grads) of nested dicts, lists and tuples of small float64 arrays."""
    seed = draw(st.integers(0, 2**20))
    rng = np.random.default_rng(seed)
    shapes = st.sampled_from(SHAPES)
    form = draw(
        st.recursive(
            shapes,
            lambda inner: st.one_of(
                st.dictionaries(st.sampled_from("abc"), inner, min_size=1),
                st.lists(inner, min_size=1, max_size=3),
            ),
            max_leaves=5,
        )
    )
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    factor = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    params = jax.tree.map(lambda s: rng.normal(size=s), form, is_leaf=is_shape)
    grads = jax.tree.map(lambda s: factor * rng.normal(size=s), form, is_leaf=is_shape)
    if not any(leaf.size for leaf in jax.tree.leaves(grads)):
        return {"a": np.ones(3), "b": params}, {"a": factor * np.arange(1.0, 4.0), "b": grads}
    return params, grads


@pytest.mark.parametrize("name", CASES)
@given(tree=trees(), rho=st.sampled_from([1e-3, 0.05, 2.0]))
def test_perturbation_is_the_dense_solution(name, tree, rho):
    case = CASES[name]
    params, grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    delta = ms.worst_case_perturbation(case.metric(**case.options), grads, params, rho)
    p, g = flat(params).astype(float), flat(grads).astype(float)
    expected = dense_perturbation(case.matrix(p, g, **case.options), g, rho)
    chex.assert_trees_all_equal_shapes_and_dtypes(delta, params)
    assert relative_error(flat(delta), expected) < 2e-6


@pytest.mark.parametrize("name", CASES)
@given(tree=trees(), rho=st.sampled_from([1e-3, 0.05, 2.0]), seed=st.integers(0, 1000))
def test_perturbation_maximises_the_linear_model_over_the_ball(name, tree, rho, seed):
    case = CASES[name]
    params, grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    delta = flat(ms.worst_case_perturbation(case.metric(**case.options), grads, params, rho))
    delta, p, g = delta.astype(float), flat(params).astype(float), flat(grads).astype(float)
    G = case.matrix(p, g, **case.options)

    assert delta @ G @ delta == pytest.approx(rho**2, rel=1e-5)  # on the ball's surface
    multiplier = G @ delta  # parallel to g: the stationarity of the Lagrangian
    cosine = multiplier @ g / np.linalg.norm(multiplier) / np.linalg.norm(g)
    assert cosine == pytest.approx(1, abs=1e-6)
    rivals = np.random.default_rng(seed).normal(size=(50, p.size))
    rivals *= rho / np.sqrt(np.einsum("ni,ij,nj->n", rivals, G, rivals))[:, None]
    assert np.max(rivals @ g) <= g @ delta * (1 + 1e-5)


@pytest.mark.parametrize("base", [ms.euclidean(), ms.adaptive(0.1), ms.diagonal_fisher(2.0)])
@given(tree=trees(), alpha=st.sampled_from([0.0, 0.3, 1.0, 5.0]))
def test_monge_lift_of_any_base(base, tree, alpha):
    params, grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    of_base, _ = base.ascent(grads, params, base.init(params))
    lifted, _ = ms.monge(base, alpha).ascent(grads, params, base.init(params))
    lift = np.sqrt(1 + (alpha * float(of_base.dual_norm)) ** 2)
    chex.assert_trees_all_close(
        lifted.direction, jax.tree.map(lambda d: d / lift, of_base.direction), rtol=2e-6
    )
    assert float(lifted.dual_norm) == pytest.approx(float(of_base.dual_norm) / lift, rel=2e-6)
    shorter = np.linalg.norm(flat(lifted.direction)) <= np.linalg.norm(flat(of_base.direction))
    assert shorter
    if alpha == 0:
        chex.assert_trees_all_equal(lifted.direction, of_base.direction)


@pytest.mark.parametrize("name", CASES)
def test_ascent_is_a_unit_vector_with_the_dual_norm(name):
    case = CASES[name]
    metric = case.metric(**case.options)
    p, g = np.array([0.5, -1.0, 2.0]), np.array([1.0, -2.0, 0.5])
    params, grads = jnp.asarray(p, jnp.float32), jnp.asarray(g, jnp.float32)
    ascent, state = metric.ascent(grads, params, metric.init(params))
    G = case.matrix(p, g, **case.options)
    assert float(ascent.dual_norm) == pytest.approx(np.sqrt(g @ np.linalg.solve(G, g)), rel=1e-6)
    d = np.asarray(ascent.direction, float)
    assert d @ G @ d == pytest.approx(1, rel=1e-6)
    assert jax.tree.leaves(state) == []


def test_a_metric_made_of_a_direction_and_a_dual_norm():
    """A unit direction and its dual norm are all that a metric has to return."""

    def ascent(grads, params, state):
        norm = jnp.sqrt(jnp.sum(grads**2))
        return ms.Ascent(grads / norm, norm), state

    metric = ms.Metric(init=lambda params: (), ascent=ascent)
    g = jnp.array([3.0, 4.0])
    for lifted, plain in [(metric, ms.euclidean()), (ms.monge(metric), ms.monge())]:
        actual = ms.worst_case_perturbation(lifted, g, g, 0.5)
        np.testing.assert_allclose(actual, ms.worst_case_perturbation(plain, g, g, 0.5), rtol=1e-6)


# --- the ends of the number range ---


def decimal_monge_length(g, rho, alpha):
    """rho / sqrt(1 + alpha^2 n^2) in 40 digits; alpha = 0 gives SAM's length."""
    squared = sum((Decimal(float(x)) ** 2 for x in g), Decimal(0))
    return Decimal(rho) / (1 + Decimal(alpha) ** 2 * squared).sqrt()


FLOATS = {"float16": jnp.float16, "bfloat16": jnp.bfloat16, "float32": jnp.float32}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("leaves", [1, 50])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
@settings(max_examples=25)
@given(exponent=st.floats(0, 1), seed=st.integers(0, 100))
def test_length_from_the_smallest_normal_number_to_the_largest(
    dtype, leaves, alpha, exponent, seed
):
    info = jnp.finfo(FLOATS[dtype])
    low, high = np.log2(float(info.tiny)), np.log2(float(info.max))
    size = 2 ** (low + exponent * (high - low))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=leaves)
    g = [jnp.asarray(s * size, FLOATS[dtype]).reshape(1) for s in signs]
    if not np.all(np.isfinite(flat(g).astype(float))):
        return  # rounded up beyond the largest number
    delta = jitted_perturbation(alpha, g)
    length = np.linalg.norm(flat(delta).astype(float))
    expected = float(decimal_monge_length(flat(g), 0.05, alpha))
    if expected < jnp.finfo(jnp.float32).tiny * np.sqrt(leaves):
        assert length <= 2 * expected  # subnormal entries may count as zero
    else:
        assert length == pytest.approx(expected, rel=1e-6, abs=0)  # by itself it allows 1e-12
    assert all(d.dtype == jnp.float32 for d in delta)


@jax.jit
def jitted_perturbation(alpha, g):
    return ms.worst_case_perturbation(ms.monge(alpha=alpha), g, g, 0.05)


@pytest.mark.parametrize("exponent", [-1022, -600, -300, 0, 300, 600, 1023])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_length_in_float64(x64, exponent, alpha):
    g = [jnp.asarray([x]) * 2.0**exponent for x in np.linspace(1, 1.9, 50)]
    delta = ms.worst_case_perturbation(ms.monge(alpha=alpha), g, g, 0.05)
    length = sum((Decimal(float(d[0])) ** 2 for d in delta), Decimal(0)).sqrt()
    expected = decimal_monge_length(flat(g), 0.05, alpha)
    if expected > Decimal(2) ** -1020:
        assert abs(length / expected - 1) < Decimal("1e-14")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("exponent", [-126, -80, -40, 0, 40, 80, 126])
def test_every_metric_at_extreme_gradients(name, exponent):
    """Against float64, whose range holds the squares that float32's does not."""
    case = CASES[name]
    g = np.array([1.0, -1.5, 1.25, 1.75]) * 2.0**exponent
    p = np.array([0.5, -1.0, 2.0, 0.0])
    params, grads = jnp.asarray(p, jnp.float32), jnp.asarray(g, jnp.float32)
    delta = ms.worst_case_perturbation(case.metric(**case.options), grads, params, 0.05)
    if name == "adaptive_sam":
        T = np.abs(p) + 0.1
        expected = 0.05 * T**2 * g / np.linalg.norm(T * g)
    elif name == "fisher_sam":
        h = g / (1 + 2.0 * g**2)
        expected = 0.05 * h / np.sqrt(g @ h)
    else:
        alpha = {"sam": 0.0, "monge_sam": 1.0, "monge_sam_steep": 3.0}[name]
        n = np.linalg.norm(g)
        expected = 0.05 * g / n / np.sqrt(1 + alpha**2 * n**2)
    normal = np.abs(expected) > 2.0**-126
    np.testing.assert_allclose(np.asarray(delta)[normal], expected[normal], rtol=2e-6)
    assert np.all(np.isfinite(delta))


def test_limits_of_the_monge_perturbation():
    alpha, rho = 2.0, 0.05
    length = lambda n: float(  # noqa: E731
        jnp.abs(
            ms.worst_case_perturbation(ms.monge(alpha=alpha), jnp.array([n]), jnp.zeros(1), rho)
        )[0]
    )
    assert length(1e-20) == pytest.approx(rho, rel=1e-6)
    assert length(1e20) == pytest.approx(rho / alpha / 1e20, rel=1e-6, abs=0)


@given(st.integers(-100, 100))
def test_scaling_by_a_power_of_two_is_exact(exponent):
    g = jnp.array([0.3, -0.7, 0.11])
    delta = ms.worst_case_perturbation(ms.euclidean(), g, g, 0.05)
    scaled = ms.worst_case_perturbation(ms.euclidean(), g * 2.0**exponent, g, 0.05)
    np.testing.assert_array_equal(delta, scaled)


# --- arguments ---

BAD_VALUES = [-0.1, float("nan"), float("inf"), np.float32(-1), jnp.asarray(np.nan), np.ones(2)]
BAD_TYPES = ["0.1", None, True, 1j, [0.1], jnp.asarray(1j), np.asarray(True)]
NUMBERS = {
    "rho": lambda x: ms.worst_case_perturbation(ms.euclidean(), jnp.ones(2), jnp.ones(2), x),
    "alpha": lambda x: ms.monge(alpha=x),
    "eta": ms.adaptive,
    "eta of Fisher": ms.diagonal_fisher,
}


@pytest.mark.parametrize("argument", NUMBERS)
@pytest.mark.parametrize("value", BAD_VALUES, ids=str)
def test_a_number_that_is_no_radius(argument, value):
    with pytest.raises(ValueError, match=f"{argument.split()[0]} must be"):
        NUMBERS[argument](value)


@pytest.mark.parametrize("argument", NUMBERS)
@pytest.mark.parametrize("value", BAD_TYPES, ids=str)
def test_a_radius_that_is_no_number(argument, value):
    with pytest.raises(TypeError, match=f"{argument.split()[0]} must be a real number"):
        NUMBERS[argument](value)


def test_a_base_that_is_no_metric():
    with pytest.raises(TypeError, match="base must be a Metric"):
        ms.monge(ms.euclidean)


# --- range ---

SIZES = [1e-36, 1e-20, 1e-10, 1.0, 1e10, 1e20, 1e28, 1e36]
LARGEST = float(jnp.finfo(jnp.float32).max)


@pytest.mark.parametrize("name", ["euclidean", "adaptive", "fisher"])
@pytest.mark.parametrize("lifted", [False, True])
def test_lengths_over_the_range_of_float32(name, lifted):
    """Of gradients and params, against float64; what is out of range is its largest number."""
    metric, weights = {
        "euclidean": (ms.euclidean(), lambda p, g: np.ones_like(p)),
        "adaptive": (ms.adaptive(0.0), lambda p, g: p**2),
        "fisher": (ms.diagonal_fisher(), lambda p, g: 1 / (1 + g**2)),
    }[name]
    metric = ms.monge(metric) if lifted else metric
    update = jax.jit(
        lambda p, g: (tx := ms.sharpness_aware(lambda q: q - p, metric=metric, rho=0.1)).update(
            g, tx.init(p), p
        )
    )
    entries = np.array([0.6, -0.3, 0.2], np.float32)
    for g_size, p_size in itertools.product(SIZES, SIZES):
        g, p = entries * np.float32(g_size), entries[::-1] * np.float32(p_size)
        g64, p64 = g.astype(float), p.astype(float)
        v = weights(p64, g64) * g64
        n = np.sqrt(g64 @ v)
        if lifted and n > LARGEST:
            continue  # n itself is out of range
        length = np.linalg.norm(0.1 * v / n) / (np.hypot(1, n) if lifted else 1)
        dual_norm = n / np.hypot(1, n) if lifted else n
        _, state = update(jnp.asarray(p), jnp.asarray(g))
        delta = ms.worst_case_perturbation(metric, jnp.asarray(g), jnp.asarray(p), 0.1)
        seen = [np.linalg.norm(np.asarray(delta, float)), state.diagnostics.dual_norm]
        for actual, expected in zip(seen, (length, dual_norm), strict=True):
            if expected > 1e-35:
                assert float(actual) == pytest.approx(min(expected, LARGEST), rel=2e-6, abs=0)
        if length > 1e-35:
            seen = float(state.diagnostics.perturbation_norm)
            assert seen == pytest.approx(length, rel=2e-6, abs=0)
        assert np.all(np.isfinite(jax.tree.leaves(state)))
