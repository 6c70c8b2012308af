"""What devices send each other in a step, counted in the compiled program."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from reference import CASES
from trajectories import NAMES, make_mesh, spread, vary

import monge_sam_jax as ms

pytestmark = pytest.mark.usefixtures("on_cpu")

WIDTH, DEVICES = 16, 8
KINDS = (
    "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|"
    "collective-broadcast"
)


class Collective(NamedTuple):
    """An instruction that moves data between devices, and the sizes of its results."""

    kind: str
    sizes: tuple[int, ...]

    @property
    def is_scalar(self):
        return all(size == 1 for size in self.sizes)


def collectives(step, *args):
    """Those of a jitted step."""
    found = []
    for line in jax.jit(step).lower(*args).compile().as_text().splitlines():
        if match := re.search(rf" = (.*?) ({KINDS})(-start)?\(", line):
            results, kind, is_asynchronous = match.groups()
            assert not is_asynchronous, "results would hold the operands too"
            shapes = re.findall(r"\w+\[([\d,]*)\]", results)
            sizes = [
                np.prod([int(n) for n in shape.split(",") if n], dtype=int) for shape in shapes
            ]
            found.append(Collective(kind, tuple(sorted(sizes))))
    return sorted(found)


def scalar_collectives(found):
    return [collective for collective in found if collective.is_scalar]


def scalars(found):
    return sum(collective.sizes.count(1) for collective in found)


def payload(found):
    """Sizes of all parts that are no scalars."""
    return sorted((c.kind, size) for c in found for size in c.sizes if size > 1)


def problem(layers, spec):
    """Params with two leaves a layer, and a batch, on eight devices."""
    rng = np.random.default_rng(0)
    params = [
        {"w": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32), "b": np.zeros(WIDTH, np.float32)}
        for _ in range(layers)
    ]
    mesh = make_mesh(AxisType.Auto, data=DEVICES)
    batch = spread(mesh, rng.normal(size=(64, WIDTH)).astype(np.float32), P("data"))
    return mesh, spread(mesh, params, spec), batch


def loss(params, batch):
    for layer in params:
        batch = jnp.tanh(batch @ layer["w"] + layer["b"].reshape(1, -1))
    return jnp.mean(batch**2)


def plain_step(params, batch):
    """Two gradients, without a norm in between."""
    first = jax.grad(loss)(params, batch)
    perturbed = jax.tree.map(lambda p, g: p + 0.05 * g, params, first)
    second = jax.grad(loss)(perturbed, batch)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, second)


def step_with(metric):
    tx = optax.chain(ms.sharpness_aware(jax.grad(loss), metric=metric), optax.sgd(0.1))

    def step(params, batch):
        updates, state = tx.update(
            jax.grad(loss)(params, batch), tx.init(params), params, batch=batch
        )
        return optax.apply_updates(params, updates), ms.get_diagnostics(state)

    return step


def metric_of(name):
    return CASES[name].metric(**CASES[name].options)


def test_data_parallel_steps_add_nothing():
    """Gradients are whole on every device, and so is all that follows from them."""
    _, params, batch = problem(layers=2, spec=P())
    plain = collectives(plain_step, params, batch)
    assert sum(size for _, size in payload(plain)) == 2 * 2 * (WIDTH**2 + WIDTH)  # the count counts
    for name in NAMES:
        assert collectives(step_with(metric_of(name)), params, batch) == plain, name


@pytest.fixture(scope="module")
def sharded_plain():
    _, params, batch = problem(layers=2, spec=P("data"))
    return collectives(plain_step, params, batch), params, batch


@pytest.mark.parametrize("name", NAMES)
def test_fully_sharded_steps_add_reductions_of_scalars(sharded_plain, name):
    """The largest entry and the sum of squares; ASAM's of T g, which needs the first, once more."""
    plain, params, batch = sharded_plain
    ours = collectives(step_with(metric_of(name)), params, batch)
    added = scalar_collectives(ours)
    assert scalars(plain) == 0
    assert {collective.kind for collective in added} == {"all-reduce"}
    assert len(added) <= (3 if name == "adaptive_sam" else 2)
    assert len(ours) == len(plain) + len(added)
    assert payload(ours) == payload(plain)


def test_fully_sharded_steps_over_many_leaves():
    """The number of reductions does not depend on the number of leaves; their scalars do."""
    counts, numbers = [], []
    for layers in (1, 3, 5):
        _, params, batch = problem(layers, spec=P("data"))
        ours = collectives(step_with(ms.monge()), params, batch)
        assert payload(ours) == payload(collectives(plain_step, params, batch))
        counts.append(len(scalar_collectives(ours)))
        numbers.append(scalars(ours))
    assert len(set(counts)) == 1
    assert np.diff(numbers, n=2) == 0
    assert numbers[-1] <= 5 * (2 * 5)


def test_a_metric_that_gathers_is_seen(sharded_plain):
    def ascent(grads, params, state):
        flat, unravel = ravel_pytree(grads)
        return ms.Ascent(unravel(flat / jnp.linalg.norm(flat)), jnp.linalg.norm(flat)), state

    plain, params, batch = sharded_plain
    ours = collectives(step_with(ms.Metric(lambda params: (), ascent)), params, batch)
    assert payload(ours) != payload(plain)


@pytest.mark.parametrize("sync", [True, False])
def test_named_axis_averages_two_gradients_or_one(sync):
    mesh, params, batch = problem(layers=2, spec=P())
    fn = ms.sharpness_aware_value_and_grad(
        loss, metric=ms.monge(), rho=0.1, axis_name="data", sync_perturbation=sync
    )
    step = jax.shard_map(
        lambda params, batch: fn(vary(params), batch)[1],
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    found = collectives(step, params, batch)
    leaves = [WIDTH, WIDTH**2] * 2
    assert payload(found) == sorted(("all-reduce", size) for size in leaves * (2 if sync else 1))
    assert scalars(found) == 0


def test_per_shard_averages_one_gradient():
    mesh, params, batch = problem(layers=2, spec=P())
    fn = ms.sharpness_aware_value_and_grad(loss, metric=ms.monge(), rho=0.1)
    found = collectives(ms.per_shard(fn, "data", mesh=mesh), params, batch)
    assert payload(found) == sorted(("all-reduce", size) for size in [WIDTH, WIDTH**2] * 2)
    assert scalars(found) == 1  # the value


def test_per_shard_gathers_sharded_params_once():
    mesh, params, batch = problem(layers=2, spec=P("data"))
    fn = ms.sharpness_aware_value_and_grad(loss, metric=ms.monge(), rho=0.1)
    found = collectives(ms.per_shard(fn, "data", params_specs=P("data"), mesh=mesh), params, batch)
    leaves = [WIDTH, WIDTH**2] * 2
    gathered = [("all-gather", size) for size in leaves]
    assert payload(found) == sorted(
        gathered + [("reduce-scatter", size // DEVICES) for size in leaves]
    )
    assert scalars(found) == 1
