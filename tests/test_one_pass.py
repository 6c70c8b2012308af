"""One-pass steps: against loops that hold theta explicitly, over many steps, in every wrapper."""

import functools
from typing import NamedTuple

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from reference import (
    adaptive_matrix,
    dense_perturbation,
    euclidean_matrix,
    example_batch,
    example_params,
    fisher_matrix,
    flat,
    monge_matrix,
    network_grad,
)
from test_cost import count_instructions, network, total
from trajectories import cpu_devices

import monge_sam_jax as ms
from monge_sam_jax.one_pass import FromMomentum, one_pass_sam, unperturbed_params
from monge_sam_jax.toy import banana

BATCH = example_batch()
gradient = jax.jit(network_grad)
DIRECTIONS = ["gradient", "momentum"]
as_pure = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure  # Flax before 0.12


@pytest.fixture(params=DIRECTIONS)
def direction(request):
    return request.param


def step(tx, params, state, grads, **extra):
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


@functools.cache
def compiled(tx):
    return jax.jit(functools.partial(step, tx))


def run(tx, steps, params=None, state=None, batches=(BATCH,), **extra):
    """(y, state) after some steps, which take the batches in turn."""
    params = example_params() if params is None else params
    state = tx.init(params) if state is None else state
    for t in range(steps):
        grads = gradient(params, batches[t % len(batches)])
        params, state = compiled(tx)(params, state, grads, **extra)
    return params, state


def find_momentum(state):
    """Of `optax.sgd`, or of `optax.adam` or `optax.adamw`, wherever it is."""
    kinds = (optax.TraceState, optax.ScaleByAdamState)
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds))
    (found,) = [x for x in leaves if isinstance(x, kinds)]
    return found[0] if isinstance(found, optax.TraceState) else found.mu


def by_hand(base, steps, direction="gradient", rho=lambda t: 0.1, grads_at=network_grad, **extra):
    """(y, theta) of a loop that holds both; `grads_at(y, t)` in place of the batch's gradient."""

    @jax.jit
    def one(y, theta, state, rho, t):
        g = grads_at(y, BATCH if grads_at is network_grad else t)
        theta, state = step(base, theta, state, g, **extra)
        ahead = g if direction == "gradient" else find_momentum(state)
        delta = ms.worst_case_perturbation(ms.monge(), ahead, theta, rho)
        return jax.tree.map(jnp.add, theta, delta), theta, state

    theta = y = example_params()
    state = base.init(theta)
    for t in range(steps):
        y, theta, state = one(y, theta, state, rho(t + 1), t)
    return y, theta


def assert_close(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


# --- against NumPy in float64, formulas by hand ---

ALPHA, ETA, RHO, LEARNING_RATE = 3.0, 0.2, 0.3, 0.05
CURVATURES = np.array([2.0, 0.5, 1.0, 3.0, 0.2])


def slope(x):
    """Gradient of sum of CURVATURES / 2 x^2 + cos 2x."""
    return CURVATURES * x - 2 * np.sin(2 * x)


def monge_adaptive_matrix(p, g):
    return adaptive_matrix(p, g, ETA) + ALPHA**2 * np.outer(g, g)


METRICS = {
    "euclidean": (ms.euclidean(), euclidean_matrix),
    "monge": (ms.monge(alpha=ALPHA), functools.partial(monge_matrix, alpha=ALPHA)),
    "adaptive": (ms.adaptive(ETA), functools.partial(adaptive_matrix, eta=ETA)),
    "fisher": (ms.diagonal_fisher(ETA), functools.partial(fisher_matrix, eta=ETA)),
    "monge adaptive": (ms.monge(ms.adaptive(ETA), ALPHA), monge_adaptive_matrix),
}
BASES = {
    "sgd": optax.sgd(LEARNING_RATE),
    "momentum": optax.sgd(LEARNING_RATE, momentum=0.8),
    "adamw": optax.adamw(LEARNING_RATE, weight_decay=0.1),
}


def numpy_loop(base, matrix, direction, steps):
    theta = y = np.linspace(-1.5, 1.0, 5)
    m, v = np.zeros(5), np.zeros(5)
    for t in range(1, steps + 1):
        g = slope(y)
        if base == "sgd":
            theta = theta - LEARNING_RATE * g
        elif base == "momentum":
            m = 0.8 * m + g
            theta = theta - LEARNING_RATE * m
        else:
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            adam = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            theta = theta - LEARNING_RATE * (adam + 0.1 * theta)
        ahead = g if direction == "gradient" else m
        y = theta + dense_perturbation(matrix(theta, ahead), ahead, RHO)
    return y, theta


@pytest.mark.parametrize(
    ("metric", "base", "direction"),
    [
        ("euclidean", "sgd", "gradient"),
        ("euclidean", "adamw", "momentum"),
        ("monge", "momentum", "gradient"),
        ("monge", "momentum", "momentum"),
        ("monge", "adamw", "momentum"),
        ("adaptive", "adamw", "gradient"),
        ("fisher", "momentum", "momentum"),
        ("monge adaptive", "adamw", "gradient"),
        ("monge adaptive", "adamw", "momentum"),
    ],
)
def test_trajectory_is_that_of_a_numpy_loop(x64, metric, base, direction):
    metric, matrix = METRICS[metric]
    tx = one_pass_sam(BASES[base], metric=metric, rho=RHO, direction=direction)
    start = jnp.linspace(-1.5, 1.0, 5)
    y = {"a": start[:2], "b": [start[2:]]}
    state = tx.init(y)
    update = compiled(tx)
    for _ in range(30):
        g = slope(flat(y))
        y, state = update(y, state, {"a": jnp.asarray(g[:2]), "b": [jnp.asarray(g[2:])]})
    expected_y, expected_theta = numpy_loop(base, matrix, direction, 30)
    np.testing.assert_allclose(flat(y), expected_y, rtol=1e-10)
    np.testing.assert_allclose(flat(unperturbed_params(state, y)), expected_theta, rtol=1e-10)
    length = np.linalg.norm(expected_y - expected_theta)
    assert float(ms.get_diagnostics(state).perturbation_norm) == pytest.approx(length, rel=1e-6)
    assert length > 0.01


def test_an_isotropic_metric_of_ones_own():
    """Its tangent may be any positive multiple of the gradient."""

    def ascent(grads, params, state):
        norm = optax.tree.norm(grads)
        return ms.Ascent(optax.tree.scale(3.0, grads), norm, length=3.0 * norm), state

    ends = []
    for metric in (ms.Metric(lambda params: (), ascent, isotropic=True), ms.euclidean()):
        tx = one_pass_sam(BASES["momentum"], metric=metric, rho=0.1, direction="momentum")
        y, state = run(tx, 3)
        ends.append((y, unperturbed_params(state, y)))
    assert_close(*ends)


def test_a_metric_with_a_state():
    """One that averages squares of gradients, over the leaves that are perturbed."""

    def ascent(grads, params, state):
        squares = jax.tree.map(lambda s, g: 0.5 * s + 0.5 * g**2, state, grads)
        v = jax.tree.map(lambda g, s: g / (1 + s), grads, squares)
        norm = jnp.sqrt(optax.tree.vdot(grads, v))
        return ms.Ascent(v, norm, length=norm), squares

    metric = ms.Metric(init=lambda params: jax.tree.map(jnp.zeros_like, params), ascent=ascent)
    tx = one_pass_sam(optax.sgd(0.1), metric=metric, rho=0.2, mask={"a": True, "b": False})
    y = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}
    state = tx.init(y)
    theta, perturbed, squares = 1.0 * np.array(y["a"]), np.array(y["a"]), np.zeros(2)
    for _ in range(3):
        g, squares = perturbed, 0.5 * squares + 0.5 * perturbed**2
        v = g / (1 + squares)
        theta = theta - 0.1 * g
        perturbed = theta + 0.2 * v / np.sqrt(g @ v)
        y, state = compiled(tx)(y, state, y)
    np.testing.assert_allclose(y["a"], perturbed, rtol=1e-5)
    np.testing.assert_allclose(y["b"], 0.5 * 0.9**3, rtol=1e-6)


