"""Twenty steps on eight devices: jit with sharded arrays, `per_shard`, shard_map and pmap."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from trajectories import (
    NAMES,
    RHO,
    assert_chain,
    assert_functional_form,
    batch_of,
    chain,
    cpu_devices,
    follow,
    functional_form,
    initial_params,
    loss,
    make_mesh,
    map_over_shards,
    spread,
    start,
    step_per_shard,
    step_with_both,
    step_with_chain,
    use_mesh,
    vary,
)

import monge_sam_jax as ms

pytestmark = pytest.mark.usefixtures("on_cpu")

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit

# Sizes of the mesh's axes, and how the params lie on them.
DATA, DATA_AND_MODEL = {"data": 8}, {"data": 4, "model": 2}
REPLICATED = {"bias": P(), "temperature": P(), "weights": P()}
LAYOUTS = {
    "replicated": (DATA, REPLICATED),
    "fully sharded": (DATA, REPLICATED | {"bias": P("data"), "weights": P(None, "data")}),
    "two axes": (
        DATA_AND_MODEL,
        REPLICATED | {"bias": P(("data", "model")), "weights": P("data", "model")},
    ),
}
# With explicit axes, JAX takes a loss only where they say by themselves how each result is sharded.
EXPLICIT_LAYOUTS = {
    "replicated": (DATA, REPLICATED),
    "fully sharded": (DATA, REPLICATED | {"weights": P("data")}),
    "two axes": (DATA_AND_MODEL, REPLICATED | {"bias": P("model"), "weights": P("data", "model")}),
}
QUICK_PLACES = [("fully sharded", AUTO), ("two axes", EXPLICIT)]
PLACES = [
    pytest.param(
        *(*layout, kind),
        id=f"{name}, {kind.name}",
        marks=() if (name, kind) in QUICK_PLACES else pytest.mark.slow,
    )
    for kind, layouts in [(AUTO, LAYOUTS), (EXPLICIT, EXPLICIT_LAYOUTS)]
    for name, layout in layouts.items()
]


def place(axes, specs, kind):
    """A mesh, the runs on it, and a function that places a batch there."""
    mesh, params = make_mesh(kind, **axes), initial_params()
    if kind == EXPLICIT:  # JAX writes specs of explicit axes in full, and compiles anew for others
        specs = {k: P(*spec, *[None] * (params[k].ndim - len(spec))) for k, spec in specs.items()}
    runs = start(spread(mesh, params, specs), ms.init_sharded)
    return mesh, runs, lambda batch: spread(mesh, batch, P("data"))


@pytest.mark.parametrize(("axes", "specs", "kind"), PLACES)
def test_jit_with_sharded_arrays_equals_one_device(axes, specs, kind):
    """Nothing to configure."""
    mesh, runs, place_batch = place(axes, specs, kind)
    step = jax.jit(lambda *args: step_with_both(*args))
    with use_mesh(mesh):
        ends = follow(step, runs, place_batch)
    assert_chain(ends, shards=1)
    assert_functional_form(ends, shards=1)
    assert step._cache_size() == 1


@pytest.mark.parametrize(("axes", "specs", "kind"), PLACES)
def test_per_shard_equals_a_loop_over_shards(axes, specs, kind):
    mesh, runs, place_batch = place(axes, specs, kind)
    step = jax.jit(functools.partial(step_per_shard, params_specs=specs))
    with use_mesh(mesh):
        ends = follow(step, runs, place_batch)
    assert_functional_form(ends, shards=axes["data"])
    assert step._cache_size() == 1


def shard_mapped(step, check_vma, **options):
    mesh, runs, place_batch = place(DATA, REPLICATED, AUTO)
    return jax.jit(map_over_shards(step, mesh, check_vma, **options)), runs, place_batch


def vmapped(step, **options):
    """The same on one device; what comes out is known to be equal everywhere."""
    mapped = jax.vmap(
        functools.partial(step, **options), (None, 0, None), out_axes=None, axis_name="data"
    )
    return jax.jit(mapped), start(initial_params(), lambda tx, params: tx.init(params)), split


def pmapped(step, **options):
    devices = cpu_devices(8)
    runs = start(initial_params(), lambda tx, params: tx.init(params))
    copy = jax.pmap(lambda runs, _: runs, axis_name="data", in_axes=(None, 0), devices=devices)
    mapped = jax.pmap(
        functools.partial(step, **options),
        axis_name="data",
        in_axes=(0, 0, None),
        devices=devices,
    )
    return mapped, copy(runs, jnp.arange(8)), split


def split(batch):
    return jax.tree.map(lambda x: x.reshape(8, 4, *x.shape[1:]), batch)


def fetch_equal(tree):
    """What all devices have in common."""
    tree = jax.device_get(tree)
    first = jax.tree.map(lambda x: x[0], tree)
    chex.assert_trees_all_equal(tree, jax.tree.map(lambda x: np.stack([x] * 8), first))
    return first


# A step -> the step on every device, runs, what places a batch, and what fetches runs.
MAPPED = {
    "shard_map": lambda step, **options: (*shard_mapped(step, True, **options), jax.device_get),
    "unchecked": lambda step, **options: (*shard_mapped(step, False, **options), jax.device_get),
    "vmap": lambda step, **options: (*vmapped(step, **options), jax.device_get),
    "pmap": lambda step, **options: (*pmapped(step, **options), fetch_equal),
}


@pytest.mark.parametrize(
    ("mapped", "sync"),
    [
        pytest.param(mapped, sync, marks=() if mapped == "shard_map" or quick else pytest.mark.slow)
        for mapped in MAPPED
        for sync, quick in [(True, mapped == "pmap"), (False, mapped == "vmap")]
    ],
)
def test_named_axis(mapped, sync):
    """One perturbation is that of one device; otherwise every shard has its own."""
    step, runs, place_batch, fetch = MAPPED[mapped](
        step_with_both, axis_name="data", sync_perturbation=sync
    )
    ends = follow(step, runs, place_batch, fetch)
    assert_chain(ends, shards=1 if sync else 8)
    assert_functional_form(ends, shards=1 if sync else 8)


@pytest.mark.parametrize("mapped", MAPPED)
def test_period_over_a_named_axis(mapped):
    step, runs, place_batch, fetch = MAPPED[mapped](step_with_chain, axis_name="data", period=2)
    ends = follow(step, {"monge_sam": runs["monge_sam"]}, place_batch, fetch)
    assert_chain(ends, shards=1, period=2)


def weighted_loss(params, batch, offset, *, weight):
    """A loss of samples along axis 1, with auxiliary output of all kinds."""
    value = jnp.mean(weight * (params["a"] * (params["b"] @ batch["x"]) - offset) ** 2)
    aux = {"mean": jnp.mean(batch["x"], axis=1), "count": jnp.sum(weight > 1), "number": 3}
    return value, aux | {"any": jnp.any(weight > 1.9), "offset": offset}


def test_per_shard_averages_all_that_is_returned():
    """Arguments divided and whole, by position and by name; aux, diagnostics and derivatives."""
    mesh, rng = make_mesh(AUTO, data=4, model=2), np.random.default_rng(0)
    specs = {"a": P(), "b": P(("data", "model"))}
    params = {"a": np.float32(1.5), "b": rng.normal(size=8).astype(np.float32)}
    x = rng.normal(size=(8, 32)).astype(np.float32)
    weight, offset = np.linspace(0, 2, 32, dtype=np.float32), np.float32(0.5)

    def fn(rho):
        return ms.sharpness_aware_value_and_grad(
            weighted_loss, metric=ms.monge(), rho=rho, has_aux=True, diagnostics=True
        )

    def over_shards(params, rho):
        mean = ms.per_shard(fn(rho), "data", axis=(-1, None), params_specs=specs, mesh=mesh)
        return mean(params, {"x": x}, offset, weight=weight)

    def by_vmap(params, rho):
        pieces = {"x": x.reshape(8, 4, 8).swapaxes(0, 1)}, weight.reshape(4, 8)
        each = lambda batch, weight: fn(rho)(params, batch, offset, weight=weight)  # noqa: E731
        return jax.tree.map(lambda xs: jnp.mean(xs, axis=0), jax.vmap(each)(*pieces))

    def with_derivatives(mean):
        def scalar(params, rho):
            output = mean(params, rho)
            return jnp.sum(jnp.sin(output[1]["b"])) * output[1]["a"], output

        return jax.jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))

    actual = with_derivatives(over_shards)(spread(mesh, params, specs), 0.1)
    assert "data" in str(actual[1][1]["b"].sharding.spec)
    expected = with_derivatives(by_vmap)(params, 0.1)
    chex.assert_trees_all_close(*jax.device_get((actual, expected)), rtol=1e-5, atol=1e-6)


def test_per_shard_takes_a_loss_with_a_loop():
    """A loop that starts from zeros, which `shard_map` refuses as long as it checks what varies."""

    def recurrent(params, batch):
        last, _ = jax.lax.scan(lambda h, x: (jnp.tanh(params * h + x), None), jnp.zeros(()), batch)
        return last**2

    mesh, batch = make_mesh(AUTO, data=8), np.linspace(0, 1, 16, dtype=np.float32)
    fn = ms.sharpness_aware_value_and_grad(recurrent, metric=ms.monge(), rho=0.1)
    actual = jax.jit(ms.per_shard(fn, "data", mesh=mesh))(1.0, batch)
    expected = jax.jit(jax.vmap(fn, (None, 0)))(1.0, batch.reshape(8, 2))
    np.testing.assert_allclose(actual, np.mean(expected, axis=1), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"axis": None}, TypeError, "axis must be an integer, or one or None for each.* got None"),
        ({"axis": (0, 1)}, ValueError, "one axis for each of the 1 positional.*(0, 1)"),
        ({"axis": 1}, ValueError, r"shape \(16,\) has no axis 1 to divide.*axis=\(0, None\)"),
        ({"params_specs": {"v": P()}}, ValueError, "params_specs must be a tree that is a prefix"),
        ({"params_specs": {"w": 0}}, TypeError, r"such as x\.sharding\.spec, got 0"),
        (
            {"fn": jax.grad(lambda params, batch: jnp.sum(params["w"] * batch))},
            TypeError,
            "got dict",
        ),
        ({"axis_name": "rows"}, ValueError, "rows"),
        ({"batch": np.ones(15, np.float32)}, ValueError, "evenly divisible"),
    ],
)
def test_per_shard_says_what_is_wrong(options, error, message):
    options = {
        "fn": jax.value_and_grad(lambda params, batch: jnp.sum(params["w"] * batch)),
        "batch": np.ones(16, np.float32),
        "axis_name": "data",
        "mesh": make_mesh(AUTO, data=8),
    } | options
    fn, batch = options.pop("fn"), options.pop("batch")
    with pytest.raises(error, match=message):
        jax.eval_shape(ms.per_shard(fn, **options), {"w": jnp.ones(())}, batch)


def test_more_shards_have_longer_gradients():
    """The mean of norms is no less than the norm of the mean; so Monge's perturbation shrinks."""
    metrics = {"sam": ms.euclidean(), "monge_sam": ms.monge()}
    norms = {name: [] for name in metrics}
    for shards in (1, 2, 4, 8):
        mesh = Mesh(np.array(cpu_devices(shards)), ("data",))

        def diagnostics(params, batch, mesh=mesh):
            return {
                name: ms.per_shard(functional_form(name), "data", mesh=mesh)(params, batch)[2]
                for name in metrics
            }

        found = jax.jit(diagnostics)(initial_params(), batch_of(1.0))
        for name in metrics:
            norms[name].append((found[name].grad_norm, found[name].perturbation_norm))
    for name in metrics:
        grad_norm, perturbation_norm = np.array(norms[name]).T
        assert np.all(np.diff(grad_norm) > 0.01)
        if name == "sam":
            np.testing.assert_allclose(perturbation_norm, RHO, rtol=1e-5)
        else:
            assert np.all(np.diff(perturbation_norm) < -0.005 * RHO)


