"""The functional form: a drop-in for jax.value_and_grad that shares the transformation's core."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import (
    CASES,
    EACH_CASE,
    dense_perturbation,
    example_batch,
    example_params,
    flat,
    network_grad,
    network_loss,
)

import monge_sam_jax as ms

BATCH = example_batch()


@pytest.fixture(params=EACH_CASE)
def case(request):
    return CASES[request.param]


def test_value_of_the_first_pass_and_gradient_of_the_second(case):
    metric = case.metric(**case.options)
    params = example_params()
    fn = ms.sharpness_aware_value_and_grad(network_loss, metric=metric, rho=0.1)
    value, grads = jax.jit(fn)(params, BATCH)
    assert float(value) == pytest.approx(float(network_loss(params, BATCH)), rel=1e-6)
    delta = ms.worst_case_perturbation(metric, network_grad(params, BATCH), params, 0.1)
    expected = network_grad(jax.tree.map(jnp.add, params, delta), BATCH)
    chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"mask": {"hidden": False, "out": True, "temperature": True}}, id="mask"),
        pytest.param({"measure": True}, id="measure", marks=pytest.mark.slow),
    ],
)
def test_equals_the_transformation(case, options):
    params = example_params()
    tx = case.builder(network_grad, rho=0.1, **case.options, **options)
    expected, state = tx.update(network_grad(params, BATCH), tx.init(params), params, batch=BATCH)
    fn = ms.sharpness_aware_value_and_grad(
        network_loss, metric=case.metric(**case.options), rho=0.1, diagnostics=True, **options
    )
    _, grads, diagnostics = fn(params, BATCH)
    chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(diagnostics, state.diagnostics, rtol=1e-5)
    assert type(diagnostics) is type(state.diagnostics)


def test_aux_comes_from_the_first_pass(case):
    def loss_fn(params, batch):
        return network_loss(params, batch), {"seen": params["temperature"]}

    fn = ms.sharpness_aware_value_and_grad(
        loss_fn, metric=case.metric(**case.options), rho=0.3, has_aux=True, diagnostics=True
    )
    params = example_params()
    (value, aux), grads, diagnostics = fn(params, BATCH)
    assert aux["seen"] == params["temperature"]
    assert float(value) == pytest.approx(float(network_loss(params, BATCH)), rel=1e-6)
    chex.assert_trees_all_equal_structs(grads, params)
    assert diagnostics.perturbation_norm > 0


@pytest.mark.parametrize("argnums", [1, -1, (0, 1), (1, 0), [0, 1]])
def test_argnums(argnums):
    """Several arguments are perturbed together: one ball, one norm."""
    loss = lambda a, b: jnp.sum(a**2) + jnp.sum(jnp.exp(b))  # noqa: E731
    gradients = [lambda a: 2 * a, np.exp]
    args = [np.array([1.0, -2.0]), np.array([0.5])]
    fn = ms.sharpness_aware_value_and_grad(loss, metric=ms.monge(), rho=0.1, argnums=argnums)
    value, grads = fn(*map(jnp.asarray, args))
    plain = jax.value_and_grad(loss, argnums=argnums)(*map(jnp.asarray, args))
    chex.assert_trees_all_equal_structs((value, grads), plain)
    chosen = [argnums] if isinstance(argnums, int) else list(argnums)
    g = np.concatenate([gradients[i](args[i]) for i in chosen])
    delta = dense_perturbation(np.eye(g.size) + np.outer(g, g), g, 0.1)
    for i, actual in zip(chosen, [grads] if isinstance(argnums, int) else grads, strict=True):
        part, delta = delta[: args[i].size], delta[args[i].size :]
        np.testing.assert_allclose(actual, gradients[i](args[i] + part), rtol=1e-5)


def test_keyword_arguments_and_an_optimizer():
    fn = ms.sharpness_aware_value_and_grad(network_loss, metric=ms.monge(), rho=0.1)
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        value, grads = fn(params, batch=BATCH)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = example_params()
    state = tx.init(params)
    values = []
    for _ in range(30):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.7 * values[0]


def test_complex_params_follow_jax_grad(case):
    """The perturbation ascends, and the gradient is what jax.value_and_grad gives there."""
    center = jnp.array([1.0 + 2.0j, -0.5j])
    loss = lambda z: jnp.sum(jnp.abs(z - center) ** 4)  # noqa: E731
    z = jnp.array([0.3 - 0.1j, 0.2 + 0.7j])
    metric = case.metric(**case.options)
    value, grads, diagnostics = ms.sharpness_aware_value_and_grad(
        loss, metric=metric, rho=0.01, diagnostics=True
    )(z)
    delta = ms.worst_case_perturbation(metric, jnp.conj(jax.grad(loss)(z)), z, 0.01)
    np.testing.assert_allclose(grads, jax.grad(loss)(z + delta), rtol=1e-5)
    rise = float(loss(z + delta) - value)
    assert rise > 0
    assert float(diagnostics.predicted_sharpness) == pytest.approx(rise, rel=0.1)


def test_traced_rho_alpha_and_derivatives(x64):
    """Hyperparameters may be traced, and differentiated."""
    loss = lambda p: jnp.sum(p**4)  # noqa: E731

    def outcome(rho, alpha):
        fn = ms.sharpness_aware_value_and_grad(loss, metric=ms.monge(alpha=alpha), rho=rho)
        return jnp.sum(fn(jnp.array([0.5, -0.3]))[1])

    h = 1e-6
    for i, derivative in enumerate(jax.jit(jax.grad(outcome, argnums=(0, 1)))(0.1, 1.0)):
        high, low = [0.1, 1.0], [0.1, 1.0]
        high[i] += h
        low[i] -= h
        numeric = (outcome(*high) - outcome(*low)) / (2 * h)
        assert float(derivative) == pytest.approx(float(numeric), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": -1.0}, ValueError, "rho must be"),
        ({"rho": optax.constant_schedule(0.1)}, TypeError, "a schedule needs"),
        ({"metric": ms.monge}, TypeError, "metric must be a Metric"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        ms.sharpness_aware_value_and_grad(
            network_loss, **{"metric": ms.monge(), "rho": 0.1, **options}
        )


def test_non_finite_first_gradient(case):
    fn = ms.sharpness_aware_value_and_grad(
        lambda p: jnp.sum(jnp.log(p["a"])) + jnp.sum(p["b"]),
        metric=case.metric(**case.options),
        rho=0.1,
    )
    _, grads = fn({"a": jnp.zeros(2), "b": jnp.ones(2)})
    assert not np.any(np.isfinite(flat(grads)))


PARTS = {0.25: slice(0, None, 4), 0.5: slice(0, None, 2), 0.75: slice(0, 12), 1e-9: slice(0, 1)}


@pytest.mark.parametrize(
    "fraction", [pytest.param(x, marks=() if x == 0.75 else pytest.mark.slow) for x in PARTS]
)
def test_ascent_on_a_part_of_the_batch(case, fraction):
    """The perturbation and the value of the part alone, the gradient of the whole batch."""
    metric, params = case.metric(**case.options), example_params()
    part = jax.tree.map(lambda x: x[PARTS[fraction]], BATCH)
    first = network_grad(params, part)
    theta, g = np.asarray(flat(params), float), np.asarray(flat(first), float)
    delta = dense_perturbation(case.matrix(theta, g, **case.options), g, 0.1)
    unflatten = jax.flatten_util.ravel_pytree(params)[1]
    perturbed = unflatten(jnp.asarray(theta + delta, jnp.float32))
    fn = ms.sharpness_aware_value_and_grad(
        network_loss, metric=metric, rho=0.1, ascent_batch_fraction=fraction
    )
    for value, grads in (jax.jit(fn)(params, BATCH), jax.jit(fn)(params, batch=BATCH)):
        assert float(value) == pytest.approx(float(network_loss(params, part)), rel=1e-5)
        chex.assert_trees_all_close(grads, network_grad(perturbed, BATCH), rtol=1e-4, atol=1e-6)


def test_arguments_that_the_ascent_gets_whole_and_axes_of_the_samples():
    def loss_fn(x, params, scale, y):
        chex.assert_shape(scale, (3,))
        chex.assert_equal(x.shape[1], y.shape[0])
        return jnp.mean(scale) * jnp.mean((params * x[0] - y) ** 2)

    x, y = jnp.arange(8.0).reshape(1, 8), jnp.ones(8)
    args = (x, jnp.array(2.0), jnp.array([1.0, 2.0, 3.0]), y)
    options = {"metric": ms.euclidean(), "rho": 0.5, "argnums": 1, "ascent_batch_fraction": 0.5}
    fn = ms.sharpness_aware_value_and_grad(loss_fn, batch_axis=(-1, None, 0), **options)
    value, grads = fn(*args)
    assert value == 2 * np.mean((2 * np.arange(0, 8, 2) - 1) ** 2)
    assert grads == 2 * np.mean(2 * (2.5 * np.arange(8) - 1) * np.arange(8))
    with pytest.raises(ValueError, match=r"batch_axis must hold one axis for each of the 3"):
        ms.sharpness_aware_value_and_grad(loss_fn, batch_axis=(0,), **options)(*args)
    message = r"shape \(\) has no axis 0 .*None in its place, such as batch_axis=\(0, None, 0\)"
    with pytest.raises(ValueError, match=message):
        ms.sharpness_aware_value_and_grad(loss_fn, **options)(x, args[1], jnp.array(1.0), y)


@pytest.mark.parametrize("fraction", [0, 0.0, 1.5, -0.5, np.nan])
def test_a_fraction_outside_zero_to_one_is_an_error(fraction):
    with pytest.raises(ValueError, match="ascent_batch_fraction must be"):
        ms.sharpness_aware_value_and_grad(
            network_loss, metric=ms.monge(), rho=0.1, ascent_batch_fraction=fraction
        )
