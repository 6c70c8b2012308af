"""One step on eight devices: pmap, shard_map, and jit with sharded arrays."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from reference import CASES, example_batch, example_params, network_loss

import monge_sam_jax as ms

STEPS = 5
NAMES = ["sam", "monge_sam", "adaptive_sam", "fisher_sam"]


@pytest.fixture(params=NAMES)
def case(request):
    return CASES[request.param]


@pytest.fixture(params=[(name, 1.0) for name in NAMES] + [("monge_sam", 0.1), ("monge_sam", 30.0)])
def scaled_case(request):
    """A case and a gradient; at several scales for Monge, where a sum for a mean would show."""
    name, scale = request.param
    return CASES[name], jax.grad(lambda params, batch: scale * network_loss(params, batch))


def devices():
    return jax.local_devices(backend="cpu")[:8]


def mesh(**kwargs):
    return jax.sharding.Mesh(np.array(devices()), ("data",), **kwargs)


def optimizer(case, grad_fn, **options):
    return optax.chain(
        case.builder(grad_fn, rho=0.1, **case.options, **options), optax.sgd(1e-3, momentum=0.9)
    )


def step(tx, grad_fn, params, state, batch):
    updates, state = tx.update(grad_fn(params, batch), state, params, batch=batch)
    return optax.apply_updates(params, updates), state


def on_one_device(case, grad_fn, **options):
    tx, batch = optimizer(case, grad_fn, **options), example_batch(32)
    update = jax.jit(lambda p, s: step(tx, grad_fn, p, s, batch))
    params = example_params()
    state = tx.init(params)
    for _ in range(STEPS):
        params, state = update(params, state)
    return params


def each_its_own(case, grad_fn):
    """m-sharpness by hand: every eighth of the batch perturbs for itself."""
    metric, tail = case.metric(**case.options), optax.sgd(1e-3, momentum=0.9)
    parts = jax.tree.map(lambda x: x.reshape(8, 4, -1), example_batch(32))
    params = example_params()
    state = tail.init(params)

    def robust(params, batch):
        first = grad_fn(params, batch)
        delta = ms.worst_case_perturbation(metric, first, params, 0.1)
        return grad_fn(jax.tree.map(jnp.add, params, delta), batch), optax.tree.norm(first)

    for _ in range(STEPS):
        grads, norms = jax.vmap(robust, in_axes=(None, 0))(params, parts)
        mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), grads)
        updates, state = tail.update(mean, state, params)
        params = optax.apply_updates(params, updates)
    return params, jnp.mean(norms)


def with_pmap(tx, grad_fn):
    batch = jax.tree.map(lambda x: x.reshape(8, 4, -1), example_batch(32))
    params = jax.tree.map(lambda x: jnp.stack([x] * 8), example_params())
    state = jax.vmap(tx.init)(params)
    update = jax.pmap(
        lambda p, s, b: step(tx, grad_fn, p, s, b), axis_name="data", devices=devices()
    )
    for _ in range(STEPS):
        params, state = update(params, state, batch)
    first = lambda x: np.asarray(x)[0]  # noqa: E731
    for leaf in jax.tree.leaves((params, state)):
        np.testing.assert_array_equal(leaf, np.broadcast_to(first(leaf), leaf.shape))
    return jax.tree.map(first, (params, state))


def vary(params):
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(params, "data", to="varying")
    return jax.lax.pvary(params, "data")


def with_shard_map(tx, grad_fn, check_vma):
    def update(params, state, batch):
        local = vary(params) if check_vma else params
        updates, state = tx.update(grad_fn(local, batch), state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    sharded = jax.jit(
        jax.shard_map(
            update,
            mesh=mesh(),
            in_specs=(P(), P(), P("data")),
            out_specs=(P(), P()),
            check_vma=check_vma,
        )
    )
    params = example_params()
    state = tx.init(params)
    for _ in range(STEPS):
        params, state = sharded(params, state, example_batch(32))
    return params, state


RUNNERS = {
    "pmap": with_pmap,
    "shard_map": lambda tx, grad_fn: with_shard_map(tx, grad_fn, check_vma=True),
    "shard_map unchecked": lambda tx, grad_fn: with_shard_map(tx, grad_fn, check_vma=False),
}


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("options", [{}, {"period": 2}], ids=["", "period"])
def test_synchronised_perturbation_equals_one_device(scaled_case, runner, options):
    case, grad_fn = scaled_case
    expected = on_one_device(case, grad_fn, **options)
    tx = optimizer(case, grad_fn, axis_name="data", **options)
    actual, _ = RUNNERS[runner](tx, grad_fn)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("runner", RUNNERS)
def test_each_device_its_own_perturbation(scaled_case, runner):
    case, grad_fn = scaled_case
    expected, mean_norm = each_its_own(case, grad_fn)
    tx = optimizer(case, grad_fn, axis_name="data", sync_perturbation=False)
    actual, state = RUNNERS[runner](tx, grad_fn)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)
    norm = float(ms.get_diagnostics(state).grad_norm)
    assert norm == pytest.approx(float(mean_norm), rel=1e-4)


@pytest.mark.parametrize("sync", [True, False])
def test_functional_form_over_an_axis(case, sync):
    fn = ms.sharpness_aware_value_and_grad(
        network_loss,
        metric=case.metric(**case.options),
        rho=0.1,
        axis_name="data",
        sync_perturbation=sync,
        diagnostics=True,
    )
    tx = optimizer(case, jax.grad(network_loss), axis_name="data", sync_perturbation=sync)
    batch = jax.tree.map(lambda x: x.reshape(8, 4, -1), example_batch(32))
    params = example_params()
    update = lambda b: tx.update(  # noqa: E731
        jax.grad(network_loss)(params, b), tx.init(params), params, batch=b
    )
    functional = lambda b: fn(params, b)[1:]  # noqa: E731
    grads, diagnostics = jax.vmap(functional, axis_name="data")(batch)
    updates, state = jax.vmap(update, axis_name="data")(batch)
    expected = jax.tree.map(lambda g: -1e-3 * g, grads)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-8)
    chex.assert_trees_all_close(diagnostics, ms.get_diagnostics(state), rtol=1e-5)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("params_spec", ["replicated", "sharded"])
def test_jit_with_sharded_arrays_equals_one_device(case, explicit, params_spec):
    """Data parallel and with sharded params; auto and explicit axes: nothing to configure."""
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    the_mesh = mesh(axis_types=(kind,))

    def spread(x):
        sharded = params_spec == "sharded" and x.ndim and x.shape[0] % 8 == 0
        return jax.device_put(x, NamedSharding(the_mesh, P("data") if sharded else P()))

    params = {"w": jnp.outer(jnp.arange(16.0), jnp.ones(2)) / 16 - 0.5, "b": jnp.zeros((1, 2))}
    batch = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(32, 16)), jnp.float32)}

    def loss(params, batch):
        hidden = jnp.einsum("ni,ij->nj", batch["x"], params["w"]) + params["b"]
        return jnp.mean(jnp.tanh(hidden) ** 2)

    tx = optimizer(case, jax.grad(loss))
    update = jax.jit(lambda p, s, b: step(tx, jax.grad(loss), p, s, b))
    expected = (params, tx.init(params))
    for _ in range(STEPS):
        expected = update(*expected, batch)

    with jax.set_mesh(the_mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(the_mesh):
        placed = jax.tree.map(spread, params)
        actual = (placed, tx.init(placed))
        split = jax.device_put(batch, NamedSharding(the_mesh, P("data")))
        for _ in range(STEPS):
            actual = update(*actual, split)
    chex.assert_trees_all_close(
        jax.device_get(actual), jax.device_get(expected), rtol=1e-5, atol=1e-6
    )


def trace_shard_map(function, params, batch, state):
    in_specs, out_specs = (P(), P("data"), P()), (P(), P())
    mapped = jax.shard_map(function, mesh=mesh(), in_specs=in_specs, out_specs=out_specs)
    return jax.eval_shape(mapped, params, batch, state)


def summed_by_shard_map(params, batch, tx, state):
    grads = jax.grad(network_loss)(params, batch)  # of replicated params: summed over devices
    return tx.update(grads, state, params, batch=batch)


@pytest.mark.parametrize("sync", [True, False])
def test_a_gradient_summed_by_shard_map_is_an_error_that_names_pcast(case, sync):
    tx = optimizer(case, jax.grad(network_loss), axis_name="data", sync_perturbation=sync)
    params = example_params()
    with pytest.raises(ValueError, match=r"does not vary over 'data'.*pcast\(params, 'data'"):
        trace_shard_map(
            lambda p, b, s: summed_by_shard_map(p, b, tx, s),
            params,
            example_batch(32),
            tx.init(params),
        )


def test_a_second_gradient_that_was_averaged_is_an_error(case):
    averaged = lambda p, batch: jax.lax.pmean(jax.grad(network_loss)(p, batch), "data")  # noqa: E731
    tx = optimizer(case, averaged, axis_name="data")

    def update(params, batch, state):
        grads = jax.grad(network_loss)(vary(params), batch)
        return tx.update(grads, state, params, batch=batch)

    params = example_params()
    with pytest.raises(ValueError, match=r"grad_fn returned.* does not vary over 'data'"):
        trace_shard_map(update, params, example_batch(32), tx.init(params))
