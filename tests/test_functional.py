"""Functional SAM against its formula in NumPy, its limits, and the passes that it takes."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from reference import CASES, EACH_CASE, dense_perturbation, flat, relative_error
from trajectories import cpu_devices, vary

import monge_sam_jax as ms

RHO = 0.3


def start(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        "hidden": jnp.asarray(rng.normal(size=(3, 5)), dtype),
        "out": {"w": jnp.asarray(rng.normal(size=(5, 4)), dtype), "b": jnp.zeros(4, dtype)},
    }


def samples(n=16):
    rng = np.random.default_rng(1)
    return {
        "x": jnp.asarray(rng.normal(size=(n, 3)), jnp.float32),
        "y": jnp.asarray(rng.integers(4, size=n)),
    }


BATCH = samples()


def model(params, batch):
    hidden = jnp.tanh(batch["x"].astype(params["hidden"].dtype) @ params["hidden"])
    return hidden @ params["out"]["w"] + params["out"]["b"].reshape(1, -1)


def cross_entropy(logits, batch):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]))


def whole(params, batch):
    return cross_entropy(model(params, batch), batch)


def functional(metric=None, rho=RHO, **options):
    return ms.functional_sam_value_and_grad(
        model, cross_entropy, metric=metric or ms.monge(), rho=rho, **options
    )


@pytest.fixture(params=EACH_CASE)
def case(request):
    return CASES[request.param]


# --- the formula ---


def logits_by_hand(theta):
    """In float64, of the params laid end to end in the order of their names."""
    hidden, b, w = theta[:15].reshape(3, 5), theta[15:19], theta[19:].reshape(5, 4)
    return np.tanh(np.asarray(BATCH["x"], float) @ hidden) @ w + b


def jacobian_by_hand(theta):
    """J by central differences, of shape (samples, classes, params)."""
    shifts = 1e-5 * np.eye(theta.size)
    columns = [logits_by_hand(theta + s) - logits_by_hand(theta - s) for s in shifts]
    return np.stack(columns, axis=-1) / 2e-5


def loss_by_hand(logits):
    log_p = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    return -np.mean(log_p[np.arange(len(logits)), BATCH["y"]])


def cotangent_by_hand(logits):
    p = np.exp(logits) / np.sum(np.exp(logits), axis=1, keepdims=True)
    return (p - np.eye(4)[np.asarray(BATCH["y"])]) / len(logits)


def test_it_is_the_formula(case):
    theta = np.asarray(flat(start()), float)
    cotangent = cotangent_by_hand(logits_by_hand(theta))
    g = np.einsum("skp,sk->p", jacobian_by_hand(theta), cotangent)
    delta = dense_perturbation(case.matrix(theta, g, **case.options), g, RHO)
    expected = np.einsum("skp,sk->p", jacobian_by_hand(theta + delta), cotangent)

    fn = functional(case.metric(**case.options), diagnostics=True)
    value, grads, diagnostics = jax.jit(fn)(start(), BATCH)
    assert float(value) == pytest.approx(loss_by_hand(logits_by_hand(theta)), rel=1e-6)
    assert relative_error(flat(grads), expected) < 1e-5
    assert float(diagnostics.perturbation_norm) == pytest.approx(np.linalg.norm(delta), rel=1e-5)
    assert float(diagnostics.grad_norm) == pytest.approx(np.linalg.norm(g), rel=1e-5)
    sam = np.einsum(
        "skp,sk->p",
        jacobian_by_hand(theta + delta),
        cotangent_by_hand(logits_by_hand(theta + delta)),
    )
    assert relative_error(sam, expected) > 0.01  # which it is not


def test_without_a_radius_it_is_the_gradient_to_the_bit(case):
    plain = jax.jit(jax.value_and_grad(whole))(start(), BATCH)
    fn = functional(case.metric(**case.options), rho=0.0)
    chex.assert_trees_all_equal(jax.jit(fn)(start(), BATCH), plain)


def test_it_is_sam_for_a_loss_linear_in_the_outputs(case):
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(16, 4)), jnp.float32)
    loss = lambda logits, batch: jnp.sum(weights * logits) / 16  # noqa: E731
    options = {"metric": case.metric(**case.options), "rho": RHO, "diagnostics": True}
    fn = ms.functional_sam_value_and_grad(model, loss, measure=True, **options)
    sam = ms.sharpness_aware_value_and_grad(
        lambda p, batch: loss(model(p, batch), batch), measure=True, **options
    )
    chex.assert_trees_all_close(fn(start(), BATCH), sam(start(), BATCH), rtol=1e-4, atol=1e-6)


def test_it_is_the_gradient_for_a_model_linear_in_its_params(case):
    linear = lambda params, batch: batch["x"] @ params["w"]  # noqa: E731
    params = {"w": jnp.asarray(np.random.default_rng(3).normal(size=(3, 4)), jnp.float32)}
    metric = case.metric(**case.options)
    fn = ms.functional_sam_value_and_grad(linear, cross_entropy, metric=metric, rho=RHO)
    loss = lambda p: cross_entropy(linear(p, BATCH), BATCH)  # noqa: E731
    chex.assert_trees_all_close(fn(params, BATCH)[1], jax.grad(loss)(params), rtol=1e-5, atol=1e-7)


def test_the_first_order_is_the_hessian_less_its_gauss_newton_part(x64):
    params = jax.tree.map(lambda p: p.astype(jnp.float64), start())
    theta, unravel = jax.flatten_util.ravel_pytree(params)
    f = lambda t: model(unravel(t), BATCH).ravel()  # noqa: E731
    loss = lambda outputs: cross_entropy(outputs.reshape(16, 4), BATCH)  # noqa: E731
    J, g, H, by_outputs = jax.jit(
        lambda t: (
            jax.jacobian(f)(t),
            jax.grad(lambda t: loss(f(t)))(t),
            jax.hessian(lambda t: loss(f(t)))(t),
            jax.hessian(loss)(f(t)),
        )
    )(theta)
    rest = H - J.T @ by_outputs @ J
    delta = 1e-5 * g / jnp.linalg.norm(g)
    _, grads, found = functional(ms.euclidean(), rho=1e-5, diagnostics=True, measure=True)(
        params, BATCH
    )
    np.testing.assert_allclose(flat(grads) - g, rest @ delta, rtol=1e-3, atol=1e-9)
    assert float(found.curvature) == pytest.approx(float(delta @ rest @ delta) / 1e-10, rel=1e-3)


# --- what it returns ---


def test_outputs_may_be_a_tree_and_arguments_have_names():
    def two_heads(params, x, *, scale):
        hidden = jnp.tanh(x @ params["hidden"])
        return {"logits": hidden @ params["out"]["w"], "size": (scale * jnp.sum(hidden**2), None)}

    def loss(outputs, x, *, scale):
        assert x.shape == (16, 3)
        return jnp.mean(outputs["logits"] ** 2) + scale * jnp.sin(outputs["size"][0])

    def flattened(params, x, *, scale):
        outputs = two_heads(params, x, scale=scale)
        return jnp.append(outputs["logits"], outputs["size"][0])

    def loss_of_flat(outputs, x, *, scale):
        return jnp.mean(outputs[:-1] ** 2) + scale * jnp.sin(outputs[-1])

    options = {"metric": ms.monge(), "rho": RHO}
    found, expected = (
        ms.functional_sam_value_and_grad(*functions, **options)(start(), BATCH["x"], scale=0.1)
        for functions in ((two_heads, loss), (flattened, loss_of_flat))
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_aux_is_that_of_the_first_pass():
    """Running statistics of the outputs, as BatchNorm's."""

    def with_statistics(variables, batch, statistics):
        logits = model(variables, batch)
        mean = 0.9 * statistics + 0.1 * jnp.mean(logits, axis=0)
        return logits - jnp.mean(logits, axis=0, keepdims=True), {"mean": mean, "step": 3}

    loss = lambda logits, batch, _: cross_entropy(logits, batch)  # noqa: E731
    fn = ms.functional_sam_value_and_grad(
        with_statistics, loss, metric=ms.monge(), rho=RHO, has_aux=True, diagnostics=True
    )
    (value, aux), grads, found = jax.jit(fn)(start(), BATCH, jnp.ones(4))
    logits = model(start(), BATCH)
    np.testing.assert_allclose(aux["mean"], 0.9 + 0.1 * np.mean(logits, axis=0), rtol=1e-5)
    assert aux["step"] == 3
    assert value == pytest.approx(
        float(cross_entropy(logits - jnp.mean(logits, 0, keepdims=True), BATCH))
    )
    assert float(found.perturbation_norm) > 0
    plain = ms.functional_sam_value_and_grad(
        lambda *args: with_statistics(*args)[0], loss, metric=ms.monge(), rho=RHO
    )(start(), BATCH, jnp.ones(4))
    chex.assert_trees_all_close((value, grads), plain, rtol=1e-5, atol=1e-7)