def test_momentum_in_less_precision_than_the_params(x64):
    """The perturbation put into y, and the one taken out again, are the same in float64."""
    base = optax.adam(0.1, mu_dtype=jnp.float32)
    ends = []
    for metric in (ms.monge(), ms.monge()._replace(isotropic=False)):  # theta recomputed, and kept
        tx = one_pass_sam(base, metric=metric, rho=1.0, direction="momentum")
        y = jnp.linspace(-1.5, 1.0, 5)
        state = tx.init(y)
        for _ in range(10):
            y, state = compiled(tx)(y, state, jnp.asarray(slope(np.asarray(y))))
        ends.append(unperturbed_params(state, y))
    np.testing.assert_allclose(*ends, rtol=1e-12)


# --- a hundred thousand steps ---

STEPS = 100_000


@functools.cache
def noisy_problem():
    """A quadratic bowl, and noise in its gradient."""
    rng = np.random.default_rng(0)
    curvature, centre = np.exp(rng.uniform(-1.5, 0.5, 8)), 3 * rng.normal(size=8)
    return curvature, centre, rng.normal(size=(STEPS, 8)).astype(np.float32)


def long_run(update, carry, dtype, pull=1.0):
    """Scans `update(carry, gradient function)`."""
    curvature, centre, noise = (jnp.asarray(x, dtype) for x in noisy_problem())

    def one(carry, noise):
        return update(carry, lambda y: pull * curvature * (y - centre) + noise), None

    return jax.jit(lambda carry, noise: jax.lax.scan(one, carry, noise)[0])(carry, noise)


def explicit(direction, decay, learning_rate, rho, dtype):
    """SGD with momentum that holds theta, y and the momentum; theta at the end."""

    def update(carry, grad_fn):
        theta, y, m = carry
        g = grad_fn(y)
        m = (decay * m + g).astype(dtype)
        theta = (theta - learning_rate * m).astype(dtype)
        ahead = (g if direction == "gradient" else m).astype(jnp.promote_types(dtype, jnp.float32))
        n = jnp.sqrt(jnp.sum(ahead**2))
        return theta, (theta + rho * ahead / n / jnp.sqrt(1 + n**2)).astype(dtype), m

    zeros = jnp.zeros(8, dtype)
    return long_run(update, (zeros, zeros, zeros), dtype)[0]


def long_descent(tx, params, pull=1.0):
    """(y, state)"""
    update = lambda carry, grad_fn: step(tx, *carry, grad_fn(carry[0]))  # noqa: E731
    return long_run(update, (params, tx.init(params)), params.dtype, pull)


def one_pass(direction, decay, learning_rate, rho, dtype):
    base = optax.sgd(learning_rate, momentum=decay)
    tx = one_pass_sam(base, rho=rho, direction=direction)
    y, state = long_descent(tx, jnp.zeros(8, dtype))
    return unperturbed_params(state, y)


@pytest.mark.parametrize("rho", [0.05, 5.0])
def test_float32_stays_within_rounding_of_float64(x64, direction, rho):
    """For momentum without a copy of theta; 1e-6 is two units in the last place of the largest."""
    arguments = (direction, 0.5, 0.0625, rho)
    exact = explicit(*arguments, jnp.float64)
    actual = one_pass(*arguments, jnp.float32)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-6)
    assert 4 < np.abs(exact).max() < 8


def test_theta_without_a_copy_drifts_no_more_than_in_plain_training(x64):
    """Where the gradient is noise and nothing pulls theta back."""
    base, start = optax.sgd(1e-3, momentum=0.5), np.linspace(-8, 8, 8, dtype=np.float32)
    exact, _ = long_descent(base, jnp.asarray(start, jnp.float64), pull=0.0)
    plain, _ = long_descent(base, jnp.asarray(start), pull=0.0)
    y, state = long_descent(
        one_pass_sam(base, rho=1.0, direction="momentum"), jnp.asarray(start), pull=0.0
    )
    assert isinstance(state.delta, FromMomentum)
    drift = np.linalg.norm(unperturbed_params(state, y) - exact)
    # As many roundings make a random walk of the same length, give or take the draw.
    assert 1e-5 < drift <= 1.5 * np.linalg.norm(plain - exact)


@pytest.mark.parametrize("rho", [0.05, 1.0])
def test_bfloat16_is_that_of_a_loop_that_keeps_theta(direction, rho):
    """Bit for bit, as all products with decay and learning rate are exact.

    Where the perturbation was larger than theta, up to the last bit, which it then takes.
    """
    arguments = (direction, 0.5, 0.0625, rho)
    actual, expected = one_pass(*arguments, jnp.bfloat16), explicit(*arguments, jnp.bfloat16)
    assert actual.dtype == jnp.bfloat16
    if rho < 1:
        np.testing.assert_array_equal(actual, expected)
    else:
        np.testing.assert_allclose(actual.astype(float), expected.astype(float), rtol=2**-7)
        assert np.sum(actual == expected) >= 7


