"""Groups of leaves with balls of their own: against formulas by hand, and against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    adaptive_matrix,
    dense_perturbation,
    example_batch,
    example_params,
    flat,
    monge_matrix,
    network_grad,
)

import monge_sam_jax as ms

BATCH = example_batch()
LABELS = {"hidden": "inner", "out": "outer", "temperature": "outer"}  # a prefix of the params
RHO = 0.3


def parts(tree):
    """The groups of `LABELS` as float64 vectors."""
    outer = {name: tree[name] for name in ("out", "temperature")}
    return flat(tree["hidden"]).astype(float), flat(outer).astype(float)


def by_label(params):
    return {name: "inner" if name == "hidden" else "outer" for name in params}


@pytest.mark.parametrize("labels", [LABELS, by_label], ids=["tree", "function"])
def test_each_group_has_its_own_ball(labels):
    params = example_params()
    g = network_grad(params, BATCH)
    metric = ms.grouped({"inner": ms.monge(alpha=2.0), "outer": ms.adaptive(0.1)}, labels)
    delta = ms.worst_case_perturbation(metric, g, params, RHO)
    (p1, p2), (g1, g2), (d1, d2) = parts(params), parts(g), parts(delta)
    np.testing.assert_allclose(
        d1, dense_perturbation(monge_matrix(p1, g1, 2.0), g1, RHO), rtol=1e-5
    )
    np.testing.assert_allclose(
        d2, dense_perturbation(adaptive_matrix(p2, g2, 0.1), g2, RHO), rtol=1e-5
    )


def test_diagnostics_of_groups():
    params = example_params()
    g = network_grad(params, BATCH)
    metric = ms.grouped({"inner": ms.euclidean(), "outer": ms.scaled(ms.euclidean(), 3.0)}, LABELS)
    tx = ms.sharpness_aware(network_grad, metric=metric, rho=RHO, measure=True)
    _, state = tx.update(g, tx.init(params), params, batch=BATCH)
    seen = ms.get_diagnostics(state)
    n1, n2 = map(np.linalg.norm, parts(g))
    assert float(seen.grad_norm) == pytest.approx(np.hypot(n1, n2), rel=1e-6)
    assert float(seen.dual_norm) == pytest.approx(n1 + 3 * n2, rel=1e-6)
    assert float(seen.predicted_sharpness) == pytest.approx(RHO * (n1 + 3 * n2), rel=1e-6)
    assert float(seen.perturbation_norm) == pytest.approx(RHO * np.hypot(1, 3), rel=1e-6)
    assert float(seen.realised_norm) == pytest.approx(RHO * np.hypot(1, 3), rel=1e-4)


@given(
    st.lists(st.floats(-3, 3, width=32), min_size=5, max_size=5),
    st.floats(0.0, 4.0),
    st.integers(0, 2**31),
)
def test_no_point_of_the_ball_rises_more_to_first_order(entries, alpha, seed):
    """Of max |delta_k| / c_k <= rho, and of the ball that the Monge lift makes of it.

    With N the norm of the product of balls, that is N(delta)^2 + alpha^2 (g . delta)^2 <= rho^2.
    """
    g = np.array(entries)
    inner, outer = g[:3], g[3:]
    base = ms.grouped({"a": ms.euclidean(), "b": ms.scaled(ms.euclidean(), 0.5)}, ["a", "b"])
    tree = [jnp.asarray(inner, jnp.float32), jnp.asarray(outer, jnp.float32)]
    delta = ms.worst_case_perturbation(ms.monge(base, alpha), tree, tree, RHO)
    delta = np.concatenate([np.asarray(d, float) for d in delta])

    def size(d):  # rows of d
        norm = np.maximum(np.linalg.norm(d[:, :3], axis=1), np.linalg.norm(d[:, 3:], axis=1) / 0.5)
        return np.sqrt(norm**2 + alpha**2 * (d @ g) ** 2)

    if np.linalg.norm(g) > 1e-3:
        np.testing.assert_allclose(size(delta[None]), RHO, rtol=1e-4)
    others = np.random.default_rng(seed).normal(size=(500, 5))
    others[:250] = delta + 0.1 * others[:250]  # half of them nearby
    others *= RHO / size(others)[:, None]
    assert np.max(others @ g) <= delta @ g * (1 + 1e-4) + 1e-6


def test_scaled_is_another_radius():
    params = example_params()
    g = network_grad(params, BATCH)
    for metric in (ms.euclidean(), ms.monge(alpha=3.0), ms.adaptive()):
        longer = ms.worst_case_perturbation(ms.scaled(metric, 4.0), g, params, RHO)
        expected = ms.worst_case_perturbation(metric, g, params, 4.0 * RHO)
        np.testing.assert_allclose(flat(longer), flat(expected), rtol=1e-6)
        assert ms.scaled(metric, 4.0).isotropic == metric.isotropic


def test_a_masked_leaf_belongs_to_no_group():
    params = example_params()
    mask = {"hidden": {"w": True, "b": False}, "out": True, "temperature": False}
    metric = ms.grouped({"inner": ms.euclidean(), "outer": ms.euclidean()}, LABELS)
    seen = []

    def grad_fn(p):
        seen.append(p)
        return network_grad(p, BATCH)

    tx = ms.sharpness_aware(grad_fn, metric=metric, rho=RHO, mask=mask)
    tx.update(network_grad(params, BATCH), tx.init(params), params)
    delta = jax.tree.map(jnp.subtract, seen[0], params)
    assert np.linalg.norm(delta["hidden"]["w"]) == pytest.approx(RHO, rel=1e-5)
    assert np.linalg.norm(delta["out"]) == pytest.approx(RHO, rel=1e-5)
    assert not np.any(delta["hidden"]["b"])
    assert delta["temperature"] == 0


def moving_average():
    """A metric with a state: squares of gradients, averaged."""

    def ascent(grads, params, state):
        squares = jax.tree.map(lambda s, g: 0.5 * s + 0.5 * g**2, state, grads)
        v = jax.tree.map(lambda g, s: g / (1 + s), grads, squares)
        norm = jnp.sqrt(sum(jax.tree.leaves(jax.tree.map(lambda g, v: jnp.sum(g * v), grads, v))))
        return ms.Ascent(v, norm, length=norm), squares

    return ms.Metric(lambda params: jax.tree.map(jnp.zeros_like, params), ascent)


@pytest.mark.parametrize("mask", [None, {"a": True, "b": True, "c": False}])
def test_states_of_the_groups(mask):
    """Each has that of its own leaves, over several steps; and `map_params` finds them."""
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([3.0]), "c": jnp.array([0.5])}
    labels = {"a": "x", "b": "y", "c": "x"}
    metric = ms.grouped({"x": moving_average(), "y": ms.euclidean()}, labels)
    grad_fn = lambda p: jax.tree.map(lambda x: x**3, p)  # noqa: E731
    tx = ms.sharpness_aware(grad_fn, metric=metric, rho=RHO, mask=mask)
    state = tx.init(params)
    optax.tree.map_params(tx, lambda x: x, state)
    own = ["a", "c"] if mask is None else ["a"]
    theta = np.concatenate([params[k] for k in own]).astype(float)
    squares = np.zeros_like(theta)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(grad_fn(params), state, params)
        g = theta**3
        squares = 0.5 * squares + 0.5 * g**2
        v = g / (1 + squares)
        expected = (theta + RHO * v / np.sqrt(g @ v)) ** 3
        actual = np.concatenate([updates[k] for k in own])
        np.testing.assert_allclose(actual, expected, rtol=1e-4)
    np.testing.assert_allclose(updates["b"], (3 + RHO) ** 3, rtol=1e-5)


def test_a_group_without_a_gradient_and_one_without_leaves():
    metrics = {"a": ms.euclidean(), "b": ms.euclidean(), "none": ms.monge()}
    metric = ms.grouped(metrics, {"x": "a", "y": "b"})
    g = {"x": jnp.zeros(2), "y": jnp.array([3.0, 4.0])}
    delta = ms.worst_case_perturbation(metric, g, g, 0.5)
    np.testing.assert_array_equal(delta["x"], 0)
    np.testing.assert_allclose(delta["y"], [0.3, 0.4], rtol=1e-6)
    g["x"] = jnp.array([jnp.inf, 1.0])
    delta = ms.worst_case_perturbation(metric, g, g, 0.5)
    assert not np.any(np.isfinite(flat(delta)))  # in the other group too


@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e20, 1e36])
def test_extreme_gradients(size):
    metric = ms.grouped({"a": ms.euclidean(), "b": ms.scaled(ms.adaptive(), 2.0)}, ["a", "b"])
    params = [jnp.ones(2), jnp.array([1e20, -1e20])]
    for other in (size, 1 / size):
        g = [jnp.array([0.6, 0.8]) * size, jnp.array([3.0, 4.0]) * other]
        delta = ms.worst_case_perturbation(metric, g, params, 0.5)
        np.testing.assert_allclose(delta[0], [0.3, 0.4], rtol=1e-6)
        np.testing.assert_allclose(delta[1], [0.6e20, 0.8e20], rtol=1e-5)


def test_one_pass_over_groups():
    metric = ms.grouped({"inner": ms.monge(), "outer": ms.adaptive()}, LABELS)
    tx = ms.one_pass_sam(optax.sgd(0.1, momentum=0.9), metric=metric, rho=RHO)
    y = theta = example_params()
    state, m = tx.init(y), jax.tree.map(jnp.zeros_like, y)
    for _ in range(3):
        g = network_grad(y, BATCH)
        updates, state = jax.jit(tx.update)(g, state, y)
        y = optax.apply_updates(y, updates)
        m = jax.tree.map(lambda m, g: 0.9 * m + g, m, g)
        theta = jax.tree.map(lambda t, m: t - 0.1 * m, theta, m)
        (p1, p2), (g1, g2) = parts(theta), parts(g)
        expected = dense_perturbation(monge_matrix(p1, g1), g1, RHO)
        np.testing.assert_allclose(parts(y)[0], p1 + expected, rtol=1e-4, atol=1e-6)
        expected = dense_perturbation(adaptive_matrix(p2, g2), g2, RHO)
        np.testing.assert_allclose(parts(y)[1], p2 + expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(flat(ms.unperturbed_params(state, y)), flat(theta), rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ms.scaled(ms.sam, 2.0), TypeError, "base must be a Metric"),
        (lambda: ms.scaled(ms.monge(), "2"), TypeError, "factor must be a real number"),
        (lambda: ms.scaled(ms.monge(), -1.0), ValueError, "factor must be finite and not negative"),
        (lambda: ms.scaled(ms.monge(), 0.0), ValueError, "factor must be positive.*mask="),
        (lambda: ms.grouped({}, "a"), ValueError, "metrics must hold a metric"),
        (lambda: ms.grouped({"a": ms.monge}, "a"), TypeError, r"metrics\['a'\] must be a Metric"),
    ],
)
def test_bad_arguments(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"x": "a", "y": "c"}, "the label 'c' has no metric; there are those of 'a', 'b'"),
        ({"x": "a"}, "labels must be a tree of labels that is a prefix of the params"),
    ],
)
def test_bad_labels(labels, message):
    metric = ms.grouped({"a": ms.monge(), "b": ms.monge()}, labels)
    g = {"x": jnp.ones(2), "y": jnp.ones(2)}
    with pytest.raises(ValueError, match=message):
        ms.worst_case_perturbation(metric, g, g, 0.1)


def test_one_label_for_all_is_the_metric_itself():
    params = example_params()
    g = network_grad(params, BATCH)
    one = ms.grouped({"all": ms.monge()}, "all")
    np.testing.assert_allclose(
        flat(ms.worst_case_perturbation(one, g, params, RHO)),
        dense_perturbation(monge_matrix(flat(params), flat(g).astype(float)), flat(g), RHO),
        rtol=1e-5,
    )