def test_mask_leaves_the_others_unperturbed():
    mask = {"hidden": True, "out": False}
    grads = functional(mask=mask)(start(), BATCH)[1]
    first = jax.grad(whole)(start(), BATCH)
    delta = ms.worst_case_perturbation(ms.monge(), first["hidden"], start()["hidden"], RHO)
    perturbed = start() | {"hidden": start()["hidden"] + delta}
    cotangent = jax.grad(cross_entropy)(model(start(), BATCH), BATCH)
    (expected,) = jax.vjp(lambda p: model(p, BATCH), perturbed)[1](cotangent)
    chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("traced", [False, True])
def test_when_it_does_not_perturb(traced):
    run = lambda when: functional(when=when, diagnostics=True)(start(), BATCH)  # noqa: E731
    run = jax.jit(run) if traced else run
    value, grads, found = run(False)
    plain = jax.value_and_grad(whole)(start(), BATCH)
    chex.assert_trees_all_close((value, grads), plain, rtol=1e-6, atol=1e-7)
    assert not np.any(flat(found))
    chex.assert_trees_all_close(run(True)[:2], functional()(start(), BATCH), rtol=1e-5, atol=1e-7)


def test_complex_params_follow_jax_grad(case):
    def outputs(z, scale):
        return scale * z**2 - z[::-1]

    def loss(w, scale):
        return jnp.sum(jnp.abs(w - 1j) ** 4) + jnp.sum(w.real)

    z = jnp.array([0.3 - 0.1j, 0.2 + 0.7j])
    metric = case.metric(**case.options)
    fn = ms.functional_sam_value_and_grad(outputs, loss, metric=metric, rho=0.1)
    value, grads = fn(z, 1.5)
    plain_value, plain = jax.value_and_grad(lambda z: loss(outputs(z, 1.5), 1.5))(z)
    assert value == plain_value
    delta = ms.worst_case_perturbation(metric, jnp.conj(plain), z, 0.1)
    cotangent = np.asarray(jax.grad(loss)(outputs(z, 1.5), 1.5))
    w = np.asarray(z + delta)
    by_hand = 2 * 1.5 * w * cotangent - cotangent[::-1]  # as the outputs are holomorphic
    np.testing.assert_allclose(grads, by_hand, rtol=1e-4)