# --- rho = 0 ---


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rho_zero_is_the_base_optimizer_bit_for_bit(dtype, direction):
    """Operation by operation, with one compiled gradient for both."""
    grad_fn = jax.jit(lambda p: jax.tree.map(lambda x: x - jnp.sin(3 * x), p))
    results = []
    for tx in (BASES["adamw"], one_pass_sam(BASES["adamw"], rho=0.0, direction=direction)):
        params = {"a": jnp.linspace(-1, 2, 7, dtype=dtype), "b": jnp.linspace(3, 5, 7, dtype=dtype)}
        state = tx.init(params)
        for _ in range(10):
            params, state = step(tx, params, state, grad_fn(params))
        results.append(params)
    chex.assert_trees_all_equal(*results)
    chex.assert_trees_all_equal(unperturbed_params(state, params), params)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_rho_zero_for_steps_of_any_size(dtype):
    """Where no difference of params is exact: steps that are larger than the params."""
    rng = np.random.default_rng(0)
    size = 2.0 ** rng.integers(-6, 6, size=(2, 200_000))
    p, g = jnp.asarray(rng.normal(size=(2, 200_000)) * size, dtype)
    tx = one_pass_sam(optax.sgd(1.0), rho=0.0)
    y, _ = step(tx, p, tx.init(p), g)
    np.testing.assert_array_equal(y, p - g)
    naive = p + ((p - g) - p)
    assert dtype == jnp.float32 or np.any(naive != p - g)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_theta_is_that_of_the_base_optimizer_in_a_compiled_step(dtype):
    """Up to the rounding of y; with 16 bits bit for bit, unless delta is about as large."""
    rng = np.random.default_rng(0)
    p, g = jnp.asarray(rng.normal(size=(2, 10_000)), dtype)
    base = optax.sgd(0.25)
    (y, state), (expected, _) = (
        compiled(tx)(p, tx.init(p), g)
        for tx in (one_pass_sam(base, metric=ms.euclidean(), rho=50.0), base)
    )
    theta = unperturbed_params(state, y)
    theta, expected, y, delta = (np.asarray(x, float) for x in (theta, expected, y, state.delta))
    largest = np.max(np.abs([theta, expected, y, delta]), axis=0)
    units = jnp.finfo(dtype).eps * 2.0 ** np.floor(np.log2(largest))
    assert np.all(np.abs(theta - expected) <= units)
    larger = np.abs(expected) >= 2 * np.abs(delta)
    assert 3_000 < np.sum(larger) < 9_900
    if dtype == jnp.bfloat16:
        np.testing.assert_array_equal(theta[larger], expected[larger])


# --- arguments ---


def test_schedule_of_rho():
    """The gradient of update t is taken at radius rho(t), and that of update 0 at zero."""
    schedule = optax.linear_schedule(0.0, 0.3, 3)
    tx = one_pass_sam(BASES["momentum"], rho=schedule, direction="momentum")
    y, state = run(tx, 6)
    expected = by_hand(BASES["momentum"], 6, "momentum", rho=schedule)
    assert_close((y, unperturbed_params(state, y)), expected)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), jnp.ones(2)])
