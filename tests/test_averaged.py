"""The averaged Monge metric against dense linear algebra, exact fractions, and Monge's own."""

import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from reference import example_batch, example_params, flat, network_grad, network_loss
from trajectories import make_mesh, spread

import monge_sam_jax as ms

RHO, ALPHA = 0.3, 2.0
BATCH = example_batch()
BASES = {
    "euclidean": (ms.euclidean(), lambda p: np.eye(p.size)),
    "adaptive": (ms.adaptive(0.1), lambda p: np.diag(1 / (np.abs(p) + 0.1) ** 2)),
    "scaled": (ms.scaled(ms.adaptive(0.1), 3.0), lambda p: np.diag(1 / (np.abs(p) + 0.1) ** 2) / 9),
    "pullback": (
        ms.pullback(lambda p: jax.tree.map(lambda x: x**3 + x, p), diagonal=True),
        lambda p: np.diag((3 * p**2 + 1) ** 2),
    ),
}


def dense(M, given, g, alpha=ALPHA):
    """The unit ascent and the dual norm, from G itself."""
    G = M + alpha**2 / len(given) * sum(np.outer(x, x) for x in given)
    natural_gradient = np.linalg.solve(G, g)
    dual_norm = np.sqrt(g @ natural_gradient)
    return natural_gradient / dual_norm, dual_norm


def assert_ascent(ascent, expected, rtol):
    direction, dual_norm = expected
    seen = flat(ascent.direction).astype(float)
    atol = rtol * np.abs(direction).max()
    np.testing.assert_allclose(seen, direction, rtol=rtol, atol=atol)
    assert float(ascent.dual_norm) == pytest.approx(dual_norm, rel=rtol, abs=0)


def gradients_of(seed, count, size):
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda p: jnp.asarray(size * rng.normal(size=p.shape), p.dtype), params)
        for params in [example_params()] * count
    ]


@functools.cache
def jitted(history, base, alpha=ALPHA):
    return jax.jit(ms.averaged_monge(history, alpha, BASES[base][0]).ascent)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("history", [1, pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("size", [1e-3, pytest.param(1.0, marks=pytest.mark.slow), 30.0])
def test_the_last_gradients(base, history, size):
    """Also before there are so many, and after."""
    metric, matrix = BASES[base]
    params = example_params()
    state = ms.averaged_monge(history, ALPHA, metric).init(params)
    seen = []
    for g in gradients_of(0, history + 2, size):
        ascent, state = jitted(history, base)(g, params, state)
        seen.append(flat(g).astype(float))
        M = matrix(flat(params).astype(float))
        assert_ascent(ascent, dense(M, seen[-history:], seen[-1]), rtol=2e-5)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("size", [1e-37, pytest.param(1.0, marks=pytest.mark.slow), 1e30])
def test_the_first_step_is_that_of_monge(base, size):
    params = example_params()
    (g,) = gradients_of(1, 1, size)
    metric = ms.averaged_monge(5, ALPHA, BASES[base][0])
    actual, state = jitted(5, base)(g, params, metric.init(params))
    expected, _ = jax.jit(ms.monge(BASES[base][0], ALPHA).ascent)(g, params, ())
    again, _ = jitted(5, base)(g, params, state)  # and so are all of the same gradient
    for found, rtol in ((actual, 2e-6), (again, 2e-5)):
        np.testing.assert_allclose(
            flat(found.direction), flat(expected.direction), rtol=rtol, atol=1e-37
        )
    np.testing.assert_allclose(actual.dual_norm, expected.dual_norm, rtol=2e-6)
    np.testing.assert_allclose(again.dual_norm, expected.dual_norm, rtol=2e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 5.0])
def test_a_history_of_one_is_monge(alpha):
    params = example_params()
    g = network_grad(params, BATCH)
    actual = ms.worst_case_perturbation(ms.averaged_monge(1, alpha), g, params, RHO)
    expected = ms.worst_case_perturbation(ms.monge(alpha=alpha), g, params, RHO)
    np.testing.assert_allclose(flat(actual), flat(expected), rtol=1e-6)


@jax.jit
def perturb_over(given, alpha, g):
    metric = ms.averaged_monge_over(given, alpha)
    return ms.worst_case_perturbation(metric, g, jnp.zeros_like(g), RHO)


@given(seed=st.integers(0, 2**20), alpha=st.sampled_from([0.0, 0.5, 4.0]))
def test_no_point_of_the_ball_rises_more_to_first_order(seed, alpha):
    rng = np.random.default_rng(seed)
    given, g = rng.normal(size=(3, 6)), rng.normal(size=6)
    G = np.eye(6) + alpha**2 / 3 * given.T @ given
    delta = perturb_over(jnp.asarray(given, jnp.float32), alpha, jnp.asarray(g, jnp.float32))
    delta = np.asarray(delta, float)
    others = rng.normal(size=(300, 6))
    others[:200] = delta + 0.1 * others[:200]
    others *= RHO / np.sqrt(np.einsum("ni,ij,nj->n", others, G, others))[:, None]
    assert np.max(others @ g) <= delta @ g * (1 + 1e-5)
    assert delta @ G @ delta == pytest.approx(RHO**2, rel=1e-4)


# --- exact, where the gradients are far apart in size or nearly parallel ---


def exact(given, g):
    """The unit ascent for M = I, alpha = 1 and g the last of the given, in fractions."""
    rows = [[Fraction(float(x)) for x in row] for row in given]
    r = len(rows)
    dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
    # G^-1 g = sum_i c_i g_i, where (I + K / r) c is the last unit vector and K the Gram matrix.
    A = [[(i == j) + dot(rows[i], rows[j]) / r for j in range(r)] for i in range(r)]
    b = [Fraction(0)] * (r - 1) + [Fraction(1)]
    for k, i in itertools.combinations(range(r), 2):
        factor = A[i][k] / A[k][k]
        A[i] = [x - factor * y for x, y in zip(A[i], A[k], strict=True)]
        b[i] -= factor * b[k]
    for k in reversed(range(r)):
        b[k] = (b[k] - sum(A[k][j] * b[j] for j in range(k + 1, r))) / A[k][k]
    v = [dot(b, column) for column in zip(*rows, strict=True)]
    squared = dot(rows[-1], v)
    scale = max(map(abs, v))
    length = float(squared / scale**2) ** 0.5  # in range where the squares are not
    return np.array([float(x / scale) for x in v]) / length, length * float(scale)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e3, 1e8, 1e30])