def test_a_first_gradient_that_is_not_finite():
    fn = ms.functional_sam_value_and_grad(
        lambda p: (jnp.log(p["a"]), p["b"]),
        lambda outputs: jnp.sum(outputs[0]) + jnp.sum(outputs[1]),
        metric=ms.monge(),
        rho=0.1,
    )
    assert np.all(np.isnan(flat(fn({"a": jnp.zeros(2), "b": jnp.ones(2)})[1])))


@pytest.mark.parametrize("widen", [False, True])
def test_bfloat16(widen):
    params = start(jnp.bfloat16)
    value, grads, found = functional(
        ms.euclidean(), widen_params=widen, diagnostics=True, measure=True
    )(params, BATCH)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("bfloat16")}
    assert value.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    expected = functional(ms.euclidean())(wide, BATCH)[1]
    assert relative_error(flat(grads).astype(float), flat(expected)) < 0.05
    assert float(found.realised_norm) == pytest.approx(RHO, rel=1e-5 if widen else 0.02)
    tiny = functional(ms.euclidean(), rho=1e-4, widen_params=widen, diagnostics=True, measure=True)
    assert (float(tiny(params, BATCH)[2].realised_norm) > 9e-5) == widen


# --- with JAX ---


def test_vmap_and_traced_rho():
    run = lambda p, rho: functional(rho=rho)(p, BATCH)  # noqa: E731
    stacked = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p]), start())
    values, grads = jax.jit(jax.vmap(run, in_axes=(0, None)))(stacked, RHO)
    for i in range(2):
        own = functional()(jax.tree.map(lambda p: p[i], stacked), BATCH)  # noqa: B023
        found = values[i], jax.tree.map(lambda g: g[i], grads)  # noqa: B023
        chex.assert_trees_all_close(found, own, rtol=1e-4, atol=1e-6)