def test_bad_rho(value):
    with pytest.raises(ValueError, match="rho must be"):
        one_pass_sam(optax.sgd(0.1), rho=value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rho": "1"}, TypeError, "rho must be a real number, got '1'"),
        ({"rho": True}, TypeError, "rho must be a real number"),
        ({"metric": ms.monge}, TypeError, "metric must be a Metric"),
        ({"base_optimizer": 0.1}, TypeError, "base_optimizer must be an Optax optimizer.*0.1"),
        ({"direction": "grad"}, ValueError, "direction must be 'gradient' or .*, got 'grad'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        one_pass_sam(**{"base_optimizer": optax.sgd(0.1), **arguments})


def test_bad_masks_and_updates():
    params = {"a": jnp.ones(2)}
    tx = one_pass_sam(optax.sgd(0.1))
    state = tx.init(params)
    with pytest.raises(TypeError, match="leaves of mask must be bools, got 1"):
        one_pass_sam(optax.sgd(0.1), mask={"a": 1}).init(params)
    with pytest.raises(ValueError, match=r"needs the params: tx.update\(grads, state, params\)"):
        tx.update(params, state)
    with pytest.raises(ValueError, match=r"nothing at params\['a'\]"):
        tx.update({"b": jnp.ones(2)}, state, params)
    with pytest.raises(TypeError, match=r"at params\['a'\] has dtype float0"):
        tx.update({"a": np.zeros(2, jax.dtypes.float0)}, state, params)


WITHOUT_MOMENTUM = {
    "none": (optax.sgd(0.1), "found 0"),
    "two": (optax.chain(optax.trace(0.9), optax.adam(0.1)), "found 2"),
    "other form": (optax.flatten(optax.adam(0.1)), "found 0"),
    "of steps": (optax.rmsprop(0.1, momentum=0.9), "of steps and not of gradients"),
    "of steps, injected": (
        optax.inject_hyperparams(optax.lars)(0.1, momentum=0.9),
        "of steps and not of gradients",
    ),
}


@pytest.mark.parametrize("base", WITHOUT_MOMENTUM)
def test_direction_needs_one_momentum_of_gradients(base):
    base, message = WITHOUT_MOMENTUM[base]
    tx = one_pass_sam(base, direction="momentum")
    with pytest.raises(ValueError, match=f"{message}.*direction='gradient'"):
        tx.init(example_params())


WITH_MOMENTUM = {
    "injected": optax.inject_hyperparams(optax.lion)(0.1),
    "partition": optax.partition(
        {"a": optax.sgd(0.1, momentum=0.5), "b": optax.adam(0.1)},
        {"hidden": "a", "out": "b", "temperature": "b"},
    ),
    "muon": optax.contrib.muon(1e-3),
    "MultiSteps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
}


@pytest.mark.parametrize("base", WITH_MOMENTUM)
def test_where_a_momentum_is_found(base):
    """It accumulates gradients: after one update of an empty state it points along the first."""
    tx = one_pass_sam(WITH_MOMENTUM[base], rho=0.1, direction="momentum")
    params = example_params()
    g = gradient(params, BATCH)
    update = compiled(tx)
    y, state = params, tx.init(params)
    for _ in range(2 if base == "MultiSteps" else 1):
        y, state = update(y, state, g)
    delta = jax.tree.map(jnp.subtract, y, unperturbed_params(state, y))
    for d, ahead in zip(jax.tree.leaves(delta), jax.tree.leaves(g), strict=True):
        cosine = jnp.sum(d * ahead) / jnp.linalg.norm(d) / jnp.linalg.norm(ahead)
        assert cosine == pytest.approx(1, abs=1e-4)


# --- the perturbation on ordinary, bad and extreme input ---


def still(params, grads, **options):
    """(y, state) after an update that leaves theta where it is."""
    tx = one_pass_sam(optax.set_to_zero(), **options)
    return compiled(tx)(params, tx.init(params), grads)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_length_of_the_perturbation_from_the_smallest_to_the_largest_gradient(dtype):
    """The formula's, to 1e-6 in float32, and to the dtype's rounding at theta = 0."""
    info = jnp.finfo(dtype)
    exponents = np.linspace(np.log10(float(info.tiny)) + 1, np.log10(float(info.max)) - 1, 7)
    tx = one_pass_sam(optax.set_to_zero(), metric=ms.monge(), rho=0.5)
    params = jnp.zeros(4, dtype)
    update = compiled(tx)
    for size in 10.0**exponents:
        grads = jnp.asarray(size * np.array([0.6, 0.0, -0.8, 0.01]), dtype)
        n = np.linalg.norm(np.asarray(grads, np.float64))
        expected = 0.5 / np.hypot(1, n)
        y, state = update(params, tx.init(params), grads)
        assert float(state.diagnostics.perturbation_norm) == pytest.approx(expected, rel=1e-6)
        if expected > 1e3 * float(info.tiny):
            realised = np.linalg.norm(np.asarray(y, np.float64))
            assert realised == pytest.approx(expected, rel=2 * float(info.eps))


def test_zero_gradient_gives_zero_perturbation(direction):
    params = example_params()
    tx = one_pass_sam(BASES["momentum"], direction=direction)
    y, state = compiled(tx)(params, tx.init(params), jax.tree.map(jnp.zeros_like, params))
    chex.assert_trees_all_equal(y, params)
    chex.assert_trees_all_equal(unperturbed_params(state, y), params)
    assert not np.any(flat(state.diagnostics))


def test_complex_params_ascend():
    """In Optax's convention: gradients conjugated by the caller."""
    loss = lambda z: jnp.sum(jnp.abs(z - (1 + 2j)) ** 2)  # noqa: E731
    z = jnp.array([0.3 - 0.1j, 0.2 + 0.7j])
    y, state = still(z, jnp.conj(jax.grad(loss)(z)), rho=0.1)
    rise = float(loss(y) - loss(z))
    assert float(state.diagnostics.predicted_sharpness) == pytest.approx(rise, rel=0.1)


def test_mixed_precision(x64, direction):
    """Dtypes stay; of the momentum's leaves those of 32 bits or more are not kept."""
    dtypes = {"f16": jnp.float16, "bf16": jnp.bfloat16, "f32": jnp.float32, "f64": jnp.float64}
    params = {name: jnp.full(2, 1.5, dtype) for name, dtype in dtypes.items()}
    tx = one_pass_sam(optax.sgd(0.25, momentum=0.5), rho=0.5, direction=direction)
    state = tx.init(params)
    update = compiled(tx)
    y, after = params, state
    for _ in range(3):
        y, after = update(y, after, params)
    chex.assert_trees_all_equal_dtypes((y, after), (params, state))
    theta = unperturbed_params(after, y)
    chex.assert_trees_all_equal_dtypes(theta, params)
    for leaf in jax.tree.leaves(theta):  # 1.5 - 0.25 * 1.5 * (1 + 1.5 + 1.75)
        np.testing.assert_allclose(np.asarray(leaf, float), -0.09375, atol=1e-7)
    kept = {name for name in dtypes if not isinstance(state.delta[name], FromMomentum)}
    assert kept == ({"f16", "bf16"} if direction == "momentum" else set(dtypes))


def test_gradients_in_more_precision_than_the_params(x64, direction):
    params = {"a": jnp.ones(2, jnp.float32)}
    base = optax.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.float64)
    tx = one_pass_sam(base, direction=direction)
    state = tx.init(params)
    wide = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    y, after = jax.eval_shape(functools.partial(step, tx), params, state, wide)
    chex.assert_trees_all_equal_dtypes((y, after), (params, state))


@pytest.mark.parametrize("mask", [None, {"a": True, "b": False}])
def test_non_finite_gradient_makes_the_whole_update_non_finite(mask, direction):
    """Also where a leaf is not perturbed, and if it is the bad one."""
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    tx = one_pass_sam(BASES["momentum"], direction=direction, mask=mask)
    update = jax.jit(tx.update)
    for leaf in params:
        for bad in (np.nan, -np.inf):
            grads = {**params, leaf: jnp.array([1.0, bad, 1.0])}
            updates, _ = update(grads, tx.init(params), params)
            assert not np.any(np.isfinite(flat(updates)))


def test_apply_if_finite_around_it_recovers_exactly(direction):
    tx = optax.apply_if_finite(one_pass_sam(BASES["momentum"], direction=direction), 5)
    update = compiled(tx)
    params = example_params()
    bad = jax.tree.map(lambda p: p + jnp.inf, params)
    clean, broken = (params, tx.init(params)), (params, tx.init(params))
    for _ in range(3):
        clean = update(*clean, gradient(clean[0], BATCH))
        broken = update(*broken, bad)
        broken = update(*broken, gradient(broken[0], BATCH))
    assert broken[1].total_notfinite == 3
    chex.assert_trees_all_equal(broken[0], clean[0])
    chex.assert_trees_all_equal(broken[1].inner_state, clean[1].inner_state)


class Pair(NamedTuple):
    a: object
    b: object


CONTAINERS = {
    "empty": {},
    "none leaf": {"a": jnp.ones(2), "b": None},
    "zero size": {"a": jnp.ones(2), "b": jnp.ones((0, 3))},
    "scalar": jnp.asarray(2.0),
    "named tuple": Pair(jnp.ones(2), [jnp.ones(())]),
    "plain tuple": (jnp.ones(2), (jnp.ones(()),)),
    "frozen dict": flax.core.freeze({"a": {"b": jnp.ones(2)}}),
    "momentum by name": {"mu": jnp.ones(2), "trace": {"mu": jnp.ones(2)}},
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_keep_their_structure(container):
    params = CONTAINERS[container]
    tx = one_pass_sam(BASES["momentum"], rho=0.1, direction="momentum")
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    theta = unperturbed_params(after, optax.apply_updates(params, updates))
    expected = jax.tree.map(lambda p: p - LEARNING_RATE * p, params)
    chex.assert_trees_all_close(theta, expected, rtol=1e-6)


# --- mask ---

MATRICES = {"hidden": {"w": True, "b": False}, "out": True, "temperature": False}


@pytest.mark.parametrize(
    ("mask", "metric", "direction"),
    [
        (MATRICES, ms.monge(), "gradient"),
        (MATRICES, ms.monge(), "momentum"),
        (lambda params: jax.tree.map(lambda p: p.ndim == 2, params), ms.adaptive(), "momentum"),
    ],
)
def test_masked_leaves_are_not_perturbed_and_do_not_enter_the_norm(mask, metric, direction):
    params, g = example_params(), gradient(example_params(), BATCH)
    tx = one_pass_sam(BASES["momentum"], metric=metric, rho=0.1, direction=direction, mask=mask)
    y, state = compiled(tx)(params, tx.init(params), g)
    theta = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, g)
    chosen = lambda tree: [tree["hidden"]["w"], tree["out"]]  # noqa: E731
    delta = ms.worst_case_perturbation(metric, chosen(g), chosen(theta), 0.1)
    expected = jax.tree.map(jnp.add, chosen(theta), delta)
    expected = {
        "hidden": {"w": expected[0], "b": theta["hidden"]["b"]},
        "out": expected[1],
        "temperature": theta["temperature"],
    }
    chex.assert_trees_all_close(y, expected, rtol=1e-6)
    chex.assert_trees_all_close(unperturbed_params(state, y), theta, rtol=1e-6)
    kept = sum(leaf.size for leaf in jax.tree.leaves(state.delta))
    assert kept == (0 if direction == "momentum" and metric.isotropic else 25)


@pytest.mark.parametrize("metric", METRICS)
def test_isotropic_metrics_are_those_whose_direction_is_the_gradients(metric):
    metric, _ = METRICS[metric]
    params, g = example_params(), gradient(example_params(), BATCH)
    ascent, _ = metric.ascent(g, params, metric.init(params))
    ratios = flat(ascent.tangent) / flat(g)
    assert metric.isotropic == np.allclose(ratios, ratios[0], rtol=1e-5)


# --- inside, before and around other transformations ---

INSIDE = {
    "clipping": optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0.3)),
    "schedule": optax.sgd(optax.linear_schedule(0.1, 0.01, 5), momentum=0.9),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}