@pytest.mark.parametrize("difference", [1e-5, 1e-3, 1.0])
def test_gradients_of_any_size_and_nearly_parallel(size, difference):
    """To the digits in which they differ; the dual norm to all of them."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=30)
    for history, factor in itertools.product((2, 4), (1.0, 1e4)):
        params = jnp.zeros(30)
        state = ms.averaged_monge(history).init(params)
        given = []
        for i in range(history):
            g = (common + difference * rng.normal(size=30)) * size * factor ** (i % 2)
            given.append(g.astype(np.float32))
            ascent, state = jitted(history, "euclidean", 1.0)(jnp.asarray(given[-1]), params, state)
        direction, dual_norm = exact(given, given[-1])
        seen = np.asarray(ascent.tangent, float) / float(ascent.length)
        error = np.abs(seen - direction).max() / np.abs(direction).max()
        assert error < 3e-6 + 1e-6 / difference
        assert float(ascent.dual_norm) == pytest.approx(dual_norm, rel=1e-5, abs=0)


@pytest.mark.parametrize("history", [2, 5, 8])
def test_it_is_finite_whatever_the_gradients(history):
    """Repeated, nearly repeated, zero, huge and tiny ones in any order."""
    rng = np.random.default_rng(history)
    metric = ms.averaged_monge(history)
    update = jitted(history, "euclidean", 1.0)
    params, bases = jnp.zeros(2000), rng.normal(size=(2, 2000))
    state = metric.init(params)
    for _ in range(60):
        g = bases[rng.integers(2)] * 10.0 ** rng.integers(-30, 30)
        g = g * (1 + rng.choice([0, 1e-7, 1e-6, 1e-4]) * rng.normal(size=2000)) * rng.integers(0, 4)
        ascent, state = update(jnp.asarray(g, jnp.float32), params, state)
        assert np.all(np.isfinite(flat(ascent)))
        assert np.linalg.norm(flat(ascent.tangent).astype(float)) <= 1.001 * float(ascent.length)


# --- given gradients ---


def each_gradient(params, count=4):
    parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), BATCH)
    return jax.vmap(network_grad, (None, 0))(params, parts)


@pytest.mark.parametrize("base", BASES)
def test_gradients_of_microbatches(base):
    metric, matrix = BASES[base]
    params = example_params()

    @jax.jit
    def find(params, alpha):
        built = ms.averaged_monge_over(each_gradient(params), alpha, metric)
        return built.ascent(network_grad(params, BATCH), params, built.init(params))

    ascent, state = find(params, ALPHA)
    given = np.asarray(jax.vmap(lambda x: ravel_pytree(x)[0])(each_gradient(params)), float)
    g = flat(network_grad(params, BATCH)).astype(float)
    # Of the mean of the gradients given not much is apart from them.
    assert_ascent(ascent, dense(matrix(flat(params).astype(float)), given, g), rtol=3e-4)
    assert state == ()


def test_a_step_with_gradients_of_microbatches():
    """The whole step, in a compiled function that builds the transformation."""
    params = example_params()
    mask = {"hidden": {"w": True, "b": False}, "out": True, "temperature": True}

    @jax.jit
    def step(params):
        metric = ms.averaged_monge_over(each_gradient(params), ALPHA)
        tx = ms.sharpness_aware(network_grad, metric=metric, rho=RHO, mask=mask)
        return tx.update(network_grad(params, BATCH), tx.init(params), params, batch=BATCH)

    updates, _ = step(params)
    chosen = lambda tree: {**tree, "hidden": {"w": tree["hidden"]["w"]}}  # noqa: E731
    given = [jax.tree.map(lambda x: x[i], chosen(each_gradient(params))) for i in range(4)]  # noqa: B023
    g = chosen(network_grad(params, BATCH))
    direction, _ = dense(
        np.eye(flat(g).size), [flat(x).astype(float) for x in given], flat(g).astype(float)
    )
    delta = ravel_pytree(g)[1](jnp.asarray(RHO * direction, jnp.float32))
    delta["hidden"]["b"] = jnp.zeros_like(params["hidden"]["b"])
    expected = network_grad(jax.tree.map(jnp.add, params, delta), BATCH)
    np.testing.assert_allclose(flat(updates), flat(expected), rtol=1e-4, atol=1e-5)


def test_given_gradients_in_a_group():
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    given = {"a": jnp.eye(3), "b": jnp.ones((3, 2))}
    over = ms.averaged_monge_over(given, ALPHA)
    metric = ms.grouped({"x": over, "y": ms.euclidean()}, {"a": "x", "b": "y"})
    delta = ms.worst_case_perturbation(metric, params, params, RHO)
    alone = ms.averaged_monge_over(given["a"], ALPHA)
    expected = ms.worst_case_perturbation(alone, params["a"], params["a"], RHO)
    np.testing.assert_allclose(delta["a"], expected, rtol=1e-6)


# --- the state ---


def test_what_the_state_takes():
    """History - 1 copies of the params, in their dtypes, and what it keeps in them."""
    params = {"w": jnp.ones((40, 5), jnp.bfloat16), "v": jnp.ones(7), "none": None}
    metric = ms.averaged_monge(4)
    state = metric.init(params)
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    assert size(state) == 3 * size(params) + 4
    g = jax.tree.map(lambda p: 2 * p.astype(jnp.float32), params)
    for steps in range(1, 6):
        _, state = metric.ascent(g, params, state)
        assert size(state) == 3 * size(params) + 4
        assert int(state.count) == min(steps, 4)
        full = [bool(np.all(flat(tree) == 2)) for tree in state.former]
        assert full == [i < steps for i in range(3)]
    assert jax.tree.map(lambda x: x.dtype, state.former[2]) == jax.tree.map(
        lambda x: x.dtype, params
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_not_kept(bad):
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    metric = ms.averaged_monge(3)
    good = {"a": jnp.array([1.0, 2.0, 3.0]), "b": jnp.ones(2)}
    _, state = metric.ascent(good, params, metric.init(params))
    ascent, after = metric.ascent({**good, "b": jnp.array([1.0, bad])}, params, state)
    assert not np.any(np.isfinite(flat(ascent.direction)))
    assert np.isnan(ascent.dual_norm)
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.usefixtures("on_cpu")
def test_on_a_mesh():
    """The former gradients lie as the params do; results are those of one device."""
    specs = {"w": P("data", "model"), "u": P(None, "data"), "v": P("model")}
    rng = np.random.default_rng(0)
    draw = lambda: {  # noqa: E731
        k: rng.normal(size=s).astype(np.float32)
        for k, s in {"w": (16, 8), "u": (8, 16), "v": 8}.items()
    }
    mesh = make_mesh(AxisType.Auto, data=4, model=2)
    start = draw()
    tx = ms.sharpness_aware(
        lambda p: jax.tree.map(jnp.cos, p), metric=ms.averaged_monge(3, ALPHA), rho=RHO
    )
    params = spread(mesh, start, specs)
    sharded, plain = ms.init_sharded(tx, params), tx.init(start)
    for tree in sharded.metric_state.former:
        assert {k: x.sharding for k, x in tree.items()} == {
            k: x.sharding for k, x in params.items()
        }
    update = jax.jit(tx.update)
    for _ in range(4):
        g = draw()
        actual, sharded = update(spread(mesh, g, specs), sharded, params)
        expected, plain = update(g, plain, start)
        for key in g:
            np.testing.assert_allclose(actual[key], expected[key], rtol=1e-4, atol=1e-5)


# --- derivatives, other dtypes ---


def test_derivatives_at_zero_gradients_are_finite():
    params = {"a": jnp.ones(3), "b": jnp.array([1.0, 2.0])}
    metric = ms.averaged_monge(2)
    _, state = metric.ascent(params, params, metric.init(params))

    def outcome(scale, state):
        ascent, _ = metric.ascent(jax.tree.map(lambda p: scale * p, params), params, state)
        return jnp.sum(ascent.direction["a"]) + ascent.dual_norm

    first = jax.grad(outcome)
    derivatives = jax.jit(lambda *x: (first(*x), jax.jacfwd(first)(*x)))
    for before in (state, metric.init(params)):
        assert float(outcome(0.0, before)) == 0
        assert np.all(np.isfinite(derivatives(0.0, before)))


def test_float64_and_derivatives_there(x64):
    params = example_params(jnp.float64)
    metric = ms.averaged_monge(3, ALPHA, ms.adaptive(0.1))
    rng = np.random.default_rng(0)
    draw = lambda: jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)  # noqa: E731
    given = [draw() for _ in range(3)]
    state, update = metric.init(params), jax.jit(metric.ascent)
    for g in given:
        before = state
        ascent, state = update(g, params, state)
    M = np.diag(1 / (np.abs(flat(params)) + 0.1) ** 2)
    assert_ascent(ascent, dense(M, list(map(flat, given)), flat(given[-1])), rtol=1e-12)

    @jax.jit
    def outcome(t):
        g = jax.tree.map(lambda x, p: x + t * p, given[-1], params)
        found, _ = metric.ascent(g, params, before)
        return sum(jnp.sum(jnp.sin(d)) for d in jax.tree.leaves(found.direction))

    numeric = (outcome(1e-6) - outcome(-1e-6)) / 2e-6
    assert float(jax.jit(jax.grad(outcome))(0.0)) == pytest.approx(float(numeric), rel=1e-6)


def test_complex_gradients_are_their_real_and_imaginary_parts():
    rng = np.random.default_rng(0)
    given = rng.normal(size=(3, 4)) + 1j * rng.normal(size=(3, 4))
    split = lambda x: np.concatenate([x.real, x.imag], axis=-1)  # noqa: E731
    metric = ms.averaged_monge_over(jnp.asarray(given, jnp.complex64), ALPHA)
    g = given.mean(axis=0)
    ascent, _ = jax.jit(metric.ascent)(
        jnp.asarray(g, jnp.complex64), jnp.zeros(4, jnp.complex64), ()
    )
    direction, dual_norm = dense(np.eye(8), list(split(given)), split(g))
    np.testing.assert_allclose(split(np.asarray(ascent.direction)), direction, rtol=1e-4)
    assert float(ascent.dual_norm) == pytest.approx(dual_norm, rel=1e-5)


def test_training_with_it():
    """Ten steps by hand: the gradients at the params, not those at the perturbed ones, are kept."""
    params = theta = example_params()
    metric = ms.averaged_monge(3, ALPHA)
    tx = optax.chain(ms.sharpness_aware(network_grad, metric=metric, rho=0.1), optax.sgd(0.05))
    state, seen = tx.init(params), []
    update = jax.jit(lambda p, s: tx.update(network_grad(p, BATCH), s, p, batch=BATCH))
    unravel = ravel_pytree(params)[1]
    for _ in range(10):
        updates, state = update(params, state)
        params = optax.apply_updates(params, updates)
        seen.append(flat(network_grad(theta, BATCH)).astype(float))
        direction, _ = dense(np.eye(seen[0].size), seen[-3:], seen[-1])
        delta = unravel(jnp.asarray(0.1 * direction, jnp.float32))
        second = network_grad(jax.tree.map(jnp.add, theta, delta), BATCH)
        theta = jax.tree.map(lambda p, g: p - 0.05 * g, theta, second)
    np.testing.assert_allclose(flat(params), flat(theta), rtol=1e-4, atol=1e-5)
    assert network_loss(params, BATCH) < network_loss(example_params(), BATCH)


# --- arguments ---

G = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ms.averaged_monge(0), ValueError, "history must be an integer, 1 or more, got 0"),
        (lambda: ms.averaged_monge(2.0), ValueError, "history must be an integer"),
        (lambda: ms.averaged_monge(2, -1.0), ValueError, "alpha must be finite and not negative"),
        (lambda: ms.averaged_monge(2, "1"), TypeError, "alpha must be a real number"),
        (lambda: ms.averaged_monge(2, base=ms.sam), TypeError, "base must be a Metric"),
        (lambda: ms.averaged_monge(2, base=ms.monge()), ValueError, "base must .* linear=True"),
        (lambda: ms.averaged_monge(1, base=ms.diagonal_fisher()), ValueError, "not depend on the"),
        (lambda: ms.averaged_monge_over(G, base=ms.layerwise()), ValueError, "not depend on the"),
        (lambda: ms.averaged_monge_over(G, np.nan), ValueError, "alpha must be finite"),
        (lambda: ms.averaged_monge_over({}), ValueError, r"stacked along a leading axis.*vmap"),
        (lambda: ms.averaged_monge_over({"a": G, "b": G[0]}), ValueError, r"\[\(2,\), \(3,\)\]"),
        (lambda: ms.averaged_monge_over(jnp.ones(())), ValueError, "stacked along"),
        (lambda: ms.averaged_monge_over(jnp.ones((0, 3))), ValueError, "stacked along"),
    ],
)
def test_bad_arguments(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"a": jnp.ones(4)}, r"form of the params: a leaf of shape \(4,\) has .* shape \(2, 3\)"),
        ({"b": jnp.ones(3)}, "gradients must have the form of the params"),
        ([jnp.ones(3)], "gradients must have the form of the params"),
    ],
)
def test_given_gradients_of_another_form(grads, message):
    metric = ms.averaged_monge_over({"a": G})
    with pytest.raises(ValueError, match=message):
        ms.worst_case_perturbation(metric, grads, grads, RHO)


def test_a_base_of_ones_own():
    """With linear=True, and a state."""

    def ascent(grads, params, state):
        v = jax.tree.map(lambda g: g / state, grads)
        dual_norm = jnp.sqrt(sum(jnp.sum(g * g / state) for g in jax.tree.leaves(grads)))
        return ms.Ascent(v, dual_norm, length=dual_norm), state + 1

    base = ms.Metric(lambda params: jnp.asarray(4.0), ascent, linear=True)
    metric, params = ms.averaged_monge(2, ALPHA, base), jnp.zeros(3)
    state, given = metric.init(params), np.array([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]])
    for g in given:
        found, state = metric.ascent(jnp.asarray(g, jnp.float32), params, state)
    assert_ascent(found, dense(5 * np.eye(3), given, given[-1]), rtol=1e-5)
    assert float(state.base_state) == 6