def test_training_with_donated_params():
    fn, tx = functional(), optax.adam(3e-2)

    def step(params, state):
        value, grads = fn(params, BATCH)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(step, donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.copy, start()), tx.init(start())
    values = []
    for _ in range(40):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize("sync", [True, False])
def test_over_devices(sync):
    """The mean of the shards' gradients, at a perturbation in common or at one of their own."""
    mesh = Mesh(np.array(cpu_devices(2)), ("data",))
    fn = functional(axis_name="data", sync_perturbation=sync)
    sharded = jax.shard_map(
        lambda p, batch: fn(vary(p), batch)[1], mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
    )
    grads = jax.jit(sharded)(start(), BATCH)
    if sync:
        expected = functional()(start(), BATCH)[1]
    else:
        halves = [jax.tree.map(lambda x: x[s], BATCH) for s in (slice(8), slice(8, None))]  # noqa: B023
        both = [functional()(start(), half)[1] for half in halves]
        expected = jax.tree.map(lambda a, b: (a + b) / 2, *both)
    chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-6)


# --- the price ---


def counts(function):
    compiled = jax.jit(function).lower(start(), BATCH).compile()
    text = compiled.as_text()
    instructions = len(re.findall(r"^\s+(?:ROOT )?%?[\w.\-]+ = ", text, re.MULTILINE))
    return text.count(" dot("), instructions, compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("on_cpu")
def test_two_passes_and_no_more_than_sams():
    evaluated = []

    def counted_model(params, batch):
        jax.debug.callback(lambda: evaluated.append("model"))
        return model(params, batch)

    def counted_loss(logits, batch):
        jax.debug.callback(lambda: evaluated.append("loss"))
        return cross_entropy(logits, batch)

    fn = ms.functional_sam_value_and_grad(counted_model, counted_loss, metric=ms.monge(), rho=RHO)
    jax.block_until_ready(jax.jit(fn)(start(), BATCH))
    jax.effects_barrier()
    assert sorted(evaluated) == ["loss", "model", "model"]

    sam = ms.sharpness_aware_value_and_grad(whole, metric=ms.monge(), rho=RHO)
    plain_dots = counts(jax.value_and_grad(whole))[0]
    dots, instructions, temporary = counts(functional())
    sam_dots, sam_instructions, sam_temporary = counts(sam)
    assert plain_dots == 5  # two forward, three backward
    assert (sam_dots, dots) == (10, 9)  # less the logits of the perturbed params
    assert instructions < sam_instructions
    assert temporary <= sam_temporary + 16 * 4 * 4 + 64


# --- errors ---


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda p, batch: None, "got None; does it lack a return statement"),
        (lambda p, batch: (), r"got \(\)"),
        (
            lambda p, batch: {"logits": model(p, batch), "best": jnp.argmax(model(p, batch), 1)},
            r"the output\['best'\] of model_fn has dtype int32, .* has_aux=True",
        ),
    ],
)
def test_outputs_that_no_loss_can_be_differentiated_by(outputs, message):
    fn = ms.functional_sam_value_and_grad(outputs, cross_entropy, metric=ms.monge(), rho=RHO)
    with pytest.raises(TypeError, match=message):
        fn(start(), BATCH)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": -1.0}, ValueError, "rho must be"),
        ({"rho": optax.constant_schedule(0.1)}, TypeError, "a schedule needs"),
        ({"metric": ms.monge}, TypeError, "metric must be a Metric"),
        ({"mask": False}, ValueError, "leaves nothing to perturb"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        ms.functional_sam_value_and_grad(
            model, cross_entropy, **{"metric": ms.monge(), "rho": RHO, **options}
        )