@pytest.mark.parametrize(
    ("base", "direction"),
    [
        ("clipping", "gradient"),
        ("clipping", "momentum"),
        ("schedule", "momentum"),
        ("MultiSteps", "gradient"),
    ],
)
def test_around_other_transformations(base, direction):
    y, state = run(one_pass_sam(INSIDE[base], rho=0.1, direction=direction), 6)
    expected = by_hand(INSIDE[base], 6, direction)
    assert_close((y, unperturbed_params(state, y)), expected)
    assert ms.get_diagnostics(state).perturbation_norm > 0


def test_extra_arguments_reach_the_base_optimizer():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=0, accumulation_size=1)
    base = optax.chain(optax.sgd(0.1), plateau)
    y, state = run(one_pass_sam(base, rho=0.1), 4, value=1.0)
    assert float(state.base_state[1].scale) < 1
    assert_close((y, unperturbed_params(state, y)), by_hand(base, 4, value=1.0))


def test_after_clipping_the_metric_sees_the_clipped_gradient():
    clip = optax.clip_by_global_norm(0.5)
    y, state = run(optax.chain(clip, one_pass_sam(BASES["adamw"], rho=0.1)), 6)
    clipped = lambda y, t: clip.update(network_grad(y, BATCH), clip.init(y))[0]  # noqa: E731
    expected = by_hand(BASES["adamw"], 6, grads_at=clipped)
    assert_close((y, unperturbed_params(state, y)), expected)
    assert float(ms.get_diagnostics(state).grad_norm) <= 0.5


def test_multisteps_around_it_takes_all_micro_batches_at_one_point():
    micro = [BATCH, example_batch(seed=2)]
    inner = one_pass_sam(BASES["momentum"], rho=0.1, direction="momentum")
    tx = optax.MultiSteps(inner, 2).gradient_transformation()
    y, state = run(tx, 7, batches=micro)  # the last one changes nothing yet

    def mean(y, t):
        del t
        return jax.tree.map(lambda a, b: (a + b) / 2, *(network_grad(y, b) for b in micro))

    expected = by_hand(BASES["momentum"], 3, "momentum", grads_at=mean)
    assert_close((y, unperturbed_params(state, y)), expected)


LABELS = {"hidden": "a", "out": "b", "temperature": "c"}
HIDDEN = {"hidden": True, "out": False, "temperature": False}
AROUND = {
    "masked": lambda tx: optax.chain(
        optax.masked(tx, HIDDEN),
        optax.masked(optax.sgd(0.1), {k: not v for k, v in HIDDEN.items()}),
    ),
    "partition": lambda tx: optax.partition({"a": tx, "b": tx, "c": optax.sgd(0.1)}, LABELS),
}


@pytest.mark.parametrize(
    ("wrapper", "direction"),
    [("masked", "gradient"), ("partition", "gradient"), ("partition", "momentum")],
)
def test_masked_and_partition_around_it(wrapper, direction):
    """Each state has its own leaves, and norm; the loop by hand treats every part alone."""
    inner = BASES["momentum"]
    metric = ms.monge(ms.adaptive()) if direction == "gradient" else ms.monge()
    tx = AROUND[wrapper](one_pass_sam(inner, metric=metric, rho=0.1, direction=direction))
    y, state = run(tx, 5)

    perturb = jax.jit(functools.partial(ms.worst_case_perturbation, metric))
    expected_y, theta = example_params(), example_params()
    states = {name: inner.init(part) for name, part in theta.items()}
    for _ in range(5):
        g = gradient(expected_y, BATCH)
        for name in theta:
            if name == "temperature" or (wrapper == "masked" and name == "out"):
                expected_y[name] = theta[name] = jax.tree.map(
                    lambda p, g: p - 0.1 * g, theta[name], g[name]
                )
                continue
            theta[name], states[name] = step(inner, theta[name], states[name], g[name])
            ahead = g[name] if direction == "gradient" else states[name][0].trace
            delta = perturb(ahead, theta[name], 0.1)
            expected_y[name] = jax.tree.map(jnp.add, theta[name], delta)
    assert_close((y, unperturbed_params(state, y)), (expected_y, theta))


def test_inject_hyperparams():
    """rho changed in the middle concerns the perturbations to come, not the one in the params."""
    tx = optax.inject_hyperparams(one_pass_sam)(BASES["momentum"], rho=0.1, direction="momentum")
    y, state = run(tx, 3)
    state = state._replace(hyperparams={**state.hyperparams, "rho": jnp.asarray(0.4)})
    y, state = run(tx, 3, y, state)
    rho = lambda t: 0.1 if t <= 3 else 0.4  # noqa: E731
    expected = by_hand(BASES["momentum"], 6, "momentum", rho=rho)
    assert_close((y, unperturbed_params(state, y)), expected)


