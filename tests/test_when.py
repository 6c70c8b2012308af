"""When to perturb: the steps that do not cost one gradient, in every form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from reference import CASES, example_batch, example_params, flat, network_grad, network_loss
from trajectories import make_mesh, vary

import monge_sam_jax as ms
from monge_sam_jax import nnx as ms_nnx
from monge_sam_jax.linen import make_train_step

BATCH = example_batch()
RHO = 0.3


def late(count):
    return count >= 3


@pytest.mark.parametrize("name", CASES)
def test_a_chain_that_perturbs_late(name):
    """Against a loop by hand; the diagnostics are those of the last perturbation."""
    case = CASES[name]
    tx = optax.chain(case.builder(network_grad, rho=RHO, when=late, **case.options), optax.sgd(0.1))
    update = jax.jit(tx.update)
    params = expected = example_params()
    state = tx.init(params)
    for t in range(5):
        g = network_grad(params, BATCH)
        updates, state = update(g, state, params, batch=BATCH)
        params = optax.apply_updates(params, updates)
        assert (float(ms.get_diagnostics(state).perturbation_norm) > 0) == (t >= 3)
        g = network_grad(expected, BATCH)
        if t >= 3:
            metric = case.metric(**case.options)
            delta = ms.worst_case_perturbation(metric, g, expected, RHO)
            g = network_grad(jax.tree.map(jnp.add, expected, delta), BATCH)
        expected = jax.tree.map(lambda p, g: p - 0.1 * g, expected, g)
        np.testing.assert_allclose(flat(params), flat(expected), rtol=1e-4, atol=1e-6)
    assert update._cache_size() == 1


def test_a_period_is_the_same_as_a_function():
    results = []
    for options in ({"period": 3}, {"when": lambda count: count % 3 == 0}):
        tx = optax.chain(ms.monge_sam(network_grad, rho=RHO, **options), optax.sgd(0.1))
        params = example_params()
        state = tx.init(params)
        for _ in range(5):
            g = network_grad(params, BATCH)
            updates, state = tx.update(g, state, params, batch=BATCH)
            params = optax.apply_updates(params, updates)
        results.append(flat((params, ms.get_diagnostics(state))))
    np.testing.assert_array_equal(*results)


def test_the_other_steps_take_no_second_gradient():
    calls = []

    def grad_fn(p):
        jax.debug.callback(lambda: calls.append(1))
        return jax.tree.map(lambda x: 2 * x, p)

    params = {"a": jnp.ones(2)}
    tx = ms.sam(grad_fn, when=late)
    state = tx.init(params)
    for _ in range(5):
        _, state = jax.jit(tx.update)(params, state, params)
    fn = jax.jit(
        lambda p, when: ms.sharpness_aware_value_and_grad(
            lambda p: jnp.sum(p["a"] ** 2), metric=ms.monge(), rho=RHO, when=when
        )(p)
    )
    jax.effects_barrier()
    assert len(calls) == 2
    plain = jax.value_and_grad(lambda p: jnp.sum(p["a"] ** 2))(params)
    for a, b in zip(jax.tree.leaves(fn(params, False)), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("measure", [False, True])
def test_the_functional_form(traced, measure):
    params = example_params()

    def run(when):
        fn = ms.sharpness_aware_value_and_grad(
            network_loss,
            metric=ms.monge(),
            rho=RHO,
            when=when,
            diagnostics=True,
            measure=measure,
        )
        return fn(params, BATCH)

    run = jax.jit(run) if traced else run
    for when in (True, False):
        value, grads, seen = run(when)
        first = network_grad(params, BATCH)
        delta = ms.worst_case_perturbation(ms.monge(), first, params, RHO if when else 0.0)
        expected = network_grad(jax.tree.map(jnp.add, params, delta), BATCH)
        np.testing.assert_allclose(value, network_loss(params, BATCH), rtol=1e-6)
        np.testing.assert_allclose(flat(grads), flat(expected), rtol=1e-5, atol=1e-7)
        assert np.any(flat(seen)) == when


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
def test_one_pass(direction):
    """Before it perturbs, y is theta; the gradient of update t is taken as when(t) says."""
    base = optax.sgd(0.1, momentum=0.9)
    tx = ms.one_pass_sam(base, rho=RHO, direction=direction, when=late)
    update = jax.jit(tx.update)
    y = theta = example_params()
    state, base_state = tx.init(y), base.init(theta)
    for t in range(1, 6):
        g = network_grad(y, BATCH)
        updates, state = update(g, state, y)
        y = optax.apply_updates(y, updates)
        u, base_state = base.update(g, base_state, theta)
        theta = optax.apply_updates(theta, u)
        ahead = g if direction == "gradient" else base_state[0].trace
        delta = ms.worst_case_perturbation(ms.monge(), ahead, theta, RHO if late(t) else 0.0)
        expected = jax.tree.map(jnp.add, theta, delta)
        np.testing.assert_allclose(flat(y), flat(expected), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(flat(ms.unperturbed_params(state, y)), flat(theta), rtol=1e-4)
        if not late(t):
            np.testing.assert_array_equal(flat(ms.unperturbed_params(state, y)), flat(y))


def test_flax_linen():
    """With a metric in the step, and with the transformation in the chain."""
    model, batch = nn.Dense(2), {"x": BATCH["x"], "y": BATCH["y"]}
    params = model.init(jax.random.key(0), batch["x"])["params"]

    def loss(params):
        return jnp.mean((model.apply({"params": params}, batch["x"]) - batch["y"]) ** 2)

    def loss_fn(variables, batch, rngs):
        del batch, rngs
        return loss(variables["params"]), ({}, {})

    sgd = optax.sgd(0.1)
    steps = {
        "step": (sgd, {"metric": ms.monge(), "rho": RHO, "when": late}),
        "chain": (optax.chain(ms.monge_sam(rho=RHO, when=late), sgd), {}),
    }
    for tx, options in steps.values():
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        step = jax.jit(make_train_step(loss_fn, **options))
        expected = params
        for t in range(5):
            state, _, _ = step(state, batch)
            g = jax.grad(loss)(expected)
            delta = ms.worst_case_perturbation(ms.monge(), g, expected, RHO if late(t) else 0.0)
            g = jax.grad(loss)(jax.tree.map(jnp.add, expected, delta))
            expected = jax.tree.map(lambda p, g: p - 0.1 * g, expected, g)
        np.testing.assert_allclose(flat(state.params), flat(expected), rtol=1e-4, atol=1e-6)


def test_flax_nnx():
    def loss(model):
        return jnp.mean((model(BATCH["x"]) - BATCH["y"]) ** 2)

    @nnx.jit
    def run(model, when):
        fn = ms_nnx.sharpness_aware_value_and_grad(loss, metric=ms.monge(), rho=RHO, when=when)
        return fn(model)

    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    value = jax.grad(lambda params: loss(nnx.merge(graphdef, params)))
    for when in (True, False):
        _, grads = run(model, jnp.asarray(when))
        first = value(params)
        delta = ms.worst_case_perturbation(ms.monge(), first, params, RHO if when else 0.0)
        expected = value(jax.tree.map(jnp.add, params, delta))
        np.testing.assert_allclose(flat(grads), flat(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("when", [False, True])
def test_over_devices(when, traced):
    """A mean over them, or for a gradient that was summed already an error, also unperturbed."""
    mesh, params = make_mesh(AxisType.Auto, data=4), jnp.array([1.0, 2.0])
    batch = jnp.arange(16.0).reshape(8, 2) / 10

    def loss(params, batch):
        return jnp.mean((batch @ params) ** 2)

    def run(vary_params):
        def on_device(params, batch, now):
            fn = ms.sharpness_aware_value_and_grad(
                loss, metric=ms.monge(), rho=RHO, axis_name="data", when=now if traced else when
            )
            return fn(vary(params) if vary_params else params, batch)[1]

        specs = (P(), P("data"), P())
        mapped = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=P())
        return jax.jit(mapped)(params, batch, jnp.asarray(when))

    g = jax.grad(loss)(params, batch)
    delta = ms.worst_case_perturbation(ms.monge(), g, params, RHO if when else 0.0)
    np.testing.assert_allclose(run(True), jax.grad(loss)(params + delta, batch), rtol=1e-5)
    with pytest.raises(ValueError, match=r"does not vary over 'data'.*summed"):
        run(False)


def test_inject_hyperparams_takes_it_for_no_schedule():
    tx = optax.inject_hyperparams(ms.sam)(lambda p: 2 * p, rho=0.5, when=late)
    params = jnp.array([3.0, 4.0])
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(2 * params, state, params)
    np.testing.assert_allclose(updates, 2 * params * 1.1, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"when": 5}, TypeError, "when must be a function of the count, or a rule"),
        ({"when": late, "period": 5}, ValueError, "both say when to perturb"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        ms.monge_sam(network_grad, **options)
    if "period" not in options:
        with pytest.raises(error, match=message):
            ms.one_pass_sam(optax.sgd(0.1), **options)
        with pytest.raises(error, match=message):
            make_train_step(lambda *_: 0, metric=ms.monge(), **options)


def test_a_part_of_the_batch_is_for_the_perturbation_alone():
    with pytest.raises(ValueError, match=r"gradient of a part of the batch.*leave when out"):
        ms.sharpness_aware_value_and_grad(
            network_loss, metric=ms.monge(), rho=RHO, ascent_batch_fraction=0.5, when=False
        )
