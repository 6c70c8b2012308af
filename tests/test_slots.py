"""The slots of the transformation: ascent, descent and when, against loops in NumPy."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from reference import flat
from trajectories import make_mesh, vary

import monge_sam_jax as ms
from monge_sam_jax import nnx as ms_nnx
from monge_sam_jax.ascent import friendly, z_score
from monge_sam_jax.descent import Descent, look, stable, surrogate_gap, weighted
from monge_sam_jax.when import WhenRule, gradient_is_large

RHO, LEARNING_RATE = 0.3, 0.1
WEIGHTS = np.array([1.0, 3.0, 0.5, 2.0, 1.5, 4.0])
START = {"a": np.array([1.0, -0.7, 0.4, 0.9]), "b": np.array([-1.2, 0.3])}


def gradient(params):
    """Of sum w |p - 1|^2 / 2 + |p|^4 / 4, in JAX."""
    w = {"a": jnp.asarray(WEIGHTS[:4]), "b": jnp.asarray(WEIGHTS[4:])}
    return jax.tree.map(lambda p, w: w.astype(p.dtype) * (p - 1) + p**3, params, w)


def dense_gradient(p):
    return WEIGHTS * (p - 1) + p**3


def train(tx, steps=6, params=START, compiled=True):
    """The params after each step, flat."""
    params = jax.tree.map(jnp.asarray, params)
    state, path = tx.init(params), []
    update = jax.jit(tx.update) if compiled else tx.update
    for _ in range(steps):
        updates, state = update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        path.append(flat(params))
    assert not compiled or update._cache_size() == 1
    return np.array(path), state


def chain(**options):
    options = {"metric": ms.euclidean(), "rho": RHO, **options}
    return optax.chain(ms.sharpness_aware(gradient, **options), optax.sgd(LEARNING_RATE))


def loop(up=lambda g, t: g, down=lambda g, second, t: second, perturbs=lambda g, t: True, steps=6):
    """SAM in NumPy; `up` is the ascent, `down` the descent."""
    p, path = np.concatenate(list(START.values())), []
    for t in range(steps):
        g = dense_gradient(p)
        if perturbs(g, t):
            a = up(g, t)
            second = dense_gradient(p + RHO * a / np.linalg.norm(a))
            p = p - LEARNING_RATE * down(g, second, t)
        else:
            p = p - LEARNING_RATE * down(g, None, t)
        path.append(p)
    return np.array(path)


def assert_same(path, expected):
    np.testing.assert_allclose(path, expected, rtol=1e-10)


# --- ascent ---


def test_an_average_as_ascent(x64):
    """`optax.ema`: VaSSO."""
    d = np.zeros(6)

    def up(g, t):
        nonlocal d
        d = 0.6 * d + 0.4 * g
        return d

    path, state = train(chain(ascent=optax.ema(0.6, debias=False)))
    assert_same(path, loop(up))
    np.testing.assert_allclose(flat(state[0].ascent_state.ema), d)


def test_centralised_ascent(x64):
    """`optax.centralize` takes the mean off leaves of two axes or more."""
    params = jax.tree.map(lambda p: p.reshape(2, -1), START)

    def gradient(params):
        return jax.tree.map(lambda p: p**3 + jnp.arange(p.size).reshape(p.shape), params)

    tx = ms.sam(gradient, rho=RHO, ascent=optax.centralize())
    g = gradient(params)
    centred = jax.tree.map(lambda g: g - g.mean(1, keepdims=True), g)
    n = np.linalg.norm(flat(centred))
    expected = gradient(jax.tree.map(lambda p, c: p + RHO * c / n, params, centred))
    found, state = tx.update(g, tx.init(params), params)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-12)
    # The diagnostics are of the gradient itself, but for the length that the metric saw.
    d = state.diagnostics
    np.testing.assert_allclose(d.grad_norm, np.linalg.norm(flat(g)), rtol=1e-6)
    np.testing.assert_allclose(d.dual_norm, n, rtol=1e-6)
    np.testing.assert_allclose(d.perturbation_norm, RHO, rtol=1e-6)
    np.testing.assert_allclose(d.predicted_sharpness, RHO * flat(g) @ flat(centred) / n, rtol=1e-6)


def test_the_direction_of_an_optimizer_as_ascent(x64):
    m, v = np.zeros(6), np.zeros(6)

    def up(g, t):
        nonlocal m, v
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        return m / (1 - 0.9 ** (t + 1)) / (np.sqrt(v / (1 - 0.99 ** (t + 1))) + 1e-8)

    path, _ = train(chain(ascent=optax.scale_by_adam(0.9, 0.99)))
    assert_same(path, loop(up))


def test_friendly(x64):
    m = np.zeros(6)

    def up(g, t):
        nonlocal m
        m = 0.7 * m + 0.3 * g
        return g - 0.8 * m

    path, _ = train(chain(ascent=friendly(decay=0.7, weight=0.8)))
    assert_same(path, loop(up))


def test_z_score(x64):
    """By the definition: standardise each leaf, and keep what is above the quantile."""

    def of_leaf(g):
        z = np.abs((g - g.mean()) / g.std())
        return np.where(z >= np.quantile(z, 0.6, method="higher") - 1e-9, g, 0)

    path, _ = train(chain(ascent=z_score(top=0.4)))
    assert_same(path, loop(lambda g, t: np.concatenate([of_leaf(g[:4]), of_leaf(g[4:])])))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e37])
def test_z_score_at_every_scale(scale):
    g = jnp.asarray(np.array([1.0, 2.0, -3.0, 2.5]) * scale, jnp.float32)
    a, _ = z_score(top=0.25).update(g, optax.EmptyState())
    np.testing.assert_array_equal(a, np.where(np.arange(4) == 2, g, 0))


@pytest.mark.parametrize("size", [0, 1, 3])
def test_z_score_of_equal_entries_is_all_of_them(size):
    g = jnp.full(size, 2.0)
    np.testing.assert_array_equal(z_score(0.1).update(g, optax.EmptyState())[0], g)


@pytest.mark.parametrize("ascent", [friendly(), z_score(), optax.ema(0.9), optax.centralize()])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_passed_on(ascent, bad):
    tx = ms.monge_sam(gradient, rho=RHO, ascent=ascent)
    params = jax.tree.map(jnp.asarray, START)
    g = {"a": gradient(params)["a"].at[1].set(bad), "b": gradient(params)["b"]}
    found, _ = tx.update(g, tx.init(params), params)
    assert np.isnan(flat(found)).all()


def test_z_score_hides_no_gradient_that_is_not_finite():
    a, _ = z_score(0.5).update(jnp.array([1.0, np.inf, 2.0]), optax.EmptyState())
    assert np.isnan(a).all()


def test_an_ascent_that_is_zero_perturbs_nothing():
    """friendly(decay=0): the average is the gradient itself."""
    tx = ms.sam(gradient, rho=RHO, ascent=friendly(decay=0.0))
    params = jax.tree.map(jnp.asarray, START)
    g = gradient(params)
    found, state = tx.update(g, tx.init(params), params)
    np.testing.assert_array_equal(flat(found), flat(g))
    assert float(state.diagnostics.perturbation_norm) == 0
    assert float(state.diagnostics.grad_norm) > 0


def test_an_ascent_sees_what_the_mask_leaves_in_float32():
    seen = []

    def update(updates, state, params=None):
        seen.append((updates, params))
        return updates, state

    ascent = optax.GradientTransformation(optax.trace(0.9).init, update)
    tx = ms.sam(gradient, mask={"a": True, "b": False}, ascent=ascent)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), START)
    state = tx.init(params)
    updates, after = tx.update(gradient(params), state, params)
    for tree in (*seen[0], state.ascent_state.trace, after.ascent_state.trace):
        assert tree["b"] is None
        assert tree["a"].dtype == jnp.float32
    assert updates["b"].dtype == jnp.bfloat16


def test_bytes_of_the_state():
    """What an ascent or a descent keeps, and no more."""
    params = {"w": jnp.zeros((10, 10), jnp.bfloat16)}
    size = 4 * 100
    grad_fn = lambda p: p  # noqa: E731
    nothing = sum(x.nbytes for x in jax.tree.leaves(ms.sam(grad_fn).init(params)))
    for options, copies, scalars in [
        ({"ascent": optax.ema(0.9)}, 1, 4),
        ({"ascent": friendly()}, 1, 4),
        ({"ascent": z_score()}, 0, 0),
        ({"descent": surrogate_gap()}, 0, 0),
        ({"descent": look()}, 1, 0),
        ({"when": gradient_is_large()}, 0, 8),
    ]:
        state = ms.sam(grad_fn, **options).init(params)
        total = sum(x.nbytes for x in jax.tree.leaves(state))
        assert total == nothing + copies * size + scalars


# --- descent ---


def across(a, b):
    return a - (a @ b) / (b @ b) * b


def test_surrogate_gap(x64):
    path, _ = train(chain(descent=surrogate_gap(alpha=0.3)))
    assert_same(path, loop(down=lambda g, second, t: second - 0.3 * across(g, second)))


def test_weighted(x64):
    path, _ = train(chain(descent=weighted(gamma=0.8)))
    assert_same(path, loop(down=lambda g, second, t: g + 4 * (second - g)))


def test_stable(x64):
    path, _ = train(chain(descent=stable()))

    def down(g, second, t):
        return second * np.linalg.norm(g) / np.linalg.norm(second)

    assert_same(path, loop(down=down))


def test_look(x64):
    kept = np.zeros(6)

    def down(g, second, t):
        nonlocal kept
        if second is None:
            return g + 0.4 * np.linalg.norm(g) / np.linalg.norm(kept) * kept
        kept = across(second, g)
        return second

    path, _ = train(chain(descent=look(alpha=0.4), period=3), steps=8)
    assert_same(path, loop(down=down, perturbs=lambda g, t: t % 3 == 0, steps=8))


DESCENTS = {
    "surrogate gap": surrogate_gap(0.3),
    "weighted": weighted(0.7),
    "stable": stable(),
    "look": look(),
}


@pytest.mark.parametrize("name", DESCENTS)
def test_descent_at_radius_zero_is_plain_training(name):
    """Bit for bit: what the second gradient adds is exactly nothing."""
    path, _ = train(chain(rho=0.0, descent=DESCENTS[name]), compiled=False)
    plain, _ = train(optax.sgd(LEARNING_RATE), compiled=False)
    np.testing.assert_array_equal(path, plain)


@pytest.mark.parametrize("name", DESCENTS)
@pytest.mark.parametrize("scale", [1e-32, 1e36])
def test_descent_over_the_range_of_float32(name, scale):
    """Linear in both gradients together, also where their squares are not in range."""
    descent = DESCENTS[name]
    rng = np.random.default_rng(0)
    first, second = (jnp.asarray(rng.normal(size=7), jnp.float32) for _ in range(2))

    def both(factor):
        followed, state = descent.follow(
            {"w": first * factor}, {"w": second * factor}, descent.init({"w": first})
        )
        return followed["w"], descent.between({"w": first * factor}, state)[0]["w"]

    for scaled, once in zip(both(jnp.float32(scale)), both(jnp.float32(1)), strict=True):
        np.testing.assert_allclose(np.asarray(scaled, float) / scale, once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DESCENTS)
@pytest.mark.parametrize("which", ["first", "second", "both"])
def test_descent_with_a_zero_gradient(name, which):
    """Finite, in the dtype of the gradient, with finite derivatives."""
    zero, one = jnp.zeros(3, jnp.bfloat16), jnp.ones(3, jnp.bfloat16)
    first = one if which == "second" else zero
    second = one if which == "first" else zero
    state = DESCENTS[name].init(first.astype(jnp.float32))

    def followed(first, second):
        return DESCENTS[name].follow(first, second, state)[0]

    assert followed(first, second).dtype == jnp.bfloat16
    for x in jax.tree.leaves((followed(first, second), jax.jacobian(followed)(first, second))):
        assert np.isfinite(np.asarray(x, float)).all()


def test_descent_sees_whole_gradients_whatever_the_mask(x64):
    path, _ = train(chain(descent=weighted(gamma=0.8), mask={"a": True, "b": False}))
    p, expected = np.concatenate(list(START.values())), []
    for _ in range(6):
        g = dense_gradient(p)
        a = np.where(np.arange(6) < 4, g, 0)
        second = dense_gradient(p + RHO * a / np.linalg.norm(a))
        p = p - LEARNING_RATE * (g + 4 * (second - g))
        expected.append(p)
    assert_same(path, expected)


def test_a_descent_of_ones_own(x64):
    path, _ = train(chain(descent=Descent(lambda a, b, s: (jax.tree.map(jnp.add, a, b), s))))
    assert_same(path, loop(down=lambda g, second, t: g + second))


# --- when ---


def test_where_the_gradient_is_large(x64):
    """The formulas of the paper, with squares as they stand there."""
    mean = variance = 0.0
    asked = []

    def perturbs(g, t):
        nonlocal mean, variance
        square = g @ g
        mean = 0.8 * mean + 0.2 * square
        variance = 0.8 * variance + 0.2 * (square - mean) ** 2
        asked.append(square >= mean + (t / 4 - 1) * np.sqrt(variance))
        return asked[-1]

    rule = gradient_is_large(lambda count: count / 4 - 1, decay=0.8)
    path, state = train(chain(when=rule), steps=10)
    down = lambda g, second, t: g if second is None else second  # noqa: E731
    expected = loop(down=down, perturbs=perturbs, steps=10)
    assert 2 < sum(asked) < 9
    assert_same(path, expected)
    statistics = state[0].when_state
    np.testing.assert_allclose(statistics.root_mean**2, mean, rtol=1e-5)
    np.testing.assert_allclose(statistics.root_deviation**4, variance, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_rule_at_every_scale(scale):
    """The decisions do not depend on it, and statistics stay finite."""
    norms = np.random.default_rng(0).uniform(0.5, 2.0, 20)

    def decisions(scale):
        rule = gradient_is_large(0.3)
        state, found = rule.init(), []
        for norm in norms:
            now, state = rule.decide(jnp.zeros((), int), jnp.float32([norm * scale]), state)
            found.append(bool(now))
        assert np.isfinite(flat(state)).all()
        return found

    assert decisions(scale) == decisions(1.0)
    assert 0 < sum(decisions(1.0)) < 20


def test_the_rule_forgets_a_gradient_that_is_not_finite():
    rule = gradient_is_large()
    _, state = rule.decide(0, jnp.ones(2), rule.init())
    now, after = rule.decide(1, jnp.array([1.0, np.nan]), state)
    assert not now
    np.testing.assert_array_equal(flat(after), flat(state))


def test_a_rule_of_ones_own():
    rule = WhenRule(lambda: jnp.zeros((), int), lambda count, g, state: (state < 2, state + 1))
    tx = ms.sam(gradient, when=rule)
    params = jax.tree.map(jnp.asarray, START)
    state, norms = tx.init(params), []
    for _ in range(4):
        found, state = tx.update(gradient(params), state, params)
        norms.append(np.abs(flat(found) - flat(gradient(params))).max() > 0)
    assert norms == [True, True, False, False]


# --- a loss budget ---


def budget_length(rho, g_norm, sigma):
    return (rho**-2 + (g_norm / sigma) ** 2) ** -0.5


@pytest.mark.parametrize("sigma", [0.01, 0.5, 100.0])
def test_loss_budget(x64, sigma):
    """The smooth minimum, also for a schedule of rho."""
    schedule = optax.linear_schedule(0.5, 0.1, 4)
    for rho in (0.3, schedule):
        tx = ms.monge_sam(gradient, rho=rho, loss_budget=sigma)
        params = jax.tree.map(jnp.asarray, START)
        state = tx.init(params)
        n = np.linalg.norm(flat(gradient(params)))
        for t in range(3):
            _, state = jax.jit(tx.update)(gradient(params), state, params)
            radius = float(schedule(t)) if callable(rho) else rho
            d = state.diagnostics
            np.testing.assert_allclose(
                d.perturbation_norm, budget_length(radius, n, sigma), rtol=1e-6
            )
            assert float(d.predicted_sharpness) <= sigma
            assert float(d.perturbation_norm) <= radius * (1 + 1e-6)


def test_loss_budget_is_in_units_of_the_loss():
    """Loss and budget times 1000: the same perturbation."""
    params = jax.tree.map(jnp.asarray, START)
    lengths = []
    for c in (1.0, 1000.0):
        scaled = lambda p, c=c: jax.tree.map(lambda g: c * g, gradient(p))  # noqa: E731
        tx = ms.monge_sam(scaled, rho=0.3, loss_budget=0.2 * c)
        _, state = tx.update(scaled(params), tx.init(params), params)
        lengths.append(state.diagnostics.perturbation_norm)
    np.testing.assert_allclose(lengths[0], lengths[1], rtol=1e-6)


def test_loss_budget_and_alpha_exclude_each_other():
    with pytest.raises(ValueError, match="give one of the two"):
        ms.monge_sam(gradient, alpha=2.0, loss_budget=1.0)
    with pytest.raises(ValueError, match="loss_budget must be positive"):
        ms.monge_sam(gradient, loss_budget=0.0)


def test_loss_budget_under_injected_hyperparams():
    tx = optax.inject_hyperparams(ms.monge_sam)(gradient, rho=0.3, loss_budget=0.5)
    params = jax.tree.map(jnp.asarray, START)
    state = tx.init(params)
    n = np.linalg.norm(flat(gradient(params)))
    for sigma in (0.5, 0.1):
        state.hyperparams["loss_budget"] = jnp.asarray(sigma)
        _, state = tx.update(gradient(params), state, params)
        length = ms.get_diagnostics(state).perturbation_norm
        np.testing.assert_allclose(length, budget_length(0.3, n, sigma), rtol=1e-6)


def test_a_metric_that_is_a_function_of_rho_may_be_injected():
    build = optax.inject_hyperparams(ms.sharpness_aware)
    tx = build(gradient, metric=lambda rho: ms.monge(alpha=rho / 0.5), rho=0.3)
    params = jax.tree.map(jnp.asarray, START)
    _, state = tx.update(gradient(params), tx.init(params), params)
    n = np.linalg.norm(flat(gradient(params)))
    length = ms.get_diagnostics(state).perturbation_norm
    np.testing.assert_allclose(length, budget_length(0.3, n, 0.5), rtol=1e-6)


# --- one pass ---


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
def test_one_pass_with_an_ascent(x64, direction):
    tx = ms.one_pass_sam(
        optax.sgd(LEARNING_RATE, momentum=0.5),
        metric=ms.euclidean(),
        rho=RHO,
        direction=direction,
        ascent=friendly(0.7, 0.8),
    )
    theta = np.concatenate(list(START.values()))
    y, m, average = theta, np.zeros(6), np.zeros(6)
    path, _ = train(tx)
    for t in range(6):
        g = dense_gradient(y)
        m = 0.5 * m + g
        theta = theta - LEARNING_RATE * m
        up = g if direction == "gradient" else m
        average = 0.7 * average + 0.3 * up
        a = up - 0.8 * average
        y = theta + RHO * a / np.linalg.norm(a)
        np.testing.assert_allclose(path[t], y, rtol=1e-10)


@pytest.mark.parametrize("name", ["descent", "period", "measure", "grad_fn", "axis_name", "alpha"])
def test_one_pass_says_what_does_not_apply(name):
    with pytest.raises(TypeError, match=f"one_pass_sam takes no {name}: "):
        ms.one_pass_sam(optax.sgd(0.1), **{name: None})


def test_one_pass_with_a_slip():
    with pytest.raises(TypeError, match="one_pass_sam takes no roh; see help"):
        ms.one_pass_sam(optax.sgd(0.1), roh=0.1)


def test_one_pass_takes_no_rule():
    with pytest.raises(TypeError, match="saves a second one"):
        ms.one_pass_sam(optax.sgd(0.1), when=gradient_is_large())


def test_one_pass_with_a_loss_budget():
    tx = ms.one_pass_sam(optax.sgd(0.1), metric=lambda rho: ms.monge(alpha=rho / 0.5), rho=0.3)
    params = jax.tree.map(jnp.asarray, START)
    _, state = tx.update(gradient(params), tx.init(params), params)
    n = np.linalg.norm(flat(gradient(params)))
    length = ms.get_diagnostics(state).perturbation_norm
    np.testing.assert_allclose(length, budget_length(0.3, n, 0.5), rtol=1e-6)


# --- the functional form and NNX ---


def loss(params):
    w = {"a": jnp.asarray(WEIGHTS[:4]), "b": jnp.asarray(WEIGHTS[4:])}
    terms = jax.tree.map(
        lambda p, w: jnp.sum(w.astype(p.dtype) * (p - 1) ** 2 / 2 + p**4 / 4), params, w
    )
    return terms["a"] + terms["b"]


class Model(nnx.Module):
    def __init__(self):
        self.a, self.b = (nnx.Param(jnp.asarray(START[name])) for name in "ab")


def of_model(model):
    return loss({"a": model.a[...], "b": model.b[...]})


def test_functional_forms_take_what_keeps_no_state():
    params = jax.tree.map(jnp.asarray, START)
    options = {"metric": ms.monge(), "rho": RHO, "ascent": z_score(0.5), "descent": stable()}
    tx = ms.sharpness_aware(gradient, **options)
    expected, _ = tx.update(gradient(params), tx.init(params), params)
    _, found = ms.sharpness_aware_value_and_grad(loss, **options)(params)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-5)

    _, grads = ms_nnx.sharpness_aware_value_and_grad(of_model, **options)(Model())
    found = [np.asarray(grads[name][...]) for name in "ab"]
    np.testing.assert_allclose(np.concatenate(found), flat(expected), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "part"), [("ascent", optax.ema(0.9)), ("ascent", friendly()), ("descent", look())]
)
def test_functional_forms_refuse_what_keeps_a_state(name, part):
    params = jax.tree.map(jnp.asarray, START)
    options = {"metric": ms.monge(), "rho": RHO, name: part}
    for evaluate in (
        lambda: ms.sharpness_aware_value_and_grad(loss, **options)(params),
        lambda: ms_nnx.sharpness_aware_value_and_grad(of_model, **options)(Model()),
    ):
        with pytest.raises(ValueError, match=f"the {name} keeps a state"):
            evaluate()
    ms.sharpness_aware(gradient, **options).init(params)


# --- arguments ---


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ms.sam(ascent=optax.sgd), "ascent must be an optax.GradientTransformation"),
        (lambda: ms.sam(ascent=0.9), "ascent must be an optax.GradientTransformation"),
        (lambda: ms.sam(descent=surrogate_gap), "descent must be a Descent"),
        (lambda: ms.sam(when=0.9), "a rule such as gradient_is_large"),
        (lambda: ms.sharpness_aware(metric=3), "metric must be a Metric"),
        (lambda: ms.one_pass_sam(optax.sgd(0.1), ascent=3), "ascent must be"),
        (lambda: ms.sharpness_aware_value_and_grad(loss, metric=3, rho=1), "must be a Metric"),
        (
            lambda: ms.sharpness_aware(metric=lambda rho: 3).init(START),
            "a function of rho, must return a Metric",
        ),
    ],
)
def test_what_is_no_part_is_refused(build, message):
    with pytest.raises(TypeError, match=message):
        build()


@pytest.mark.parametrize("bad", [1.0, -0.1, np.nan, np.inf])
@pytest.mark.parametrize(
    "build",
    [weighted, gradient_is_large, friendly, z_score],
    ids=["gamma", "decay", "decay of friendly", "top"],
)
def test_fractions(build, bad):
    name = {weighted: "gamma", gradient_is_large: "decay", friendly: "decay", z_score: "top"}[build]
    if build is z_score and bad == 1.0:
        bad = 0.0
    with pytest.raises(ValueError, match=f"{name} must be"):
        build(**{name: bad})
    with pytest.raises(TypeError, match=f"{name} must be a real number"):
        build(**{name: "1"})


def test_the_state_of_other_parts_is_refused():
    params = jax.tree.map(jnp.asarray, START)
    state = ms.sam(gradient, ascent=optax.ema(0.9)).init(params)
    for options in ({}, {"ascent": optax.scale_by_adam()}, {"when": gradient_is_large()}):
        with pytest.raises(ValueError, match="is that of another one"):
            ms.sam(gradient, **options).update(gradient(params), state, params)
    one_pass = functools.partial(ms.one_pass_sam, optax.sgd(0.1))
    state = one_pass(ascent=optax.ema(0.9)).init(params)
    with pytest.raises(ValueError, match="another mask, direction, ascent"):
        one_pass().update(gradient(params), state, params)


# --- devices ---


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("sync", [True, False])
def test_slots_over_devices(sync):
    """Synchronised as one device; per device with the parts that see averages the same on all."""
    mesh = make_mesh(AxisType.Auto, data=8)
    batch = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
    params = {"w": jnp.array([0.5, -1.0, 2.0])}

    def grad_fn(params, batch):
        return jax.grad(lambda p: jnp.mean((batch @ p["w"] - 1) ** 2))(params)

    options = {
        "metric": ms.monge(),
        "rho": RHO,
        "ascent": friendly(0.5),
        "descent": look(0.5),
        "when": gradient_is_large(0.2, decay=0.5),
    }
    tx = ms.sharpness_aware(grad_fn, axis_name="data", sync_perturbation=sync, **options)
    state = tx.init(params)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P(), P())
    )
    def update(params, state, batch):
        varying = vary(params)
        return tx.update(grad_fn(varying, batch), state, params, batch=batch)

    single = ms.sharpness_aware(grad_fn, **options)
    expected_state = single.init(params)

    @jax.jit
    def update_single(params, state, batch):
        return single.update(grad_fn(params, batch), state, params, batch=batch)

    for _ in range(4):
        found, state = jax.jit(update)(params, state, batch)
        expected, expected_state = update_single(params, expected_state, batch)
        if sync:
            np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-4)
            np.testing.assert_allclose(flat(state), flat(expected_state), rtol=1e-3, atol=1e-5)
        else:  # an average is linear, so the state is that of the whole batch
            np.testing.assert_allclose(
                flat(state.when_state), flat(expected_state.when_state), rtol=1e-4
            )
        params = optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, found))


# --- the product of the slots ---

ASCENTS = {
    "none": None,
    "ema": optax.ema(0.8),
    "friendly": friendly(0.8),
    "z score": z_score(0.5),
    "adam": optax.scale_by_adam(),
}
METRICS = {
    "euclidean": ms.euclidean(),
    "monge": ms.monge(),
    "adaptive": ms.adaptive(0.1),
    "fisher": ms.diagonal_fisher(),
    "monge adaptive": ms.monge(ms.adaptive(0.1), 2.0),
    "budget": lambda rho: ms.monge(alpha=rho / 0.5),
    "layerwise": ms.layerwise(ms.adaptive(0.1)),
    "supremum": ms.monge(ms.supremum()),
    "spectral": ms.spectral(),
    "averaged": ms.averaged_monge(3),
    "preconditioned": ms.preconditioned(optax.scale_by_rms()),
}
WHENS = {
    "always": {},
    "period": {"period": 2},
    "late": {"when": lambda count: count >= 2},
    "large": {"when": gradient_is_large(0.0)},
}
MASKS = {"all": None, "a": {"a": True, "b": False}}
choices = st.fixed_dictionaries(
    {
        "ascent": st.sampled_from(sorted(ASCENTS)),
        "metric": st.sampled_from(sorted(METRICS)),
        "descent": st.sampled_from(["none", *sorted(DESCENTS)]),
        "when": st.sampled_from(sorted(WHENS)),
        "mask": st.sampled_from(sorted(MASKS)),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
    }
)


def chosen(choice, **options):
    return {
        "ascent": ASCENTS[choice["ascent"]],
        "metric": METRICS[choice["metric"]],
        "descent": {"none": None, **DESCENTS}[choice["descent"]],
        "mask": MASKS[choice["mask"]],
        "rho": RHO,
        **WHENS[choice["when"]],
        **options,
    }


@settings(max_examples=8)
@given(choices)
def test_any_choice_keeps_the_promises(choice):
    """Types stay, one compilation, the same under jit, resumed, at rho = 0, and with NaN."""
    params = jax.tree.map(lambda p: jnp.asarray(p, choice["dtype"]), START)
    tx = optax.chain(ms.sharpness_aware(gradient, **chosen(choice)), optax.sgd(LEARNING_RATE))

    def step(params, state):
        updates, state = tx.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)  # noqa: E731
    states = [(params, tx.init(params))]
    for _ in range(4):
        states.append(compiled(*states[-1]))
        assert types(states[-1]) == types(states[0])
    assert compiled._cache_size() == 1
    scanned, _ = jax.lax.scan(lambda carry, _: (step(*carry), None), states[0], None, length=4)
    tolerance = 1e-5 if choice["dtype"] == "float32" else 0.05
    np.testing.assert_allclose(
        flat(scanned[0]).astype(float), flat(states[-1][0]).astype(float), rtol=tolerance, atol=1e-3
    )
    resumed = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), states[2])
    np.testing.assert_array_equal(flat(compiled(*resumed)), flat(states[3]))

    broken = {"a": gradient(params)["a"].at[0].set(jnp.nan), "b": gradient(params)["b"]}
    updates, _ = tx.update(broken, states[2][1], params)
    assert np.isnan(np.asarray(flat(updates), float)).any()
    if choice["when"] == "always":
        assert np.isnan(np.asarray(flat(updates), float)).all()

    if choice["descent"] == "none":
        at_zero = ms.sharpness_aware(gradient, **chosen(choice, rho=0.0))
        found, _ = jax.jit(at_zero.update)(gradient(params), at_zero.init(params), params)
        np.testing.assert_array_equal(flat(found), flat(jax.jit(gradient)(params)))


one_pass_choices = st.fixed_dictionaries(
    {
        "ascent": st.sampled_from(sorted(ASCENTS)),
        "metric": st.sampled_from(sorted(METRICS)),
        "mask": st.sampled_from(sorted(MASKS)),
        "direction": st.sampled_from(["gradient", "momentum"]),
    }
)


@settings(max_examples=10)
@given(one_pass_choices)
def test_any_choice_in_one_pass(choice):
    """theta is the base optimizer's at the gradients that were given, and at rho = 0 y is too."""
    base = optax.sgd(LEARNING_RATE, momentum=0.5)
    for rho in (RHO, 0.0):
        tx = ms.one_pass_sam(
            base,
            metric=METRICS[choice["metric"]],
            ascent=ASCENTS[choice["ascent"]],
            direction=choice["direction"],
            mask=MASKS[choice["mask"]],
            rho=rho,
        )
        y = theta = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), START)
        state, base_state = tx.init(y), base.init(theta)
        for _ in range(3):
            g = gradient(y)
            updates, state = jax.jit(tx.update)(g, state, y)
            y = optax.apply_updates(y, updates)
            updates, base_state = base.update(g, base_state, theta)
            theta = optax.apply_updates(theta, updates)
        np.testing.assert_allclose(
            flat(ms.unperturbed_params(state, y)), flat(theta), rtol=1e-5, atol=1e-6
        )
        moved = np.abs(flat(y) - flat(theta)).max()
        assert moved < 1e-6 if rho == 0 else moved > 1e-3


def test_help_names_the_slots():
    for builder in (ms.sam, ms.monge_sam, ms.adaptive_sam, ms.fisher_sam, ms.sharpness_aware):
        assert {"ascent", "descent", "when"} <= set(inspect.signature(builder).parameters)