def test_inject_hyperparams_of_the_metric():
    def build(rho, alpha):
        return one_pass_sam(optax.sgd(0.1), metric=ms.monge(alpha=alpha), rho=rho)

    tx = optax.inject_hyperparams(build)(rho=0.1, alpha=2.0)
    params = example_params()
    _, state = run(tx, 1)
    n = np.linalg.norm(flat(gradient(params, BATCH)))
    length = ms.get_diagnostics(state).perturbation_norm
    assert float(length) == pytest.approx(0.1 / np.hypot(1, 2 * n), rel=1e-5)


def test_train_state():
    """Whose apply_gradients passes no extra arguments on."""
    tx = one_pass_sam(BASES["momentum"], rho=0.1)
    train_state = TrainState.create(apply_fn=None, params=example_params(), tx=tx)
    apply_gradients = jax.jit(lambda s, g: s.apply_gradients(grads=g))
    for _ in range(4):
        train_state = apply_gradients(train_state, gradient(train_state.params, BATCH))
    theta = unperturbed_params(train_state.opt_state, train_state.params)
    assert_close((train_state.params, theta), by_hand(BASES["momentum"], 4))


def test_nnx_optimizer(direction):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = one_pass_sam(optax.adam(0.1), rho=0.2, direction=direction)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    loss = lambda params: jnp.mean((BATCH["x"] @ params["kernel"] - BATCH["y"]) ** 2)  # noqa: E731
    params = {"kernel": model.kernel[...], "bias": model.bias[...]}
    state = tx.init(params)

    @nnx.jit
    def train(model, optimizer):
        squares = lambda m: jnp.mean((BATCH["x"] @ m.kernel[...] - BATCH["y"]) ** 2)  # noqa: E731
        optimizer.update(model, nnx.grad(squares)(model))

    update = jax.jit(lambda p, s: step(tx, p, s, jax.grad(loss)(p)))
    for _ in range(3):
        train(model, optimizer)
        params, state = update(params, state)
    opt_state = as_pure(optimizer.opt_state)
    theta = unperturbed_params(opt_state, as_pure(nnx.state(model, nnx.Param)))
    assert_close(dict(theta), unperturbed_params(state, params))


FOLLOWED = {
    "chain": lambda tx: optax.chain(tx, optax.scale(0.5)),
    "nested": lambda tx: optax.chain(optax.chain(optax.clip(1.0), tx), optax.scale(0.5)),
    "injected": lambda tx: optax.inject_hyperparams(
        lambda scale: optax.chain(tx, optax.scale(scale))
    )(0.5),
    "in a mask": lambda tx: optax.masked(optax.chain(tx, optax.scale(0.5)), HIDDEN),
}


@pytest.mark.parametrize("wrapper", FOLLOWED)
def test_what_comes_after_it_in_a_chain_is_found_out(wrapper):
    params = example_params()
    state = FOLLOWED[wrapper](one_pass_sam(optax.sgd(0.1))).init(params)
    with pytest.raises(ValueError, match=r"one_pass_sam\(optax.chain\(...\)\), or before"):
        unperturbed_params(state, params)


def test_unperturbed_params_needs_a_state():
    params = example_params()
    with pytest.raises(ValueError, match="found no state of one_pass_sam"):
        unperturbed_params(optax.adam(0.1).init(params), params)


# --- the state ---


def size_in_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("metric", [ms.monge(), ms.adaptive()])
def test_bytes_of_the_state(dtype, metric, direction):
    """That of the base optimizer, eight scalars, and one copy of the params where it is needed."""
    params = {"w": jnp.ones((1000, 100), dtype), "b": jnp.ones(10, dtype)}
    base = optax.adam(1e-3)
    state = one_pass_sam(base, metric=metric, direction=direction).init(params)
    recomputed = direction == "momentum" and dtype == jnp.float32 and metric.isotropic
    expected = size_in_bytes(base.init(params)) + (0 if recomputed else size_in_bytes(params))
    assert size_in_bytes(state) == expected + 8 * 4


def test_tree_map_params(direction):
    tx = one_pass_sam(BASES["momentum"], direction=direction)
    params = example_params()
    state = tx.init(params)
    labels = jax.tree.map(lambda p: "params", params)
    mapped = optax.tree_map_params(
        tx,
        lambda leaf, label: leaf if isinstance(leaf, optax.MaskedNode) else label,
        state,
        labels,
        transform_non_params=lambda leaf: "other",
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),  # as for optax.masked
    )
    assert mapped.base_state[0].trace == labels
    expected = jax.tree.map(lambda p: FromMomentum(), params)
    assert mapped.delta == (labels if direction == "gradient" else expected)
    assert mapped.multiple == "other"


def test_one_compilation_donation_and_scan(direction):
    tx = one_pass_sam(
        optax.adam(1e-2), rho=optax.linear_schedule(0.2, 0.05, 10), direction=direction
    )
    train = lambda p, s: step(tx, p, s, network_grad(p, BATCH))  # noqa: E731
    update = jax.jit(train, donate_argnums=(0, 1))
    start = example_params()
    params, state = start, tx.init(start)
    weak = lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False))  # noqa: E731
    before = jax.tree.map(weak, jax.eval_shape(lambda x: x, (params, state)))
    assert before == jax.tree.map(weak, jax.eval_shape(train, params, state))
    for i in range(20):
        if i == 10:
            saved = jax.device_get((params, state))
            data = serialization.to_bytes((params, state))
        params, state = update(params, state)
    assert jax.tree.leaves(start)[0].is_deleted()  # donated
    assert update._cache_size() == 1

    restored = serialization.from_bytes(jax.tree.map(np.zeros_like, saved), data)
    chex.assert_trees_all_equal(restored, saved)
    for resumed in (saved, restored):
        resumed = jax.tree.map(jnp.asarray, resumed)
        for _ in range(10):
            resumed = update(*resumed)
        chex.assert_trees_all_equal(resumed, (params, state))

    fresh = example_params()
    scanned, _ = jax.lax.scan(lambda c, _: (train(*c), None), (fresh, tx.init(fresh)), length=20)
    chex.assert_trees_all_close(scanned, (params, state), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("mask", "direction"), [(None, "gradient"), (MATRICES, "momentum")])
def test_orbax_restores_the_state_exactly(tmp_path, direction, mask):
    tx = one_pass_sam(optax.adam(1e-2), direction=direction, mask=mask)
    saved = run(tx, 3)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, saved))
    chex.assert_trees_all_equal(restored, saved)
    chex.assert_trees_all_equal_structs(restored, saved)


# --- devices, and the price ---