def trace_shard_map(function, params, batch, state):
    in_specs, out_specs = (P(), P("data"), P()), (P(), P())
    mapped = jax.shard_map(
        function, mesh=make_mesh(AUTO, data=8), in_specs=in_specs, out_specs=out_specs
    )
    return jax.eval_shape(mapped, params, batch, state)


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_summed_by_shard_map_is_an_error_that_names_pcast(name, sync):
    tx = chain(name, axis_name="data", sync_perturbation=sync)

    def update(params, batch, state):
        grads = jax.grad(loss)(params, batch)  # of replicated params: summed over devices
        return tx.update(grads, state, params, batch=batch)

    params = initial_params()
    with pytest.raises(ValueError, match=r"does not vary over 'data'.*pcast\(params, 'data'"):
        trace_shard_map(update, params, batch_of(1.0), tx.init(params))


def test_a_second_gradient_that_was_averaged_is_an_error():
    def averaged(params, batch):
        return jax.lax.pmean(jax.grad(loss)(params, batch), "data")

    tx = ms.monge_sam(averaged, axis_name="data")

    def update(params, batch, state):
        return tx.update(jax.grad(loss)(vary(params), batch), state, params, batch=batch)

    params = initial_params()
    with pytest.raises(ValueError, match=r"grad_fn returned.* does not vary over 'data'"):
        trace_shard_map(update, params, batch_of(1.0), tx.init(params))
