"""Optimizer states that lie on the mesh as the params do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from trajectories import make_mesh, spread

import monge_sam_jax as ms

pytestmark = pytest.mark.usefixtures("on_cpu")

# A shape says which param it is of, also beside adafactor's sums over rows and columns.
SPECS = {"layer": {"w": P("data", "model"), "b": P("model")}, "table": P(None, "data"), "t": P()}


def loss(params, batch):
    hidden = jnp.tanh(batch @ params["layer"]["w"])[:, :8] + params["layer"]["b"].reshape(1, -1)
    return jnp.mean((params["t"] * hidden) ** 2) + jnp.mean(jnp.cos(params["table"]))


def sharded_params(axis_type=AxisType.Auto):
    rng = np.random.default_rng(0)
    params = {
        "layer": {"w": rng.normal(size=(16, 32)), "b": rng.normal(size=8)},
        "table": rng.normal(size=(3, 4)),
        "t": np.array(1.5),
    }
    return spread(make_mesh(axis_type, data=4, model=2), jax.tree.map(np.float32, params), SPECS)


def label(params):
    return {"layer": {"w": "matrix", "b": "rest"}, "table": "matrix", "t": "rest"}


def with_memory():
    """A metric with a state of its own: a mean of past gradients, and a count."""

    def init(params):
        return {"mean": jax.tree.map(jnp.zeros_like, params), "count": jnp.zeros((), jnp.int32)}

    def ascent(grads, params, state):
        mean = jax.tree.map(lambda m, g: 0.5 * (m + g), state["mean"], grads)
        result, _ = ms.monge().ascent(mean, params, ())
        return result, {"mean": mean, "count": state["count"] + 1}

    return ms.Metric(init, ascent)


def monge_and(*rest):
    return optax.chain(ms.monge_sam(jax.grad(loss), rho=0.1), *rest)


def injected(rho, learning_rate):
    return optax.chain(ms.monge_sam(jax.grad(loss), rho=rho), optax.adam(learning_rate))


# The optimizer, and how many of its leaves are sharded: three for each copy of the params.
OPTIMIZERS = {
    "momentum": (monge_and(optax.sgd(0.1, momentum=0.9)), 3),
    "adam": (monge_and(optax.adam(0.1)), 6),
    "metric's state": (
        optax.chain(ms.sharpness_aware(jax.grad(loss), metric=with_memory()), optax.sgd(0.1)),
        3,
    ),
    "inject_hyperparams": (
        optax.inject_hyperparams(injected)(rho=0.05, learning_rate=0.1),
        6,
    ),
    "MultiSteps": (monge_and(optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()), 9),
    "multi_transform": (
        monge_and(
            optax.multi_transform({"matrix": optax.adam(0.1), "rest": optax.sgd(0.1)}, label)
        ),
        4,
    ),
    "masked": (
        monge_and(optax.masked(optax.adam(0.1), {"layer": True, "table": False, "t": False})),
        4,
    ),
    "adafactor": (monge_and(optax.adafactor(0.1, min_dim_size_to_factor=16, momentum=0.9)), 5),
    "schedule_free": (optax.contrib.schedule_free(monge_and(optax.sgd(0.1)), 0.1), 3),
    "flatten": (optax.flatten(optax.adam(0.1)), 0),
}


@pytest.mark.parametrize(("tx", "number"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_states_are_sharded_as_the_params(tx, number):
    params = sharded_params()
    state, expected = ms.init_sharded(tx, params), tx.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    by_shape = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(params)}
    everywhere = NamedSharding(params["t"].sharding.mesh, P())
    for leaf, value in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding == by_shape.get(leaf.shape, everywhere)
        assert (leaf.dtype, leaf.weak_type) == (value.dtype, value.weak_type)
        np.testing.assert_array_equal(leaf, value)
    assert sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state)) == number


def test_jit_of_init_loses_them():
    params, (tx, _) = sharded_params(), OPTIMIZERS["momentum"]
    trace = optax.tree.get(jax.jit(tx.init)(params), "trace")
    assert trace["layer"]["w"].sharding != params["layer"]["w"].sharding
    trace = optax.tree.get(ms.init_sharded(tx, params), "trace")
    assert trace["layer"]["w"].sharding == params["layer"]["w"].sharding


@pytest.mark.parametrize("name", ["inject_hyperparams", "MultiSteps", "multi_transform"])
def test_a_donating_step_keeps_them(name):
    params, (tx, _) = sharded_params(), OPTIMIZERS[name]
    state = ms.init_sharded(tx, params)
    batch = spread(params["t"].sharding.mesh, np.ones((32, 16), np.float32), P("data"))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, state))

    def step(params, state, batch):
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(3):
        before = jax.tree.leaves((params, state))
        params, state = jitted(params, state, batch)
        assert all(x.is_deleted() for x in before if not x.sharding.is_fully_replicated)
        assert jax.tree.map(lambda leaf: leaf.sharding, (params, state)) == shardings
    assert jitted._cache_size() == 1


def test_explicit_axes():
    params, (tx, _) = sharded_params(AxisType.Explicit), OPTIMIZERS["adam"]
    state = ms.init_sharded(tx, params)
    for moment in ("mu", "nu"):
        assert jax.tree.map(jax.typeof, optax.tree.get(state, moment)) == jax.tree.map(
            jax.typeof, params
        )


def test_params_that_are_not_on_a_mesh():
    with pytest.raises(ValueError, match=r"params\['a'\] is not on a mesh.*jax\.device_put"):
        ms.init_sharded(optax.sgd(0.1), {"a": jnp.ones(2)})
    assert jax.tree.leaves(ms.init_sharded(optax.sgd(0.1, momentum=0.9), {})) == []