@pytest.mark.usefixtures("on_cpu")
def test_sharded_params_keep_their_shardings(direction):
    mesh = jax.sharding.Mesh(np.array(cpu_devices(8)), ("x",))
    params = {"w": jnp.arange(64.0).reshape(16, 4) / 64, "b": jnp.ones(4)}
    shardings = {"w": NamedSharding(mesh, P("x")), "b": NamedSharding(mesh, P())}
    tx = one_pass_sam(optax.adam(1e-2), rho=0.1, direction=direction)
    loss = lambda p: jnp.mean(jnp.tanh(p["w"] + p["b"].reshape(1, -1)) ** 2)  # noqa: E731
    update = jax.jit(lambda p, s: step(tx, p, s, jax.grad(loss)(p)))

    def train(params):
        state = tx.init(params)
        for _ in range(4):
            yield params, state
            params, state = update(params, state)

    *_, (expected, expected_state) = train(params)
    for y, state in train(jax.device_put(params, shardings)):
        kept = [] if direction == "momentum" else [state.delta]
        for tree in (y, state.base_state[0].mu, *kept):
            for name, leaf in tree.items():
                assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim)
    chex.assert_trees_all_close(y, expected, rtol=1e-5)
    chex.assert_trees_all_close(state, expected_state, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("on_cpu")
def test_price_beside_the_plain_step():
    """Beside one gradient: a few operations per param, one more copy of them, nothing temporary."""
    loss, params, batch = network(layers=2)
    base = optax.adam(1e-3)

    def compile_step(tx):
        train = lambda p, s: step(tx, p, s, jax.grad(loss)(p, batch))  # noqa: E731
        return jax.jit(train).lower(params, tx.init(params)).compile()

    plain = compile_step(base)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    for direction, copies in (("gradient", 1), ("momentum", 0)):
        ours = compile_step(one_pass_sam(base, direction=direction))
        flops = ours.cost_analysis()["flops"] - plain.cost_analysis()["flops"]
        assert flops <= 24 * size + 1000
        ours, memory = ours.memory_analysis(), plain.memory_analysis()
        assert ours.temp_size_in_bytes <= 1.01 * memory.temp_size_in_bytes
        extra = ours.output_size_in_bytes - memory.output_size_in_bytes
        assert extra <= copies * 4 * size + 1000


@pytest.mark.usefixtures("on_cpu")
def test_instructions_of_a_step_over_many_leaves():
    """No scalars are copied into the leaves: not many more than a plain normalisation takes."""
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=4), jnp.float32) for _ in range(50)]
    grad_fn = jax.grad(lambda params: total([jnp.sum(jnp.tanh(p) ** 2) for p in params]))
    base = optax.sgd(0.1, momentum=0.9)
    tx = one_pass_sam(base)

    def plain(params, state):
        theta, state = state
        g = grad_fn(params)
        theta, state = step(base, theta, state, g)
        norm = jnp.sqrt(total([jnp.sum(x * x) for x in g]))
        return [t + 0.05 * x / norm for t, x in zip(theta, g, strict=True)], (theta, state)

    by_hand = jax.jit(plain).lower(params, (params, base.init(params))).compile()
    ours = jax.jit(lambda p, s: step(tx, p, s, grad_fn(p))).lower(params, tx.init(params)).compile()
    assert count_instructions(ours) < 1.4 * count_instructions(by_hand)


# --- a margin of stability ---


def capped_loop(matrix, base, direction, margin, steps, chosen=slice(None)):
    """`numpy_loop` with |delta| / |ahead| <= margin |dy| / |dg|, of what is perturbed."""
    theta = y = np.linspace(-1.5, 1.0, 5)
    m, last, shortened = np.zeros(5), None, []
    for _ in range(steps):
        g = slope(y)
        m = 0.8 * m + g
        theta = theta - LEARNING_RATE * (m if base == "momentum" else g)
        ahead = (g if direction == "gradient" else m)[chosen]
        delta = np.zeros(5)
        delta[chosen] = dense_perturbation(matrix(theta[chosen], ahead), ahead, RHO)
        if last is not None:
            dy, dg = y[chosen] - last[0], g[chosen] - last[1]
            longest = margin * np.linalg.norm(dy) / np.linalg.norm(dg) * np.linalg.norm(ahead)
            shortened.append(longest < np.linalg.norm(delta))
            delta *= min(1.0, longest / np.linalg.norm(delta))
        last = y[chosen], g[chosen]
        y = theta + delta
    assert 0.2 < np.mean(shortened) < 0.9
    return y, theta


@pytest.mark.parametrize(
    ("metric", "base", "direction", "margin", "first"),
    [
        ("euclidean", "sgd", "gradient", 0.4, 0),
        ("monge", "momentum", "momentum", 0.1, 0),
        ("monge adaptive", "momentum", "gradient", 0.2, 2),
    ],
)
def test_a_margin_is_kept_as_in_a_numpy_loop(x64, metric, base, direction, margin, first):
    metric, matrix = METRICS[metric]
    mask = {"a": False, "b": True} if first else None
    options = {"rho": RHO, "direction": direction, "mask": mask, "stability_margin": margin}
    tx = one_pass_sam(BASES[base], metric=metric, **options)
    start = jnp.linspace(-1.5, 1.0, 5)
    y = {"a": start[:2], "b": [start[2:]]}
    state = tx.init(y)
    for _ in range(30):
        g = slope(flat(y))
        y, state = compiled(tx)(y, state, {"a": jnp.asarray(g[:2]), "b": [jnp.asarray(g[2:])]})
    loop = capped_loop(matrix, base, direction, margin, 30, slice(first, None))
    np.testing.assert_allclose(flat(y), loop[0], rtol=1e-9)
    np.testing.assert_allclose(flat(unperturbed_params(state, y)), loop[1], rtol=1e-9)
    length = np.linalg.norm(loop[0] - loop[1])
    assert float(ms.get_diagnostics(state).perturbation_norm) == pytest.approx(length, rel=1e-5)


@pytest.mark.parametrize(("dtype", "floor"), [(jnp.float64, 1e-24), (jnp.float32, 1e-11)])
@pytest.mark.parametrize("metric", [ms.euclidean(), ms.monge()], ids=["sam", "monge"])
def test_with_a_margin_it_settles_in_the_valley_of_the_banana(x64, metric, dtype, floor):
    """And without it beside the valley; in float32 y stands still in the end, and stays there."""
    starts = jnp.asarray([[-3.0, 0.33], [-2.3, 1.0], [0.33, -1.0], [3.0, 2.3]], dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def losses(margin):
        tx = one_pass_sam(optax.sgd(0.01), metric=metric, rho=1.0, stability_margin=margin)

        def descend(start):
            move = lambda carry, _: (step(tx, *carry, jax.grad(banana)(carry[0])), None)  # noqa: E731
            (y, state), _ = jax.lax.scan(move, (start, tx.init(start)), length=3000)
            return banana(unperturbed_params(state, y))

        return jax.vmap(descend)(starts)

    assert np.all(losses(None) > 0.1)
    assert np.all(losses(0.5) < floor)


def test_a_margin_before_anything_is_seen_and_where_nothing_moves():
    """No limit at the first update; and where params stay, the last curvature holds."""
    p, curvature = jnp.array([3.0, 4.0]), 2.0
    tx = one_pass_sam(optax.sgd(0.0), metric=ms.euclidean(), rho=8.0, stability_margin=0.5)
    y, state = step(tx, p, tx.init(p), curvature * p)
    assert float(state.diagnostics.effective_radius) == pytest.approx(8 / 10)
    for _ in range(2):
        _, state = step(tx, y, state, curvature * y)
        assert float(state.diagnostics.effective_radius) == pytest.approx(0.5 / curvature)
    flat_loss = step(tx, y + 1, state, curvature * y)[1]  # another point with the same gradient
    assert float(flat_loss.diagnostics.perturbation_norm) == pytest.approx(8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_what_a_margin_keeps(dtype):
    """Two copies of what is perturbed and a scalar, in one program; nothing without it."""
    params = {"a": jnp.linspace(0.5, 2, 7, dtype=dtype), "b": jnp.ones(3, dtype)}
    options = {"mask": {"a": True, "b": False}, "when": lambda count: count % 2 == 0}
    schedule = optax.linear_schedule(0.2, 0.1, 3)
    assert one_pass_sam(optax.adam(0.1), **options).init(params).secant == ()
    tx = one_pass_sam(optax.adam(0.1), rho=schedule, stability_margin=0.5, **options)
    state = tx.init(params)
    kinds = [(x.shape, x.dtype) for x in jax.tree.leaves(state.secant)]
    assert kinds == [((7,), dtype), ((7,), dtype), ((), jnp.float32)]
    y, after = params, state
    for t in range(5):
        y, after = compiled(tx)(y, after, jax.tree.map(jnp.sin, y))
        assert (float(after.diagnostics.perturbation_norm) > 0) == (t % 2 == 1)
    chex.assert_trees_all_equal_shapes_and_dtypes((y, after), (params, state))
    assert 0 < float(after.secant.curvature) < 2  # cos y, but for rounding
    assert compiled(tx)._cache_size() == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rho_zero_with_a_margin_is_the_base_optimizer(dtype, direction):
    results = []
    margin = {"rho": 0.0, "direction": direction, "stability_margin": 0.5}
    for tx in (BASES["adamw"], one_pass_sam(BASES["adamw"], **margin)):
        params = jnp.linspace(-1, 2, 7, dtype=dtype)
        state = tx.init(params)
        for _ in range(5):
            params, state = step(tx, params, state, jnp.sin(3 * params))
        results.append(params)
    chex.assert_trees_all_equal(*results)
    chex.assert_trees_all_equal(unperturbed_params(state, params), params)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-0.5, ValueError, "must be finite and not negative, got -0.5"),
        (float("nan"), ValueError, "must be finite and not negative, got nan"),
        (0.0, ValueError, "must be positive, got 0.0: rho=0 is without a perturbation"),
        (jnp.ones(2), ValueError, "must be a scalar"),
        ("0.5", TypeError, "must be a real number, got '0.5'"),
        (True, TypeError, "must be a real number"),
    ],
)
def test_bad_margins(value, error, message):
    with pytest.raises(error, match=f"stability_margin {message}"):
        one_pass_sam(optax.sgd(0.1), stability_margin=value)


def test_the_state_of_another_margin():
    """Any number will do, but not with for without; the advice of the error is followed."""
    params, base = example_params(), BASES["momentum"]
    old = one_pass_sam(base)
    y, state = run(old, 2)
    tx = one_pass_sam(base, stability_margin=0.5)
    with pytest.raises(ValueError, match="with or without a stability_margin"):
        tx.update(params, state, y)
    theta = unperturbed_params(state, y)
    state = tx.init(theta)._replace(base_state=state.base_state)
    y, state = step(tx, theta, state, gradient(theta, BATCH))
    with pytest.raises(ValueError, match="with or without a stability_margin"):
        old.update(params, state, y)
    run(one_pass_sam(base, stability_margin=0.4), 1, y, state)


def test_an_injected_margin_and_derivatives():
    """Of theta's loss after two updates with respect to rho and the margin: finite differences."""
    start = jnp.array([0.3, -0.8, 0.5])

    def end(rho, margin):
        builder = optax.inject_hyperparams(one_pass_sam)
        tx = builder(optax.sgd(0.3), metric=ms.euclidean(), rho=rho, stability_margin=margin)
        y, state = start, tx.init(start)
        for _ in range(3):
            y, state = step(tx, y, state, 2 * y + jnp.sin(3 * y))
        return jnp.sum(unperturbed_params(state, y) ** 2)

    for margin, which in ((0.05, 1), (50.0, 0)):  # the margin decides, or rho
        slopes = jax.grad(end, (0, 1))(0.2, margin)
        h = 1e-2 * (0.2, margin)[which]
        shift = [0.0, 0.0]
        shift[which] = h
        ahead = end(0.2 + shift[0], margin + shift[1])
        behind = end(0.2 - shift[0], margin - shift[1])
        assert float(slopes[which]) == pytest.approx(float(ahead - behind) / (2 * h), rel=2e-2)
        assert abs(float(slopes[which])) > 1e-3


@pytest.mark.usefixtures("on_cpu")
def test_a_margin_keeps_shardings():
    mesh = jax.sharding.Mesh(np.array(cpu_devices(8)), ("x",))
    params = {"w": jnp.arange(64.0).reshape(16, 4) / 64, "b": jnp.ones(4)}
    shardings = {"w": NamedSharding(mesh, P("x")), "b": NamedSharding(mesh, P())}
    tx = one_pass_sam(optax.sgd(0.1), rho=1.0, stability_margin=0.1)
    loss = lambda p: jnp.mean(jnp.tanh(p["w"] + p["b"].reshape(1, -1)) ** 2)  # noqa: E731
    update = jax.jit(lambda p, s: step(tx, p, s, jax.grad(loss)(p)))
    ends = []
    for placed in (params, jax.device_put(params, shardings)):
        y, state = placed, tx.init(placed)
        for _ in range(3):
            y, state = update(y, state)
        ends.append((y, state))
    chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-7)
    for tree in (state.secant.point, state.secant.gradient):
        for name, leaf in tree.items():
            assert leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim)
    assert float(state.diagnostics.effective_radius) < 0.11 / float(state.secant.curvature)
